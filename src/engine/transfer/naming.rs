//! Sets the tag of a finished image, unless somebody else has set it meanwhile.

use bytes::Bytes;

use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, Reference},
    source::{Destination, Manifest},
};

/// The name of a destination, and what it named when the work began.
///
/// Registries have no compare-and-swap: what another writes between the last look and the write is still replaced. That is one round trip
/// instead of the minutes that a conversion takes.
pub(crate) struct TagUpdate<'a> {
    destination: &'a Destination,
    before: TagTarget,
}

/// What a name leads to.
enum TagTarget {
    Nothing,
    Manifest(Manifest),
    /// Something that cannot be read as a manifest.
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
    /// Looks at what the name leads to now.
    pub(crate) async fn begin(destination: &'a Destination) -> Result<Self> {
        let before = named(destination).await?;
        Ok(Self {
            destination,
            before,
        })
    }

    /// The manifest that it named, where there was one.
    pub(crate) fn before(&self) -> Option<&Manifest> {
        match &self.before {
            TagTarget::Manifest(manifest) => Some(manifest),
            TagTarget::Nothing | TagTarget::Other => None,
        }
    }

    /// Stores a manifest and gives it the name, unless that leads to something else than it did.
    pub(crate) async fn give(self, media_type: &str, bytes: &Bytes) -> Result<Digest> {
        let now = named(self.destination).await?;
        let what = match &now {
            TagTarget::Manifest(now) if now.digest == Digest::of(bytes) => None,
            same if same.is_same(&self.before) => None,
            TagTarget::Manifest(now) => Some(now.digest.to_string()),
            TagTarget::Nothing => Some("nothing".to_owned()),
            TagTarget::Other => Some("something else".to_owned()),
        };
        if let Some(what) = what {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "{} was changed while this was made, and names {what} now: it stays so; do it again",
                    self.destination.reference()
                ),
            ));
        }
        self.destination.tag_manifest(media_type, bytes).await
    }
}

async fn named(destination: &Destination) -> Result<TagTarget> {
    // without a tag a layout gets one entry more, and nothing is replaced
    if matches!(destination.reference(), Reference::Layout { tag: None, .. }) {
        return Ok(TagTarget::Nothing);
    }
    let Some(there) = destination.source().await? else {
        return Ok(TagTarget::Nothing); // an archive is written anew
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
        let folder = tempfile::tempdir().unwrap();
        let reference = format!("oci:{}:v1", folder.path().display());
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
            naming.give(OCI_MANIFEST, first).await.unwrap();
            assert_eq!(named().await, *first);
        }
        let naming = TagUpdate::begin(&destination).await.unwrap();
        let put = destination.tag_manifest(OCI_MANIFEST, &theirs).await;
        put.unwrap();
        let error = naming.give(OCI_MANIFEST, &old).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
        assert_eq!(named().await, theirs);
        // two who make the same are not in each other's way
        let naming = TagUpdate::begin(&destination).await.unwrap();
        destination.tag_manifest(OCI_MANIFEST, &new).await.unwrap();
        naming.give(OCI_MANIFEST, &new).await.unwrap();
    }
}
