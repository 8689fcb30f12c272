//! From a reference to one image: its manifest for a platform, its configuration, its layers.

use bytes::Bytes;
use oci_spec::image::{ImageIndex, ImageManifest};

use crate::{
    error::{Error, Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::{
        Digest, ImageConfig, Packing, Platform, Reference,
        artifact::What,
        manifest::{self, Document, MAX_CONFIG_BYTES, parse},
        platform::choose,
    },
    source::{Manifest, Source},
};

/// Manifests and indexes that are read to find one image. An index holds manifests; one in another occurs, a deep nest of them not.
const MAX_DOCUMENTS: usize = 32;

/// An image for one platform, as its registry or layout has it.
#[derive(Clone)]
pub struct Image {
    /// What was asked for.
    pub reference: Reference,
    /// Where its blobs are.
    pub source: Source,
    /// Its manifest.
    pub manifest: ImageManifest,
    /// The manifest's bytes.
    pub manifest_bytes: Bytes,
    /// The manifest's media type.
    pub media_type: String,
    /// The manifest's digest.
    pub digest: Digest,
    /// Its configuration.
    pub config: ImageConfig,
    /// The configuration's bytes: it has fields that [`Self::config`] does not.
    pub config_bytes: Bytes,
    /// The platform that its configuration names; where it names none, that of its descriptor, or what was asked for.
    pub platform: Platform,
    /// Its layers, the lowest first. The same layer may occur twice.
    pub layers: Vec<LayerBlob>,
    /// The image index that it was chosen from, if the reference led to one.
    pub index_digest: Option<Digest>,
}

impl Image {
    /// Finds the image that the source's reference names. Without a platform the host's is meant, and an image that is not in an
    /// index is taken whatever its platform is; [`Self::platform`] says which.
    pub async fn resolve(source: &Source, platform: Option<&Platform>) -> Result<Self> {
        Search::new(source, platform)
            .run()
            .await
            .map_err(|error| error.context(format!("image {}", source.reference())))
    }
}

impl Image {
    /// The image of a manifest that was found at the source. `stated` is its platform where its configuration names none.
    pub async fn of_manifest(
        source: &Source,
        found: Manifest,
        stated: Option<&Platform>,
        index_digest: Option<Digest>,
    ) -> Result<Self> {
        let digest = found.digest;
        let of = async {
            match document(&found)? {
                Document::Image(manifest) => {
                    let unstated = stated.cloned().unwrap_or_else(Platform::unknown);
                    let search = Search::new(source, stated);
                    search
                        .image(found, *manifest, index_digest, &unstated)
                        .await
                }
                Document::Index(_) => Err(Error::new(
                    Kind::Corrupt,
                    "it is an index, where a manifest is expected",
                )),
            }
        };
        of.await.map_err(|error| {
            error.context(format!("image {}, manifest {digest}", source.reference()))
        })
    }
}

/// A walk from the root to the image.
struct Search<'a> {
    source: &'a Source,
    wanted: Platform,
    /// Whether the caller named the platform.
    is_strict: bool,
    documents_left: usize,
    /// Platforms seen, for the error.
    offered: Vec<Platform>,
}

impl<'a> Search<'a> {
    fn new(source: &'a Source, platform: Option<&Platform>) -> Self {
        Self {
            source,
            wanted: platform.cloned().unwrap_or_else(Platform::host),
            is_strict: platform.is_some(),
            documents_left: MAX_DOCUMENTS,
            offered: Vec::new(),
        }
    }

    async fn run(mut self) -> Result<Image> {
        let root = self.source.root_manifest().await?;
        match document(&root)? {
            Document::Image(manifest) => {
                let image = self.image(root, *manifest, None, &self.wanted).await?;
                if self.is_strict && self.wanted.rank(&image.platform).is_none() {
                    return Err(self.not_offered(&[image.platform]));
                }
                Ok(image)
            }
            Document::Index(index) => self.in_index(root.digest, *index).await,
        }
    }

