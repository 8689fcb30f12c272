//! The tags of a repository (OCI distribution 1.1, "Listing Tags").

use std::collections::{BTreeSet, HashSet};

use serde_json::Value;

use super::{
    client::Client,
    document::{self, Answer},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::reference::is_tag,
};

/// Answers of one list, of a thousand tags each or as many as the registry likes.
const MAX_ANSWERS: usize = 4096;

/// All tags, sorted. Invalid tags are logged and ignored: in a URL they could lead anywhere.
pub(super) async fn list(client: &Client) -> Result<Vec<String>> {
    let what = format!("listing the tags of {}", client.name());
    let corrupt = |why: &str| Error::new(Kind::Corrupt, format!("{what}: {why}"));
    let mut url = client.url("tags/list")?;
    url.query_pairs_mut().append_pair("n", "1000");
    let mut tags = BTreeSet::new();
    let mut seen = HashSet::new();
    for _ in 0..MAX_ANSWERS {
        if !seen.insert(url.clone()) {
            return Err(corrupt("its list is circular"));
        }
        let document = match document::get(client, &url, "application/json", &what).await? {
            Answer::Document(document) => document,
            Answer::Nothing => return Err(corrupt("no list of tags")),
            Answer::Refused(refusal) => return Err(refusal.error().context(what)),
        };
        let list: Value = serde_json::from_slice(&document.bytes)
            .or_kind(Kind::Corrupt, || format!("{what}: no list of tags"))?;
        match &list["tags"] {
            Value::Array(listed) => {
                for tag in listed {
                    match tag.as_str().filter(|tag| is_tag(tag)) {
                        Some(tag) => drop(tags.insert(tag.to_owned())),
                        None => tracing::warn!("{what}: a tag is ignored: {}", shown(tag)),
                    }
                }
            }
            Value::Null if list.is_object() => {} // Go's empty list
            _ => return Err(corrupt("no list of tags")),
        }
        match document.next_page(client, &url, &what)? {
            Some(next) => url = next,
            None => return Ok(tags.into_iter().collect()),
        }
    }
    Err(corrupt("its list has no end"))
}

/// An invalid tag, shortened for a message.
fn shown(entry: &Value) -> String {
    let text = entry.to_string(); // as JSON: control characters are escaped
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
