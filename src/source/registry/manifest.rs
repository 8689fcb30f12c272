//! Manifests and indexes, by tag or digest.

use bytes::Bytes;
use reqwest::{Method, StatusCode};

use super::{
    client::{Client, Wanted},
    document::{self, Answer, Document},
    refusal::Refusal,
    retry::{Failure, Tries},
};
use crate::{
    error::{Error, Kind, Result},
    oci::Digest,
    source::Manifest,
};

/// The accepted media types: without them, old registries answer in Docker's schema 1.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.artifact.manifest.v1+json";

/// The fields that show the kind of a document.
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
    found(find_tag(client, tag).await?, client, tag)
}

/// Like [`by_tag`]; a refusal (no such tag) is a result, not an error.
pub(super) async fn find_tag(client: &Client, tag: &str) -> Result<Result<Manifest, Refusal>> {
    get(client, tag, None).await
}

/// The manifest with this digest.
pub(super) async fn by_digest(client: &Client, digest: &Digest) -> Result<Manifest> {
    let name = digest.to_string();
    found(get(client, &name, Some(digest)).await?, client, &name)
}

fn what(client: &Client, name: &str) -> String {
    format!("reading manifest {name} of {}", client.name())
}

/// A refusal is an error.
fn found(answer: Result<Manifest, Refusal>, client: &Client, name: &str) -> Result<Manifest> {
    answer.map_err(|refusal| refusal.error().context(what(client, name)))
}

async fn get(
    client: &Client,
    name: &str,
    expected: Option<&Digest>,
) -> Result<Result<Manifest, Refusal>> {
    let what = what(client, name);
    let url = client.url(&format!("manifests/{name}"))?;
    let document = match document::get(client, &url, ACCEPT, &what).await? {
        Answer::Document(document) => document,
        Answer::Nothing => {
            let nothing = Error::new(Kind::Corrupt, "the answer has no manifest (204)");
            return Err(nothing.context(what));
        }
        Answer::Refused(refusal) => return Ok(Err(refusal)),
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
            format!(
                "the content does not match the digest: it has {digest}{}",
                document.packed
            ),
        ));
    }
    // by tag, the header is all there is; another algorithm's digest cannot be compared
    if let Some(said) = document.digest.as_deref()
        && said.starts_with("sha256:")
        && said != digest.to_string()
    {
        return Err(Error::new(
            Kind::Corrupt,
            format!(
                "the registry announced {said:?}, but sent content of {digest}{}",
                document.packed
            ),
        ));
    }
    let Ok(head) = serde_json::from_slice::<Head>(&document.bytes) else {
        return Err(Error::new(
            Kind::Corrupt,
            format!(
                "{:?} instead of a manifest: is this a registry?{}",
                document.content_type, document.packed
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
            "the image has the obsolete Docker manifest schema 1: push it again in another format (skopeo copy --format oci)",
        ));
    }
    Ok(Manifest {
        media_type,
        digest,
        bytes: document.bytes,
    })
}

/// Stores a manifest under a tag or its digest. Returns the `OCI-Subject` of the answer: a registry that sends it lists the manifest
/// among its subject's referrers.
pub(super) async fn put(
    client: &Client,
    name: &str,
    media_type: &str,
    bytes: &Bytes,
) -> Result<Option<String>> {
    let url = client.url(&format!("manifests/{name}"))?;
    let wanted = Wanted {
        method: Method::PUT,
        content: Some((media_type.to_owned(), bytes.clone())),
        ..Wanted::default()
    };
    let what = format!("storing manifest {name} in {}", client.name());
    let mut tries = Tries::new(what, client.limits.control_patience);
    loop {
        let asked = async {
            let body = client.ask(&url, &wanted).await?;
            if !body.head().status().is_success() {
                return Err(client.refuse(body).await);
            }
            let digest = Digest::of(bytes).to_string();
            if let Some(said) = body.header("docker-content-digest")
                && said.starts_with("sha256:")
                && said != digest
            {
                return Err(Failure::Final(Error::new(
                    Kind::Corrupt,
                    format!(
                        "{} reports that it has stored {said:?}, not {digest}",
                        body.host()
                    ),
                )));
            }
            Ok(body.header("oci-subject").map(str::to_owned))
        };
        match asked.await {
            Ok(subject) => return Ok(subject),
            Err(Failure::Final(error)) if error.kind() == Kind::Immutable => {
                // Amazon's registry also refuses a manifest that it has already
                if is_there(client, name, bytes).await {
                    return Ok(None);
                }
                let what = format!(
                    "the tag {name} of {} exists, and the registry does not allow it to be replaced: give another tag, or remove it first",
                    client.name()
                );
                return Err(error.context(what));
            }
            Err(failure) => tries.after(failure).await?,
        }
    }
}

/// Whether a tag names just this manifest.
async fn is_there(client: &Client, tag: &str, bytes: &Bytes) -> bool {
    let found = find_tag(client, tag).await;
    matches!(found, Ok(Ok(manifest)) if manifest.digest == Digest::of(bytes))
}

/// Removes a manifest. `false` when it was not there.
pub(super) async fn delete(client: &Client, digest: &Digest) -> Result<bool> {
    let url = client.url(&format!("manifests/{digest}"))?;
    let wanted = Wanted {
        method: Method::DELETE,
        ..Wanted::default()
    };
    let what = format!("removing manifest {digest} from {}", client.name());
    let mut tries = Tries::new(what, client.limits.control_patience);
    loop {
        let asked = async {
            let body = client.ask(&url, &wanted).await?;
            match body.head().status() {
                status if status.is_success() => Ok(true),
                StatusCode::NOT_FOUND => Ok(false),
                _ => Err(client.refuse(body).await),
            }
        };
        match asked.await {
            Ok(removed) => return Ok(removed),
            Err(failure) => tries.after(failure).await?,
        }
    }
}
