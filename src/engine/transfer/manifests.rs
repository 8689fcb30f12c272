//! Copies manifests with everything that they refer to.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture};
use serde::Serialize;
use serde_json::Value;

use crate::{
    compact::{manifest as compact, manifest::ARTIFACT_TYPE as COMPACT_TYPE},
    engine::open::platforms::{MAX_DEPTH, too_deep},
    error::{Error, Kind, Result, ResultExt as _},
    oci::{
        Digest, Platform,
        artifact::what_is_type,
        index_edit::{Edit, digest_of, edit},
        media_type::{OCI_INDEX, is_foreign_layer},
        platform::candidate,
    },
    soci::{
        convert::{Converted, image_index},
        index::{IMAGE_MANIFEST_DIGEST, V2_TYPE},
    },
    source::{Copied, Destination, Manifest, Source},
};

/// Maximum number of manifests per copy.
const MAX_MANIFESTS: usize = 4096;

/// Counters of the blobs of a copy.
#[derive(Debug, Default)]
pub(crate) struct BlobTally {
    present: AtomicU64,
    mounted: AtomicU64,
    uploaded: AtomicU64,
    uploaded_bytes: AtomicU64,
}

/// The counts of a [`Tally`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlobCounts {
    /// Blobs that existed at the destination.
    pub present: u64,
    /// Blobs that the registry has mounted from another of its repositories.
    pub mounted: u64,
    /// Blobs that were uploaded.
    pub uploaded: u64,
    /// Size of the uploaded blobs in bytes.
    pub uploaded_bytes: u64,
}

impl BlobTally {
    /// Counts one blob.
    pub(crate) fn count(&self, copied: Copied, size: u64) {
        match copied {
            Copied::Present => &self.present,
            Copied::Mounted => &self.mounted,
            Copied::Uploaded => {
                self.uploaded_bytes.fetch_add(size, Ordering::Relaxed);
                &self.uploaded
            }
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    pub(crate) fn counts(&self) -> BlobCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlobCounts {
            present: of(&self.present),
            mounted: of(&self.mounted),
            uploaded: of(&self.uploaded),
            uploaded_bytes: of(&self.uploaded_bytes),
        }
    }
}

impl fmt::Display for BlobCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            present,
            mounted,
            uploaded,
            uploaded_bytes,
        } = self;
        write!(
            f,
            "blobs: {present} present, {mounted} mounted, {uploaded} uploaded ({uploaded_bytes} bytes)"
        )
    }
}

/// A copy of manifests of a source with everything that they refer to.
///
/// An entry of an index that is missing at the source is left out, unless the destination has it; the index at the destination then
/// differs. It also differs if it lists converted images. Everything else is copied byte for byte.
pub(crate) struct ManifestCopier<'a> {
    pub(crate) source: &'a Source,
    pub(crate) destination: &'a Destination,
    /// Number of parallel uploads.
    pub(crate) uploads: usize,
    pub(crate) tally: &'a BlobTally,
    /// Converted images; their entries are replaced.
    converted: &'a [Converted],
    /// Digests of old SOCI indexes that are replaced by new ones.
    replaced: HashSet<String>,
    outcomes: HashMap<Digest, EntryOutcome>,
    /// Index entries that were copied unchanged, in their order.
    pub(crate) copied: Vec<CopiedManifest>,
    /// Warnings about entries that were left out and foreign layers that were not copied.
    pub(crate) warnings: Vec<String>,
}

/// An index entry that was copied.
pub(crate) struct CopiedManifest {
    pub(crate) digest: Digest,
    /// Whether the entry has an artifact type.
    pub(crate) is_artifact: bool,
}

/// The outcome of an index entry.
#[derive(Clone)]
enum EntryOutcome {
    /// The destination has it unchanged.
    Kept,
    /// It is missing at source and destination.
    LeftOut,
    /// The destination has this manifest instead.
    Replaced(Manifest),
}

