//! Lists an image index with its nested indexes, and the entries of an index.

use serde_json::Value;

use crate::{
    oci::{
        Digest,
        index_edit::digest_of,
        manifest::{Document, parse},
        media_type,
    },
    source::{Manifest, Source},
};

/// Maximum number of indexes that [`indexes`] returns.
const MAX_INDEXES: usize = 64;

/// The document if it is an index, and its nested indexes, as far as they are readable.
pub(crate) async fn indexes(source: &Source, root: &Manifest) -> Vec<Manifest> {
    let is_index = |found: &Manifest| {
        let document = parse(&found.bytes, &found.media_type);
        matches!(document, Ok(Document::Index(..)))
    };
    let mut found: Vec<Manifest> = Some(root.clone()).into_iter().filter(is_index).collect();
    let mut at = 0;
    while let Some(index) = found.get(at) {
        at += 1;
        let is_index_entry =
            |entry: &Value| media_type::is_index(entry["mediaType"].as_str().unwrap_or_default());
        for digest in listed(index, is_index_entry) {
            if found.len() == MAX_INDEXES || found.iter().any(|taken| taken.digest == digest) {
                continue;
            }
            found.extend(source.manifest(&digest).await.ok().filter(is_index));
        }
    }
    found
}

/// The digests of the selected entries of an index.
pub(crate) fn listed(index: &Manifest, is_wanted: impl Fn(&Value) -> bool) -> Vec<Digest> {
    let document: Value = serde_json::from_slice(&index.bytes).unwrap_or_default();
    let entries = document["manifests"].as_array().into_iter().flatten();
    entries
        .filter(|entry| is_wanted(entry))
        .filter_map(|entry| digest_of(entry).parse().ok())
        .collect()
}
