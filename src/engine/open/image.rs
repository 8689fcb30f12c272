//! An image of a reference: its manifest for one platform, its configuration and its layers.

use std::collections::HashSet;

use bytes::Bytes;
use oci_spec::image::ImageManifest;

use crate::{
    error::{Error, Kind, Result, ResultExt},
    layer::LayerBlob,
    oci::{
        Digest, ImageConfig, Packing, Platform, Reference,
        artifact::What,
        manifest::{self, Document, MAX_CONFIG_BYTES, parse},
        media_type::is_foreign_layer,
    },
    source::{Manifest, Source},
};

/// An image for one platform.
#[derive(Clone)]
pub struct Image {
    /// The reference of the request.
    pub reference: Reference,
    /// The source of its blobs.
    pub source: Source,
    /// The manifest.
    pub manifest: ImageManifest,
    /// Bytes of the manifest.
    pub manifest_bytes: Bytes,
    /// Media type of the manifest.
    pub media_type: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// The configuration.
    pub config: ImageConfig,
    /// Bytes of the configuration; they have fields that [`Self::config`] does not have.
    pub config_bytes: Bytes,
    /// The platform of the configuration; if it names none, that of the descriptor or of the request.
    pub platform: Platform,
    /// Layers, lowest first. A layer may be repeated.
    pub layers: Vec<LayerBlob>,
    /// Digest of the image index that the image was chosen from, if any.
    pub index_digest: Option<Digest>,
}

impl Image {
    /// Opens the image of a manifest. `unstated` is the platform to use if the configuration names none.
    pub(super) async fn of_manifest(
        source: &Source,
        found: Manifest,
        unstated: &Platform,
        index_digest: Option<Digest>,
    ) -> Result<Self> {
        let digest = found.digest;
        let Document::Image(manifest) = document(&found)? else {
            let text = format!(
                "{digest} is an image index, but its descriptor says it is an image manifest"
            );
            return Err(Error::new(Kind::Corrupt, text));
        };
        let context = |error: Error| error.context(format!("manifest {digest}"));
        let descriptor = manifest.config();
        let config_digest: Digest = descriptor.digest().as_ref().parse().map_err(context)?;
        let config_bytes = source
            .blob(&config_digest, descriptor.size(), MAX_CONFIG_BYTES)
            .await
            .map_err(|error| context(error.context("image configuration")))?;
        let layers = manifest.layers().len();
        let config = ImageConfig::parse(&config_bytes, layers).map_err(|error| {
            let text = format!("manifest {digest}, configuration {config_digest}");
            Error::with_source(error.kind(), text, error)
        })?;
        let layers = layers_of(&manifest, &config.diff_ids).map_err(context)?;
        let platform = config.platform.clone();
        Ok(Self {
            reference: source.reference().clone(),
            source: source.clone(),
            manifest: *manifest,
            manifest_bytes: found.bytes,
            media_type: found.media_type,
            digest,
            config,
            config_bytes,
            platform: platform.unwrap_or_else(|| unstated.clone()),
            layers,
            index_digest,
        })
    }

    /// Adds an explanation to the error of a missing layer if it is a foreign layer.
    pub(crate) fn explain(&self, layer: &Digest, error: Error) -> Error {
        match error.kind() {
            Kind::NotFound if self.foreign_layers().contains(layer) => error.context(
                "this is a foreign layer: registries need not store it, and its URLs are not used; copy its blob to the repository or layout of the image",
            ),
            _ => error,
        }
    }

    /// The foreign layers. Registries need not store them; their descriptors have URLs, which are not used here.
    pub(crate) fn foreign_layers(&self) -> HashSet<Digest> {
        self.manifest
            .layers()
            .iter()
            .filter(|layer| {
                let has_urls = layer.urls().as_ref().is_some_and(|urls| !urls.is_empty());
                has_urls || is_foreign_layer(layer.media_type().as_ref())
            })
            .filter_map(|layer| layer.digest().as_ref().parse().ok())
            .collect()
    }
}

pub(crate) fn document(found: &Manifest) -> Result<Document> {
    parse(&found.bytes, &found.media_type).map_err(|error| not_an_image(&found.digest, error))
}

fn not_an_image(digest: &Digest, error: manifest::Error) -> Error {
    let hint = match error {
        manifest::Error::NotAnImage(What::SociIndex(_) | What::CompactIndex) => {
            " (use the reference of the image; --index selects an index)"
        }
        _ => "",
    };
    Error::with_source(error.kind(), format!("manifest {digest}{hint}"), error)
}

fn layers_of(manifest: &ImageManifest, diff_ids: &[Digest]) -> Result<Vec<LayerBlob>> {
    if diff_ids.is_empty() {
        return Err(Error::new(
            Kind::Unsupported,
            "the image has no layers: there is nothing to mount",
        ));
    }
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (number, (descriptor, diff_id)) in manifest.layers().iter().zip(diff_ids).enumerate() {
        let media_type = descriptor.media_type().to_string();
        // `parse` has rejected other media types
        let packing = Packing::of_media_type(&media_type).ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                format!("layer {number} has the unknown media type {media_type:?}"),
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
                format!("layer {number} has the invalid size {}", descriptor.size()),
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
