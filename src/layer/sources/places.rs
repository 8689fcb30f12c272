//! Where a layer can be had: every place that an image named for it, each with its own way to credentials. Kept with the disk, so that
//! a daemon that starts again can fetch without being told.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::health::{HealthChange, HostKey, Hosts, SourceDown, SourceHealth, is_of_host};
use crate::{
    error::{Error, Result},
    layer::{
        locked::locked,
        stored::{folder::DiskFolder, seal},
    },
    oci::Reference,
    source::{Access, Source},
};

/// More places than this are not remembered; the one added first is forgotten.
const MAX_SOURCES: usize = 16;

/// One place, as `sources.json` (and `windows.json`, of the compact index) holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SourceRecord {
    reference: Reference,
    #[serde(default)]
    access: Access,
}

impl SourceRecord {
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

/// The content of the file.
#[derive(Serialize, Deserialize)]
struct RecordList<R> {
    sources: Vec<R>,
}

/// A place, opened when it is first needed, and what is remembered of it.
pub(crate) struct LayerSource {
    record: SourceRecord,
    source: Mutex<Option<Source>>,
    /// Of its host: shared by all places there.
    host: Arc<SourceHealth>,
    /// Whether it gives this blob, where its host answers.
    blob: SourceHealth,
}

impl LayerSource {
    fn new(record: SourceRecord, source: Option<Source>, hosts: &Hosts) -> Arc<Self> {
        let host = hosts.get(HostKey::of(&record.reference, &record.access));
        Arc::new(Self {
            record,
            source: Mutex::new(source),
            host,
            blob: SourceHealth::default(),
        })
    }

    /// The source, opened.
    pub(crate) async fn open(&self) -> Result<Source> {
        if let Some(source) = &*locked(&self.source) {
            return Ok(source.clone());
        }
        let source = Source::open(&self.record.reference, &self.record.access).await?;
        Ok(locked(&self.source).get_or_insert(source).clone())
    }

    /// What its reference names.
    pub(crate) fn reference(&self) -> &Reference {
        &self.record.reference
    }

    /// What is remembered of its host.
    pub(crate) fn host(&self) -> &SourceHealth {
        &self.host
    }

    /// It has sent what it was asked for.
    pub(crate) fn answered(&self) {
        self.changed(self.host.succeeded(), None);
    }

    /// What it has sent was the blob's.
    pub(crate) fn is_right(&self) {
        self.changed(self.blob.succeeded(), None);
    }

    /// It has not sent what it was asked for, or other bytes.
    pub(crate) fn failed(&self, error: &Arc<Error>) {
        if is_of_host(error.kind()) {
            self.changed(self.host.failed(error), Some(error));
        } else {
            // the host has answered
            self.changed(self.host.succeeded(), None);
            self.changed(self.blob.failed(error), Some(error));
        }
    }

    /// Whether others are to be asked before it.
    pub(super) fn is_down(&self) -> bool {
        self.host.is_down() || self.blob.is_down()
    }

    /// Whether it is to be tried now, for it is down and its pause is over. True for one caller after each pause.
    pub(super) fn begin_trial(&self) -> bool {
        self.host.begin_trial() || (!self.host.is_down() && self.blob.begin_trial())
    }

    /// Says when it goes down or comes up; nothing of each failure.
    fn changed(&self, change: HealthChange, error: Option<&Arc<Error>>) {
        let source = self.reference();
        match change {
            HealthChange::Nothing => {}
            HealthChange::WentDown => tracing::warn!(
                "the source {source} is down, others are asked before it: {}",
                error.map(|error| error.report()).unwrap_or_default()
            ),
            HealthChange::CameUp => tracing::info!("the source {source} is up again"),
        }
    }
}

/// The places of one layer; the one added last is tried first, for its credentials are the newest.
pub(crate) struct LayerSources {
    folder: DiskFolder,
    /// The file that remembers them.
    name: &'static str,
    hosts: Hosts,
    known: Mutex<Vec<Arc<LayerSource>>>,
}

impl LayerSources {
    /// What a file of the folder remembers. A list that is damaged is an empty one: the next attach adds its source.
    pub(crate) fn open(folder: &DiskFolder, name: &'static str, hosts: &Hosts) -> Self {
        let bytes = folder.read(name).ok();
        let records = bytes.and_then(|bytes| decode(&bytes)).unwrap_or_else(|| {
            tracing::warn!(
                "{} is damaged: where the layer can be had is known again when an image that has it is attached",
                folder.path().join(name).display()
            );
            Vec::new()
        });
        let known = records.into_iter();
        Self {
            folder: folder.clone(),
            name,
            hosts: hosts.clone(),
            known: Mutex::new(
                known
                    .map(|record| LayerSource::new(record, None, hosts))
                    .collect(),
            ),
        }
    }

    /// The bytes of such a file with this one source.
    pub(crate) fn encode_one(source: &Source) -> Vec<u8> {
        encode(&[&SourceRecord {
            reference: source.reference().clone(),
            access: source.access().clone(),
        }])
    }

    /// Remembers a source, and puts it first.
    pub(crate) fn add(&self, source: &Source) -> Result<()> {
        let record = SourceRecord {
            reference: source.reference().clone(),
            access: source.access().clone(),
        };
        let mut known = locked(&self.known);
        let found = known
            .iter()
            .position(|known| known.record.same_place(&record));
        if let Some(0) = found {
            *locked(&known[0].source) = Some(source.clone());
            return Ok(());
        }
        if let Some(found) = found {
            known.remove(found);
        }
        known.insert(
            0,
            LayerSource::new(record, Some(source.clone()), &self.hosts),
        );
        known.truncate(MAX_SOURCES);
        let bytes = encode(&known.iter().map(|known| &known.record).collect::<Vec<_>>());
        self.folder.replace(self.name, &bytes)
    }

    /// All of them, in the order in which they are to be asked: those that are down last.
    pub(crate) fn in_order(&self) -> Vec<Arc<LayerSource>> {
        let mut places = locked(&self.known).clone();
        places.sort_by_cached_key(|place| (place.host.is_down(), place.blob.is_down()));
        places
    }

    /// Those whose host does not answer.
    pub(crate) fn down(&self) -> Vec<SourceDown> {
        let known = locked(&self.known);
        let down = known.iter();
        down.filter_map(|place| place.host.down(place.reference()))
            .collect()
    }
}

fn encode(records: &[&SourceRecord]) -> Vec<u8> {
    let list = |sources| seal::seal_json(&RecordList { sources });
    // a path that is not UTF-8 cannot be written; the list is then empty, and the next attach adds its source
    list(records.to_vec())
        .or_else(|_| list(Vec::new()))
        .unwrap_or_default()
}

/// `None`: the file is damaged. One of a folder of the version before is a list without a check.
fn decode(bytes: &[u8]) -> Option<Vec<SourceRecord>> {
    match seal::has_json_seal(bytes) {
        true => seal::unseal_json::<RecordList<SourceRecord>>(bytes).map(|list| list.sources),
        false => serde_json::from_slice(bytes).ok(),
    }
}
