//! The field numbers of `ztoc.fbs` and `zinfo.fbs`: the order of declaration there.

pub(super) mod ztoc {
    pub(in crate::ztoc) const VERSION: usize = 0;
    pub(in crate::ztoc) const BUILD_TOOL_IDENTIFIER: usize = 1;
    pub(in crate::ztoc) const COMPRESSED_ARCHIVE_SIZE: usize = 2;
    pub(in crate::ztoc) const UNCOMPRESSED_ARCHIVE_SIZE: usize = 3;
    pub(in crate::ztoc) const TOC: usize = 4;
    pub(in crate::ztoc) const COMPRESSION_INFO: usize = 5;
}

pub(super) mod toc {
    pub(in crate::ztoc) const METADATA: usize = 0;
}

pub(super) mod file {
    pub(in crate::ztoc) const NAME: usize = 0;
    pub(in crate::ztoc) const TYPE: usize = 1;
    pub(in crate::ztoc) const UNCOMPRESSED_OFFSET: usize = 2;
    pub(in crate::ztoc) const UNCOMPRESSED_SIZE: usize = 3;
    pub(in crate::ztoc) const LINKNAME: usize = 4;
    pub(in crate::ztoc) const MODE: usize = 5;
    pub(in crate::ztoc) const UID: usize = 6;
    pub(in crate::ztoc) const GID: usize = 7;
    pub(in crate::ztoc) const UNAME: usize = 8;
    pub(in crate::ztoc) const GNAME: usize = 9;
    pub(in crate::ztoc) const MOD_TIME: usize = 10;
    pub(in crate::ztoc) const DEVMAJOR: usize = 11;
    pub(in crate::ztoc) const DEVMINOR: usize = 12;
    pub(in crate::ztoc) const XATTRS: usize = 13;
}

/// All PAX records, whatever the table's name says.
pub(super) mod xattr {
    pub(in crate::ztoc) const KEY: usize = 0;
    pub(in crate::ztoc) const VALUE: usize = 1;
}

pub(super) mod compression_info {
    pub(in crate::ztoc) const COMPRESSION_ALGORITHM: usize = 0;
    pub(in crate::ztoc) const MAX_SPAN_ID: usize = 1;
    pub(in crate::ztoc) const SPAN_DIGESTS: usize = 2;
    pub(in crate::ztoc) const CHECKPOINTS: usize = 3;

    /// `CompressionAlgorithm.Gzip`, the default.
    pub(in crate::ztoc) const GZIP: i8 = 1;
    /// `CompressionAlgorithm.Uncompressed`.
    pub(in crate::ztoc) const UNCOMPRESSED: i8 = 2;
}

pub(super) mod tar_zinfo {
    pub(in crate::ztoc) const VERSION: usize = 0;
    pub(in crate::ztoc) const SPAN_SIZE: usize = 1;
    pub(in crate::ztoc) const SIZE: usize = 2;

    /// What today's tool writes as `version`.
    pub(in crate::ztoc) const CURRENT_VERSION: i32 = 2;
}
