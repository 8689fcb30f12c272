//! Referrers: manifests that refer to another manifest, their subject (OCI distribution specification 1.1), and the list of them under a
//! tag if a registry has no API for it.
//!
//! A tag is only a name: the content under it is read or changed as a list of referrers only if it has the form of one.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use super::{
    Digest,
    descriptor::{Descriptor, annotations},
    media_type::{OCI_INDEX, is_config},
};

/// Entries without a type of a list whose manifests are looked at, at most.
const MAX_UNTYPED: usize = 64;

/// The tag of the list of the referrers of a manifest, if there is no API ("Referrers Tag Schema").
pub fn referrers_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// The manifest whose referrers the content of a tag would list.
pub fn subject_of_tag(tag: &str) -> Option<Digest> {
    format!("sha256:{}", tag.strip_prefix("sha256-")?)
        .parse()
        .ok()
}

/// The data of a manifest as a referrer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referring {
    /// Its artifact type: that of its configuration where it states none.
    pub artifact_type: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Reads a manifest as a referrer of a subject; `None` where it is not one.
pub fn referring(manifest: &[u8], subject: &Digest) -> Option<Referring> {
    let manifest: Value = serde_json::from_slice(manifest).ok()?;
    if manifest["subject"]["digest"] != subject.to_string() {
        return None;
    }
    let types = [&manifest["artifactType"], &manifest["config"]["mediaType"]];
    let artifact_type = types
        .into_iter()
        .filter_map(Value::as_str)
        .find(|stated| !stated.is_empty())?;
    Some(Referring {
        artifact_type: artifact_type.to_owned(),
        annotations: annotations(&manifest["annotations"]).unwrap_or_default(),
    })
}

/// Why the content under a tag is not the list of the referrers of a manifest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotAList {
    /// The tag leads to the manifest whose referrers are looked for.
    #[error("it is the manifest itself: the registry resolves the tag as a digest")]
    Subject,
    /// Another kind of document.
    #[error("it is not an image index but {0:?}")]
    OtherType(String),
    /// It has a field that a list does not have, or has it wrong.
    #[error("its {0:?} is not that of a list of referrers")]
    Field(&'static str),
    /// An entry is for a platform.
    #[error("its entry {0} has a platform: it is a multi-platform image")]
    Platform(usize),
    /// An entry names no artifact type, and its manifest does not refer to the subject.
    #[error("its entry {0} is not a referrer")]
    NotAReferrer(usize),
}

/// Content that has the form of a list of referrers: an image index without platforms. For entries without an artifact type, the manifests
/// must be read.
pub struct Candidate {
    list: ReferrersList,
    /// Entries without an artifact type, by their place, and their digests.
    untyped: Vec<(usize, Digest)>,
}

impl Candidate {
    /// Reads the content under the tag of a subject. `media_type` is that of the registry or of the descriptor.
    pub fn read(bytes: &[u8], media_type: &str, subject: &Digest) -> Result<Self, NotAList> {
        if Digest::of(bytes) == *subject {
            return Err(NotAList::Subject);
        }
        let other = || NotAList::OtherType(media_type.chars().take(80).collect());
        let document: Map<String, Value> = serde_json::from_slice(bytes).map_err(|_| other())?;
        let stated = match document.get("mediaType") {
            None | Some(Value::Null) => media_type,
            Some(stated) => stated.as_str().unwrap_or_default(),
        };
        if stated != OCI_INDEX {
            return Err(NotAList::OtherType(stated.chars().take(80).collect()));
        }
        if document.get("schemaVersion") != Some(&json!(2)) {
            return Err(NotAList::Field("schemaVersion"));
        }
        // a document with any of these fields is of another kind, or refers to something itself
        for field in ["layers", "config", "fsLayers", "blobs", "subject"] {
            if document.get(field).is_some_and(|value| !value.is_null()) {
                return Err(NotAList::Field(field));
            }
        }
        if document
            .get("artifactType")
            .is_some_and(|stated| !stated.is_null() && *stated != "")
        {
            return Err(NotAList::Field("artifactType"));
        }
        let entries = match document.get("manifests") {
            Some(Value::Array(entries)) => entries.as_slice(),
            Some(Value::Null) => &[], // Go's empty list
            _ => return Err(NotAList::Field("manifests")),
        };
        let mut untyped = Vec::new();
        let mut shown = 0_usize;
        for (at, entry) in entries.iter().enumerate() {
            if !entry.is_object() {
                continue; // it tells nothing
            }
            if !entry["platform"].is_null() {
                return Err(NotAList::Platform(at));
            }
            let stated = entry["artifactType"].as_str().unwrap_or_default();
            if stated.is_empty() || is_config(stated) {
                let digest = entry["digest"].as_str().and_then(|text| text.parse().ok());
                let digest = digest.filter(|_| untyped.len() < MAX_UNTYPED);
                untyped.push((at, digest.ok_or(NotAList::NotAReferrer(at))?));
            }
            shown = shown.saturating_add(1);
        }
        if shown == 0 && !entries.is_empty() {
            return Err(NotAList::NotAReferrer(0));
        }
        Ok(Self {
            list: ReferrersList {
                document,
                looked_at: HashMap::new(),
            },
            untyped,
        })
    }

