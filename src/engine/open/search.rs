//! Which index of an image counts, of each kind: SOCI's and the compact one.
//!
//! In this order, and the first that there is:
//! 1. the one that the caller names by its digest, from the image's own place or from the local root;
//! 2. version 2: the one that the image manifest's annotation names. It is bound to the image's digest. An annotation that leads
//!    nowhere is said, and version 1 is then not tried: the image's author has said which index is meant, and who can push to the
//!    repository shall not be able to put another in its place;
//! 3. version 1: of the referrers of the image manifest the newest (the last listed) that can be read;
//! 4. one in the local root, made by this host's operator; the newest.
//!
//! Both kinds are looked for at the same time, by the same rules; the compact index goes before the SOCI index, layer by layer. For a compact
//! index an annotation of either kind bars the referrers.
//!
//! [`IndexPolicy`] says whose word counts: step 3 is left out unless it is `any`, and all of them where it is `none`.
//!
//! An error of the registry (`Unavailable`) is an error here, never "there is none": whoever asks decides, and asks again later.

use super::{
    compact_index::CompactIndex,
    image::Image,
    image_index::ImageIndex,
    local_indexes::LocalIndexes,
    policy::{IndexChoice, IndexOrigin, IndexPolicy},
    soci_index::SociIndex,
};
use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest,
        artifact::{What, what_is},
    },
    source::{Manifest, Referrer, Source},
};

/// Referrers that are tried, from the newest.
const MAX_TRIED: usize = 16;

/// The outcome of a search.
#[derive(Default)]
pub struct FoundIndexes {
    /// The SOCI index, if there is one.
    pub index: Option<SociIndex>,
    /// The compact index, if there is one: it goes before the SOCI index, layer by layer.
    pub compact: Option<CompactIndex>,
    /// What the person should know: an index that could not be used, and why.
    pub warnings: Vec<String>,
}

/// Finds the indexes that count for an image.
pub async fn find(
    image: &Image,
    choice: &IndexChoice,
    local: &LocalIndexes,
) -> Result<FoundIndexes> {
    let new = || IndexSearch {
        image,
        local,
        warnings: Vec::new(),
    };
    let found = match &choice.digest {
        // this one, whichever it is
        Some(digest) => new().given(digest, choice.policy).await?,
        None => {
            let (mut soci, mut compact) = (new(), new());
            let (index, compact_index) =
                tokio::try_join!(soci.run(choice.policy), compact.run(choice.policy))?;
            soci.warnings.extend(compact.warnings);
            FoundIndexes {
                index,
                compact: compact_index,
                warnings: soci.warnings,
            }
        }
    };
    if choice.is_required {
        let unreadable = found
            .index
            .as_ref()
            .is_some_and(|it| !it.unreadable.is_empty());
        if found.index.is_none() && found.compact.is_none() || unreadable {
            return Err(required(image, &found.warnings));
        }
    }
    for warning in &found.warnings {
        tracing::warn!(image = %image.reference, "{warning}");
    }
    Ok(found)
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

/// A search for the index of one kind.
struct IndexSearch<'a> {
    image: &'a Image,
    local: &'a LocalIndexes,
    warnings: Vec<String>,
}

