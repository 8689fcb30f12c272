//! The result of checking a disk.

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// What was found of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// The layer.
    pub layer: Digest,
    /// The table that the disk was laid out from.
    pub table: Digest,
    /// Bytes of the disk that are present; all of them were read.
    pub bytes: u64,
    /// What was not as it was written, and is right again.
    pub mended: Vec<String>,
    /// What is still not right, and why.
    pub wrong: Vec<String>,
}

impl ScrubReport {
    /// Of a disk of which nothing has been read.
    pub fn new(layer: Digest, table: Digest) -> Self {
        Self {
            layer,
            table,
            bytes: 0,
            mended: Vec::new(),
            wrong: Vec::new(),
        }
    }

    /// Nothing was wrong.
    pub fn is_sound(&self) -> bool {
        self.mended.is_empty() && self.wrong.is_empty()
    }
}