impl<'a> ManifestCopier<'a> {
    pub(crate) fn new(
        source: &'a Source,
        destination: &'a Destination,
        uploads: usize,
        tally: &'a BlobTally,
    ) -> Self {
        Self {
            source,
            destination,
            uploads: uploads.max(1),
            tally,
            converted: &[],
            replaced: HashSet::new(),
            outcomes: HashMap::new(),
            copied: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Adds converted images.
    pub(crate) fn with_converted(self, converted: &'a [Converted]) -> Self {
        let replaced = converted.iter().filter_map(|image| image.replaces.clone());
        Self {
            replaced: replaced.collect(),
            converted,
            ..self
        }
    }

    /// Copies everything that a manifest refers to, then the manifest. Returns the manifest at the destination.
    pub(crate) async fn copy(&mut self, manifest: &Manifest) -> Result<Manifest> {
        let copied = self.copy_references(manifest).await?;
        self.destination
            .put_manifest(&copied.media_type, &copied.bytes)
            .await?;
        Ok(copied)
    }

    /// Copies everything that a manifest refers to. Returns the manifest to write.
    pub(crate) async fn copy_references(&mut self, manifest: &Manifest) -> Result<Manifest> {
        let copied = self.document(manifest, 0).await?;
        copied.ok_or_else(|| {
            let text = format!(
                "all images are missing at the source: {}",
                self.warnings.join("; ")
            );
            Error::new(Kind::NotFound, text)
        })
    }

    /// Copies the blobs of a manifest, but not the manifest.
    pub(super) async fn copy_blobs(&mut self, manifest: &Manifest) -> Result<()> {
        let digest = manifest.digest;
        let document: Value = serde_json::from_slice(&manifest.bytes)
            .or_kind(Kind::Corrupt, || format!("manifest {digest}"))?;
        let left = self
            .blobs(&document)
            .await
            .map_err(|error| error.context(format!("manifest {digest}")))?;
        self.warnings.extend(left);
        Ok(())
    }

    /// Copies everything that a document refers to; `None` if it lists images and all are missing.
    fn document<'b>(
        &'b mut self,
        manifest: &'b Manifest,
        depth: usize,
    ) -> BoxFuture<'b, Result<Option<Manifest>>> {
        Box::pin(async move {
            self.copy_blobs(manifest).await?;
            let digest = manifest.digest;
            let context = || format!("manifest {digest}");
            let document: Value =
                serde_json::from_slice(&manifest.bytes).or_kind(Kind::Corrupt, context)?;
            let entries = list(&document, "manifests");
            if entries.is_empty() {
                return Ok(Some(manifest.clone()));
            }
            if depth == MAX_DEPTH {
                return Err(too_deep(&digest));
            }
            let mut edits = HashMap::new();
            let (mut images, mut left_out) = (0_usize, 0_usize);
            // images first, then attestations and indexes that belong to them
            let (images_first, then): (Vec<&Value>, Vec<&Value>) = entries
                .iter()
                .partition(|entry| belongs_to(entry).is_none());
            for entry in images_first.into_iter().chain(then) {
                let is_image = may_be_image(entry);
                images += usize::from(is_image);
                let edit = match self.entry(entry, depth).await? {
                    EntryOutcome::Kept => continue,
                    EntryOutcome::LeftOut => {
                        left_out += usize::from(is_image);
                        Edit::LeaveOut
                    }
                    EntryOutcome::Replaced(new) => Edit::Replace {
                        media_type: new.media_type,
                        digest: new.digest,
                        size: new.bytes.len(),
                    },
                };
                edits.insert(digest_of(entry).to_owned(), edit);
            }
            if images > 0 && images == left_out {
                return Ok(None);
            }
            self.written(manifest, entries, &edits).map(Some)
        })
    }

