//! Referrers of a manifest (OCI distribution 1.1, "Listing Referrers"): the API, or where there is none the tag that stands in for it.

use std::collections::{BTreeMap, HashSet};

use reqwest::StatusCode;

use super::{
    client::Client,
    document::{self, Answer, Document},
    link, manifest,
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::Digest,
    source::Referrer,
};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Answers of one list. A subject with more referrers of one type is no honest one.
const MAX_ANSWERS: usize = 64;
/// Referrers of one list.
const MAX_REFERRERS: usize = 4096;
/// The annotation by which early registries said which filters they had applied.
const FILTERS_ANNOTATION: &str = "org.opencontainers.referrers.filtersApplied";

#[derive(serde::Deserialize)]
struct Index {
    // no defaults: with them serde would take an empty list for an index
    manifests: Option<Vec<Entry>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    digest: String,
    size: u64,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// All referrers of this artifact type, or of any, in the registry's order.
pub(super) async fn list(
    client: &Client,
    subject: &Digest,
    artifact_type: Option<&str>,
) -> Result<Vec<Referrer>> {
    let what = format!("listing the referrers of {subject} of {}", client.name());
    match by_api(client, subject, artifact_type, &what).await? {
        Some(found) => Ok(found),
        None => by_tag(client, subject, artifact_type, &what).await,
    }
}

/// `None` where the registry has no such API.
async fn by_api(
    client: &Client,
    subject: &Digest,
    artifact_type: Option<&str>,
    what: &str,
) -> Result<Option<Vec<Referrer>>> {
    let mut url = client.url(&format!("referrers/{subject}"))?;
    if let Some(artifact_type) = artifact_type {
        url.query_pairs_mut()
            .append_pair("artifactType", artifact_type);
    }
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for answers in 0..MAX_ANSWERS {
        if !seen.insert(url.clone()) {
            return Err(corrupt(what, "its list leads back to itself"));
        }
        let document = match document::get(client, &url, INDEX, what).await? {
            Answer::Document(document) => document,
            Answer::Refused(refusal) => {
                let unknown_name = refusal.codes.iter().any(|code| code == "NAME_UNKNOWN");
                if answers > 0 || refusal.status == StatusCode::NOT_FOUND && unknown_name {
                    return Err(refusal.error().context(what));
                }
                return Ok(None);
            }
        };
        if document.content_type != INDEX {
            return match answers {
                0 => Ok(None),
                _ => Err(corrupt(what, "its list goes on with what is no index")),
            };
        }
        let next = document
            .links
            .iter()
            .find_map(|header| link::next_target(header))
            .map(|target| url.join(target));
        take(&mut found, &document, artifact_type, what)?;
        url = match next {
            None => return Ok(Some(found)),
            Some(Ok(next)) if client.is_own(&next) => next,
            Some(_) => return Err(corrupt(what, "its list goes on at another host")),
        };
    }
    Err(corrupt(what, "its list has no end"))
}

/// The index under the tag `sha256-<hex>`, which clients keep where the registry has no API.
async fn by_tag(
    client: &Client,
    subject: &Digest,
    artifact_type: Option<&str>,
    what: &str,
) -> Result<Vec<Referrer>> {
    let tag = format!("sha256-{}", subject.hex());
    let manifest = match manifest::find_tag(client, &tag).await? {
        Ok(manifest) => manifest,
        Err(refused) if refused.kind() == Kind::NotFound => return Ok(Vec::new()),
        Err(refused) => return Err(refused),
    };
    let document = Document {
        content_type: manifest.media_type,
        digest: None,
        links: Vec::new(),
        filters: String::new(),
        bytes: manifest.bytes,
    };
    let mut found = Vec::new();
    take(&mut found, &document, artifact_type, what)?;
    Ok(found)
}

/// Adds the referrers of one answer. What the registry did not filter is filtered here; what is no SHA-256 digest cannot be fetched
/// and is passed over.
fn take(
    found: &mut Vec<Referrer>,
    document: &Document,
    artifact_type: Option<&str>,
    what: &str,
) -> Result<()> {
    let index: Index = serde_json::from_slice(&document.bytes)
        .or_kind(Kind::Corrupt, || format!("{what}: no index"))?;
    let annotated = index
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(FILTERS_ANNOTATION))
        .map_or("", String::as_str);
    let is_filtered = [document.filters.as_str(), annotated]
        .iter()
        .flat_map(|list| list.split(','))
        .any(|filter| filter.trim() == "artifactType");
    for entry in index.manifests.unwrap_or_default() {
        let of_type = match (entry.artifact_type.as_deref(), artifact_type) {
            (_, None) => true,
            (None | Some(""), Some(_)) => is_filtered,
            (Some(other), Some(wanted)) => other == wanted,
        };
        let Ok(digest) = entry.digest.parse::<Digest>() else {
            tracing::debug!(what, "a referrer whose digest is not SHA-256");
            continue;
        };
        if !of_type {
            continue;
        }
        if found.len() == MAX_REFERRERS {
            return Err(corrupt(what, "over 4096 of one type"));
        }
        found.push(Referrer {
            digest,
            size: entry.size,
            artifact_type: artifact_type
                .map(str::to_owned)
                .or(entry.artifact_type)
                .unwrap_or_default(),
            annotations: entry.annotations.unwrap_or_default(),
        });
    }
    Ok(())
}

fn corrupt(what: &str, why: &str) -> Error {
    Error::new(Kind::Corrupt, format!("{what}: {why}"))
}
