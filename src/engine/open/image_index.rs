//! The trait of the two kinds of indexes: SOCI indexes and compact indexes.

use super::{image::Image, policy::IndexOrigin};
use crate::{
    error::Result,
    source::{Manifest, Source},
};

/// A kind of index.
pub(super) trait ImageIndex: Sized {
    /// Name of the kind, followed by "index" in messages.
    const NAME: &'static str;
    /// Artifact type, as a referrer and in the state directory.
    const ARTIFACT_TYPE: &'static str;
    /// Annotation of an image manifest that names an index of this kind.
    const ANNOTATION: &'static str;
    /// Annotations of an image manifest that exclude its referrers of this kind.
    const BARS_REFERRERS: &'static [&'static str];

    /// Parses a manifest that was found for an image at `source`. `warnings` gets messages for the user.
    fn read(
        found: &Manifest,
        origin: IndexOrigin,
        source: &Source,
        image: &Image,
        warnings: &mut Vec<String>,
    ) -> Result<Self>;

    /// Whether the index states this image as its subject, or no subject.
    fn is_of(&self, image: &Image) -> bool;

    /// Why the index is not usable for an image that does not name it. The subject is checked by [`Self::is_of`].
    fn unfit(&self, image: &Image) -> Option<&'static str>;
}
