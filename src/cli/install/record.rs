//! The record of an installation: what each changed file was before, and what has been made of it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml_edit::DocumentMut;

use super::{root::Root, settings::Done};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// Where the record is.
pub(super) const RECORD: &str = "/etc/socinbd/install.json";
/// The only format of the record.
const FORMAT: u32 = 1;

/// What an installation has changed.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub(super) struct Record {
    format: u32,
    pub(super) files: Vec<Changed>,
    /// The program, if it was copied to the node.
    pub(super) program: Option<PathBuf>,
    /// The directories that were made, in the order of their making.
    pub(super) directories: Vec<PathBuf>,
    /// The socket of containerd.
    pub(super) containerd: String,
}

/// A file that an installation has written.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub(super) struct Changed {
    pub(super) path: PathBuf,
    /// Its content before; nothing if there was none.
    pub(super) before: Option<String>,
    pub(super) after: String,
    /// The settings, if the file is one of a person.
    pub(super) settings: Vec<Done>,
}

impl Record {
    pub(super) fn new() -> Self {
        Self {
            format: FORMAT,
            ..Self::default()
        }
    }

    /// The record of a root directory, if something is installed there.
    pub(super) fn read(root: &Root, path: &Path) -> Result<Option<Self>> {
        let Some(text) = root.read(path)? else {
            return Ok(None);
        };
        let named = || format!("the record {}", root.outside(path).display());
        let record: Self = serde_json::from_str(&text).or_kind(Kind::Corrupt, named)?;
        let paths = record.files.iter().map(|file| &file.path);
        let mut paths = paths.chain(&record.program).chain(&record.directories);
        match record.format {
            FORMAT if paths.all(|path| path.is_absolute()) => Ok(Some(record)),
            FORMAT => Err(Error::new(
                Kind::Corrupt,
                named() + ": a path is not absolute",
            )),
            other => Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{} has the format {other}: use the version of socinbd that has written it",
                    named()
                ),
            )),
        }
    }

    pub(super) fn write(&self, root: &Root, path: &Path) -> Result<()> {
        let text =
            serde_json::to_string_pretty(self).or_kind(Kind::Io, || "writing the record".into())?;
        root.write(path, text.as_bytes(), 0o600)
    }

    /// The content of a file as it would be without the installation. What a person has changed since then stays.
    pub(super) fn without(&self, path: &Path, now: Option<String>) -> Result<Option<String>> {
        let changed = self.files.iter().find(|changed| changed.path == path);
        match changed {
            Some(changed) => changed.undone(now),
            None => Ok(now),
        }
    }
}

impl Changed {
    /// Whether a person has changed the file since.
    pub(super) fn is_edited(&self, now: Option<&str>) -> bool {
        now.is_some_and(|now| now != self.after && Some(now) != self.before.as_deref())
    }

    /// The content of the file as it would be without the installation.
    fn undone(&self, now: Option<String>) -> Result<Option<String>> {
        let Some(now) = now else { return Ok(None) };
        if !self.is_edited(Some(&now)) {
            return Ok(self.before.clone());
        }
        if self.settings.is_empty() {
            // a file of the installation alone
            return Ok(None);
        }
        let mut document = now
            .parse::<DocumentMut>()
            .or_kind(Kind::InvalidArgument, || {
                format!("{}: correct it first", self.path.display())
            })?;
        for done in self.settings.iter().rev() {
            done.undo(&mut document)?;
        }
        Ok(Some(document.to_string()))
    }
}
