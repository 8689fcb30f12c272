//! The tags of a repository (OCI distribution 1.1, "Listing Tags").

use std::collections::{BTreeSet, HashSet};

use super::{
    client::Client,
    document::{self, Answer},
    link,
};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// Answers of one list, of a thousand tags each or as many as the registry likes.
const MAX_ANSWERS: usize = 4096;

/// All tags, sorted.
pub(super) async fn list(client: &Client) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct List {
        tags: Option<Vec<String>>,
    }
    let what = format!("listing the tags of {}", client.name());
    let corrupt = |why: &str| Error::new(Kind::Corrupt, format!("{what}: {why}"));
    let mut url = client.url("tags/list")?;
    url.query_pairs_mut().append_pair("n", "1000");
    let mut tags = BTreeSet::new();
    let mut seen = HashSet::new();
    for _ in 0..MAX_ANSWERS {
        if !seen.insert(url.clone()) {
            return Err(corrupt("its list leads back to itself"));
        }
        let document = match document::get(client, &url, "application/json", &what).await? {
            Answer::Document(document) => document,
            Answer::Refused(refusal) => return Err(refusal.error().context(what)),
        };
        let list: List = serde_json::from_slice(&document.bytes)
            .or_kind(Kind::Corrupt, || format!("{what}: no list of tags"))?;
        tags.extend(list.tags.unwrap_or_default());
        let next = document
            .links
            .iter()
            .find_map(|header| link::next_target(header))
            .map(|target| url.join(target));
        url = match next {
            None => return Ok(tags.into_iter().collect()),
            Some(Ok(next)) if client.is_own(&next) => next,
            Some(_) => return Err(corrupt("its list goes on at another host")),
        };
    }
    Err(corrupt("its list has no end"))
}
