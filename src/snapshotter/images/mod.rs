//! Images whose layers are being opened: the first request for a layer opens all layers of the image.

mod check;
mod interest;
mod progress;
mod staged;

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    pin::pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout, timeout_at},
};

pub(super) use self::{
    check::{START_TIME, check_soon},
    staged::NotOpen,
};
use self::{
    interest::Interest,
    progress::while_it_arrives,
    staged::{Awaited, OpeningLayer, StagedImage, StagedLayer, awaited, late, shared, silent},
};
use super::{
    labels::LayerRequest,
    options::{SnapshotterOptions, Unproven},
    rules::{self, Choice, Pull},
};
use crate::{
    engine::{
        Engine,
        open::{
            disks::FoundImage,
            opened::{OpenEvent, OpenedLayer},
            policy::{IndexChoice, IndexPolicy},
        },
        space::image_record::LayerDisk,
        verifiers::Subject,
    },
    error::{Error, Kind, Result},
    layer::LayerBlob,
    oci::{Digest, Reference},
    source::{Access, Source},
};

/// Maximum time without progress that requests wait for the layers of an image: containerd locks its snapshots meanwhile.
const SILENT_TIME: Duration = Duration::from_secs(2);
/// Maximum time that they wait at all. What was not opened by then is pulled by containerd, which takes longer on a slow link or a busy node,
/// where opening takes more than two seconds.
const WAIT_TIME: Duration = Duration::from_secs(10);
/// Interval in which progress is looked at.
const LOOK_TIME: Duration = Duration::from_millis(100);
/// Maximum time that requests wait until the verifiers have accepted an image.
const VERDICT_TIME: Duration = Duration::from_secs(60);
/// How long an image stays open for requests for its layers.
const OPEN_TIME: Duration = Duration::from_secs(120);
/// How long a failure, also of the search for an index, is answered without another try.
const FAILURE_TIME: Duration = Duration::from_secs(3);
/// Maximum number of images that are opened at a time.
const MAX_IMAGES: usize = 256;
/// Number of layers without a table that are streamed in parallel, for each image, where no rule wants them.
const STREAMS_AT_ONCE: usize = 3;
/// Limits of the number of layers of all images that are pulled into disks in parallel: one for each processor. Each has up to 16 MiB of its
/// blob in memory.
const PULLS_AT_ONCE: (usize, usize) = (3, 8);

/// The images that are being opened, or were a moment ago.
pub(super) struct Images {
    engine: Arc<Engine>,
    options: Arc<SnapshotterOptions>,
    open: Mutex<HashMap<ImageKey, Arc<OpenImage>>>,
    /// Permits of the layers that a rule or a label wants on disks.
    pulls: Semaphore,
}

/// An image that is being opened.
pub(super) struct OpenImage {
    /// Whether the verifiers accept it.
    verdict: Awaited<()>,
    opening: Awaited<Arc<StagedImage>>,
    /// The source of the image, when it is known.
    source: Arc<OnceLock<Source>>,
    /// When the first request has begun to wait for a layer that is not open yet.
    began: OnceLock<Instant>,
    interest: Arc<Interest>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ImageKey {
    image: Reference,
    index: Option<Digest>,
    /// How the label says that it is pulled.
    pull: Option<Pull>,
    /// Whether it is opened for a layer that has a snapshot: then containerd does not pull it.
    is_again: bool,
    named: Option<Reference>,
    headers: BTreeMap<String, String>,
}

impl OpenImage {
    /// The image, when its manifest and its indexes were read.
    pub(super) async fn image(&self) -> Result<Arc<StagedImage>, Arc<Error>> {
        self.opening.clone().await
    }

    /// The layer at a position, when it is opened.
    pub(super) async fn layer(
        &self,
        image: &StagedImage,
        position: usize,
    ) -> Result<StagedLayer, Arc<Error>> {
        let _waiting = self.interest.enter();
        image.opening(position)?.work.clone().await
    }

