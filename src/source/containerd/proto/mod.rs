//! The APIs of containerd for images, content and leases, generated from their definitions (`containerd/`, Apache License 2.0, of
//! `containerd/api` 1.12.0).
//!
//! `SOCINBD_TEST_GENERATE=1 cargo test --test it -- snapshotter::proto` generates them again; without the variable the test compares.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

/// The package `containerd.services`.
pub mod services {
    /// The package `containerd.services.content`.
    pub mod content {
        /// The package `containerd.services.content.v1`.
        pub mod v1 {
            include!("containerd.services.content.v1.rs");
        }
    }
    /// The package `containerd.services.images`.
    pub mod images {
        /// The package `containerd.services.images.v1`.
        pub mod v1 {
            include!("containerd.services.images.v1.rs");
        }
    }
    /// The package `containerd.services.leases`.
    pub mod leases {
        /// The package `containerd.services.leases.v1`.
        pub mod v1 {
            include!("containerd.services.leases.v1.rs");
        }
    }
}

/// The package `containerd.types`.
pub mod types {
    include!("containerd.types.rs");
}

pub use services::{content::v1 as content, images::v1 as images, leases::v1 as leases};
