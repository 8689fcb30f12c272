//! One image of a reference: its manifest for a platform, its configuration and its layers.

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
    /// The image of a manifest that was found at the source. `unstated` is its platform where its configuration names none.
    pub(super) async fn of_manifest(
        source: &Source,
        found: Manifest,
        unstated: &Platform,
        index_digest: Option<Digest>,
    ) -> Result<Self> {
        let digest = found.digest;
        let Document::Image(manifest) = document(&found)? else {
            let text = format!("{digest} is an index, where its descriptor says a manifest");
            return Err(Error::new(Kind::Corrupt, text));
        };
        let context = |error: Error| error.context(format!("manifest {digest}"));
        let descriptor = manifest.config();
        let config_digest: Digest = descriptor.digest().as_ref().parse().map_err(context)?;
        let config_bytes = source
            .blob(&config_digest, descriptor.size(), MAX_CONFIG_BYTES)
            .await
            .map_err(|error| context(error.context("its configuration")))?;
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

    /// Says of a layer that is not there that it is a foreign one, if it is.
    pub(crate) fn explain(&self, layer: &Digest, error: Error) -> Error {
        match error.kind() {
            Kind::NotFound if self.foreign_layers().contains(layer) => error.context(
                "it is a foreign layer, which registries need not keep, and its URLs are not followed: copy its blob to where the image is",
            ),
            _ => error,
        }
    }

    /// Its foreign layers: registries need not keep them, and their descriptors have URLs of where they are. Those are not followed here.
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
            " (attach the image that it belongs to; --index names an index)"
        }
        _ => "",
    };
    Error::with_source(error.kind(), format!("manifest {digest}{hint}"), error)
}

fn layers_of(manifest: &ImageManifest, diff_ids: &[Digest]) -> Result<Vec<LayerBlob>> {
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
