//! A file of an image, opened for reading.

use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::{error::Result, oci::Digest};

/// A file that was found and opened.
pub struct OpenedFile {
    /// Path in the image, with symbolic links resolved.
    pub path: String,
    /// The layer that has it.
    pub layer: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Stream of the data.
    pub data: BoxStream<'static, Result<Bytes>>,
}
