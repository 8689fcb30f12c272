//! Which SOCI index counts for an image.
//!
//! In this order, and the first that there is:
//! 1. the one that the caller names by its digest, from the image's own place or from the local root;
//! 2. version 2: the one that the image manifest's annotation names. It is bound to the image's digest. An annotation that leads
//!    nowhere is said, and version 1 is then not tried: the image's author has said which index is meant, and who can push to the
//!    repository shall not be able to put another in its place;
//! 3. version 1: of the referrers of the image manifest the newest (the last listed) that can be read;
//! 4. one in the local root, made by this host's operator; the newest.
//!
//! The compact index is looked for at the same time, by the same rules ([`super::compact_index`]), and goes before the SOCI index.
//!
//! [`IndexPolicy`] says whose word counts: step 3 is left out unless it is `any`, and all of them where it is `none`.
//!
//! An error of the registry (`Unavailable`) is an error here, never "there is none": whoever asks decides, and asks again later.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    compact_index::{self, CompactIndex},
    image::Image,
    local_indexes::LocalIndexes,
};
use crate::{
    error::{Error, Kind, Result, ResultExt},
    oci::{
        Digest,
        artifact::{What, what_is},
    },
    soci::index::{BlobRef, INDEX_DIGEST, IndexManifest, V1_TYPE, Version},
    source::{Manifest, Referrer, Source},
};

/// Bytes of the largest zTOC that is fetched: 10 GB of layer at 4 MiB a span have 80 MB.
pub const MAX_ZTOC_BYTES: u64 = 1 << 30;

/// Referrers that are tried, from the newest.
const MAX_TRIED: usize = 16;

/// Whose word about an image's layers counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum IndexPolicy {
    /// The image's own (version 2, bound to the image's digest), the caller's (`--index`), and this host's operator's (the local root).
    V2,
    /// As `v2`, and that of whoever may push to the image's repository (version 1).
    #[default]
    Any,
    /// Nobody's: each layer is downloaded whole, and checked against the image.
    None,
}

/// Which index a caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexChoice {
    /// This one and no other, by its digest: then any failure is an error.
    pub digest: Option<Digest>,
    /// Whose counts where none is named.
    #[serde(default)]
    pub policy: IndexPolicy,
    /// Whether to fail rather than go on without one, or with one that cannot be read for a layer.
    #[serde(default)]
    pub is_required: bool,
}

/// How an index was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Named by the caller.
    Given,
    /// By the annotation of the image manifest.
    Annotation,
    /// Among the referrers of the image manifest.
    Referrer,
    /// In the local root.
    Local,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given => "given",
            Self::Annotation => "annotation",
            Self::Referrer => "referrer",
            Self::Local => "local",
        })
    }
}

/// The SOCI index that counts for an image.
#[derive(Clone)]
pub struct SociIndex {
    /// Its digest.
    pub digest: Digest,
    /// 1 or 2.
    pub version: u8,
    /// How it was found.
    pub origin: Origin,
    /// The zTOCs of the image's layers, by the layer's digest.
    pub ztocs: BTreeMap<Digest, BlobRef>,
    /// The layers that it has a zTOC for which cannot be read, and why.
    pub unreadable: BTreeMap<Digest, String>,
    /// What it says, prefetch artifacts too.
    pub manifest: IndexManifest,
    place: Place,
}

/// Where an index and its zTOCs are.
#[derive(Clone)]
pub(crate) enum Place {
    Source(Source),
    Local(LocalIndexes),
}

impl Place {
    /// Whether it is on this host.
    pub(super) fn is_here(&self) -> bool {
        match self {
            Self::Source(source) => source.is_here(),
            Self::Local(_) => true,
        }
    }

    /// A blob of an index there, verified.
    pub(crate) async fn blob(&self, blob: &BlobRef, limit: u64) -> Result<Bytes> {
        match self {
            Self::Source(source) => source.blob(&blob.digest, blob.size, limit).await,
            Self::Local(local) => local.blob(&blob.digest, blob.size, limit).await,
        }
    }

    /// A manifest there, verified.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        match self {
            Self::Source(source) => source.manifest(digest).await,
            Self::Local(local) => local.manifest(digest).await,
        }
    }
}

/// The outcome of a search.
#[derive(Default)]
pub struct Found {
    /// The SOCI index, if there is one.
    pub index: Option<SociIndex>,
    /// The compact index, if there is one: it goes before the SOCI index, layer by layer.
    pub compact: Option<CompactIndex>,
    /// What the person should know: an index that could not be used, and why.
    pub warnings: Vec<String>,
}

impl SociIndex {
    /// Where its blobs are.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// The digest of a layer's zTOC, if it has one.
    pub fn ztoc(&self, layer: &Digest) -> Option<Digest> {
        self.ztocs.get(layer).map(|ztoc| ztoc.digest)
    }