    /// The same within the time for which containerd may be held up: `pull_time` if a rule or a label wants the layer on a disk. If such a layer
    /// fails, containerd fetches all layers from this one on, so the others are not fetched twice.
    pub(super) async fn layer_in_time(
        &self,
        image: &StagedImage,
        position: usize,
        pull_time: Duration,
    ) -> Result<StagedLayer, NotOpen> {
        let opening = image.opening(position);
        let opening = opening.map_err(|error| NotOpen::Failed(shared(error)))?;
        if !opening.is_pulled() {
            return self.wait(self.layer(image, position)).await;
        }
        let pulled = timeout(pull_time, self.layer(image, position)).await;
        let pulled = match pulled {
            Ok(pulled) => pulled.map_err(|error| NotOpen::Failed(shared(error))),
            Err(_) => Err(late(pull_time)),
        };
        if pulled.is_err() {
            self.interest.end();
        }
        pulled
    }

    /// Waits for a part of the image until its registry makes no progress, or its time is over. The time begins with the first request, so an
    /// image that is opened slowly does not hold up containerd once for each of its layers.
    pub(super) async fn wait<T>(
        &self,
        part: impl Future<Output = Result<T, Arc<Error>>>,
    ) -> Result<T, NotOpen> {
        let deadline = *self.began.get_or_init(Instant::now) + WAIT_TIME;
        let mut part = pin!(part);
        loop {
            let look = deadline.min(Instant::now() + LOOK_TIME);
            if let Ok(done) = timeout_at(look, &mut part).await {
                return done.map_err(|error| NotOpen::Failed(shared(error)));
            }
            let source = self.source.get();
            if source.is_some_and(|source| source.is_silent(SILENT_TIME)) {
                return Err(silent());
            }
            if look == deadline {
                return Err(late(WAIT_TIME));
            }
        }
    }
}

impl Images {
    pub(super) fn new(engine: Arc<Engine>, options: Arc<SnapshotterOptions>) -> Arc<Self> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            engine,
            options,
            open: Mutex::default(),
            pulls: Semaphore::new(processors.clamp(PULLS_AT_ONCE.0, PULLS_AT_ONCE.1)),
        })
    }

    /// Opens the image of a request, or joins the opening, which goes on although nobody waits.
    pub(super) fn open(
        self: &Arc<Self>,
        request: &LayerRequest,
    ) -> Result<Arc<OpenImage>, Arc<Error>> {
        self.open_as(request, false)
    }

    /// The same for a layer that has a snapshot, whose disk is needed again.
    pub(super) fn open_again(
        self: &Arc<Self>,
        request: &LayerRequest,
    ) -> Result<Arc<OpenImage>, Arc<Error>> {
        self.open_as(request, true)
    }

    fn open_as(
        self: &Arc<Self>,
        request: &LayerRequest,
        is_again: bool,
    ) -> Result<Arc<OpenImage>, Arc<Error>> {
        let key = ImageKey {
            image: request.image.clone(),
            index: request.index,
            pull: request.pull,
            is_again,
            named: request.named.clone(),
            headers: request.headers.clone(),
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.len();
        match open.entry(key) {
            Entry::Occupied(opening) => Ok(Arc::clone(opening.get())),
            Entry::Vacant(_) if count >= MAX_IMAGES => {
                let why = format!("{MAX_IMAGES} images are being opened already");
                Err(Arc::new(Error::new(Kind::Unavailable, why)))
            }
            Entry::Vacant(place) => {
                let (images, key) = (Arc::clone(self), place.key().clone());
                let interest = Interest::new();
                let of_layers = Arc::clone(&interest);
                let source = Arc::default();
                let opened = Arc::clone(&source);
                let verdict = {
                    let (images, key) = (Arc::clone(self), key.clone());
                    awaited(async move { images.verify(&key).await })
                };
                let accepted = verdict.clone();
                let opening = awaited(async move {
                    accepted.await.map_err(shared)?;
                    images.start(&key, &opened, &of_layers).await.map(Arc::new)
                });
                self.forget_later(place.key().clone(), opening.clone());
                let image = OpenImage {
                    verdict,
                    opening,
                    source,
                    began: OnceLock::new(),
                    interest,
                };
                Ok(Arc::clone(place.insert(Arc::new(image))))
            }
        }
    }

    /// Waits until the verifiers have accepted the image of a request. An error: it must not be used.
    pub(super) async fn verified(self: &Arc<Self>, request: &LayerRequest) -> Result<()> {
        let verifiers = self.engine.disks().verifiers();
        let Some(named) = request.named.as_ref().filter(|it| verifiers.apply_to(it)) else {
            return Ok(());
        };
        let open = self.open(request).map_err(shared)?;
        let verdict = timeout(VERDICT_TIME, open.verdict.clone()).await;
        let verdict = verdict.map_err(|_| {
            let time = VERDICT_TIME.as_secs();
            let why = format!("{named} was not verified within {time} s");
            Error::new(Kind::Unavailable, why)
        })?;
        verdict.map_err(shared)
    }

    async fn verify(&self, key: &ImageKey) -> Result<()> {
        let verifiers = self.engine.disks().verifiers();
        let (Some(named), Reference::Registry { digest, .. }) = (&key.named, &key.image) else {
            return Ok(());
        };
        let Some(manifest) = digest.filter(|_| verifiers.apply_to(named)) else {
            return Ok(());
        };
        let find = Subject::of_pulled(named, &manifest, &self.options.access);
        verifiers.verify_found(named, find).await
    }

    /// Forgets the image of a request: the next one opens it again.
    pub(super) fn forget(&self, request: &LayerRequest) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|key, _| key.image != request.image);
    }

    /// Forgets an image after some time; what failed is tried again soon.
    fn forget_later(self: &Arc<Self>, key: ImageKey, opening: Awaited<Arc<StagedImage>>) {
        let images = Arc::clone(self);
        tokio::spawn(async move {
            let time = match opening.clone().await {
                Ok(image) if image.has_failed().await => FAILURE_TIME,
                Ok(_) => OPEN_TIME,
                Err(_) => FAILURE_TIME,
            };
            tokio::time::sleep(time).await;
            let mut open = images.open.lock().unwrap_or_else(PoisonError::into_inner);
            // it may have been opened again meanwhile
            let is_this = |image: &Arc<OpenImage>| image.opening.ptr_eq(&opening);
            if open.get(&key).is_some_and(is_this) {
                open.remove(&key);
            }
        });
    }

    /// Resolves an image, and starts to open its layers.
    async fn start(
        self: &Arc<Self>,
        key: &ImageKey,
        opened: &OnceLock<Source>,
        interest: &Arc<Interest>,
    ) -> Result<StagedImage> {
        let choice = IndexChoice {
            digest: key.index.or(self.options.index.digest),
            ..match self.options.unproven {
                Unproven::Stream => IndexChoice {
                    policy: IndexPolicy::None,
                    ..IndexChoice::default()
                },
                _ => self.options.index,
            }
        };
        let disks = self.engine.disks();
        let access = Access {
            headers: key.headers.clone(),
            ..self.options.access.clone()
        };
        let source = disks.source(&key.image, &access).await?;
        let source = opened.get_or_init(|| source);
        let found = disks.find_verified_image(source, &choice).await?;
        let chain = found.image.config.chain_ids();
        let layers: Vec<_> = found.image.layers.iter().cloned().zip(chain).collect();
        let has_warnings = !found.indexes.warnings.is_empty();
        let found = Arc::new(found);
        let streams = Arc::new(Semaphore::new(STREAMS_AT_ONCE));
        let mut opening = HashMap::new();
        for (blob, choice) in self.choices(key, &found, &layers) {
            opening.entry(blob.digest).or_insert_with(|| {
                let (images, found, streams, interest) = (
                    Arc::clone(self),
                    Arc::clone(&found),
                    Arc::clone(&streams),
                    Arc::clone(interest),
                );
                let (blob, chosen) = (blob.clone(), choice.clone());
                let work = async move {
                    images
                        .layer(&found, &blob, chosen, &streams, &interest)
                        .await
                };
                OpeningLayer {
                    choice,
                    work: awaited(work),
                }
            });
        }
        let of = |pull: Pull| -> Vec<Awaited<StagedLayer>> {
            let layers = opening.values().filter(|it| it.choice.pull == pull);
            layers.map(|layer| layer.work.clone()).collect()
        };
        let (lazy, whole) = (of(Pull::Lazy), of(Pull::Disks));
        let engine = Arc::clone(&self.engine);
        tokio::spawn(async move { record(&engine, &found, lazy, whole).await });
        Ok(StagedImage::new(layers, opening, has_warnings))
    }

    /// How each layer of an image is pulled.
    fn choices<'a>(
        &self,
        key: &ImageKey,
        found: &FoundImage,
        layers: &'a [(LayerBlob, Digest)],
    ) -> Vec<(&'a LayerBlob, Choice)> {
        let sizes = layers.iter().map(|(blob, _)| blob.size);
        let image_size = sizes.fold(0, u64::saturating_add);
        let has_index = layers.iter().any(|(blob, _)| found.has_table(blob));
        let choose = |blob: &LayerBlob| {
            let has_table = found.has_table(blob);
            if key.is_again {
                return Choice {
                    pull: if has_table { Pull::Lazy } else { Pull::Disks },
                    is_asked_for: true,
                    by: "its snapshot needs it again".to_owned(),
                };
            }
            let layer = rules::Layer {
                image: &key.image,
                image_size,
                image_has_index: has_index || self.options.unproven == Unproven::Stream,
                size: blob.size,
                has_table,
            };
            rules::choose(&self.options.rules, key.pull, &layer)
        };
        let layers = layers.iter();
        layers.map(|(blob, _)| (blob, choose(blob))).collect()
    }

    async fn layer(
        &self,
        found: &Arc<FoundImage>,
        blob: &LayerBlob,
        choice: Choice,
        streams: &Semaphore,
        interest: &Interest,
    ) -> Result<StagedLayer> {
        let disks = self.engine.disks();
        let by = choice.by;
        let opened = match (choice.pull, choice.is_asked_for) {
            (Pull::Lazy, _) => {
                let (opened, warning) = disks.open_layer(found, blob, streams, &|_| {}).await?;
                if let Some(warning) = warning {
                    tracing::warn!(image = %found.image.reference, "{warning}");
                }
                opened
            }
            (Pull::Disks, true) => self.pull(found, blob, &by, interest).await?,
            (Pull::Disks, false) => {
                let why = by.clone();
                disks
                    .open_whole_layer(found, blob, streams, why, &|_| {})
                    .await?
            }
            (Pull::Containerd, true) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("{by} leaves it to containerd"),
                ));
            }
            (Pull::Containerd, false) => {
                let verified = disks.verified_layer(blob).await?;
                let why = || {
                    let why = format!("no index has a table for layer {}", blob.digest);
                    Error::new(Kind::NotFound, why)
                };
                verified.ok_or_else(why)?
            }
        };
        Ok(StagedLayer {
            disk: opened.disk,
            basis: opened.basis,
            chosen_by: by,
        })
    }

    /// Pulls a layer into a disk because a rule or a label says so: as long as it brings bytes and somebody waits for its image.
    async fn pull(
        &self,
        found: &FoundImage,
        blob: &LayerBlob,
        by: &str,
        interest: &Interest,
    ) -> Result<OpenedLayer> {
        let arrived = AtomicU64::new(0);
        let event = |event| {
            if let OpenEvent::Streaming { done, .. } = event {
                arrived.store(done, Ordering::Relaxed);
            }
        };
        let disks = self.engine.disks();
        let why = by.to_owned();
        let pulling = disks.open_whole_layer(found, blob, &self.pulls, why, &event);
        let arrived = || arrived.load(Ordering::Relaxed);
        let limits = &self.options.pull_limits;
        while_it_arrives(pulling, arrived, blob, limits, interest).await
    }
}

/// Connects the lazy layers of an image, and records the image and its disks when they are there.
async fn record(
    engine: &Engine,
    found: &FoundImage,
    lazy: Vec<Awaited<StagedLayer>>,
    whole: Vec<Awaited<StagedLayer>>,
) {
    let disks = engine.disks();
    let mut known = Vec::new();
    for (layers, are_lazy) in [(lazy, true), (whole, false)] {
        let layers = join_all(layers).await.into_iter().flatten();
        let layers: Vec<OpenedLayer> = layers
            .map(|layer| OpenedLayer {
                disk: layer.disk,
                basis: layer.basis,
            })
            .collect();
        if are_lazy {
            disks.start_together(found, &layers);
        }
        known.extend(layers.iter().map(|layer| LayerDisk::of(&layer.disk)));
        if !layers.is_empty() {
            let image = &found.image;
            disks.record_image(&image.reference, image.digest, known.clone());
        }
    }
}