    /// The index to write, with these edits and the converted images.
    fn written(
        &self,
        index: &Manifest,
        entries: &[Value],
        edits: &HashMap<String, Edit>,
    ) -> Result<Manifest> {
        let context = || format!("index {}", index.digest);
        let mut written = index.clone();
        if !edits.is_empty() {
            let edited = edit(&index.bytes, edits).or_kind(Kind::Corrupt, context)?;
            written.bytes = edited.into();
        }
        let is_listed = |image: &&Converted| {
            let old = image.old.to_string();
            entries.iter().any(|entry| digest_of(entry) == old)
        };
        let converted: Vec<Converted> = self.converted.iter().filter(is_listed).cloned().collect();
        if !converted.is_empty() {
            let bytes = image_index(Some(&written.bytes), &converted);
            written.bytes = bytes.or_kind(Kind::Corrupt, context)?.into();
            written.media_type = OCI_INDEX.to_owned();
        }
        written.digest = Digest::of(&written.bytes);
        Ok(written)
    }

    /// Copies an index entry.
    async fn entry(&mut self, entry: &Value, depth: usize) -> Result<EntryOutcome> {
        let text = digest_of(entry);
        let name = name_of(entry);
        let image = belongs_to(entry);
        if self.is_converted(text) || self.replaced.contains(text) || self.is_replaced(entry, image)
        {
            return Ok(EntryOutcome::Kept); // the entry is replaced later
        }
        let image = image.and_then(|image| self.outcomes.get(&image.parse().ok()?));
        if matches!(image, Some(EntryOutcome::LeftOut)) {
            self.warnings.push(format!(
                "{name} ({text}) belongs to a missing image and is left out"
            ));
            return Ok(EntryOutcome::LeftOut);
        }
        let digest: Digest = match text.parse() {
            Ok(digest) => digest,
            Err(error) => {
                self.warnings
                    .push(format!("{name} cannot be copied and is left out: {error}"));
                return Ok(EntryOutcome::LeftOut);
            }
        };
        if let Some(outcome) = self.outcomes.get(&digest) {
            return Ok(outcome.clone());
        }
        if self.outcomes.len() == MAX_MANIFESTS {
            return Err(Error::new(
                Kind::Unsupported,
                format!("the image index leads to more than {MAX_MANIFESTS} manifests"),
            ));
        }
        let outcome = match self.source.manifest(&digest).await {
            Ok(child) => self
                .child(&child, depth)
                .await
                .map_err(|error| error.context(&name))?,
            Err(error) if error.kind() != Kind::NotFound => return Err(error),
            Err(_) if self.is_at_destination(&digest).await? => EntryOutcome::Kept,
            Err(error) if is_index_of_ours(entry) => {
                let text = format!("{name} is missing: make it again with `socinbd convert`");
                return Err(error.context(text));
            }
            Err(_) => EntryOutcome::LeftOut,
        };
        match &outcome {
            EntryOutcome::LeftOut => self.warnings.push(format!(
                "{name} ({digest}) is listed, but missing, and is left out"
            )),
            EntryOutcome::Kept => self.copied.push(CopiedManifest {
                digest,
                is_artifact: entry.get("artifactType").is_some(),
            }),
            EntryOutcome::Replaced(_) => {}
        }
        self.outcomes.insert(digest, outcome.clone());
        Ok(outcome)
    }

    fn is_converted(&self, image: &str) -> bool {
        let mut converted = self.converted.iter();
        converted.any(|converted| converted.old.to_string() == image)
    }

    /// Whether an entry is the SOCI or compact index of a converted image and is replaced by a new one.
    fn is_replaced(&self, entry: &Value, image: Option<&str>) -> bool {
        self.converted.iter().any(|converted| {
            image.is_some_and(|image| converted.old.to_string() == image)
                && (entry["artifactType"] == V2_TYPE
                    || entry["artifactType"] == COMPACT_TYPE && converted.compact.is_some())
        })
    }

    async fn child(&mut self, child: &Manifest, depth: usize) -> Result<EntryOutcome> {
        let Some(written) = self.document(child, depth + 1).await? else {
            return Ok(EntryOutcome::LeftOut);
        };
        self.destination
            .put_manifest(&written.media_type, &written.bytes)
            .await?;
        Ok(match written.digest == child.digest {
            true => EntryOutcome::Kept,
            false => EntryOutcome::Replaced(written),
        })
    }