    /// Looks for the image in an index, and in indexes that it holds.
    async fn in_index(&mut self, root: Digest, index: ImageIndex) -> Result<Image> {
        let is_single = index.manifests().len() == 1;
        // of several that do not say what they run on, none is as good as asked for
        let unstated = match is_single {
            true => self.wanted.clone(),
            false => Platform::unknown(),
        };
        let mut indexes = vec![index];
        while let Some(index) = indexes.pop() {
            let choice = choose(&index, &self.wanted);
            self.offered.extend(choice.offered);
            if let Some(best) = choice.manifests.first() {
                let found = self.fetch(best.digest().as_ref()).await?;
                return match document(&found)? {
                    Document::Image(manifest) => {
                        let stated = Platform::of_descriptor(best);
                        let stated = stated.as_ref().unwrap_or(&self.wanted);
                        self.image(found, *manifest, Some(root), stated).await
                    }
                    Document::Index(_) => Err(Error::new(
                        Kind::Corrupt,
                        format!(
                            "{} is an index, where its descriptor says a manifest",
                            found.digest
                        ),
                    )),
                };
            }
            let mut nested = Vec::new();
            for descriptor in choice.unnamed {
                let found = self.fetch(descriptor.digest().as_ref()).await?;
                match parse(&found.bytes, &found.media_type) {
                    Ok(Document::Index(index)) => nested.push(*index),
                    Ok(Document::Image(manifest)) => {
                        let image = self.image(found, *manifest, Some(root), &unstated).await?;
                        let any = is_single && !self.is_strict;
                        if any || self.wanted.rank(&image.platform).is_some() {
                            return Ok(image);
                        }
                        self.offered.push(image.platform);
                    }
                    Err(manifest::Error::NotAnImage(_)) => {} // a signature beside the images, say
                    Err(error) => return Err(not_an_image(&found.digest, error)),
                }
            }
            indexes.extend(nested.into_iter().rev());
        }
        Err(self.not_offered(&self.offered))
    }

    async fn fetch(&mut self, digest: &str) -> Result<Manifest> {
        self.documents_left = self.documents_left.checked_sub(1).ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                format!(
                    "its index leads to more than {MAX_DOCUMENTS} manifests without a platform"
                ),
            )
        })?;
        self.source.manifest(&digest.parse()?).await
    }

    /// The image of a manifest. `unstated` is its platform where its configuration does not say.
    async fn image(
        &self,
        found: Manifest,
        manifest: ImageManifest,
        index_digest: Option<Digest>,
        unstated: &Platform,
    ) -> Result<Image> {
        let descriptor = manifest.config();
        let config_digest: Digest = descriptor.digest().as_ref().parse()?;
        let config_bytes = self
            .source
            .blob(&config_digest, descriptor.size(), MAX_CONFIG_BYTES)
            .await
            .map_err(|error| error.context("its configuration"))?;
        let layers = manifest.layers().len();
        let config = ImageConfig::parse(&config_bytes, layers).map_err(|error| {
            Error::with_source(
                error.kind(),
                format!("manifest {}, configuration {config_digest}", found.digest),
                error,
            )
        })?;
        let layers = self::layers(&manifest, &config.diff_ids)?;
        let platform = config.platform.clone();
        Ok(Image {
            reference: self.source.reference().clone(),
            source: self.source.clone(),
            manifest,
            manifest_bytes: found.bytes,
            media_type: found.media_type,
            digest: found.digest,
            config,
            config_bytes,
            platform: platform.unwrap_or_else(|| unstated.clone()),
            layers,
            index_digest,
        })
    }

    fn not_offered(&self, offered: &[Platform]) -> Error {
        let mut names: Vec<String> = offered.iter().map(Platform::to_string).collect();
        names.sort();
        names.dedup();
        let names = if names.is_empty() {
            "no image".to_owned()
        } else {
            names.join(", ")
        };
        Error::new(
            Kind::NotFound,
            format!("no image for {}; it has {names}", self.wanted),
        )
    }
}

pub(super) fn document(found: &Manifest) -> Result<Document> {
    parse(&found.bytes, &found.media_type).map_err(|error| not_an_image(&found.digest, error))
}

fn not_an_image(digest: &Digest, error: manifest::Error) -> Error {
    let hint = match error {
        manifest::Error::NotAnImage(What::SociIndex(_) | What::CompactIndex) => {
            " (attach the image that it belongs to; --index names an index)"
        }
        _ => "",
    };
    Error::with_source(error.kind(), format!("manifest {digest}{hint}"), error)
}

fn layers(manifest: &ImageManifest, diff_ids: &[Digest]) -> Result<Vec<LayerBlob>> {
    if diff_ids.is_empty() {
        return Err(Error::new(
            Kind::Unsupported,
            "it has no layers: there is nothing to mount",
        ));
    }
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (number, (descriptor, diff_id)) in manifest.layers().iter().zip(diff_ids).enumerate() {
        let media_type = descriptor.media_type().to_string();
        // `parse` has let no other layer through
        let packing = Packing::of_media_type(&media_type).ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                format!("layer {number} has the unknown type {media_type:?}"),
            )
        })?;
        let digest = descriptor
            .digest()
            .as_ref()
            .parse()
            .or_kind(Kind::Unsupported, || format!("layer {number}"))?;
        if i64::try_from(descriptor.size()).is_err() {
            return Err(Error::new(
                Kind::Corrupt,
                format!("layer {number} is said to have {} bytes", descriptor.size()),
            ));
        }
        layers.push(LayerBlob {
            digest,
            size: descriptor.size(),
            packing,
            diff_id: *diff_id,
        });
    }
    Ok(layers)
}
