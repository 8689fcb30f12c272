//! What may be wrong with a layer that passes.

use crate::{error::Kind, gzip::scan, oci::Packing, tar};

/// Why a layer could not be read to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error<E> {
    /// The sink failed.
    #[error("the data of the layer could not be written")]
    Sink(#[source] E),
    /// The gzip stream is damaged.
    #[error("the layer's gzip stream cannot be read")]
    Gzip(#[source] scan::Error),
    /// The zstd stream is damaged, or needs a larger window than is allowed (128 MiB, as in the program zstd).
    #[error("bad zstd data at {compressed_offset} of the blob: {message}")]
    Zstd {
        /// The position in the blob, at the earliest.
        compressed_offset: u64,
        /// The library's words.
        message: String,
    },
    /// The blob ends inside of a zstd frame.
    #[error("the zstd blob ends at {compressed_offset}, within a frame")]
    ZstdTruncated {
        /// The blob's size.
        compressed_offset: u64,
    },
    /// The layer is not a tar.
    #[error("the layer's tar cannot be read")]
    Tar(#[source] tar::Error),
    /// The blob is compressed in a way that this program does not read.
    #[error(
        "the layer is compressed with {0}, which cannot be read: build the image with gzip or zstd layers"
    )]
    Compression(&'static str),
    /// The blob does not have the announced compression, and is not a tar either.
    #[error("the blob is neither {declared:?}, as its media type says, nor a plain tar")]
    Unpacked {
        /// How it was said to be packed.
        declared: Packing,
        /// Why it is not a tar.
        source: tar::Error,
    },
}

impl<E> Error<E> {
    /// Whose fault it is; `Io` when the sink failed.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Sink(_) => Kind::Io,
            Self::Compression(_) | Self::Tar(tar::Error::UnsupportedType { .. }) => {
                Kind::Unsupported
            }
            Self::Gzip(_)
            | Self::Zstd { .. }
            | Self::ZstdTruncated { .. }
            | Self::Tar(_)
            | Self::Unpacked { .. } => Kind::Corrupt,
        }
    }
}
