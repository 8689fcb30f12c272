//! The trait of the two kinds of indexes: SOCI's index and the compact index.

use super::{image::Image, policy::IndexOrigin};
use crate::{
    error::Result,
    source::{Manifest, Source},
};

/// A kind of index that an image may have.
pub(super) trait ImageIndex: Sized {
    /// What it is called, before "index".
    const NAME: &'static str;
    /// Its artifact type, as a referrer and below a root.
    const ARTIFACT_TYPE: &'static str;
    /// The annotation by which an image manifest names one.
    const ANNOTATION: &'static str;
    /// The annotations of an image manifest that bar its referrers of this kind.
    const BARS_REFERRERS: &'static [&'static str];

    /// Reads a manifest that was found for an image at `source`. The person should know of `warnings`.
    fn read(
        found: &Manifest,
        origin: IndexOrigin,
        source: &Source,
        image: &Image,
        warnings: &mut Vec<String>,
    ) -> Result<Self>;

    /// Whether it was made for this image, as far as it says.
    fn is_of(&self, image: &Image) -> bool;

    /// Why it does not do for an image that does not name it; its subject is looked at elsewhere.
    fn unfit(&self, image: &Image) -> Option<&'static str>;
}