    async fn is_at_destination(&self, digest: &Digest) -> Result<bool> {
        let Some(there) = self.destination.source().await? else {
            return Ok(false);
        };
        match there.manifest(digest).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Copies the blobs of a manifest. Returns warnings about foreign layers that were not copied.
    async fn blobs(&self, document: &Value) -> Result<Vec<String>> {
        let config = document.get("config").filter(|config| config.is_object());
        let named = config
            .into_iter()
            .chain(list(document, "layers"))
            .chain(list(document, "blobs")); // of OCI artifact manifests
        let mut seen = HashSet::new();
        let mut blobs = Vec::new();
        for descriptor in named {
            let (digest, size) = blob_of(descriptor)?;
            let media_type = descriptor["mediaType"].as_str().unwrap_or_default();
            let is_foreign = !list(descriptor, "urls").is_empty() || is_foreign_layer(media_type);
            if seen.insert(digest) {
                blobs.push((digest, size, is_foreign));
            }
        }
        futures_util::stream::iter(blobs)
            .map(|(digest, size, is_foreign)| self.blob(digest, size, is_foreign))
            .buffer_unordered(self.uploads)
            .try_filter_map(|left| async { Ok(left) })
            .try_collect()
            .await
    }

    async fn blob(&self, digest: Digest, size: u64, is_foreign: bool) -> Result<Option<String>> {
        let copied = self
            .destination
            .copy_blob(self.source, &digest, size, None)
            .await;
        match copied {
            Ok(copied) => self.tally.count(copied, size),
            // registries need not store foreign layers
            Err(error) if is_foreign && error.kind() == Kind::NotFound => {
                return Ok(Some(foreign_layer_left(&digest)));
            }
            Err(error) => return Err(error),
        }
        Ok(None)
    }
}

/// The warning about a foreign layer that was not copied.
pub(crate) fn foreign_layer_left(digest: &Digest) -> String {
    format!("foreign layer {digest} is missing at the source: only its descriptor is copied")
}

/// The image that an entry belongs to, by its annotations: attestations, SOCI and compact indexes.
fn belongs_to(entry: &Value) -> Option<&str> {
    [
        "vnd.docker.reference.digest",
        IMAGE_MANIFEST_DIGEST,
        compact::IMAGE_MANIFEST_DIGEST,
    ]
    .into_iter()
    .find_map(|key| entry["annotations"][key].as_str())
}

/// Whether an entry is a SOCI or compact index. Without it, the image that names it is not lazy.
fn is_index_of_ours(entry: &Value) -> bool {
    entry["artifactType"] == V2_TYPE || entry["artifactType"] == COMPACT_TYPE
}

/// Whether an entry may be an image or an index of images.
fn may_be_image(entry: &Value) -> bool {
    serde_json::from_value(entry.clone()).is_ok_and(|entry| candidate(&entry).is_some())
}

/// The kind of an entry, for messages.
fn name_of(entry: &Value) -> String {
    let part = |key: &str| entry["platform"][key].as_str().unwrap_or_default();
    let kind = match entry["artifactType"].as_str() {
        Some(kind) => what_is_type(kind).to_string(),
        None if entry["annotations"]["vnd.docker.reference.type"].is_string() => {
            "an attestation".to_owned()
        }
        None if part("os").is_empty() || part("os") == "unknown" => return "a manifest".to_owned(),
        None => "the image".to_owned(),
    };
    let variant = Some(part("variant")).filter(|variant| !variant.is_empty());
    match part("os") {
        "" | "unknown" => kind,
        os => format!(
            "{kind} for {}",
            Platform::new(os, part("architecture"), variant)
        ),
    }
}

fn list<'a>(document: &'a Value, key: &str) -> &'a [Value] {
    document
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn blob_of(descriptor: &Value) -> Result<(Digest, u64)> {
    let text = descriptor["digest"].as_str().unwrap_or_default();
    let size = descriptor["size"].as_u64().ok_or_else(|| {
        Error::new(
            Kind::Corrupt,
            format!("the descriptor of {text:?} has no size"),
        )
    })?;
    Ok((text.parse()?, size))
}
