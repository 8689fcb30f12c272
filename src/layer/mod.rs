//! The disk of a layer: an ext4 image in the folder `<root>/layers/sha256/<layer>/<table>/`, whose data comes span by span.
//!
//! - `stored`: the files of the folder, and their checks.
//! - `build`: makes a folder, from a table or from the whole layer.
//! - `read`: brings what a read of the disk needs: from a source, verified, inflated, to its place.
//! - `sources`: where that is fetched from.
//! - `ahead`: fetches what readers will want next.
//! - `verify`: holds what came against the table, and the whole layer against the image.
//! - `repair`: finds damage of the folder, and mends it.
//!
//! [`Store`] has all disks below a root, and [`Disk`] is one of them, open.

mod ahead;
mod build;
mod disk;
mod read;
mod repair;
mod services;
mod sources;
mod store;
mod stored;
mod types;
mod verify;

pub use ahead::{prefetch::Listed, recording::Touch};
pub use build::lazy::TableBytes;
pub use disk::{Disk, served::ServedDisk};
pub use read::{before::Before, health::Reason};
pub use repair::report::ScrubReport;
pub use services::Options;
pub use sources::health::SourceDown;
pub use store::Store;
pub use stored::{folder::make_private, stored_file::close_spare_files};
pub use types::{Allocation, Counters, DiskKey, LayerBlob, Progress, StackingFacts, StoredDisk};
