//! What must be known after a kill of the daemon: one JSON file an attachment, in `<run-dir>/attachments`.
//!
//! A record is written before the mount is made and removed after the last device is gone, so that whatever is mounted belongs to a record.
//! A device that a kill leaves before its record was written is known by its identifier. The run directory does not outlive a reboot, and neither do devices and mounts.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use super::request::Attachment;
use crate::{
    error::{Kind, Result, ResultExt},
    layer::make_private,
};

/// The records of a run directory.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

impl Records {
    /// Opens them, and makes their folder (0700).
    pub fn open(run_dir: &Path) -> Result<Self> {
        let folder = run_dir.join("attachments");
        make_private(&folder)?;
        Ok(Self { folder })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    /// Writes a record, whole or not at all.
    pub fn write(&self, attachment: &Attachment) -> Result<()> {
        let path = self.path(&attachment.id);
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(&serde_json::to_vec(attachment)?)?;
            file.persist(&path)?;
            Ok(())
        };
        write().or_kind(Kind::Io, || {
            format!("writing the record {}", path.display())
        })
    }

    /// Removes a record; one that is gone is gone.
    pub fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error)
                .or_kind(Kind::Io, || {
                    format!("removing the record {}", path.display())
                }),
            _ => Ok(()),
        }
    }

    /// All records, by id. A file that is no record is left alone and reported.
    pub fn all(&self) -> Result<Vec<Attachment>> {
        let entries = fs::read_dir(&self.folder)
            .or_kind(Kind::Io, || format!("listing {}", self.folder.display()))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry
                .or_kind(Kind::Io, || format!("listing {}", self.folder.display()))?
                .path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let parsed = fs::read(&path)
                .map_err(|error| error.to_string())
                .and_then(|bytes| {
                    serde_json::from_slice::<Attachment>(&bytes).map_err(|error| error.to_string())
                });
            match parsed {
                Ok(attachment) => found.push(attachment),
                Err(error) => {
                    tracing::warn!(path = %path.display(), error, "this is no record of an attachment; it is left alone")
                }
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }
}
