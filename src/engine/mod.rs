//! The control path: what commands do with images, above the layers and the kernel.
//!
//! - `open`: from a reference to the opened disks of its layers; needs no privilege.
//! - `attach`: from disks to a mount, and back.
//! - `observe`: what an operator sees of attachments and of the node: metrics, states, and what was fetched for which file.
//! - `examine`: checks of disks, and recordings of starts.
//! - `space`: what images and layers hold on the root, and what may be removed.
//! - `make`: makes SOCI indexes, compact indexes and converted images.
//! - `transfer`: copies images and the artifacts that refer to them.
//! - `cat`: reads single files of an image, without a disk.
//! - `verifiers`: outside programs that verify images and indexes before the first mount.

pub mod attach;
pub mod cat;
pub mod examine;
pub mod make;
pub mod observe;
pub mod open;
pub mod space;
pub mod transfer;
pub mod verifiers;

pub use attach::{
    devices::kept::KeptDescriptors,
    engine::Engine,
    explain::{Explanation, LayerExplanation},
    layer_mounts::table::LayerMounter,
    mount_place::{place_of, unmount},
    names::mount_source,
    records::AttachmentRecords,
    restart::formats::Formats,
    steps::AttachedImage,
    types::{
        AttachRequest, AttachedLayer, Attachment, AttachmentState, AttachmentStatus, DeviceChoice,
        DeviceKind, RestoredAttachment, ServingProgram, UsedIndex,
    },
};
pub use examine::recording::RecordingDirectory;
pub use observe::{
    families::MetricsFormat,
    fetches::{FetchReport, FileFetch, FileWait, LayerFetches, UnreadFile, UnreadFiles},
    layers::{LayerStatus, LayerUser},
    snapshots::{SnapshotLayer, SnapshotStatus},
    soci_names::MetricNames,
};
pub use open::{
    disks::Disks,
    image::Image,
    opened::{DiskBasis, OpenEvent},
};
pub use space::snapshots::SnapshotKind;
