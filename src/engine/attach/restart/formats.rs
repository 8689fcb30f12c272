//! The versions of what one daemon leaves to the next: journals in memory, and files in the state directory.

use serde::{Deserialize, Serialize};

use crate::{
    engine::{
        attach::{layer_mounts::record::VERSION as LAYER_MOUNT_VERSION, records::RECORD_VERSION},
        space::snapshots::VERSION as SNAPSHOT_VERSION,
    },
    error::{Error, Kind, Result},
    kernel::fuse,
    layer,
    nbd::kept,
    versions::{is_read, readable},
};

/// The versions that a daemon writes. A program reads its own version and the one before; an older or newer one is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Formats {
    /// Records of attachments.
    pub attachment_record: u32,
    /// Records of layer mounts.
    #[serde(default = "first")]
    pub layer_mount_record: u32,
    /// Records of snapshots.
    #[serde(default = "first")]
    pub snapshot_record: u32,
    /// Directories of layers.
    pub layer_directory: u32,
    /// Journals of nbd connections.
    pub nbd_journal: u32,
    /// Journals of FUSE files.
    pub fuse_journal: u32,
}

/// What a daemon without snapshots writes none of.
fn first() -> u32 {
    1
}

impl Formats {
    /// Those of this program.
    pub const OWN: Self = Self {
        attachment_record: RECORD_VERSION,
        layer_mount_record: LAYER_MOUNT_VERSION,
        snapshot_record: SNAPSHOT_VERSION,
        layer_directory: layer::DIRECTORY_VERSION,
        nbd_journal: kept::JOURNAL_VERSION,
        fuse_journal: fuse::JOURNAL_VERSION,
    };

    /// Whether this program can take over from a daemon that writes these. `Unsupported` names the first that it cannot read.
    pub fn check(&self) -> Result<()> {
        for ((what, found), (_, own)) in self.all().into_iter().zip(Self::OWN.all()) {
            if !is_read(found, own) {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "the running daemon writes {what} of version {found}, and this program reads {}",
                        readable(own)
                    ),
                ));
            }
        }
        Ok(())
    }

    fn all(&self) -> [(&'static str, u32); 6] {
        [
            ("attachment records", self.attachment_record),
            ("records of layer mounts", self.layer_mount_record),
            ("snapshot records", self.snapshot_record),
            ("layer directories", self.layer_directory),
            ("nbd journals", self.nbd_journal),
            ("FUSE journals", self.fuse_journal),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_refused_with_its_name() {
        Formats::OWN.check().unwrap();
        let newer = Formats {
            nbd_journal: Formats::OWN.nbd_journal + 1,
            ..Formats::OWN
        };
        let error = newer.check().unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        let message = error.report();
        assert!(
            message.contains("writes nbd journals of version"),
            "{message}"
        );
        let older = Formats {
            layer_directory: 0,
            ..Formats::OWN
        };
        let message = older.check().unwrap_err().report();
        assert!(
            message.contains("layer directories of version 0"),
            "{message}"
        );
    }
}