    /// Fetches a layer's zTOC, verified against its digest and size.
    pub async fn fetch_ztoc(&self, layer: &Digest) -> Result<Bytes> {
        let context = || format!("SOCI index {}, zTOC of layer {layer}", self.digest);
        let Some(ztoc) = self.ztocs.get(layer) else {
            return Err(Error::new(Kind::NotFound, context()));
        };
        let fetched = self.place.blob(ztoc, MAX_ZTOC_BYTES).await;
        fetched.map_err(|error| error.context(context()))
    }
}

/// Finds the index that counts for an image.
pub async fn find(image: &Image, choice: &IndexChoice, local: &LocalIndexes) -> Result<Found> {
    let mut search = Search {
        image,
        local,
        warnings: Vec::new(),
    };
    let (index, compact) = match &choice.digest {
        // this one, whichever it is
        Some(digest) => match search.given_by_digest(digest, choice.policy).await? {
            Given::Soci(index) => (Some(*index), None),
            Given::Compact(compact) => (None, Some(compact)),
        },
        None => {
            let (index, compact) = tokio::try_join!(
                search.run(choice.policy),
                compact_index::find(image, choice.policy, local)
            )?;
            search.warnings.extend(compact.1);
            (index, compact.0)
        }
    };
    if choice.is_required {
        let unreadable = index
            .as_ref()
            .is_some_and(|index| !index.unreadable.is_empty());
        if index.is_none() && compact.is_none() || unreadable {
            return Err(required(image, &search.warnings));
        }
    }
    for warning in &search.warnings {
        tracing::warn!(image = %image.reference, "{warning}");
    }
    Ok(Found {
        index,
        compact,
        warnings: search.warnings,
    })
}

/// The error where an index is required and there is none.
fn required(image: &Image, warnings: &[String]) -> Error {
    let why = match warnings.is_empty() {
        true => "none is in its repository or on this host".to_owned(),
        false => warnings.join("; "),
    };
    Error::new(
        Kind::NotFound,
        format!(
            "{} ({}): a SOCI index is required: {why}",
            image.reference, image.digest
        ),
    )
}

/// What a digest has led to.
enum Given {
    Soci(Box<SociIndex>),
    Compact(CompactIndex),
}

struct Search<'a> {
    image: &'a Image,
    local: &'a LocalIndexes,
    warnings: Vec<String>,
}

