//! The indexes in the local root. (Stub.)
pub struct LocalIndexes;
impl LocalIndexes {
    pub fn open(_root: &std::path::Path) -> crate::error::Result<Self> {
        Ok(Self)
    }
}
