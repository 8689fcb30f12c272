//! `state.json`: what a disk's folder is worth.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::LayerBlob;
use crate::oci::Digest;

/// The version of the folder that this program writes and reads.
const VERSION: u32 = 1;

/// The content of `state.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// The layer, as the image that made the disk named it.
    pub layer: LayerBlob,
    /// The digest of the table that the disk was laid out from.
    pub table: Digest,
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
    /// What has shown that the table is not the layer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refuted: Option<String>,
    /// The boot in which the folder was made, as long as it is not known to be on the disk: the death of the daemon does not hurt such
    /// a folder, a loss of power may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsynced_since_boot: Option<String>,
}

impl State {
    /// The state of a new folder, not yet synced.
    pub(super) fn new(layer: &LayerBlob, table: Digest, disk_size: u64, spans: u32) -> Self {
        Self {
            version: VERSION,
            layer: layer.clone(),
            table,
            compact: None,
            disk_size,
            spans,
            complete: false,
            verified: false,
            refuted: None,
            unsynced_since_boot: Some(boot().to_owned()),
        }
    }

    /// Reads a `state.json`. `None`: it is none of this version, or its folder may have suffered a loss of power.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let state: Self = serde_json::from_slice(bytes).ok()?;
        let lost = state
            .unsynced_since_boot
            .as_ref()
            .is_some_and(|then| then.is_empty() || *then != boot());
        (state.version == VERSION && !lost).then_some(state)
    }

    /// The bytes of `state.json`.
    pub(super) fn encode(&self) -> Vec<u8> {
        // plain numbers, strings and flags: nothing in here that JSON cannot hold
        serde_json::to_vec_pretty(self).unwrap_or_default()
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

    fn state() -> State {
        let layer = LayerBlob {
            digest: Digest::of(b"layer"),
            size: 5,
            packing: Packing::Gzip,
            diff_id: Digest::of(b"diff"),
        };
        State::new(&layer, Digest::of(b"table"), 4096, 7)
    }

    #[test]
    fn a_folder_of_this_boot_counts_without_a_sync() {
        let state = state();
        assert_eq!(State::parse(&state.encode()), Some(state));
    }

    #[test]
    fn a_folder_of_another_boot_counts_only_when_synced() {
        let mut state = state();
        state.unsynced_since_boot = Some("another".to_owned());
        assert_eq!(State::parse(&state.encode()), None);
        state.unsynced_since_boot = Some(String::new());
        assert_eq!(State::parse(&state.encode()), None);
        state.unsynced_since_boot = None;
        assert_eq!(State::parse(&state.encode()), Some(state));
    }

    #[test]
    fn another_version_and_half_a_file_do_not_count() {
        let mut state = state();
        let bytes = state.encode();
        assert_eq!(State::parse(&bytes[..bytes.len() / 2]), None);
        assert_eq!(State::parse(b""), None);
        state.version += 1;
        assert_eq!(State::parse(&state.encode()), None);
    }
}