impl Search<'_> {
    async fn given_by_digest(&mut self, digest: &Digest, policy: IndexPolicy) -> Result<Given> {
        if policy == IndexPolicy::None {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("--index names {digest}, and --index-policy none takes no index"),
            ));
        }
        self.given(digest).await
    }

    async fn run(&mut self, policy: IndexPolicy) -> Result<Option<SociIndex>> {
        if policy == IndexPolicy::None {
            return Ok(None);
        }
        if let Some(annotation) = self.annotation() {
            if let Some(index) = self.annotated(&annotation).await? {
                return Ok(Some(index));
            }
        } else if policy == IndexPolicy::Any
            && let Some(index) = self.referred().await?
        {
            return Ok(Some(index));
        }
        self.local().await
    }

    async fn given(&mut self, digest: &Digest) -> Result<Given> {
        let source = &self.image.source;
        let found = match source.manifest(digest).await {
            Ok(manifest) => Ok((manifest, Place::Source(source.clone()))),
            Err(error) if error.kind() == Kind::NotFound => self
                .local
                .manifest(digest)
                .await
                .map(|manifest| (manifest, Place::Local(self.local.clone())))
                // where the image is says more than that the local root has nothing either
                .map_err(|_| error),
            Err(error) => Err(error),
        };
        let (manifest, place) =
            found.map_err(|error| error.context(format!("SOCI index {digest}, as given")))?;
        if what_is(&manifest.bytes, &manifest.media_type) == What::CompactIndex {
            let source = match place {
                Place::Source(source) => source,
                Place::Local(local) => local.source().await?,
            };
            let compact = CompactIndex::read(&manifest, Origin::Given, &source)?;
            if !compact.is_of(self.image) {
                self.warn_of_another_image("compact", digest);
            }
            return Ok(Given::Compact(compact));
        }
        let index = self.read(&manifest, Origin::Given, place)?;
        if !self.is_of_this_image(&index.manifest) {
            self.warn_of_another_image("SOCI", digest);
        }
        Ok(Given::Soci(Box::new(index)))
    }

    fn warn_of_another_image(&mut self, kind: &str, digest: &Digest) {
        self.warnings.push(format!(
            "{kind} index {digest} was made for another image than {}",
            self.image.digest
        ));
    }

    fn annotation(&self) -> Option<String> {
        let annotations = self.image.manifest.annotations().as_ref()?;
        annotations.get(INDEX_DIGEST).cloned()
    }

    /// The index of version 2. `None` when the annotation leads to nothing that can be read.
    async fn annotated(&mut self, annotation: &str) -> Result<Option<SociIndex>> {
        let source = &self.image.source;
        let found = async {
            let digest: Digest = annotation.parse()?;
            let manifest = source.manifest(&digest).await?;
            self.read(&manifest, Origin::Annotation, Place::Source(source.clone()))
        };
        match found.await {
            Ok(index) => Ok(Some(index)),
            Err(error) if error.kind() == Kind::Unavailable => Err(error),
            Err(error) => {
                let annotation: String = annotation.chars().take(255).collect();
                self.warnings.push(format!(
                    "the image names the SOCI index {annotation:?}, which cannot be used, and so none of its repository is: {}",
                    error.report()
                ));
                Ok(None)
            }
        }
    }

    /// The newest index of version 1 that can be read.
    async fn referred(&mut self) -> Result<Option<SociIndex>> {
        let source = self.image.source.clone();
        match source.referrers(&self.image.digest, V1_TYPE).await {
            Ok(list) => {
                self.newest(&list, Origin::Referrer, &Place::Source(source))
                    .await
            }
            Err(error) if error.kind() == Kind::Unavailable => Err(error),
            Err(error) => {
                self.warnings.push(format!(
                    "SOCI indexes of this image cannot be looked for: {}",
                    error.report()
                ));
                Ok(None)
            }
        }
    }

    async fn local(&mut self) -> Result<Option<SociIndex>> {
        match self.local.of_image(&self.image.digest, V1_TYPE).await {
            Ok(list) => {
                self.newest(&list, Origin::Local, &Place::Local(self.local.clone()))
                    .await
            }
            Err(error) => {
                self.warnings
                    .push(format!("local SOCI indexes: {}", error.report()));
                Ok(None)
            }
        }
    }

    async fn newest(
        &mut self,
        list: &[Referrer],
        origin: Origin,
        place: &Place,
    ) -> Result<Option<SociIndex>> {
        for referrer in list.iter().rev().take(MAX_TRIED) {
            let fetched = place.manifest(&referrer.digest).await;
            let read = fetched.and_then(|manifest| self.of_version_1(&manifest, origin, place));
            match read {
                Ok(index) => return Ok(Some(index)),
                Err(error) if error.kind() == Kind::Unavailable => return Err(error),
                Err(error) => self.warnings.push(format!(
                    "SOCI index {} is left out: {}",
                    referrer.digest,
                    error.report()
                )),
            }
        }
        Ok(None)
    }

    fn of_version_1(
        &mut self,
        manifest: &Manifest,
        origin: Origin,
        place: &Place,
    ) -> Result<SociIndex> {
        let index = self.read(manifest, origin, place.clone())?;
        let refused = |what: &str| Err(Error::new(Kind::Corrupt, what));
        if index.manifest.version != Version::V1 {
            refused("it is not of version 1")
        } else if !self.is_of_this_image(&index.manifest) {
            refused("its subject is another image")
        } else if index.ztocs.is_empty() {
            refused("it has a zTOC for no layer of this image")
        } else {
            Ok(index)
        }
    }

    fn read(&mut self, manifest: &Manifest, origin: Origin, place: Place) -> Result<SociIndex> {
        let digest = manifest.digest;
        let parsed = IndexManifest::parse(&manifest.bytes)
            .or_kind(Kind::Corrupt, || format!("SOCI index {digest}"))?;
        let (mut ztocs, mut unreadable) = (BTreeMap::new(), BTreeMap::new());
        for layer in &self.image.layers {
            let why = match parsed.ztoc_of(&layer.digest) {
                Ok(None) => continue,
                Ok(Some(ztoc)) if ztoc.size <= MAX_ZTOC_BYTES => {
                    ztocs.insert(layer.digest, ztoc);
                    continue;
                }
                Ok(Some(ztoc)) => format!(
                    "its zTOC has {} bytes, where at most {MAX_ZTOC_BYTES} are read",
                    ztoc.size
                ),
                Err(error) => format!("SOCI index {digest}: {error}"),
            };
            self.warnings
                .push(format!("layer {} is not lazy: {why}", layer.digest));
            unreadable.insert(layer.digest, why);
        }
        Ok(SociIndex {
            digest,
            version: match parsed.version {
                Version::V1 => 1,
                Version::V2 => 2,
            },
            origin,
            ztocs,
            unreadable,
            manifest: parsed,
            place,
        })
    }

    /// Whether the subject, if there is one, is this image. AWS's tool accepts version 1 without a subject.
    fn is_of_this_image(&self, index: &IndexManifest) -> bool {
        index
            .subject
            .as_ref()
            .is_none_or(|subject| subject.digest == self.image.digest.to_string())
    }
}
