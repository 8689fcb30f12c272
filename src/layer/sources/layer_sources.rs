//! The sources of a layer: every reference that an image named for it, each with its own access to credentials. They are stored with the
//! disk, so that a restarted daemon can fetch without further input.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::health::{HealthChange, HostKey, Hosts, SourceDown, SourceHealth, is_host_failure};
use crate::{
    error::{Error, Result},
    layer::{
        locked::locked,
        stored::{directory::DiskDirectory, seal},
    },
    oci::Reference,
    source::{Access, Source, hosts::RegistryHost},
};

/// Maximum number of sources that are stored. The one that was added first is removed first.
const MAX_SOURCES: usize = 16;

/// One source, as `sources.json` (and `windows.json` for a compact index) stores it: without the passwords of proxies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SourceRecord {
    reference: Reference,
    #[serde(default)]
    access: Access,
}

impl SourceRecord {
    fn of(source: &Source) -> Self {
        Self {
            reference: source.reference().clone(),
            access: source.access().without_passwords(),
        }
    }

    /// Whether both lead to the same blobs with the same credentials, whatever their tags, digests and headers are.
    fn is_same_source(&self, other: &Self) -> bool {
        let is_same_reference = match (&self.reference, &other.reference) {
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
            (
                Reference::Containerd { namespace, .. },
                Reference::Containerd {
                    namespace: other, ..
                },
            ) => namespace == other,
            _ => false,
        };
        is_same_reference && self.access.without_headers() == other.access.without_headers()
    }
}

/// The content of the file.
#[derive(Serialize, Deserialize)]
struct RecordList<R> {
    sources: Vec<R>,
}

/// A source, opened when it is first needed, and its health.
pub(crate) struct LayerSource {
    record: SourceRecord,
    /// The host that is asked, of those that serve the registry.
    at: Option<RegistryHost>,
    /// For messages.
    name: String,
    host_name: String,
    source: Mutex<Option<Source>>,
    /// Health of its host, shared by all sources there.
    host: Arc<SourceHealth>,
    hosts: Hosts,
    /// Health of this blob at the source, while its host answers.
    blob: SourceHealth,
}

impl LayerSource {
    fn new(
        record: SourceRecord,
        at: Option<RegistryHost>,
        source: Option<Source>,
        hosts: &Hosts,
    ) -> Arc<Self> {
        let key = HostKey::of(&record.reference, &record.access, at.as_ref());
        let name = match at.as_ref().filter(|at| at.is_mirror()) {
            Some(mirror) => format!("{} at {}", record.reference, mirror.name()),
            None => record.reference.to_string(),
        };
        Arc::new(Self {
            record,
            at,
            name,
            host_name: key.name().to_owned(),
            source: Mutex::new(source),
            host: hosts.get(key),
            hosts: hosts.clone(),
            blob: SourceHealth::default(),
        })
    }

    /// The source of a test that has this reference.
    #[cfg(test)]
    pub(super) fn of_test(reference: &str, hosts: &Hosts) -> Arc<Self> {
        let record = SourceRecord {
            reference: reference.parse().unwrap(),
            access: Access::default(),
        };
        Self::new(record, None, None, hosts)
    }

    /// The source, opened.
    pub(crate) async fn open(&self) -> Result<Source> {
        if let Some(source) = &*locked(&self.source) {
            return Ok(source.clone());
        }
        // after a restart: a proxy's password may be in the environment of the daemon
        let access = &self.record.access;
        let access = access.with_passwords_of(&Access::from_environment());
        let source = self
            .hosts
            .open(&self.record.reference, &access, self.at.as_ref());
        let source = source.await?;
        Ok(locked(&self.source).get_or_insert(source).clone())
    }

    /// The reference of the source, and the mirror.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The host that it is asked from.
    pub(crate) fn host_name(&self) -> &str {
        &self.host_name
    }

    /// The health of its host.
    pub(crate) fn host(&self) -> &SourceHealth {
        &self.host
    }

    /// It has sent the requested bytes.
    pub(crate) fn answered(&self) {
        self.log_change(self.host.succeeded(), None);
    }

    /// The bytes that it has sent were those of the blob.
    pub(crate) fn sent_right_bytes(&self) {
        self.log_change(self.blob.succeeded(), None);
    }

    /// It has not sent the requested bytes, or it has sent other bytes.
    pub(crate) fn failed(&self, error: &Arc<Error>) {
        if is_host_failure(error.kind()) {
            self.log_change(self.host.failed(error), Some(error));
        } else {
            // the host has answered
            self.log_change(self.host.succeeded(), None);
            self.log_change(self.blob.failed(error), Some(error));
        }
    }

    /// Whether other sources are asked before it.
    pub(super) fn is_down(&self) -> bool {
        self.host.is_down() || self.blob.is_down()
    }

    /// Whether it is down, its pause has passed, and the caller has to try it. True for one caller after each pause.
    pub(super) fn begin_trial(&self) -> bool {
        self.host.begin_trial() || (!self.host.is_down() && self.blob.begin_trial())
    }

    /// Logs when it goes down or comes up, and not each failure.
    fn log_change(&self, change: HealthChange, error: Option<&Arc<Error>>) {
        let source = self.name();
        match change {
            HealthChange::Nothing => {}
            HealthChange::WentDown => tracing::warn!(
                "the source {source} is down, and other sources are asked before it: {}",
                error.map(|error| error.report()).unwrap_or_default()
            ),
            HealthChange::CameUp => tracing::info!("the source {source} is up again"),
        }
    }
}

