//! Manifests and indexes, by tag or digest.

use super::{
    client::Client,
    document::{self, Answer, Document},
};
use crate::{
    error::{Error, Kind, Result},
    oci::Digest,
    source::Manifest,
};

/// What is asked for: without it, old registries answer in Docker's schema 1.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.artifact.manifest.v1+json";

/// The fields that tell what a document is.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    schema_version: u64,
    #[serde(default)]
    media_type: String,
}

/// The manifest that a tag names now.
pub(super) async fn by_tag(client: &Client, tag: &str) -> Result<Manifest> {
    match find_tag(client, tag).await? {
        Ok(manifest) => Ok(manifest),
        Err(refused) => Err(refused),
    }
}

/// As [`by_tag`]; a refusal (no such tag) is an answer.
pub(super) async fn find_tag(client: &Client, tag: &str) -> Result<Result<Manifest>> {
    get(
        client,
        tag,
        &format!("reading manifest {tag} of {}", client.name()),
        None,
    )
    .await
}

/// The manifest with this digest.
pub(super) async fn by_digest(client: &Client, digest: &Digest) -> Result<Manifest> {
    let what = format!("reading manifest {digest} of {}", client.name());
    get(client, &digest.to_string(), &what, Some(digest)).await?
}

async fn get(
    client: &Client,
    name: &str,
    what: &str,
    expected: Option<&Digest>,
) -> Result<Result<Manifest>> {
    let url = client.url(&format!("manifests/{name}"))?;
    let document = match document::get(client, &url, ACCEPT, what).await? {
        Answer::Document(document) => document,
        Answer::Refused(refusal) => return Ok(Err(refusal.error().context(what))),
    };
    verify(document, expected)
        .map(Ok)
        .map_err(|error| error.context(what))
}

/// Checks a manifest's digest, and that it is one.
fn verify(document: Document, expected: Option<&Digest>) -> Result<Manifest> {
    let digest = Digest::of(&document.bytes);
    if let Some(expected) = expected
        && digest != *expected
    {
        return Err(Error::new(
            Kind::Corrupt,
            format!("other bytes than the digest's: they have {digest}"),
        ));
    }
    // by tag, the header is all there is; another algorithm's digest cannot be compared
    if let Some(said) = document.digest.as_deref()
        && said.starts_with("sha256:")
        && said != digest.to_string()
    {
        return Err(Error::new(
            Kind::Corrupt,
            format!("the registry says {said:?}, and sent bytes of {digest}"),
        ));
    }
    let Ok(head) = serde_json::from_slice::<Head>(&document.bytes) else {
        return Err(Error::new(
            Kind::Corrupt,
            format!(
                "no manifest, but {:?}: is this a registry?",
                document.content_type
            ),
        ));
    };
    // the document's own word is under the digest, the header's is not
    let media_type = match head.media_type.is_empty() {
        true => document.content_type,
        false => head.media_type,
    };
    if head.schema_version == 1
        || media_type.starts_with("application/vnd.docker.distribution.manifest.v1")
    {
        return Err(Error::new(
            Kind::Unsupported,
            "the image is in Docker's schema 1: push it again with a tool of this decade (skopeo copy --format oci)",
        ));
    }
    Ok(Manifest {
        media_type,
        digest,
        bytes: document.bytes,
    })
}
