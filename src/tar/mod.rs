//! Tar: headers, PAX records, GNU long names, sparse maps, with exact offsets; the entry as SOCI records it. Pure.

mod reader;

pub use reader::{Archive, Event, NoZtoc, Reader};

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link; its text is `linkname`.
    Symlink,
    /// A further name of the file that `linkname` names in the same layer.
    Hardlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
}

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970, rounded down.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// A piece of a sparse file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file.
    pub file_offset: u64,
    /// Where in the layer's uncompressed stream.
    pub layer_offset: crate::units::LayerOffset,
    /// Bytes.
    pub length: u64,
}

/// One entry of a layer, as a zTOC's `FileMetadata` holds it. Merged headers (PAX, GNU long names) are applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As in the tar, not cleaned: may start with `./` or `/` and end with `/`. Any bytes but NUL.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Where its data starts.
    pub data_offset: crate::units::LayerOffset,
    /// Bytes of data; 0 for all but regular files.
    pub size: u64,
    /// Text of a symlink, target of a hard link, else empty.
    pub linkname: Vec<u8>,
    /// The raw mode; the low 12 bits count.
    pub mode: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name; not used for the disk.
    pub uname: Vec<u8>,
    /// Group's name; not used for the disk.
    pub gname: Vec<u8>,
    /// Modification time; `None` where a zTOC holds no readable one.
    pub mtime: Option<Timestamp>,
    /// Device numbers, for `Char` and `Block`.
    pub devmajor: i64,
    /// See `devmajor`.
    pub devminor: i64,
    /// All PAX records of the entry, sorted bytewise by key. Xattrs are those that start with `SCHILY.xattr.`.
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
    /// Only for a sparse file: its data, sorted, within `size`. A zTOC cannot hold this.
    pub sparse: Option<Vec<Segment>>,
}

/// Why a tar stream could not be read. Offsets are of the header block at fault, in the uncompressed stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}
