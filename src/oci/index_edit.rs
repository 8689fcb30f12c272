//! Edits of the entries of an image index that leave everything else unchanged and in order.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::Digest;

/// The edit of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// The index does not list it any more.
    LeaveOut,
    /// The entry refers to another document and keeps its other fields.
    Replace {
        /// The document's media type.
        media_type: String,
        /// Its digest.
        digest: Digest,
        /// Its bytes.
        size: usize,
    },
}

/// Edits the entries of an index by their digests, which are taken unparsed.
pub fn edit(index: &[u8], edits: &HashMap<String, Edit>) -> serde_json::Result<Vec<u8>> {
    let mut document: Value = serde_json::from_slice(index)?;
    if let Some(Value::Array(entries)) = document.get_mut("manifests") {
        entries.retain(|entry| edits.get(digest_of(entry)) != Some(&Edit::LeaveOut));
        for entry in entries {
            if let Some(Edit::Replace {
                media_type,
                digest,
                size,
            }) = edits.get(digest_of(entry))
                && let Value::Object(fields) = entry
            {
                fields.insert("mediaType".to_owned(), json!(media_type));
                fields.insert("digest".to_owned(), json!(digest));
                fields.insert("size".to_owned(), json!(size));
                fields.shift_remove("data"); // the bytes of the old document
            }
        }
    }
    serde_json::to_vec(&document)
}

/// The digest of an entry, unparsed; empty if it has none.
pub fn digest_of(entry: &Value) -> &str {
    entry
        .get("digest")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_edited_stays_in_its_order() {
        let new = Digest::of(b"new");
        let index = r#"{"z":1,"manifests":[{"x":{"b":1,"a":2},"digest":"one","size":1},{"digest":"two","data":"e30=","size":2,"platform":{"os":"linux"}},{"size":9}],"a":"<&>"}"#;
        let edits = HashMap::from([
            ("one".to_owned(), Edit::LeaveOut),
            (
                "two".to_owned(),
                Edit::Replace {
                    media_type: "m".to_owned(),
                    digest: new,
                    size: 77,
                },
            ),
        ]);
        let edited = edit(index.as_bytes(), &edits).unwrap();
        assert_eq!(
            String::from_utf8(edited).unwrap(),
            format!(
                r#"{{"z":1,"manifests":[{{"digest":"{new}","size":77,"platform":{{"os":"linux"}},"mediaType":"m"}},{{"size":9}}],"a":"<&>"}}"#
            )
        );
        assert_eq!(
            edit(index.as_bytes(), &HashMap::new()).unwrap(),
            index.as_bytes()
        );
    }

    #[test]
    fn what_is_no_index_is_left_alone() {
        let edits = HashMap::from([(String::new(), Edit::LeaveOut)]);
        for other in ["7", "{}", r#"{"manifests":7}"#, r#"{"manifests":[7]}"#] {
            let expected = other.replace("[7]", "[]");
            assert_eq!(edit(other.as_bytes(), &edits).unwrap(), expected.as_bytes());
        }
        edit(b"{", &edits).unwrap_err();
    }
}
