//! The control path: what commands do with images, above the layers and the kernel.
//!
//! - `open`: from a reference to the opened disks of its layers; needs no privilege.
//! - `attach`: from disks to a mount, and back.
//! - `examine`: checks of disks, and recordings of starts.
//! - `make`: makes SOCI indexes, compact indexes and converted images.
//! - `transfer`: copies images and the artifacts that refer to them.
//! - `cat`: reads single files of an image, without a disk.

pub mod attach;
pub mod cat;
pub mod examine;
pub mod make;
pub mod open;
pub mod transfer;

pub use attach::{
    devices::kept::KeptDescriptors,
    engine::Engine,
    explain::{Explanation, LayerExplanation},
    mount_place::{place_of, unmount},
    names::mount_source,
    records::AttachmentRecords,
    steps::AttachedImage,
    types::{
        AttachRequest, AttachedLayer, Attachment, AttachmentState, AttachmentStatus, DeviceChoice,
        DeviceKind, UsedIndex,
    },
};
pub use examine::recording::RecordingDirectory;
pub use open::{
    disks::Disks,
    image::Image,
    opened::{DiskBasis, OpenEvent},
};
