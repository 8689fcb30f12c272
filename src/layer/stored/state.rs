//! `state.json`: the state of a disk's directory.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::seal;
use crate::{layer::types::LayerBlob, oci::Digest};

/// The version of the directory that this program writes. It counts what the files are and where a layer's data goes on the disk: a change
/// of either needs another one.
const VERSION: u32 = 2;

/// The version before: its files had no checks. It is read, and becomes one of this version when it is opened (`mend`).
pub(crate) const WITHOUT_CHECKS: u32 = 1;

/// The content of `state.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskState {
    pub version: u32,
    /// The layer, as the image that made the disk named it.
    pub layer: LayerBlob,
    /// The digest of the table that the disk was laid out from.
    pub table: Digest,
    /// Bytes of the table; 0 where there is none, or it was not noted.
    #[serde(default)]
    pub table_size: u64,
    /// The blob of the compact index that has the layer's windows; none when the table is a zTOC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compact: Option<Digest>,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Spans of the layer; 0 when it has been streamed.
    pub spans: u32,
    /// Every span is on the disk, and it is verified.
    pub complete: bool,
    /// The layer's bytes, as the table lays them out, were checked in full against the layer's digest or diff ID.
    pub verified: bool,
    /// The check of the disk's metadata (`metadata`); not known before the directory was synced for the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_crc32: Option<u32>,
    /// What has shown that the table is not the layer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refuted: Option<String>,
    /// The boot in which the directory was made, as long as it is not known to be on the disk: the death of the daemon does not hurt such
    /// a directory, a loss of power may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsynced_since_boot: Option<String>,
}

impl DiskState {
    /// The state of a new directory, not yet synced.
    pub(crate) fn new(layer: &LayerBlob, table: Digest, disk_size: u64, spans: u32) -> Self {
        Self {
            version: VERSION,
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

    /// Reads a `state.json`. `None`: it is damaged, of a version that is not read, or its directory may have suffered a loss of power.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (state, version): (Self, _) = match seal::has_json_seal(bytes) {
            true => (seal::unseal_json(bytes)?, VERSION),
            false => (serde_json::from_slice(bytes).ok()?, WITHOUT_CHECKS),
        };
        let lost = state
            .unsynced_since_boot
            .as_ref()
            .is_some_and(|then| then.is_empty() || *then != boot());
        (state.version == version && !lost).then_some(state)
    }

    /// This state, of a directory of this version.
    pub(crate) fn of_this_version(mut self) -> Self {
        self.version = VERSION;
        self
    }

    /// The bytes of `state.json`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // plain numbers, strings and flags: nothing in here that JSON cannot hold
        seal::seal_json(self).unwrap_or_default()
    }
}

/// The kernel's identifier of this boot; empty where it has none, which no boot is equal to.
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
        // a check that went with the end of the file is none of the version before
        assert_eq!(DiskState::parse(&serde_json::to_vec(&state).unwrap()), None);
        state.version = WITHOUT_CHECKS;
        let bytes = serde_json::to_vec_pretty(&state).unwrap();
        assert_eq!(DiskState::parse(&bytes), Some(state));
    }
}
