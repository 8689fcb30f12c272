//! The disk of a layer: an ext4 image in `<root>/layers/sha256/<layer>/<table>/`, whose data is fetched span by span.
//!
//! - `stored`: the files of that directory, and their checksums.
//! - `build`: makes the directory, from a table or from the whole layer.
//! - `read`: fetches, verifies, inflates and writes the spans that a read needs.
//! - `sources`: the places to fetch from.
//! - `ahead`: fetches spans that will be read next.
//! - `space`: measures disks, and makes room on the local file system.
//! - `verify`: detects tables that contradict the layer's bytes.
//! - `repair`: detects and repairs damage of the directory's files.
//!
//! [`Store`] has all disks below a root; a [`Disk`] is one of them, open. `services` is what they share; `lock` makes sure that one process has them.

mod ahead;
mod build;
mod disk;
mod lock;
mod locked;
mod read;
mod repair;
mod services;
mod sources;
mod space;
mod store;
mod stored;
mod types;
mod verify;

pub use ahead::{fill_decision::FillPolicy, prefetch::ListedSpans, recording::Touch};
pub use build::lazy::TableBytes;
pub use disk::{
    Disk,
    activity::FirstRead,
    evicted::SpanHold,
    fetch_log::{Entries, FetchEntry, FetchReason, WaitEntry},
    files::{LayerFile, LayerFiles},
    served::{ReadAttempts, ServedDisk},
};
pub use lock::{DirectoryLock, lock_root};
pub use read::{health::DegradedReason, span_window::SpanWindow};
pub use repair::report::ScrubReport;
pub use services::StoreOptions;
pub use sources::health::SourceDown;
pub(crate) use space::measure::allocated_by;
pub use space::{
    budget::{DiskLimits, DiskReserve},
    evict::SpaceStatus,
};
pub use store::Store;
pub(crate) use stored::seal::{seal_json, unseal_json};
pub use stored::{
    directory::make_private, state::DIRECTORY_VERSION, stored_file::close_spare_files,
};
pub use types::{
    Allocation, DiskCounters, DiskKey, DiskProgress, LayerBlob, StackingFacts, StoreLoad,
    StoredDisk,
};
