//! The referrers of a manifest (OCI distribution 1.1, "Listing Referrers"): from the API, or from the referrers tag if there is no API.

pub(super) mod list;

use std::collections::HashSet;

use reqwest::StatusCode;
use serde_json::Value;

use self::list::Tagged;
use super::{
    client::Client,
    document::{self, Answer, Document},
    refusal::Refusal,
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, descriptor::Descriptor, media_type::OCI_INDEX, referrers::referrers_tag},
    source::Referrer,
};

/// Maximum number of answers for one list. A subject with more referrers of one type is not plausible.
const MAX_ANSWERS: usize = 64;
/// Referrers of one list.
const MAX_REFERRERS: usize = 4096;
/// The annotation by which early registries said which filters they had applied.
const FILTERS_ANNOTATION: &str = "org.opencontainers.referrers.filtersApplied";

/// All referrers of this artifact type, or of any, in the registry's order.
pub(super) async fn list(
    client: &Client,
    subject: &Digest,
    artifact_type: Option<&str>,
) -> Result<Vec<Referrer>> {
    match by_api(client, subject, artifact_type).await? {
        Some(found) => Ok(found),
        None => by_tag(client, subject, artifact_type).await,
    }
}

fn what(client: &Client, subject: &Digest) -> String {
    format!("listing the referrers of {subject} of {}", client.name())
}

/// The list of the registry's API; `None` if it has no such API. Readers and writers both ask this, because a list is written under the
/// tag only if readers will look for it there.
pub(super) async fn by_api(
    client: &Client,
    subject: &Digest,
    artifact_type: Option<&str>,
) -> Result<Option<Vec<Referrer>>> {
    let what = &what(client, subject);
    let mut url = client.url(&format!("referrers/{subject}"))?;
    if let Some(artifact_type) = artifact_type {
        url.query_pairs_mut()
            .append_pair("artifactType", artifact_type);
    }
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for answers in 0..MAX_ANSWERS {
        if !seen.insert(url.clone()) {
            return Err(corrupt(what, "its list is circular"));
        }
        let document = match document::get(client, &url, OCI_INDEX, what).await? {
            Answer::Document(document) if document.content_type == OCI_INDEX => document,
            Answer::Document(_) | Answer::Nothing if answers == 0 => return Ok(None),
            Answer::Document(_) | Answer::Nothing => {
                return Err(corrupt(
                    what,
                    "its list continues with something other than an image index",
                ));
            }
            Answer::Refused(refusal) if answers == 0 && means_no_api(&refusal) => return Ok(None),
            Answer::Refused(refusal) => return Err(refusal.error().context(what.as_str())),
        };
        take_answer(&mut found, &document, artifact_type, what)?;
        match document.next_page(client, &url, what)? {
            Some(next) => url = next,
            None => return Ok(Some(found)),
        }
    }
    Err(corrupt(what, "its list has no end"))
}

/// Whether a registry that refuses the API does not have it. Credentials and haste are other reasons, and so is an outage.
fn means_no_api(refusal: &Refusal) -> bool {
    let is_other_reason = matches!(
        refusal.status,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS
    );
    refusal.status == StatusCode::NOT_IMPLEMENTED
        || refusal.status.is_client_error() && !is_other_reason
}

/// The list under the tag `sha256-<hex>`, which clients maintain if the registry has no API. Other content under the tag is not a list.
pub(super) async fn by_tag(
    client: &Client,
    subject: &Digest,
    artifact_type: Option<&str>,
) -> Result<Vec<Referrer>> {
    let what = what(client, subject);
    let list = match list::read(client, subject)
        .await
        .map_err(|error| error.context(what.as_str()))?
    {
        Tagged::Nothing => return Ok(Vec::new()),
        Tagged::List(list) => list,
        Tagged::Other(why) => {
            tracing::info!(
                "{} of {} is ignored as a list of referrers: {why}",
                referrers_tag(subject),
                client.name()
            );
            return Ok(Vec::new());
        }
    };
    let mut found = Vec::new();
    take(&mut found, list.descriptors(), false, artifact_type, &what)?;
    Ok(found)
}

/// Adds the referrers of one answer of the API.
fn take_answer(
    found: &mut Vec<Referrer>,
    document: &Document,
    artifact_type: Option<&str>,
    what: &str,
) -> Result<()> {
    let index: Value = serde_json::from_slice(&document.bytes)
        .or_kind(Kind::Corrupt, || format!("{what}: not an index"))?;
    let entries: &[Value] = match &index["manifests"] {
        Value::Array(entries) => entries,
        Value::Null if index.is_object() => &[], // Go's empty list
        _ => return Err(corrupt(what, "not an index")),
    };
    let annotated = index["annotations"][FILTERS_ANNOTATION]
        .as_str()
        .unwrap_or_default();
    let is_filtered = [document.filters.as_str(), annotated]
        .iter()
        .flat_map(|list| list.split(','))
        .any(|filter| filter.trim() == "artifactType");
    let entries = Descriptor::read_list(entries);
    take(found, entries, is_filtered, artifact_type, what)
}

/// Adds the referrers of a list. They are filtered here if the registry did not filter them; malformed entries are logged and ignored.
fn take(
    found: &mut Vec<Referrer>,
    (entries, odd): (Vec<Descriptor>, Vec<String>),
    is_filtered: bool,
    artifact_type: Option<&str>,
    what: &str,
) -> Result<()> {
    for odd in odd {
        tracing::warn!("{what}: ignored: {odd}");
    }
    for entry in entries {
        let of_type = match (entry.artifact_type.as_deref(), artifact_type) {
            (_, None) => true,
            (None, Some(_)) => is_filtered,
            (Some(other), Some(wanted)) => other == wanted,
        };
        if !of_type {
            continue;
        }
        if found.len() == MAX_REFERRERS {
            return Err(corrupt(what, "more than 4096 of one type"));
        }
        found.push(Referrer {
            digest: entry.digest,
            size: entry.size,
            artifact_type: artifact_type
                .map(str::to_owned)
                .or(entry.artifact_type)
                .unwrap_or_default(),
            annotations: entry.annotations,
        });
    }
    Ok(())
}

fn corrupt(what: &str, why: &str) -> Error {
    Error::new(Kind::Corrupt, format!("{what}: {why}"))
}
