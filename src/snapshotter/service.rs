//! The snapshots API of containerd, over the snapshots of one socket.

use std::{pin::Pin, sync::Arc, time::SystemTime};

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status};

use super::{
    errors::SnapshotError,
    filters::Filters,
    proto::snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, Kind as ProtoKind, ListSnapshotsRequest,
        ListSnapshotsResponse, MountsRequest, MountsResponse, PrepareSnapshotRequest,
        PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse,
        UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
        ViewSnapshotRequest, ViewSnapshotResponse, snapshots_server::Snapshots,
    },
    records::{Labels, Snapshot, SnapshotKind},
    set::{SnapshotSet, run_blocking, usage_of},
};

/// Snapshots in one message of a list.
const BATCH: usize = 100;

/// The service of one socket.
#[derive(Clone)]
pub(super) struct Service {
    set: Arc<SnapshotSet>,
}

impl Service {
    pub(super) fn new(set: Arc<SnapshotSet>) -> Self {
        Self { set }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Snapshots for Service {
    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Answer<PrepareSnapshotResponse> {
        let PrepareSnapshotRequest {
            key,
            parent,
            labels,
            ..
        } = request.into_inner();
        let labels: Labels = labels.into_iter().collect();
        let mounts = self.set.prepare(key, parent, labels).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Answer<ViewSnapshotResponse> {
        let ViewSnapshotRequest {
            key,
            parent,
            labels,
            ..
        } = request.into_inner();
        let labels: Labels = labels.into_iter().collect();
        let mounts = self.set.view(key, parent, labels).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Answer<MountsResponse> {
        let mounts = self.set.mounts(&request.get_ref().key).await?;
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Answer<()> {
        let CommitSnapshotRequest {
            name,
            key,
            labels,
            parent,
            ..
        } = request.into_inner();
        let set = Arc::clone(&self.set);
        run_blocking(move || {
            let labels = labels.into_iter().collect();
            let active = set.records.get(&key)?;
            // before other changes have to wait for this one; a large layer has many files
            let usage = match (active.kind, &active.layer) {
                (SnapshotKind::Active, None) => Some(usage_of(&set.content(&active))?),
                _ => None,
            };
            set.records.commit(&key, &name, labels, &parent, usage)
        })
        .await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Answer<()> {
        self.set.remove(request.into_inner().key).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Answer<StatSnapshotResponse> {
        let snapshot = self.set.records.get(&request.get_ref().key)?;
        Ok(Response::new(StatSnapshotResponse {
            info: Some(info(&snapshot)),
        }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Answer<UpdateSnapshotResponse> {
        let UpdateSnapshotRequest {
            info: given,
            update_mask,
            ..
        } = request.into_inner();
        let given = given.ok_or_else(|| Status::invalid_argument("the request has no snapshot"))?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let names = changed_labels(&given.name, &paths)?;
        let records = Arc::clone(&self.set.records);
        let updated = run_blocking(move || {
            let labels = given.labels.into_iter().collect();
            records.update(&given.name, labels, names.as_deref())
        })
        .await?;
        Ok(Response::new(UpdateSnapshotResponse {
            info: Some(info(&updated)),
        }))
    }

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let filters = Filters::parse(&request.get_ref().filters)?;
        let mut found = self.set.records.list();
        found.retain(|snapshot| filters.matches(|path| field(snapshot, path)));
        let batches: Vec<_> = found
            .chunks(BATCH)
            .map(|batch| {
                Ok(ListSnapshotsResponse {
                    info: batch.iter().map(|snapshot| info(snapshot)).collect(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(stream::iter(batches))))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Answer<UsageResponse> {
        let usage = self.set.usage(request.into_inner().key).await?;
        Ok(Response::new(UsageResponse {
            size: i64::try_from(usage.size).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    async fn cleanup(&self, _request: Request<CleanupRequest>) -> Answer<()> {
        self.set.cleanup().await.map_err(SnapshotError::from)?;
        Ok(Response::new(()))
    }
}

/// The labels that an update changes; `None`: all.
fn changed_labels(name: &str, paths: &[String]) -> Result<Option<Vec<String>>, SnapshotError> {
    if paths.is_empty() || paths.iter().any(|path| path == "labels") {
        return match paths
            .iter()
            .find(|path| *path != "labels" && !path.starts_with("labels."))
        {
            None => Ok(None),
            Some(path) => Err(unchangeable(name, path)),
        };
    }
    let label = |path: &String| match path.strip_prefix("labels.") {
        Some(label) => Ok(label.to_owned()),
        None => Err(unchangeable(name, path)),
    };
    paths.iter().map(label).collect::<Result<_, _>>().map(Some)
}

fn unchangeable(name: &str, path: &str) -> SnapshotError {
    SnapshotError::InvalidArgument(format!(
        "the field {path} of snapshot {name} cannot be changed"
    ))
}

/// A field of a snapshot, as filters name it.
fn field<'a>(snapshot: &'a Snapshot, path: &[Vec<u8>]) -> Option<&'a [u8]> {
    let (first, rest) = path.split_first()?;
    match (first.as_slice(), rest) {
        (b"kind", _) => Some(match snapshot.kind {
            SnapshotKind::Active => b"active",
            SnapshotKind::View => b"view",
            SnapshotKind::Committed => b"committed",
        }),
        (b"name", _) => Some(snapshot.name.as_bytes()),
        (b"parent", _) => Some(snapshot.parent.as_deref().unwrap_or_default().as_bytes()),
        (b"labels", rest) => {
            let name = String::from_utf8(rest.join(&b'.')).ok()?;
            snapshot.labels.get(&name).map(String::as_bytes)
        }
        _ => None,
    }
}

fn info(snapshot: &Snapshot) -> Info {
    let kind = match snapshot.kind {
        SnapshotKind::Active => ProtoKind::Active,
        SnapshotKind::View => ProtoKind::View,
        SnapshotKind::Committed => ProtoKind::Committed,
    };
    Info {
        name: snapshot.name.clone(),
        parent: snapshot.parent.clone().unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(snapshot.created)),
        updated_at: Some(timestamp(snapshot.updated)),
        labels: snapshot
            .labels
            .iter()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
    }
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    prost_types::Timestamp::from(time)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::{
        engine::{Engine, KeptDescriptors},
        layer::StoreOptions,
        snapshotter::{images::Images, records::NewSnapshot, set::make_directories},
    };

    #[tokio::test]
    async fn records_answer_before_devices_are_taken_over_and_what_mounts_waits() {
        let folder = tempfile::tempdir().unwrap();
        let [root, run_dir] = ["root", "run"].map(|name| folder.path().join(name));
        let options = StoreOptions::default();
        let kept = KeptDescriptors::default();
        let engine = Engine::open_daemon(&root, &run_dir, kept, options).unwrap();
        let options = Arc::default();
        let images = Images::new(Arc::clone(&engine), Arc::clone(&options));
        let set = SnapshotSet::open(&engine, "set", &options, &images).unwrap();
        let snapshot = NewSnapshot {
            name: "a".to_owned(),
            parent: String::new(),
            kind: SnapshotKind::Active,
            labels: Labels::new(),
            layer: None,
            why: None,
        };
        set.records.create(snapshot, make_directories).unwrap();
        let service = Service::new(Arc::clone(&set));
        let request = StatSnapshotRequest {
            key: "a".to_owned(),
            ..Default::default()
        };
        service.stat(Request::new(request)).await.unwrap();
        let listed = service.list(Request::new(ListSnapshotsRequest::default()));
        listed.await.unwrap();
        let mut waiting = [
            tokio::spawn({
                let set = Arc::clone(&set);
                async move {
                    let prepared = set.prepare("b".to_owned(), String::new(), Labels::new());
                    prepared.await.map(|_| ())
                }
            }),
            tokio::spawn({
                let set = Arc::clone(&set);
                async move { set.mounts("a").await.map(|_| ()) }
            }),
            tokio::spawn(async move { set.remove("a".to_owned()).await }),
        ];
        for request in &mut waiting {
            let answered = timeout(Duration::from_millis(100), request).await;
            assert!(answered.is_err());
        }
        engine.take_over().await.unwrap();
        let [prepared, mounts, removed] = waiting;
        prepared.await.unwrap().unwrap();
        // the removal may come first
        let _ = mounts.await.unwrap();
        removed.await.unwrap().unwrap();
    }
}
