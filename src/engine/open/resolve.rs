//! Resolves a reference to one image.

use super::{
    image::Image,
    platforms::{Platforms, choose_images},
};
use crate::{
    error::{Error, Kind, Result},
    oci::Platform,
    source::{Manifest, Source},
};

impl Image {
    /// Finds the image of the source's reference. Without a platform, the host's is chosen from an index, and a single image is taken
    /// whatever its platform is; see [`Self::platform`].
    pub async fn resolve(source: &Source, platform: Option<&Platform>) -> Result<Self> {
        Self::of_root(source, &Self::root(source).await?, platform).await
    }

    /// The manifest or image index that the source's reference names.
    pub(super) async fn root(source: &Source) -> Result<Manifest> {
        let root = source.root_manifest().await;
        root.map_err(|error| error.context(format!("image {}", source.reference())))
    }

    /// Like [`Self::resolve`], from what the reference names.
    pub(super) async fn of_root(
        source: &Source,
        root: &Manifest,
        platform: Option<&Platform>,
    ) -> Result<Self> {
        let platforms = match platform {
            Some(platform) => Platforms::These(vec![platform.clone()]),
            None => Platforms::Host,
        };
        let find = async {
            let chosen = choose_images(source, root, &platforms).await?;
            for warning in chosen.warnings {
                tracing::warn!("{}: {warning}", source.reference());
            }
            let mut images = chosen.images.into_iter();
            images
                .next()
                .ok_or_else(|| Error::new(Kind::NotFound, "there is no image"))
        };
        find.await
            .map_err(|error: Error| error.context(format!("image {}", source.reference())))
    }
}
