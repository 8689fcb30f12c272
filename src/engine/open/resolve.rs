//! Resolves a reference to one image.

use super::{
    image::Image,
    platforms::{Platforms, choose_images},
};
use crate::{
    error::{Error, Kind, Result},
    oci::Platform,
    source::Source,
};

impl Image {
    /// Finds the image of the source's reference. Without a platform, the host's is chosen from an index, and a single image is taken
    /// whatever its platform is; see [`Self::platform`].
    pub async fn resolve(source: &Source, platform: Option<&Platform>) -> Result<Self> {
        let platforms = match platform {
            Some(platform) => Platforms::These(vec![platform.clone()]),
            None => Platforms::Host,
        };
        let find = async {
            let root = source.root_manifest().await?;
            let chosen = choose_images(source, &root, &platforms).await?;
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
