//! A file of an image, opened for reading.

use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::{error::Result, oci::Digest};

/// A file that was found.
pub struct OpenedFile {
    /// Its path in the image, links followed.
    pub path: String,
    /// The layer that has it.
    pub layer: Digest,
    /// Its bytes.
    pub size: u64,
    /// Its data, in order.
    pub data: BoxStream<'static, Result<Bytes>>,
}
