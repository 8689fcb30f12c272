//! Sets the tag of a finished image, unless another writer has changed the tag meanwhile.

use bytes::Bytes;

use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, Reference},
    source::{Destination, Manifest},
};

/// The tag of a destination, and what it named when the work began.
///
/// Registries have no compare-and-swap: a change between the last check and the write is overwritten. That window is one round trip, not
/// the minutes of a conversion.
pub(crate) struct TagUpdate<'a> {
    destination: &'a Destination,
    before: TagTarget,
}

/// The content of a tag.
enum TagTarget {
    Nothing,
    Manifest(Manifest),
    /// Content that is not a readable manifest.
    Other,
}

impl TagTarget {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Manifest(one), Self::Manifest(other)) => one.digest == other.digest,
            (Self::Nothing, Self::Nothing) | (Self::Other, Self::Other) => true,
            _ => false,
        }
    }
}

impl<'a> TagUpdate<'a> {
    /// Reads what the tag names now.
    pub(crate) async fn begin(destination: &'a Destination) -> Result<Self> {
        let before = named(destination).await?;
        Ok(Self {
            destination,
            before,
        })
    }

    /// The manifest that the tag named at the start, if any.
    pub(crate) fn before(&self) -> Option<&Manifest> {
        match &self.before {
            TagTarget::Manifest(manifest) => Some(manifest),
            TagTarget::Nothing | TagTarget::Other => None,
        }
    }

    /// Stores a manifest and sets the tag, unless the tag has changed since the start.
    pub(crate) async fn set(self, media_type: &str, bytes: &Bytes) -> Result<Digest> {
        let now = named(self.destination).await?;
        let what = match &now {
            TagTarget::Manifest(now) if now.digest == Digest::of(bytes) => None,
            same if same.is_same(&self.before) => None,
            TagTarget::Manifest(now) => Some(now.digest.to_string()),
            TagTarget::Nothing => Some("nothing".to_owned()),
            TagTarget::Other => Some("another kind of content".to_owned()),
        };
        if let Some(what) = what {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "{} was changed by another writer and now names {what}: it is not replaced; try again",
                    self.destination.reference()
                ),
            ));
        }
        self.destination.tag_manifest(media_type, bytes).await
    }
}

async fn named(destination: &Destination) -> Result<TagTarget> {
    // without a tag, a layout gets a new entry, and nothing is replaced
    if matches!(destination.reference(), Reference::Layout { tag: None, .. }) {
        return Ok(TagTarget::Nothing);
    }
    let Some(there) = destination.source().await? else {
        return Ok(TagTarget::Nothing); // an archive is always written as a new file
    };
    match there.root_manifest().await {
        Ok(manifest) => Ok(TagTarget::Manifest(manifest)),
        Err(error) if error.kind() == Kind::NotFound => Ok(TagTarget::Nothing),
        Err(error)
            if matches!(
                error.kind(),
                Kind::Corrupt | Kind::Unsupported | Kind::InvalidArgument
            ) =>
        {
            Ok(TagTarget::Other)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{oci::media_type::OCI_MANIFEST, source::Access};

    fn manifest(text: &str) -> Bytes {
        format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","layers":[],"x":"{text}"}}"#)
            .into()
    }

    #[tokio::test]
    async fn a_name_that_was_given_to_something_else_meanwhile_stays() {
        let directory = tempfile::tempdir().unwrap();
        let reference = format!("oci:{}:v1", directory.path().display());
        let reference = reference.parse().unwrap();
        let destination = Destination::open(&reference, &Access::default())
            .await
            .unwrap();
        let [old, new, theirs] = ["old", "new", "theirs"].map(manifest);
        let named = async || {
            let there = destination.source().await.unwrap().unwrap();
            there.root_manifest().await.unwrap().bytes
        };
        for first in [&old, &new] {
            let naming = TagUpdate::begin(&destination).await.unwrap();
            naming.set(OCI_MANIFEST, first).await.unwrap();
            assert_eq!(named().await, *first);
        }
        let naming = TagUpdate::begin(&destination).await.unwrap();
        let put = destination.tag_manifest(OCI_MANIFEST, &theirs).await;
        put.unwrap();
        let error = naming.set(OCI_MANIFEST, &old).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
        assert_eq!(named().await, theirs);
        // two writers of the same content do not conflict
        let naming = TagUpdate::begin(&destination).await.unwrap();
        destination.tag_manifest(OCI_MANIFEST, &new).await.unwrap();
        naming.set(OCI_MANIFEST, &new).await.unwrap();
    }
}
