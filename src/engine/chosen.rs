//! The images of a reference that a job is for, by platform.

use super::image::{Image, document};
use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest, Platform,
        manifest::{Document, parse},
        platform::{Images, images},
    },
    source::{Manifest, Source},
};

/// Which images of an image index are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Platforms {
    /// The one for this machine; of a single image, that one.
    #[default]
    Host,
    /// Those for these; each must be there.
    These(Vec<Platform>),
    /// All that are there.
    All,
}

/// The images that are meant of what `root` is, and warnings.
pub async fn chosen(
    source: &Source,
    root: &Manifest,
    platforms: &Platforms,
) -> Result<(Vec<Image>, Vec<String>)> {
    let mut warnings = Vec::new();
    let index = match document(root)? {
        Document::Image(_) => {
            let image = Image::of_manifest(source, root.clone(), None, None).await?;
            if let Platforms::These(wanted) = platforms {
                for platform in wanted {
                    if platform.rank(&image.platform).is_none() {
                        return Err(missing(platform, &[image.platform]));
                    }
                }
            }
            return Ok((vec![image], warnings));
        }
        Document::Index(index) => index,
    };
    let Images { named, unnamed } = images(&index);
    let mut offered: Vec<(Platform, Digest, Option<Manifest>)> = Vec::new();
    for (platform, descriptor) in named {
        offered.push((platform, descriptor.digest().as_ref().parse()?, None));
    }
    for descriptor in unnamed {
        let manifest = source
            .manifest(&descriptor.digest().as_ref().parse()?)
            .await?;
        // a nested index stays what it is
        if let Ok(Document::Image(_)) = parse(&manifest.bytes, &manifest.media_type) {
            let image = Image::of_manifest(source, manifest.clone(), None, None).await?;
            offered.push((image.platform, manifest.digest, Some(manifest)));
        }
    }
    let all = *platforms == Platforms::All;
    let wanted = match platforms {
        Platforms::All => offered
            .iter()
            .map(|(platform, ..)| platform.clone())
            .collect(),
        Platforms::These(wanted) => wanted.clone(),
        Platforms::Host => vec![Platform::host()],
    };
    let mut picked: Vec<usize> = Vec::new();
    if all {
        picked = (0..offered.len()).collect();
    } else {
        for platform in &wanted {
            let best = offered
                .iter()
                .enumerate()
                .filter_map(|(at, (offered, ..))| Some((platform.rank(offered)?, at)))
                .min();
            match best {
                Some((_, at)) if picked.contains(&at) => {}
                Some((_, at)) => picked.push(at),
                None => {
                    let names: Vec<Platform> = offered
                        .iter()
                        .map(|(platform, ..)| platform.clone())
                        .collect();
                    return Err(missing(platform, &names));
                }
            }
        }
        picked.sort_unstable(); // in the order of the index
    }
    let mut found = Vec::new();
    for at in picked {
        let Some((platform, digest, manifest)) = offered.get_mut(at) else {
            continue; // it was picked from there
        };
        let manifest = match manifest.take() {
            Some(manifest) => Ok(manifest),
            None => source.manifest(digest).await,
        };
        match manifest {
            Ok(manifest) => found.push(
                Image::of_manifest(source, manifest, Some(platform), Some(root.digest)).await?,
            ),
            Err(error) if all && error.kind() == Kind::NotFound => {
                warnings.push(format!(
                    "the image for {platform} is not there, and stays as it is"
                ));
            }
            Err(error) => {
                return Err(error.context(format!("the image for {platform}")));
            }
        }
    }
    if found.is_empty() {
        return Err(Error::new(Kind::NotFound, "it lists no image"));
    }
    Ok((found, warnings))
}

fn missing(platform: &Platform, offered: &[Platform]) -> Error {
    let offered: Vec<String> = offered.iter().map(Platform::to_string).collect();
    Error::new(
        Kind::NotFound,
        format!(
            "no image for {platform}; it has {}; --platform names one, --all-platforms takes all",
            offered.join(", ")
        ),
    )
}
