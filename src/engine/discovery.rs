//! Which SOCI index counts for an image. (Stub: the shape that callers use.)
use super::{image::Image, local::LocalIndexes};
use crate::{error::Result, oci::Digest};
use bytes::Bytes;
pub struct Found {
    pub index: Option<SociIndex>,
    pub warnings: Vec<String>,
}
pub struct SociIndex {
    pub digest: Digest,
    pub version: u8,
    pub origin: String,
}
impl SociIndex {
    pub fn ztoc(&self, _layer: &Digest) -> Option<Digest> {
        None
    }
    pub async fn fetch_ztoc(&self, _layer: &Digest) -> Result<Bytes> {
        unimplemented!()
    }
}
pub async fn find(
    _image: &Image,
    _explicit: Option<&Digest>,
    _local: &LocalIndexes,
) -> Result<Found> {
    Ok(Found {
        index: None,
        warnings: vec![],
    })
}