/// A source as it is stored, and the hosts that it is asked from.
struct KnownSource {
    record: SourceRecord,
    /// The source of an attach, already open.
    opened: Option<Source>,
    hosts: Option<Arc<[RegistryHost]>>,
    /// One for each host, in their order; at least one.
    sources: Vec<Arc<LayerSource>>,
}

impl KnownSource {
    fn new(record: SourceRecord, opened: Option<Source>, table: &Hosts) -> Self {
        let hosts = table.serving(&record.reference, &record.access);
        let mut known = Self {
            record,
            opened,
            hosts,
            sources: Vec::new(),
        };
        known.split(table);
        known
    }

    /// Takes over what `hosts.toml` says now.
    fn refresh(&mut self, table: &Hosts) {
        let hosts = table.serving(&self.record.reference, &self.record.access);
        let is_same = match (&self.hosts, &hosts) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            (before, now) => before.is_none() && now.is_none(),
        };
        if !is_same {
            self.hosts = hosts;
            self.split(table);
        }
    }

    /// Makes the sources for the hosts.
    fn split(&mut self, table: &Hosts) {
        let at: Vec<Option<RegistryHost>> = match &self.hosts {
            Some(hosts) => hosts
                .iter()
                .filter(|host| host.serves_blobs())
                .cloned()
                .map(Some)
                .collect(),
            None => Vec::new(),
        };
        // without any, the source is opened as a whole and has the error
        let at = match at.is_empty() {
            true => vec![None],
            false => at,
        };
        let opened = |at: &Option<RegistryHost>| {
            let opened = self.opened.as_ref()?;
            let is_same = at.is_none() || opened.only_host() == at.as_ref();
            is_same.then(|| opened.clone())
        };
        let sources = at.into_iter().map(|at| {
            let opened = opened(&at);
            LayerSource::new(self.record.clone(), at, opened, table)
        });
        self.sources = sources.collect();
    }
}

/// The sources of one layer. The one that was added last is asked first: its credentials are the newest.
pub(crate) struct LayerSources {
    directory: DiskDirectory,
    /// The file that stores them.
    name: &'static str,
    hosts: Hosts,
    known: Mutex<Vec<KnownSource>>,
}

impl LayerSources {
    /// The sources that a file of the directory has. A damaged file counts as empty: the next attach adds its source.
    pub(crate) fn open(directory: &DiskDirectory, name: &'static str, hosts: &Hosts) -> Self {
        let bytes = directory.read(name).ok();
        let records = bytes.and_then(|bytes| decode(&bytes)).unwrap_or_else(|| {
            tracing::warn!(
                "{} is damaged, so the sources of the layer are not known: attach an image with this layer again",
                directory.path().join(name).display()
            );
            Vec::new()
        });
        let known = records.into_iter();
        Self {
            directory: directory.clone(),
            name,
            hosts: hosts.clone(),
            known: Mutex::new(
                known
                    .map(|record| KnownSource::new(record, None, hosts))
                    .collect(),
            ),
        }
    }

    /// The content of such a file with one source.
    pub(crate) fn encode_one(source: &Source) -> Vec<u8> {
        encode(&[&SourceRecord::of(source)])
    }

    /// Stores a source as the first.
    pub(crate) fn add(&self, source: &Source) -> Result<()> {
        let record = SourceRecord::of(source);
        let mut known = locked(&self.known);
        let found = known
            .iter()
            .position(|known| known.record.is_same_source(&record));
        if let Some(0) = found {
            let first = &mut known[0];
            // headers are not stored, and may be others
            first.record = record;
            first.opened = Some(source.clone());
            for known in &first.sources {
                if known.at.is_none() || known.at.as_ref() == source.only_host() {
                    *locked(&known.source) = Some(source.clone());
                }
            }
            return Ok(());
        }
        if let Some(found) = found {
            known.remove(found);
        }
        let first = KnownSource::new(record, Some(source.clone()), &self.hosts);
        known.insert(0, first);
        known.truncate(MAX_SOURCES);
        let bytes = encode(&known.iter().map(|known| &known.record).collect::<Vec<_>>());
        self.directory.replace(self.name, &bytes)
    }

    /// All sources in the order in which they are asked: those that are down are last.
    pub(crate) async fn in_order(&self) -> Vec<Arc<LayerSource>> {
        let records: Vec<SourceRecord> = locked(&self.known)
            .iter()
            .map(|known| known.record.clone())
            .collect();
        for record in &records {
            self.hosts.renew(&record.reference, &record.access).await;
        }
        let mut known = locked(&self.known);
        let mut sources = Vec::new();
        for known in known.iter_mut() {
            known.refresh(&self.hosts);
            sources.extend(known.sources.iter().cloned());
        }
        sources.sort_by_cached_key(|source| (source.host.is_down(), source.blob.is_down()));
        sources
    }

    /// The sources whose host is down.
    pub(crate) fn down(&self) -> Vec<SourceDown> {
        let known = locked(&self.known);
        let sources = known.iter().flat_map(|known| &known.sources);
        sources
            .filter_map(|source| source.host.down(source.name()))
            .collect()
    }
}

fn encode(records: &[&SourceRecord]) -> Vec<u8> {
    let list = |sources| seal::seal_json(&RecordList { sources });
    // a path that is not UTF-8 cannot be written; then the list is empty, and the next attach adds its source
    list(records.to_vec())
        .or_else(|_| list(Vec::new()))
        .unwrap_or_default()
}

/// `None`: the file is damaged. A file of directory version 1 is a list without a checksum.
fn decode(bytes: &[u8]) -> Option<Vec<SourceRecord>> {
    match seal::has_json_seal(bytes) {
        true => seal::unseal_json::<RecordList<SourceRecord>>(bytes).map(|list| list.sources),
        false => serde_json::from_slice(bytes).ok(),
    }
}
