//! socinbd: OCI image layers as read-only block devices, fetched span by span as the kernel reads them.
//!
//! This library is not a stable interface: it exists for the program `socinbd` and for the tests, benchmarks and fuzzers of this package.
//! Any release may change or remove any item. The stable interface is the command line, with its exit statuses and its JSON output.
//!
//! Modules stand in levels; one uses only what stands below it (`tests/it/levels.rs` checks this):
//! 0 `units`, `error`, `versions` | 1 `oci`, `tar`, `ztoc`, `ext4::format`, `nbd::protocol`, `keeper::message` | 2 `gzip`, `compact`, `tree`, `ext4`, `soci` |
//! 3 `metrics`, `blocking`, `buffer`, `fair_share`, `open_files`, `program`, `regular_file`, `source`, `layer` | 4 `kernel`, `nbd`, `keeper` | 5 `engine` | 6 `builder`, `api`, `snapshotter`, `cli`.
//! Levels 0 to 2 are pure: no I/O, no clock, no async. Within a level the order of this table counts. `docs/architecture.md` tells the two flows.

#![warn(missing_docs, unreachable_pub)]
#![warn(
    clippy::allow_attributes_without_reason,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used
)]

pub mod error;
pub mod units;
mod versions;

pub mod oci;
pub mod tar;
pub mod ztoc;

pub mod compact;
pub mod ext4;
pub mod gzip;
pub mod soci;
pub mod tree;

mod blocking;
mod buffer;
mod fair_share;
pub mod layer;
mod metrics;
mod open_files;
mod program;
mod regular_file;
pub mod source;

pub mod keeper;
pub mod kernel;
pub mod nbd;

// No fuzzer calls these, and with the counters of a fuzzer they take long to build.
#[cfg(not(fuzzing))]
pub mod engine;

#[cfg(not(fuzzing))]
pub mod api;
#[cfg(not(fuzzing))]
pub mod builder;
#[cfg(not(fuzzing))]
pub mod cli;
#[cfg(not(fuzzing))]
pub mod snapshotter;
