//! Which compact index counts for an image.
//!
//! It is looked for beside the SOCI index, by the same rules (see [`super::soci_index`]): the one that the caller names; the one that the
//! image manifest's annotation names; of the referrers the newest that can be read, unless the image names an index of either kind by
//! annotation, or the policy takes none that was pushed to the repository; one in the local root. Where a layer's part of it cannot be
//! used, the layer's zTOC is.

use bytes::Bytes;

use super::{
    image::Image,
    local_indexes::LocalIndexes,
    soci_index::{IndexPolicy, Origin},
};
use crate::{
    compact::{
        MAX_TABLE_SIZE, Table,
        manifest::{ARTIFACT_TYPE, INDEX_DIGEST, LayerIndex, Manifest},
    },
    error::{Error, Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::Digest,
    soci::index,
    source::{self, Referrer, Source},
};

/// Referrers that are tried, from the newest.
const MAX_TRIED: usize = 16;

/// The compact index that counts for an image.
#[derive(Clone)]
pub struct CompactIndex {
    /// Its digest.
    pub digest: Digest,
    /// How it was found.
    pub origin: Origin,
    /// What it has, and of which layers.
    pub manifest: Manifest,
    /// Where its blobs are.
    pub source: Source,
}

impl CompactIndex {
    /// What it has of a layer.
    pub fn layer(&self, layer: &Digest) -> Option<&LayerIndex> {
        self.manifest.of_layer(layer)
    }

    /// Fetches a layer's table by range, and verifies it against its digest.
    pub async fn fetch_table(&self, layer: &LayerIndex) -> Result<Bytes> {
        let context = || {
            format!(
                "compact index {}, table of layer {}",
                self.digest, layer.layer
            )
        };
        // `LayerIndex` is of a manifest that was checked: this says it again for who makes one
        let size = layer.table_size.min(MAX_TABLE_SIZE);
        let bytes = self
            .source
            .range(&layer.blob, 0..size)
            .await
            .map_err(|error| error.context(context()))?;
        let found = Digest::of(&bytes);
        if found != layer.table {
            return Err(Error::new(
                Kind::Corrupt,
                format!("{}: its bytes have the digest {found}", context()),
            ));
        }
        Ok(bytes)
    }

    /// What the index has of a layer, and its table with its bytes, verified, parsed, and checked to be of just this layer; `None` where
    /// there is none.
    pub async fn table(&self, layer: &LayerBlob) -> Result<Option<(&LayerIndex, Bytes, Table)>> {
        let Some(part) = self.layer(&layer.digest) else {
            return Ok(None);
        };
        let bytes = self.fetch_table(part).await?;
        let table = Table::parse(&bytes)
            .and_then(|table| {
                table.check(&layer.digest, layer.size, part.size)?;
                Ok(table)
            })
            .or_kind(Kind::Corrupt, || {
                format!("the compact table {} of layer {}", part.table, layer.digest)
            })?;
        Ok(Some((part, bytes, table)))
    }

    /// Reads a manifest that was found.
    pub(crate) fn read(found: &source::Manifest, origin: Origin, source: &Source) -> Result<Self> {
        let digest = found.digest;
        let manifest = Manifest::parse(&found.bytes)
            .or_kind(Kind::Corrupt, || format!("compact index {digest}"))?;
        Ok(Self {
            digest,
            origin,
            manifest,
            source: source.clone(),
        })
    }

    /// Whether it was made for this image, as far as it says.
    pub(super) fn is_of(&self, image: &Image) -> bool {
        let subject = self.manifest.subject.as_ref();
        subject.is_none_or(|subject| subject.digest == image.digest)
    }
}

/// Finds the compact index of an image, where the caller names none. Gives what the person should know too.
pub(crate) async fn find(
    image: &Image,
    policy: IndexPolicy,
    local: &LocalIndexes,
) -> Result<(Option<CompactIndex>, Vec<String>)> {
    let mut search = Search {
        image,
        warnings: Vec::new(),
    };
    let index = search.run(policy, local).await?;
    Ok((index, search.warnings))
}

struct Search<'a> {
    image: &'a Image,
    warnings: Vec<String>,
}

impl Search<'_> {
    async fn run(
        &mut self,
        policy: IndexPolicy,
        local: &LocalIndexes,
    ) -> Result<Option<CompactIndex>> {
        if policy == IndexPolicy::None {
            return Ok(None);
        }
        if let Some(annotation) = self.annotation(INDEX_DIGEST) {
            if let Some(index) = self.annotated(&annotation).await? {
                return Ok(Some(index));
            }
        } else if policy == IndexPolicy::Any
            && self.annotation(index::INDEX_DIGEST).is_none()
            && let Some(index) = self.referred().await?
        {
            return Ok(Some(index));
        }
        self.local(local).await
    }

    fn annotation(&self, name: &str) -> Option<String> {
        let annotations = self.image.manifest.annotations().as_ref()?;
        annotations.get(name).cloned()
    }

    async fn annotated(&mut self, annotation: &str) -> Result<Option<CompactIndex>> {
        let source = &self.image.source;
        let found = async {
            let digest: Digest = annotation.parse()?;
            let manifest = source.manifest(&digest).await?;
            CompactIndex::read(&manifest, Origin::Annotation, source).map(Some)
        };
        let annotation: String = annotation.chars().take(255).collect();
        let what =
            format!("the image names the compact index {annotation:?}, which cannot be used");
        self.or_warning(found.await, &what)
    }

    async fn referred(&mut self) -> Result<Option<CompactIndex>> {
        let source = self.image.source.clone();
        let list = source.referrers(&self.image.digest, ARTIFACT_TYPE).await;
        let what = "compact indexes of this image cannot be looked for";
        match self.or_warning(list.map(Some), what)? {
            Some(list) => self.newest(&list, Origin::Referrer, &source).await,
            None => Ok(None),
        }
    }

    async fn local(&mut self, local: &LocalIndexes) -> Result<Option<CompactIndex>> {
        let list = local.of_image(&self.image.digest, ARTIFACT_TYPE).await;
        let found = match self.or_warning(list.map(Some), "local compact indexes")? {
            Some(list) if !list.is_empty() => list,
            _ => return Ok(None),
        };
        let source = local.source().await?;
        self.newest(&found, Origin::Local, &source).await
    }

    async fn newest(
        &mut self,
        list: &[Referrer],
        origin: Origin,
        source: &Source,
    ) -> Result<Option<CompactIndex>> {
        for referrer in list.iter().rev().take(MAX_TRIED) {
            let fetched = source.manifest(&referrer.digest).await;
            let read = fetched.and_then(|found| {
                let index = CompactIndex::read(&found, origin, source)?;
                let layers = &self.image.layers;
                if !index.is_of(self.image) {
                    Err(Error::new(Kind::Corrupt, "its subject is another image"))
                } else if !layers
                    .iter()
                    .any(|layer| index.layer(&layer.digest).is_some())
                {
                    let what = "it has a table for no layer of this image";
                    Err(Error::new(Kind::Corrupt, what))
                } else {
                    Ok(Some(index))
                }
            });
            let what = format!("compact index {} is left out", referrer.digest);
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
