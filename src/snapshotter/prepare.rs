//! Creates snapshots: directories that containerd or a container fills, and lazy layers instead of an extraction.

use std::{sync::Arc, time::Instant};

use super::{
    errors::SnapshotError,
    images::{self, NotOpen, START_TIME},
    labels::{Extraction, LayerRequest, TARGET},
    mounts,
    options::Unproven,
    proto::types::Mount,
    records::{Labels, LazyLayer, NewSnapshot, Snapshot, SnapshotKind},
    set::{SnapshotSet, make_directories, run_blocking},
};
use crate::{
    engine::DiskBasis,
    error::{Error, Kind, Result},
    layer::Disk,
    metrics::{ExtractionReason, METRICS, Prepared},
    oci::Digest,
};

/// How an extraction is answered.
enum Answer {
    /// The snapshot that it is for exists, with its content, which is this.
    Exists(Prepared),
    /// Its content is there, and it gets its parent when it is committed.
    Staged(Box<LazyLayer>),
    /// containerd extracts the layer, for this reason if it has asked for a lazy one.
    Extract(Option<Refusal>),
}

/// Why a layer is neither lazy nor on a disk.
struct Refusal {
    reason: ExtractionReason,
    /// For people.
    why: String,
}

impl SnapshotSet {
    /// Creates an active snapshot. `AlreadyExists`: the snapshot of the label `containerd.io/snapshot.ref` exists; it may have been made now.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        self.engine.wait_taken_over().await;
        let began = Instant::now();
        let new = NewSnapshot {
            name: key,
            parent,
            kind: SnapshotKind::Active,
            labels,
            layer: None,
            why: None,
        };
        let extraction = Extraction::of(&new.labels, &self.options.label_headers);
        let is_extraction = !matches!(&extraction, Ok(None));
        let extraction = extraction.unwrap_or_else(|error| {
            tracing::warn!(
                "the labels of an extraction are not used: {}",
                error.report()
            );
            None
        });
        let answer = match &extraction {
            Some(extraction) => self.extraction(extraction, &new).await?,
            None => Answer::Extract(None),
        };
        if is_extraction {
            answer.count(began);
        }
        match answer {
            Answer::Exists(_) => Err(SnapshotError::AlreadyExists(format!(
                "target snapshot {}",
                new.labels.get(TARGET).map_or("", String::as_str)
            ))),
            Answer::Staged(layer) => {
                let layer = Some(*layer);
                let snapshot = self.create(NewSnapshot { layer, ..new }).await?;
                Ok(mounts::staged(&self.records.directory_of(snapshot.id)))
            }
            Answer::Extract(refusal) => {
                let is_rebased = extraction.is_some_and(|it| is_rebased(&it, &new));
                let why = refusal.map(|refusal| refusal.why);
                let (snapshot, mounts) = self.directory(NewSnapshot { why, ..new }).await?;
                Ok(match is_rebased {
                    true => mounts::rebased(&self.records.directory_of(snapshot.id)),
                    false => mounts,
                })
            }
        }
    }

    /// Creates a view.
    pub(super) async fn view(
        self: &Arc<Self>,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let new = NewSnapshot {
            name: key,
            parent,
            kind: SnapshotKind::View,
            labels,
            layer: None,
            why: None,
        };
        Ok(self.directory(new).await?.1)
    }

    /// The mounts of an active snapshot or a view.
    pub(super) async fn mounts(self: &Arc<Self>, key: &str) -> Result<Vec<Mount>, SnapshotError> {
        let snapshot = self.records.get(key)?;
        let directory = self.records.directory_of(snapshot.id);
        if snapshot.layer.is_some() && snapshot.kind == SnapshotKind::Active {
            return Ok(mounts::staged(&directory));
        }
        match snapshot.kind {
            SnapshotKind::Active => {
                let lowers = self.lowers(&snapshot, false).await?;
                Ok(mounts::active(&directory, &lowers))
            }
            SnapshotKind::View => {
                let lowers = self.lowers(&snapshot, false).await?;
                Ok(mounts::view(&directory, &lowers))
            }
            SnapshotKind::Committed => Err(SnapshotError::FailedPrecondition(format!(
                "snapshot {key} is neither active nor a view"
            ))),
        }
    }

    /// Creates a snapshot with a directory, and returns its mounts.
    async fn directory(
        self: &Arc<Self>,
        new: NewSnapshot,
    ) -> Result<(Arc<Snapshot>, Vec<Mount>), SnapshotError> {
        let snapshot = self.create(new).await?;
        let made = self.finish(&snapshot).await;
        if made.is_err()
            && let Err(error) = self.remove(snapshot.name.clone()).await
        {
            tracing::warn!("a snapshot that could not be made is left: {error}");
        }
        made.map(|mounts| (snapshot, mounts))
    }

    /// The mounts of a snapshot whose record is new.
    async fn finish(self: &Arc<Self>, snapshot: &Snapshot) -> Result<Vec<Mount>, SnapshotError> {
        let directory = self.records.directory_of(snapshot.id);
        let lowers = self.lowers(snapshot, true).await?;
        Ok(match snapshot.kind {
            SnapshotKind::View => mounts::view(&directory, &lowers),
            _ => mounts::active(&directory, &lowers),
        })
    }

    async fn create(self: &Arc<Self>, new: NewSnapshot) -> Result<Arc<Snapshot>, SnapshotError> {
        let records = Arc::clone(&self.records);
        run_blocking(move || records.create(new, make_directories)).await
    }

    /// Decides how an extraction is answered.
    async fn extraction(
        self: &Arc<Self>,
        extraction: &Extraction,
        new: &NewSnapshot,
    ) -> Result<Answer, SnapshotError> {
        if let Some(request) = &extraction.layer {
            self.images.verified(request).await?;
        }
        let is_rebased = is_rebased(extraction, new);
        let below = match new.parent.as_str() {
            "" => extraction.parent_chain,
            parent => match chain_id(&*self.records.get(parent)?) {
                Some(id) => Some(id),
                None => return Ok(Answer::Extract(None)), // it may be any layer's parent
            },
        };
        let existing = match is_rebased {
            true => None,
            false => self.existing(extraction, new),
        };
        if let Some(existing) = &existing
            && self.may_answer(existing, extraction)
        {
            return Ok(Answer::Exists(Prepared::Existing));
        }
        let Some(request) = &extraction.layer else {
            return Ok(Answer::Extract(None));
        };
        let layer = match self
            .lazy_layer(extraction, request, (&new.parent, below))
            .await
        {
            Ok(layer) => layer,
            Err(refusal) => {
                tracing::info!(
                    image = %request.image,
                    layer = %request.layer,
                    "containerd pulls the layer: {}",
                    refusal.why
                );
                return Ok(Answer::Extract(Some(refusal)));
            }
        };
        if is_rebased {
            return Ok(Answer::Staged(Box::new(layer)));
        }
        if let Some(existing) = existing {
            return Ok(self.compare(&existing, &layer));
        }
        let disk = layer.clone();
        let committed = NewSnapshot {
            name: lazy_name(&new.parent, &extraction.target),
            kind: SnapshotKind::Committed,
            layer: Some(layer.clone()),
            ..new.clone()
        };
        match self.create(committed).await {
            Ok(_) => {
                let prepared = prepared(&disk);
                self.sync_later(disk);
                Ok(Answer::Exists(prepared))
            }
            // another request has made it meanwhile
            Err(SnapshotError::AlreadyExists(_)) => {
                let existing = self.existing(extraction, new);
                Ok(existing.map_or(Answer::Extract(None), |it| self.compare(&it, &layer)))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether an unproven snapshot may stand for a layer: it has the same disk. Two snapshots of one chain ID and parent cannot be told
    /// apart by containerd, so it extracts a layer that is not the same, and thereby proves it.
    fn compare(self: &Arc<Self>, existing: &Snapshot, layer: &LazyLayer) -> Answer {
        match &existing.layer {
            Some(other) if (&other.blob, other.table) == (&layer.blob, layer.table) => {
                Answer::Exists(Prepared::Existing)
            }
            Some(other) => {
                let claim = (&layer.image, &layer.blob.digest);
                let why = self.note_conflict(other, claim, "containerd pulls the second");
                Answer::Extract(Some(Refusal {
                    reason: ExtractionReason::Conflict,
                    why,
                }))
            }
            None => Answer::Exists(Prepared::Existing),
        }
    }

    /// A layer that is used is compared with its diff ID as the policy says. One that containerd has pulled meanwhile is not fetched again.
    pub(super) fn compare_soon(&self, disk: &Arc<Disk>) {
        if self.options.unproven == Unproven::VerifySoon {
            let (engine, disk) = (Arc::clone(&self.engine), Arc::clone(disk));
            tokio::spawn(async move { images::check_soon(&engine, disk, START_TIME).await });
        }
    }

    /// A disk that was not synced is not used after a reboot.
    fn sync_later(self: &Arc<Self>, layer: LazyLayer) {
        let store = Arc::clone(self.engine.disks().store());
        tokio::task::spawn_blocking(move || {
            let disk = store.stored(&layer.blob.digest, &layer.table);
            let synced = disk.and_then(|disk| disk.map_or(Ok(()), |disk| disk.sync()));
            if let Err(error) = synced {
                tracing::warn!(layer = %layer.blob.digest, "{}", error.report());
            }
        });
    }

    /// The committed snapshot that containerd would take for this extraction.
    fn existing(&self, extraction: &Extraction, new: &NewSnapshot) -> Option<Arc<Snapshot>> {
        let target = extraction.target.to_string();
        let parent = Some(new.parent.as_str()).filter(|parent| !parent.is_empty());
        self.records.list().into_iter().find(|snapshot| {
            snapshot.kind == SnapshotKind::Committed
                && snapshot.parent.as_deref() == parent
                && snapshot.labels.get(TARGET) == Some(&target)
        })
    }

    /// Whether a snapshot may stand for a layer without a look at the image: it is proven to have the content that its chain ID names, or it
    /// is that of the same image.
    fn may_answer(&self, existing: &Snapshot, extraction: &Extraction) -> bool {
        let Some(layer) = &existing.layer else {
            return true; // containerd has compared it
        };
        let is_same = |request: &LayerRequest| {
            request.layer == layer.blob.digest && request.manifest == layer.manifest
        };
        extraction.layer.as_ref().is_some_and(is_same)
            || self
                .engine
                .disks()
                .store()
                .is_verified(&layer.blob, &layer.table)
    }

    /// Opens the layer of a request, and checks that the image has it where the chain IDs say.
    async fn lazy_layer(
        self: &Arc<Self>,
        extraction: &Extraction,
        request: &LayerRequest,
        (parent, below): (&str, Option<Digest>),
    ) -> Result<LazyLayer, Refusal> {
        let open = self.images.open(request).map_err(unshared)?;
        let image = open.wait(open.image()).await.map_err(Refusal::of)?;
        let position = image.position(&request.layer, &extraction.target);
        let position = position.filter(|position| image.chain_below(*position) == below);
        let Some(position) = position else {
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "the image has no layer {} with the chain ID {} on this parent",
                    request.layer, extraction.target
                ),
            )
            .into());
        };
        if let Some((below, _)) = position.checked_sub(1).and_then(|it| image.claim(it)) {
            self.compare_parent(parent, request, below)?;
        }
        let pull_time = self.options.pull_limits.time;
        let opened = open.layer_in_time(&image, position, pull_time).await;
        let opened = opened.map_err(|why| Refusal {
            // the choice, unless there was no time for it
            reason: match why {
                NotOpen::Late(_) => ExtractionReason::Late,
                NotOpen::Failed(_) => image.reason_not_to_open(position),
            },
            ..Refusal::of(why)
        })?;
        self.compare_soon(&opened.disk);
        Ok(LazyLayer {
            blob: opened.disk.layer().clone(),
            table: *opened.disk.table(),
            basis: opened.basis,
            chosen_by: opened.chosen_by,
            chain_id: extraction.target,
            image: request.image.clone(),
            manifest: request.manifest,
        })
    }
}