impl IndexSearch<'_> {
    /// The index of this digest, of whichever kind.
    async fn given(mut self, digest: &Digest, policy: IndexPolicy) -> Result<FoundIndexes> {
        if policy == IndexPolicy::None {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("--index names {digest}, and --index-policy none takes no index"),
            ));
        }
        let image = &self.image.source;
        let found = match image.manifest(digest).await {
            Ok(manifest) => Ok((manifest, image.clone())),
            Err(error) if error.kind() == Kind::NotFound => {
                // where the image is says more than that the local root has nothing either
                self.in_local_root(digest).await.map_err(|_| error)
            }
            Err(error) => Err(error),
        };
        let (manifest, source) =
            found.map_err(|error| error.context(format!("SOCI index {digest}, as given")))?;
        let (mut index, mut compact) = (None, None);
        match what_is(&manifest.bytes, &manifest.media_type) {
            What::CompactIndex => compact = Some(self.read_given(&manifest, &source)?),
            _ => index = Some(self.read_given(&manifest, &source)?),
        }
        Ok(FoundIndexes {
            index,
            compact,
            warnings: self.warnings,
        })
    }

    async fn in_local_root(&self, digest: &Digest) -> Result<(Manifest, Source)> {
        let manifest = self.local.manifest(digest).await?;
        Ok((manifest, self.local.source().await?))
    }

    fn read_given<T: ImageIndex>(&mut self, found: &Manifest, source: &Source) -> Result<T> {
        let index = T::read(
            found,
            IndexOrigin::Given,
            source,
            self.image,
            &mut self.warnings,
        )?;
        if !index.is_of(self.image) {
            self.warnings.push(format!(
                "{} index {} was made for another image than {}",
                T::NAME,
                found.digest,
                self.image.digest
            ));
        }
        Ok(index)
    }

    /// The index of a kind that counts where the caller names none.
    async fn run<T: ImageIndex>(&mut self, policy: IndexPolicy) -> Result<Option<T>> {
        if policy == IndexPolicy::None {
            return Ok(None);
        }
        if let Some(annotation) = self.annotation(T::ANNOTATION) {
            if let Some(index) = self.annotated(&annotation).await? {
                return Ok(Some(index));
            }
        } else if policy == IndexPolicy::Any
            && T::BARS_REFERRERS
                .iter()
                .all(|name| self.annotation(name).is_none())
            && let Some(index) = self.referred().await?
        {
            return Ok(Some(index));
        }
        self.stored().await
    }

    fn annotation(&self, name: &str) -> Option<String> {
        let annotations = self.image.manifest.annotations().as_ref()?;
        annotations.get(name).cloned()
    }

    /// The index that the image names.
    async fn annotated<T: ImageIndex>(&mut self, annotation: &str) -> Result<Option<T>> {
        let source = &self.image.source;
        let found = async {
            let digest: Digest = annotation.parse()?;
            source.manifest(&digest).await
        };
        let read = found.await.and_then(|manifest| {
            let warnings = &mut self.warnings;
            T::read(
                &manifest,
                IndexOrigin::Annotation,
                source,
                self.image,
                warnings,
            )
            .map(Some)
        });
        let annotation: String = annotation.chars().take(255).collect();
        let what = format!(
            "the image names the {} index {annotation:?}, which cannot be used, and so none of its repository is",
            T::NAME
        );
        self.or_warning(read, &what)
    }

    /// The newest referrer of the image that can be read.
    async fn referred<T: ImageIndex>(&mut self) -> Result<Option<T>> {
        let source = self.image.source.clone();
        let list = source.referrers(&self.image.digest, T::ARTIFACT_TYPE).await;
        let what = format!("{} indexes of this image cannot be looked for", T::NAME);
        match self.or_warning(list.map(Some), &what)? {
            Some(list) => self.newest(&list, IndexOrigin::Referrer, &source).await,
            None => Ok(None),
        }
    }

    /// The newest in the local root.
    async fn stored<T: ImageIndex>(&mut self) -> Result<Option<T>> {
        let list = self
            .local
            .of_image(&self.image.digest, T::ARTIFACT_TYPE)
            .await;
        let what = format!("local {} indexes", T::NAME);
        let list = match self.or_warning(list.map(Some), &what)? {
            Some(list) if !list.is_empty() => list,
            _ => return Ok(None),
        };
        let source = self.local.source().await;
        match self.or_warning(source.map(Some), &what)? {
            Some(source) => self.newest(&list, IndexOrigin::Local, &source).await,
            None => Ok(None),
        }
    }

    async fn newest<T: ImageIndex>(
        &mut self,
        list: &[Referrer],
        origin: IndexOrigin,
        source: &Source,
    ) -> Result<Option<T>> {
        for referrer in list.iter().rev().take(MAX_TRIED) {
            let found = source.manifest(&referrer.digest).await;
            let read = found.and_then(|found| {
                let index = T::read(&found, origin, source, self.image, &mut self.warnings)?;
                let why = match index.is_of(self.image) {
                    true => index.unfit(self.image),
                    false => Some("its subject is another image"),
                };
                why.map_or(Ok(Some(index)), |why| Err(Error::new(Kind::Corrupt, why)))
            });
            let what = format!("{} index {} is left out", T::NAME, referrer.digest);
            if let Some(index) = self.or_warning(read, &what)? {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// An error becomes a warning, unless the registry cannot say now what it may say later.
    fn or_warning<T>(&mut self, found: Result<Option<T>>, what: &str) -> Result<Option<T>> {
        match found {
            Ok(found) => Ok(found),
            Err(error) if error.kind() == Kind::Unavailable => Err(error),
            Err(error) => {
                self.warnings.push(format!("{what}: {}", error.report()));
                Ok(None)
            }
        }
    }
}
