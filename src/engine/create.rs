//! Making an index. (Stub.)
use crate::{error::Result, oci::Digest};
pub const DEFAULT_SPAN_SIZE: u64 = 4 << 20;
pub const DEFAULT_MIN_LAYER_SIZE: u64 = 10 << 20;
pub struct CreateOptions {
    pub span_size: u64,
    pub min_layer_size: u64,
}
#[derive(serde::Serialize)]
pub struct CreateReport {}
impl std::fmt::Display for CreateReport {
    fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}
pub async fn create(
    _i: &super::Image,
    _o: &CreateOptions,
    _l: &super::local::LocalIndexes,
    _p: &(dyn Fn(Digest, u64, u64) + Send + Sync),
) -> Result<CreateReport> {
    Ok(CreateReport {})
}