impl Answer {
    /// Counts the answer to a request for a layer.
    fn count(&self, began: Instant) {
        let prepared = match self {
            Self::Exists(prepared) => *prepared,
            Self::Staged(layer) => prepared(layer),
            Self::Extract(refusal) => {
                let reason = refusal.as_ref().map(|it| it.reason);
                let reason = reason.unwrap_or(ExtractionReason::Labels);
                METRICS.layers_extracted.count(reason as usize);
                return;
            }
        };
        METRICS.layers_prepared.count(prepared as usize);
        if prepared != Prepared::Existing {
            METRICS.layer_prepare.observe(began.elapsed());
        }
    }
}

impl Refusal {
    fn of(why: NotOpen) -> Self {
        match why {
            NotOpen::Late(error) => Self {
                reason: ExtractionReason::Late,
                why: error.report(),
            },
            NotOpen::Failed(error) => error.into(),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self {
            reason: ExtractionReason::Failure,
            why: error.report(),
        }
    }
}

/// What stands for a layer.
fn prepared(layer: &LazyLayer) -> Prepared {
    match layer.basis {
        DiskBasis::Compact | DiskBasis::Ztoc => Prepared::Lazy,
        DiskBasis::Verified | DiskBasis::Whole { .. } => Prepared::Disk,
    }
}

/// Whether containerd sets the parent when it commits. A committed snapshot would never get it.
fn is_rebased(extraction: &Extraction, new: &NewSnapshot) -> bool {
    new.parent.is_empty() && extraction.parent_chain.is_some()
}

/// The name of the lazy layer on a parent: there is one for each chain ID. No client's name begins so.
fn lazy_name(parent: &str, target: &Digest) -> String {
    format!(
        "/lazy/{}",
        Digest::of(format!("{parent} {target}").as_bytes()).hex()
    )
}

fn unshared(error: Arc<Error>) -> Error {
    Error::with_source(error.kind(), "opening the image", error)
}

/// The chain ID of a committed snapshot, as containerd or the image has it.
fn chain_id(snapshot: &Snapshot) -> Option<Digest> {
    match &snapshot.layer {
        Some(layer) => Some(layer.chain_id),
        None => snapshot.labels.get(TARGET)?.parse().ok(),
    }
}
