//! `state.json`: the state of a disk's directory.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::seal;
use crate::{layer::types::LayerBlob, oci::Digest};

/// The version of the directory that this program writes. A change of the files or of the place of data on a disk needs a new version.
pub const DIRECTORY_VERSION: u32 = 2;

/// Version 1: its files had no checksums. It is read, and converted to this version when it is opened (`from_table`).
pub(crate) const WITHOUT_CHECKS: u32 = 1;

/// The content of `state.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskState {
    pub version: u32,
    /// The layer, as the image that made the disk named it.
    pub layer: LayerBlob,
    /// The digest of the table that the disk was laid out from.
    pub table: Digest,
    /// Size of the table; 0: there is none, or it is not known.
    #[serde(default)]
    pub table_size: u64,
    /// The blob of the compact index that has the layer's windows; none if the table is a zTOC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compact: Option<Digest>,
    /// Size of the disk.
    pub disk_size: u64,
    /// Number of spans; 0 for a streamed layer.
    pub spans: u32,
    /// Every span is on the disk, and it is verified.
    pub complete: bool,
    /// The layer, as the table lays it out, was checked in full against its digest or diff ID.
    pub verified: bool,
    /// The checksum of the disk's metadata (`metadata`); not known before the first sync of the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_crc32: Option<u32>,
    /// The evidence that the table contradicts the layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refuted: Option<String>,
    /// The boot in which the directory was made, until it is synced. A killed daemon does not damage such a directory, but a power failure
    /// may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsynced_since_boot: Option<String>,
}

impl DiskState {
    /// The state of a new directory, not yet synced.
    pub(crate) fn new(layer: &LayerBlob, table: Digest, disk_size: u64, spans: u32) -> Self {
        Self {
            version: DIRECTORY_VERSION,
            layer: layer.clone(),
            table,
            table_size: 0,
            compact: None,
            disk_size,
            spans,
            complete: false,
            verified: false,
            metadata_crc32: None,
            refuted: None,
            unsynced_since_boot: Some(boot().to_owned()),
        }
    }

    /// Reads a `state.json`. `None`: it is damaged or of an unknown version, or its directory was not synced before a power failure.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (state, version): (Self, _) = match seal::has_json_seal(bytes) {
            true => (seal::unseal_json(bytes)?, DIRECTORY_VERSION),
            false => (serde_json::from_slice(bytes).ok()?, WITHOUT_CHECKS),
        };
        let lost = state
            .unsynced_since_boot
            .as_ref()
            .is_some_and(|then| then.is_empty() || *then != boot());
        (state.version == version && !lost).then_some(state)
    }

    /// This state with this version.
    pub(crate) fn of_this_version(mut self) -> Self {
        self.version = DIRECTORY_VERSION;
        self
    }

    /// The bytes of `state.json`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // numbers, strings and flags can all be written as JSON
        seal::seal_json(self).unwrap_or_default()
    }
}

/// The kernel's identifier of this boot; empty if it is not known: no boot is equal to that.
fn boot() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Packing;

    fn state() -> DiskState {
        let layer = LayerBlob {
            digest: Digest::of(b"layer"),
            size: 5,
            packing: Packing::Gzip,
            diff_id: Digest::of(b"diff"),
        };
        DiskState::new(&layer, Digest::of(b"table"), 4096, 7)
    }

    #[test]
    fn a_directory_of_this_boot_counts_without_a_sync() {
        let state = state();
        assert_eq!(DiskState::parse(&state.encode()), Some(state));
    }

    #[test]
    fn a_directory_of_another_boot_counts_only_when_synced() {
        let mut state = state();
        state.unsynced_since_boot = Some("another".to_owned());
        assert_eq!(DiskState::parse(&state.encode()), None);
        state.unsynced_since_boot = Some(String::new());
        assert_eq!(DiskState::parse(&state.encode()), None);
        state.unsynced_since_boot = None;
        assert_eq!(DiskState::parse(&state.encode()), Some(state));
    }

    #[test]
    fn another_version_and_half_a_file_do_not_count() {
        let mut state = state();
        let bytes = state.encode();
        assert_eq!(DiskState::parse(&bytes[..bytes.len() / 2]), None);
        assert_eq!(DiskState::parse(b""), None);
        state.version += 1;
        assert_eq!(DiskState::parse(&state.encode()), None);
        state.version = 0;
        assert_eq!(DiskState::parse(&serde_json::to_vec(&state).unwrap()), None);
    }

    #[test]
    fn a_state_counts_with_its_check_or_as_one_of_the_version_before() {
        let mut state = state();
        let bytes = state.encode();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 2;
            assert_eq!(DiskState::parse(&flipped), None, "{at}");
        }
        // a file that was cut before its checksum is not one of version 1
        assert_eq!(DiskState::parse(&serde_json::to_vec(&state).unwrap()), None);
        state.version = WITHOUT_CHECKS;
        let bytes = serde_json::to_vec_pretty(&state).unwrap();
        assert_eq!(DiskState::parse(&bytes), Some(state));
    }
}