    /// Digests of the manifests that have to be looked at.
    pub fn untyped(&self) -> impl Iterator<Item = Digest> {
        self.untyped.iter().map(|(_, digest)| *digest)
    }

    /// The list, after the manifests that had to be read.
    pub fn prove(self, found: HashMap<Digest, Referring>) -> Result<ReferrersList, NotAList> {
        for (at, digest) in &self.untyped {
            if !found.contains_key(digest) {
                return Err(NotAList::NotAReferrer(*at));
            }
        }
        Ok(ReferrersList {
            looked_at: found,
            ..self.list
        })
    }
}

/// The list of the referrers of a manifest, as the content of its tag. Unknown fields are kept.
#[derive(Clone, Debug)]
pub struct ReferrersList {
    document: Map<String, Value>,
    /// The data of the manifests of entries without an artifact type.
    looked_at: HashMap<Digest, Referring>,
}

impl Default for ReferrersList {
    /// An empty list.
    fn default() -> Self {
        let fields = [
            ("schemaVersion", json!(2)),
            ("mediaType", json!(OCI_INDEX)),
            ("manifests", json!([])),
        ];
        Self {
            document: Map::from_iter(fields.map(|(key, value)| (key.to_owned(), value))),
            looked_at: HashMap::new(),
        }
    }
}

impl ReferrersList {
    /// Its entries, unparsed.
    pub fn entries(&self) -> &[Value] {
        self.document
            .get("manifests")
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice)
    }

    fn entries_mut(&mut self) -> Option<&mut Vec<Value>> {
        let entries = self.document.entry("manifests").or_insert(Value::Null);
        if entries.is_null() {
            *entries = json!([]);
        }
        entries.as_array_mut()
    }

    /// Adds a descriptor at the end, unless its manifest is listed. Whether anything has changed.
    pub fn add(&mut self, entry: &Value) -> bool {
        let Some(entries) = self.entries_mut() else {
            return false; // it has a list, or none
        };
        let is_listed = entries
            .iter()
            .any(|known| known["digest"] == entry["digest"]);
        if !is_listed {
            entries.push(entry.clone());
        }
        !is_listed
    }

    /// Takes a manifest out. Whether anything has changed.
    pub fn remove(&mut self, digest: &Digest) -> bool {
        let Some(entries) = self.entries_mut() else {
            return false;
        };
        let before = entries.len();
        let digest = digest.to_string();
        entries.retain(|known| known["digest"] != digest);
        entries.len() != before
    }

    /// The valid entries, and messages about the others.
    pub fn descriptors(&self) -> (Vec<Descriptor>, Vec<String>) {
        let (mut sound, odd) = Descriptor::read_list(self.entries());
        for descriptor in &mut sound {
            if let Some(referring) = self.looked_at.get(&descriptor.digest) {
                descriptor.artifact_type = Some(referring.artifact_type.clone());
            }
        }
        (sound, odd)
    }

    /// As JSON, to be stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        Value::from(self.document.clone()).to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests;
