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

/// Suffixes of the tags of older cosign versions for the artifacts of `sha256:<hex>`: `sha256-<hex>.sig`.
const COSIGN_SUFFIXES: &[&str] = &["sig", "att", "sbom"];

/// An artifact that refers to a manifest.
#[derive(Clone, Debug, Serialize)]
pub struct RelatedArtifact {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Digest of the manifest that it refers to.
    pub subject: Digest,
    /// Artifact type; empty if only a tag gives the type.
    pub artifact_type: String,
    /// Kind of artifact, e.g. `a cosign signature`.
    pub what: String,
    /// The tag that binds it to its subject, if it is not a referrer.
    pub tag: Option<String>,
    /// Whether it is a signature or an attestation.
    pub vouches: bool,
}

/// All artifacts that refer to a manifest: its referrers, and those with cosign's tags.
pub async fn of(source: &Source, subject: &Digest) -> Result<Vec<RelatedArtifact>> {
    let mut found: Vec<RelatedArtifact> = source
        .all_referrers(subject)
        .await?
        .into_iter()
        .map(|referrer| {
            let what = what_is_type(&referrer.artifact_type);
            RelatedArtifact {
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
        found.push(RelatedArtifact {
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
