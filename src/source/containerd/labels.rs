//! Labels of content for containerd's garbage collection: content lives as long as an image, a lease or other content names it.

use std::collections::HashMap;

use serde_json::Value;

use crate::oci::{
    Digest,
    artifact::{What, what_is},
};

/// The beginning of the labels that name content.
const REFERENCE: &str = "containerd.io/gc.ref.content.";
/// The label of an image with the SOCI index that AWS's tool has made for it.
pub(super) const SOCI_INDEX: &str = "containerd.io/gc.ref.content.soci-index";
/// The beginning of the labels of a manifest that name its referrers.
const REFERRER: &str = "containerd.io/gc.ref.content.referrer.";
/// The label of a lease with the time of its end, RFC 3339.
pub(super) const EXPIRE: &str = "containerd.io/gc.expire";

/// The label of a subject that names this referrer.
pub(super) fn of_referrer(referrer: &Digest) -> String {
    let hex = referrer.hex();
    format!("{REFERRER}{}", hex.get(..16).unwrap_or(&hex))
}

/// The referrers that the labels of a subject, or of an image, name.
pub(super) fn referrers(labels: &HashMap<String, String>) -> impl Iterator<Item = Digest> {
    let named = labels
        .iter()
        .filter(|(name, _)| *name == SOCI_INDEX || name.starts_with(REFERRER));
    named.filter_map(|(_, digest)| digest.parse().ok())
}

/// The labels of a manifest: one for each document and blob that it names. Those of images and image indexes have the names that containerd
/// gives them, those of SOCI indexes the names of AWS's tool: `ctr content prune` removes the labels of an image's layers, and no others.
pub(super) fn of_manifest(bytes: &[u8], media_type: &str) -> HashMap<String, String> {
    let Ok(document) = serde_json::from_slice::<Value>(bytes) else {
        return HashMap::new();
    };
    let layer = match what_is(bytes, media_type) {
        What::Image | What::ImageOfUnknownLayers(_) => "l",
        What::SociIndex(_) | What::CompactIndex => "ztoc",
        _ => "blob",
    };
    let list = |field: &str, name: &'static str| {
        let entries = document[field].as_array().cloned().unwrap_or_default();
        entries
            .into_iter()
            .enumerate()
            .map(move |(number, entry)| (format!("{name}.{number}"), entry))
    };
    let config = ("config".to_owned(), document["config"].clone());
    std::iter::once(config)
        .chain(list("manifests", "m"))
        .chain(list("layers", layer))
        .chain(list("blobs", layer))
        .filter_map(|(name, entry)| {
            let digest: Digest = entry["digest"].as_str()?.parse().ok()?;
            Some((format!("{REFERENCE}{name}"), digest.to_string()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        oci::media_type::{OCI_INDEX, OCI_MANIFEST},
        soci::index::V1_TYPE,
    };

    #[test]
    fn each_document_and_blob_has_a_label() {
        let [a, b, c] = ["a", "b", "c"].map(|text| Digest::of(text.as_bytes()).to_string());
        let of = |document: &str, media_type: &str| {
            let mut labels: Vec<_> = of_manifest(document.as_bytes(), media_type)
                .into_iter()
                .map(|(name, digest)| (name.replace(REFERENCE, ""), digest))
                .collect();
            labels.sort();
            labels
        };
        let named = |list: &[(&str, &String)]| -> Vec<(String, String)> {
            list.iter()
                .map(|(name, digest)| ((*name).to_owned(), (*digest).clone()))
                .collect()
        };
        let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
        let image = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{a}"}},
            "layers":[{{"mediaType":"{layer}","digest":"{b}"}},{{"mediaType":"{layer}","digest":"{c}"}}]}}"#
        );
        let expected = [("config", &a), ("l.0", &b), ("l.1", &c)];
        assert_eq!(of(&image, OCI_MANIFEST), named(&expected));
        let soci = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"mediaType":"{V1_TYPE}","digest":"{a}"}},
            "layers":[{{"mediaType":"application/octet-stream","digest":"{b}"}}],"subject":{{"digest":"{c}"}}}}"#
        );
        let expected = [("config", &a), ("ztoc.0", &b)];
        assert_eq!(of(&soci, OCI_MANIFEST), named(&expected));
        let index = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{{"digest":"{a}"}},{{"digest":"nothing"}},{{"digest":"{c}"}}]}}"#
        );
        let expected = [("m.0", &a), ("m.2", &c)];
        assert_eq!(of(&index, OCI_INDEX), named(&expected));
        assert!(of("[]", OCI_INDEX).is_empty() && of("{", OCI_INDEX).is_empty());
    }
}
