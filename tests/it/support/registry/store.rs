//! Repositories: blobs in memory or in files, manifests, tags.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::Arc,
};

use bytes::Bytes;
use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::reply::text;

#[derive(Default)]
pub(super) struct Repository {
    pub(super) blobs: HashMap<Digest, Data>,
    pub(super) manifests: HashMap<Digest, (String, Bytes)>,
    /// Manifests in the order in which they came, for the referrers' order.
    pub(super) order: Vec<Digest>,
    pub(super) tags: BTreeMap<String, Digest>,
}

#[derive(Clone)]
pub(super) enum Data {
    Memory(Bytes),
    File(Arc<File>, u64),
}

impl Repository {
    pub(super) fn put_manifest(
        &mut self,
        media_type: &str,
        bytes: Bytes,
        tag: Option<&str>,
    ) -> Digest {
        let digest = Digest::of(&bytes);
        if self
            .manifests
            .insert(digest, (media_type.to_owned(), bytes))
            .is_none()
        {
            self.order.push(digest);
        }
        if let Some(tag) = tag {
            self.tags.insert(tag.to_owned(), digest);
        }
        digest
    }

    /// Descriptors of the manifests whose subject this is.
    pub(super) fn referrers(&self, subject: &Digest) -> Vec<Value> {
        let subject = subject.to_string();
        let mut found = Vec::new();
        for digest in &self.order {
            let (media_type, bytes) = &self.manifests[digest];
            let Ok(manifest) = serde_json::from_slice::<Value>(bytes) else {
                continue;
            };
            if manifest["subject"]["digest"] != subject.as_str() {
                continue;
            }
            let artifact_type = match manifest["artifactType"].as_str() {
                Some(artifact_type) if !artifact_type.is_empty() => artifact_type.to_owned(),
                _ => text(&manifest["config"], "mediaType"),
            };
            let mut descriptor = json!({
                "mediaType": media_type,
                "digest": digest.to_string(),
                "size": bytes.len(),
                "artifactType": artifact_type,
            });
            if manifest["annotations"].is_object() {
                descriptor["annotations"] = manifest["annotations"].clone();
            }
            found.push(descriptor);
        }
        found
    }
}

impl Data {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(_, size) => *size,
        }
    }

    pub(super) fn read(&self, range: Range<u64>) -> std::io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
            Self::File(file, _) => {
                let mut buffer = vec![0; (range.end - range.start) as usize];
                file.read_exact_at(&mut buffer, range.start)?;
                Ok(buffer.into())
            }
        }
    }
}
