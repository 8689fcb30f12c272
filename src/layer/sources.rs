//! Where a layer can be had: every place that an image named for it, each with its own way to credentials. Kept with the disk, so that
//! a daemon that starts again can fetch without being told.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::folder::Folder;
use crate::{
    error::{Error, Kind, Result},
    oci::Reference,
    source::{Access, Source},
};

/// More places than this are not remembered; the one added first is forgotten.
const MAX_SOURCES: usize = 16;

/// One place, as `sources.json` (and `windows.json`, of the compact index) holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    reference: Reference,
    #[serde(default)]
    access: Access,
}

impl Record {
    /// Whether both lead to the same blobs with the same credentials. Tags and digests make no difference to that.
    fn same_place(&self, other: &Self) -> bool {
        let place = match (&self.reference, &other.reference) {
            (
                Reference::Registry {
                    host, repository, ..
                },
                Reference::Registry {
                    host: other_host,
                    repository: other_repository,
                    ..
                },
            ) => (host, repository) == (other_host, other_repository),
            (Reference::Layout { path, .. }, Reference::Layout { path: other, .. })
            | (Reference::Archive { path, .. }, Reference::Archive { path: other, .. }) => {
                path == other
            }
            _ => false,
        };
        place && self.access == other.access
    }
}

/// A place, opened when it is first needed.
struct Known {
    record: Record,
    source: Option<Source>,
}

/// The places of one layer; the one added last is tried first, for its credentials are the newest.
pub(super) struct Sources {
    folder: Folder,
    /// The file that remembers them.
    name: &'static str,
    known: Mutex<Vec<Known>>,
}

impl Sources {
    /// What a file of the folder remembers. A list that cannot be read is an empty one: the next attach adds its source.
    pub(super) fn open(folder: &Folder, name: &'static str) -> Self {
        let records: Vec<Record> = folder
            .read(name)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            folder: folder.clone(),
            name,
            known: Mutex::new(
                records
                    .into_iter()
                    .map(|record| Known {
                        record,
                        source: None,
                    })
                    .collect(),
            ),
        }
    }

    /// The bytes of such a file with this one source.
    pub(super) fn encode_one(source: &Source) -> Vec<u8> {
        encode(&[&Record {
            reference: source.reference().clone(),
            access: source.access().clone(),
        }])
    }

    /// Remembers a source, and puts it first.
    pub(super) fn add(&self, source: &Source) -> Result<()> {
        let record = Record {
            reference: source.reference().clone(),
            access: source.access().clone(),
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let place = known
            .iter()
            .position(|known| known.record.same_place(&record));
        if let Some(0) = place {
            known[0].source = Some(source.clone());
            return Ok(());
        }
        if let Some(place) = place {
            known.remove(place);
        }
        known.insert(
            0,
            Known {
                record,
                source: Some(source.clone()),
            },
        );
        known.truncate(MAX_SOURCES);
        let bytes = encode(&known.iter().map(|known| &known.record).collect::<Vec<_>>());
        self.folder.replace(self.name, &bytes)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// The `index`-th source, opened.
    pub(super) async fn get(&self, index: usize) -> Result<Source> {
        let record = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(known) = known.get(index) else {
                return Err(Error::new(Kind::Unavailable, "no source is known"));
            };
            match &known.source {
                Some(source) => return Ok(source.clone()),
                None => known.record.clone(),
            }
        };
        let source = Source::open(&record.reference, &record.access).await?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // it may have been moved meanwhile
        if let Some(known) = known.iter_mut().find(|known| known.record == record) {
            known.source.get_or_insert(source.clone());
        }
        Ok(source)
    }
}

fn encode(records: &[&Record]) -> Vec<u8> {
    // a path that is not UTF-8 cannot be written; the list is then empty, and the next attach adds its source
    serde_json::to_vec_pretty(records).unwrap_or_else(|_| b"[]".to_vec())
}
