//! The snapshots API of containerd, generated from its definitions (`containerd/`, Apache License 2.0, of `containerd/api` 1.12.0).
//!
//! `SOCINBD_TEST_GENERATE=1 cargo test --test it -- snapshotter::proto` generates it again; without the variable the test compares.

#![allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

/// The package `containerd.services`.
pub mod services {
    /// The package `containerd.services.snapshots`.
    pub mod snapshots {
        /// The package `containerd.services.snapshots.v1`.
        pub mod v1 {
            include!("containerd.services.snapshots.v1.rs");
        }
    }
}

/// The package `containerd.types`.
pub mod types {
    include!("containerd.types.rs");
}

pub use services::snapshots::v1 as snapshots;
