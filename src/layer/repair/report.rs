//! The result of checking a disk.

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// The result of checking a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ScrubReport {
    /// The layer.
    pub layer: Digest,
    /// The table that the disk was laid out from.
    pub table: Digest,
    /// Bytes of the disk that are present and were read.
    pub bytes: u64,
    /// Damage that was found and repaired.
    pub repaired: Vec<String>,
    /// Damage that could not be repaired, and why.
    pub wrong: Vec<String>,
}

impl ScrubReport {
    /// The report of a disk of which nothing was read.
    pub fn new(layer: Digest, table: Digest) -> Self {
        Self {
            layer,
            table,
            bytes: 0,
            repaired: Vec::new(),
            wrong: Vec::new(),
        }
    }

    /// Whether no damage was found.
    pub fn is_sound(&self) -> bool {
        self.repaired.is_empty() && self.wrong.is_empty()
    }
}
