//! Lists the referrers of a manifest: signatures, SBOMs, attestations, SOCI indexes and others.

use serde::Serialize;

use crate::{
    error::Result,
    oci::{
        Digest,
        artifact::{What, what_is, what_is_type},
    },
    source::Source,
};

/// Tags that cosign's older form gives to what belongs to `sha256:<hex>`: `sha256-<hex>.sig`.
const COSIGN_SUFFIXES: &[&str] = &["sig", "att", "sbom"];

/// Something that refers to a manifest.
#[derive(Clone, Debug, Serialize)]
pub struct Companion {
    /// Its manifest.
    pub digest: Digest,
    /// The manifest that it refers to.
    pub subject: Digest,
    /// Its artifact type; empty where only a tag says what it is.
    pub artifact_type: String,
    /// What it is, e.g. `a cosign signature`.
    pub what: String,
    /// The tag by which it refers, where it is not a referrer.
    pub tag: Option<String>,
    /// Whether it vouches for its subject: a signature or an attestation.
    pub vouches: bool,
}

/// All that refers to a manifest at a source: its referrers, and what cosign's tags name.
pub async fn of(source: &Source, subject: &Digest) -> Result<Vec<Companion>> {
    let mut found: Vec<Companion> = source
        .all_referrers(subject)
        .await?
        .into_iter()
        .map(|referrer| {
            let what = what_is_type(&referrer.artifact_type);
            Companion {
                digest: referrer.digest,
                subject: *subject,
                vouches: vouches(&what),
                what: what.to_string(),
                artifact_type: referrer.artifact_type,
                tag: None,
            }
        })
        .collect();
    for suffix in COSIGN_SUFFIXES {
        let tag = format!("sha256-{}.{suffix}", subject.hex());
        let Some(manifest) = source.tagged(&tag).await? else {
            continue;
        };
        let what = what_is(&manifest.bytes, &manifest.media_type);
        found.push(Companion {
            digest: manifest.digest,
            subject: *subject,
            artifact_type: String::new(),
            vouches: vouches(&what) || *suffix == "sig",
            what: what.to_string(),
            tag: Some(tag),
        });
    }
    Ok(found)
}

fn vouches(what: &What) -> bool {
    matches!(what, What::Signature(_) | What::Attestation(_))
}
