//! Finds the index to use for an image, of each kind: SOCI index and compact index.
//!
//! The first index in this order:
//! 1. the index that the caller names by digest, from the image's source or the state directory;
//! 2. version 2: the index that an annotation of the image manifest names. It is bound to the image's digest. If it cannot be read, there
//!    is a warning, and version 1 is not tried: the author of the image has chosen an index, and users who can push to the repository must
//!    not be able to replace it;
//! 3. version 1: the newest (last listed) readable referrer of the image manifest;
//! 4. the newest index in the state directory, made by the administrator of this host.
//!
//! Both kinds are searched in parallel by the same rules. For each layer, the compact index is preferred. An annotation of either kind
//! excludes referrers of compact indexes.
//!
//! [`IndexPolicy`] restricts the search: step 3 needs `any`, and `none` disables all steps.
//!
//! `Unavailable` is returned as an error and never treated as "there is no index", so that the caller can try again later.

use super::{
    compact_index::CompactIndex,
    image::Image,
    image_index::ImageIndex,
    local_indexes::LocalIndexes,
    policy::{IndexChoice, IndexOrigin, IndexPolicy},
    soci_index::SociIndex,
};
use crate::{
    engine::verifiers::{Subject, Verifiers},
    error::{Error, Kind, Result},
    oci::{
        Digest,
        artifact::{What, what_is},
    },
    source::{Manifest, Referrer, Source},
};

/// Maximum number of referrers to try, newest first.
const MAX_TRIED: usize = 16;

/// The outcome of a search.
#[derive(Default)]
pub struct FoundIndexes {
    /// The SOCI index, if there is one.
    pub index: Option<SociIndex>,
    /// The compact index, if there is one; preferred to the SOCI index for each layer.
    pub compact: Option<CompactIndex>,
    /// Warnings for the user: which index is unusable, and why.
    pub warnings: Vec<String>,
}

/// Finds the indexes to use for an image.
pub async fn find(
    image: &Image,
    choice: &IndexChoice,
    local: &LocalIndexes,
) -> Result<FoundIndexes> {
    find_verified(image, choice, local, &Verifiers::default()).await
}

/// Like [`find`]. The verifiers verify indexes that the image does not name: one that they refuse is not used.
pub(crate) async fn find_verified(
    image: &Image,
    choice: &IndexChoice,
    local: &LocalIndexes,
    verifiers: &Verifiers,
) -> Result<FoundIndexes> {
    let new = || IndexSearch {
        image,
        local,
        verifiers,
        warnings: Vec::new(),
    };
    let found = match &choice.digest {
        // may be of either kind
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

/// The error if an index is required and there is none.
fn required(image: &Image, warnings: &[String]) -> Error {
    let why = match warnings.is_empty() {
        true => "neither the repository nor the state directory has one".to_owned(),
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

/// A search for an index of one kind.
struct IndexSearch<'a> {
    image: &'a Image,
    local: &'a LocalIndexes,
    verifiers: &'a Verifiers,
    warnings: Vec<String>,
}

impl IndexSearch<'_> {
    /// Finds the index of `--index`, of either kind.
    async fn given(mut self, digest: &Digest, policy: IndexPolicy) -> Result<FoundIndexes> {
        if policy == IndexPolicy::None {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("--index {digest} contradicts --index-policy none"),
            ));
        }
        let image = &self.image.source;
        let found = match image.manifest(digest).await {
            Ok(manifest) => Ok((manifest, image.clone())),
            Err(error) if error.kind() == Kind::NotFound => {
                // the error of the image's source is more useful than that of the state directory
                self.in_local_root(digest).await.map_err(|_| error)
            }
            Err(error) => Err(error),
        };
        let (manifest, source) =
            found.map_err(|error| error.context(format!("SOCI index {digest} of --index")))?;
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
                "{} index {} was made for another image, not for {}",
                T::NAME,
                found.digest,
                self.image.digest
            ));
        }
        Ok(index)
    }

    /// Finds the index of one kind if the caller has not named one.
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

    /// Reads the index that the image names.
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
            "the image names the {} index {annotation:?}, which cannot be used; indexes in its repository are ignored",
            T::NAME
        );
        self.or_warning(read, &what)
    }

    /// Finds the newest readable referrer of the image.
    async fn referred<T: ImageIndex>(&mut self) -> Result<Option<T>> {
        let source = self.image.source.clone();
        let list = source.referrers(&self.image.digest, T::ARTIFACT_TYPE).await;
        let what = format!("cannot list the {} indexes of this image", T::NAME);
        match self.or_warning(list.map(Some), &what)? {
            Some(list) => self.newest(&list, IndexOrigin::Referrer, &source).await,
            None => Ok(None),
        }
    }

    /// Finds the newest index in the state directory.
    async fn stored<T: ImageIndex>(&mut self) -> Result<Option<T>> {
        let list = self
            .local
            .of_image(&self.image.digest, T::ARTIFACT_TYPE)
            .await;
        let what = format!("cannot read the {} indexes of the state directory", T::NAME);
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
            let read = self.read_referrer(referrer, origin, source).await;
            let what = format!("skipped {} index {}", T::NAME, referrer.digest);
            if let Some(index) = self.or_warning(read, &what)? {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    async fn read_referrer<T: ImageIndex>(
        &mut self,
        referrer: &Referrer,
        origin: IndexOrigin,
        source: &Source,
    ) -> Result<Option<T>> {
        let found = source.manifest(&referrer.digest).await?;
        let index = T::read(&found, origin, source, self.image, &mut self.warnings)?;
        let why = match index.is_of(self.image) {
            true => index.unfit(self.image),
            false => Some("its subject is another image"),
        };
        if let Some(why) = why {
            return Err(Error::new(Kind::Corrupt, why));
        }
        // the image names all others, or the administrator of this host has made them
        if origin == IndexOrigin::Referrer {
            let name = self.image.reference.with_digest(referrer.digest);
            self.verifiers.verify(&Subject::new(&name, &found)).await?;
        }
        Ok(Some(index))
    }

    /// Turns an error into a warning, unless it is `Unavailable`, which may pass.
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
