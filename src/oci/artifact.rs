//! The kind of a manifest: an image, an image index, or one of the many other things that registries hold in the form of a manifest.
//!
//! The image specification has three marks, tried in this order: `artifactType`, the media type of the configuration, and the media types
//! of the layers (the older signatures of cosign look like images otherwise).

use std::fmt;

use serde_json::Value;

use super::media_type::{
    DOCKER_CONFIG, DOCKER_LIST, DOCKER_MANIFEST, LAYER_STEMS, OCI_CONFIG, OCI_EMPTY, OCI_INDEX,
    OCI_MANIFEST, Packing, is_config,
};

/// The kind of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// An image for one platform.
    Image,
    /// A list of images by platform.
    ImageIndex,
    /// A SOCI index of this version.
    SociIndex(u8),
    /// A compact index, this program's own.
    CompactIndex,
    /// The list under a tag `sha256-<hex>` where a registry has no referrers API.
    ReferrersList,
    /// A signature, with the tool that made it.
    Signature(&'static str),
    /// A Helm chart.
    HelmChart,
    /// A software bill of materials, and its format.
    Sbom(&'static str),
    /// An attestation, and its format.
    Attestation(&'static str),
    /// A WebAssembly module.
    Wasm,
    /// A Docker plugin.
    DockerPlugin,
    /// Docker's manifest of schema 1, long obsolete.
    DockerSchema1,
    /// The configuration of an image, not its manifest.
    ImageConfig,
    /// Another artifact, by its type.
    Artifact(String),
    /// An image with a layer that is encrypted or of unknown kind: the media type of the layer.
    ImageOfUnknownLayers(String),
    /// JSON that is not a manifest, or not JSON.
    NoManifest,
}

impl What {
    /// Advice for a user who needs an image, as the end of a message.
    pub(super) fn advice(&self) -> &'static str {
        match self {
            Self::ImageOfUnknownLayers(layer) if layer.ends_with("+encrypted") => {
                ", which cannot be read: decrypt the image first (skopeo copy --decryption-key)"
            }
            Self::ImageOfUnknownLayers(_) => {
                ", which cannot be read: build the image with gzip or zstd layers"
            }
            _ => ", not an image",
        }
    }

    /// Whether images are taken from this.
    pub fn is_image(&self) -> bool {
        matches!(self, Self::Image | Self::ImageIndex)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image => f.write_str("an image"),
            Self::ImageIndex => f.write_str("an image index"),
            Self::SociIndex(version) => write!(f, "a SOCI index (v{version})"),
            Self::CompactIndex => f.write_str("a compact index"),
            Self::ReferrersList => f.write_str("a list of referrers"),
            Self::Signature(by) => write!(f, "a {by} signature"),
            Self::HelmChart => f.write_str("a Helm chart"),
            Self::Sbom(format) => write!(f, "an SBOM ({format})"),
            Self::Attestation(format) => write!(f, "an attestation ({format})"),
            Self::Wasm => f.write_str("a WebAssembly module"),
            Self::DockerPlugin => f.write_str("a Docker plugin"),
            Self::DockerSchema1 => f.write_str("a Docker manifest of the obsolete schema 1"),
            Self::ImageConfig => f.write_str("the configuration of an image, not its manifest"),
            Self::Artifact(kind) => write!(f, "an artifact of type {kind:?}"),
            Self::ImageOfUnknownLayers(media_type) => match unsupported_layer(media_type) {
                Some(kind) => write!(f, "an image with {kind} ({media_type})"),
                None => write!(f, "an image with a layer of unknown type {media_type:?}"),
            },
            Self::NoManifest => f.write_str("no manifest"),
        }
    }
}

/// The kind of layer with this media type, if such layers exist and this program does not read them.
fn unsupported_layer(media_type: &str) -> Option<&'static str> {
    let rest = LAYER_STEMS
        .iter()
        .find_map(|stem| media_type.strip_prefix(stem))?;
    if rest.ends_with("+encrypted") {
        return Some("an encrypted layer");
    }
    match rest.trim_start_matches(['+', '.']) {
        "bzip2" | "bz2" => Some("a layer that is compressed with bzip2"),
        "xz" => Some("a layer that is compressed with xz"),
        "lz4" => Some("a layer that is compressed with lz4"),
        _ => None,
    }
}

/// The kind of these bytes. `media_type` is that of the descriptor or the registry; the `mediaType` of the document takes precedence.
/// Never fails: unknown content is [`What::NoManifest`].
pub fn what_is(bytes: &[u8], media_type: &str) -> What {
    match serde_json::from_slice(bytes) {
        Ok(document) => what_is_document(&document, media_type),
        Err(_) => What::NoManifest,
    }
}

/// [`what_is`] for a document that has been parsed.
pub(super) fn what_is_document(document: &Value, media_type: &str) -> What {
    let stated = text(document, "mediaType");
    let artifact_type = text(document, "artifactType");
    let media_type = if stated.is_empty() {
        media_type
    } else {
        stated
    };
    match media_type {
        OCI_INDEX | DOCKER_LIST => return of_index(document, artifact_type),
        OCI_MANIFEST | DOCKER_MANIFEST => return of_manifest(document, artifact_type),
        "application/vnd.docker.distribution.manifest.v1+json"
        | "application/vnd.docker.distribution.manifest.v1+prettyjws" => {
            return What::DockerSchema1;
        }
        "application/vnd.oci.artifact.manifest.v1+json" => {
            return known(artifact_type).unwrap_or_else(|| artifact(artifact_type, media_type));
        }
        OCI_CONFIG | DOCKER_CONFIG => return What::ImageConfig,
        _ => {}
    }
    // nothing, or nothing usable, is stated: by shape
    if document.get("manifests").is_some() {
        of_index(document, artifact_type)
    } else if document.get("config").is_some_and(Value::is_object)
        && document.get("layers").is_some()
    {
        of_manifest(document, artifact_type)
    } else if document.get("fsLayers").is_some() {
        What::DockerSchema1
    } else if document.get("rootfs").is_some() {
        What::ImageConfig
    } else {
        What::NoManifest
    }
}

fn of_index(document: &Value, artifact_type: &str) -> What {
    if !artifact_type.is_empty() {
        return known(artifact_type).unwrap_or_else(|| artifact(artifact_type, OCI_INDEX));
    }
    let entries = list(document, "manifests");
    let is_artifact = |entry: &Value| !text(entry, "artifactType").is_empty();
    if !entries.is_empty() && entries.iter().all(is_artifact) {
        return What::ReferrersList;
    }
    What::ImageIndex
}

fn of_manifest(document: &Value, artifact_type: &str) -> What {
    let config_type = document
        .get("config")
        .map_or("", |config| text(config, "mediaType"));
    let layers = || {
        list(document, "layers")
            .iter()
            .map(|layer| text(layer, "mediaType"))
    };
    let marks = [artifact_type, config_type].into_iter().chain(layers());
    if let Some(what) = marks.into_iter().find_map(known) {
        return what;
    }
    let has_type = !artifact_type.is_empty() && !is_config(artifact_type);
    // a manifest with the configuration and the layers of an image is an image, whatever its artifact type
    if is_config(config_type) {
        match layers().find(|layer| Packing::of_media_type(layer).is_none()) {
            None => return What::Image,
            Some(layer) if !has_type || unsupported_layer(layer).is_some() => {
                return What::ImageOfUnknownLayers(layer.to_owned());
            }
            Some(_) => {}
        }
    }
    if has_type {
        return artifact(artifact_type, OCI_MANIFEST);
    }
    // by the distribution specification, the configuration's media type is then the artifact type
    let by_layer = layers().next().unwrap_or_default();
    match if config_type == OCI_EMPTY {
        by_layer
    } else {
        config_type
    } {
        "" => What::NoManifest,
        kind => artifact(kind, OCI_MANIFEST),
    }
}

/// The kind of an artifact of this type.
pub fn what_is_type(artifact_type: &str) -> What {
    known(artifact_type).unwrap_or_else(|| artifact(artifact_type, ""))
}

/// Types that are self-explanatory.
fn known(media_type: &str) -> Option<What> {
    Some(match media_type {
        "application/vnd.amazon.soci.index.v1+json" => What::SociIndex(1),
        "application/vnd.amazon.soci.index.v2+json" => What::SociIndex(2),
        "application/vnd.socinbd.compact-index.v1+json" => What::CompactIndex,
        "application/vnd.dev.cosign.simplesigning.v1+json"
        | "application/vnd.dev.cosign.artifact.sig.v1+json" => What::Signature("cosign"),
        "application/vnd.cncf.notary.signature" => What::Signature("Notary Project"),
        "application/vnd.cncf.helm.config.v1+json"
        | "application/vnd.cncf.helm.chart.content.v1.tar+gzip" => What::HelmChart,
        "application/vnd.dev.cosign.artifact.sbom.v1+json" => What::Sbom("cosign"),
        "application/vnd.syft+json" => What::Sbom("Syft"),
        "application/vnd.in-toto+json" | "application/vnd.in-toto+dsse" => {
            What::Attestation("in-toto")
        }
        "application/vnd.dsse.envelope.v1+json" => What::Attestation("DSSE"),
        "application/vnd.dev.cosign.artifact.att.v1+json" => What::Attestation("cosign"),
        "application/vnd.wasm.config.v0+json" | "application/vnd.wasm.config.v1+json" => What::Wasm,
        "application/vnd.docker.plugin.v1+json" => What::DockerPlugin,
        other => return known_family(other),
    })
}

/// Types that come in several versions and encodings.
fn known_family(media_type: &str) -> Option<What> {
    let is = |stem: &str| {
        media_type
            .strip_prefix(stem)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', '.', ';']))
    };
    if is("application/spdx") || is("text/spdx") || is("application/vnd.spdx") {
        Some(What::Sbom("SPDX"))
    } else if is("application/vnd.cyclonedx") {
        Some(What::Sbom("CycloneDX"))
    } else if is("application/vnd.dev.sigstore.bundle") {
        Some(What::Attestation("Sigstore bundle"))
    } else {
        None
    }
}

fn artifact(kind: &str, otherwise: &str) -> What {
    let kind = if kind.is_empty() { otherwise } else { kind };
    // it comes from outside and goes into error messages
    What::Artifact(kind.chars().take(255).collect())
}

fn text<'a>(document: &'a Value, key: &str) -> &'a str {
    document
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn list<'a>(document: &'a Value, key: &str) -> &'a [Value] {
    document
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(artifact_type: &str, config: &str, layers: &[&str]) -> String {
        serde_json::json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": {"mediaType": config},
            "layers": layers.iter().map(|l| serde_json::json!({"mediaType": l})).collect::<Vec<_>>(),
        })
        .to_string()
    }

    #[test]
    fn each_kind_is_named() {
        const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
        for (artifact_type, config, layers, text) in [
            ("", OCI_CONFIG, &[LAYER, LAYER][..], "an image"),
            ("", DOCKER_CONFIG, &[], "an image"),
            (
                "",
                "application/vnd.amazon.soci.index.v1+json",
                &["application/octet-stream"],
                "a SOCI index (v1)",
            ),
            (
                "application/vnd.amazon.soci.index.v2+json",
                OCI_EMPTY,
                &[],
                "a SOCI index (v2)",
            ),
            (
                "",
                OCI_CONFIG, // cosign's tag scheme borrows the type of an image's configuration
                &["application/vnd.dev.cosign.simplesigning.v1+json"],
                "a cosign signature",
            ),
            (
                "application/vnd.cncf.notary.signature",
                OCI_EMPTY,
                &["application/jose+json"],
                "a Notary Project signature",
            ),
            (
                "",
                "application/vnd.cncf.helm.config.v1+json",
                &["application/vnd.cncf.helm.chart.content.v1.tar+gzip"],
                "a Helm chart",
            ),
            ("", OCI_EMPTY, &["application/spdx+json"], "an SBOM (SPDX)"),
            ("", OCI_CONFIG, &["text/spdx+xml"], "an SBOM (SPDX)"),
            (
                "application/vnd.cyclonedx+json",
                OCI_EMPTY,
                &[],
                "an SBOM (CycloneDX)",
            ),
            (
                "",
                OCI_CONFIG,
                &["application/vnd.in-toto+json"],
                "an attestation (in-toto)",
            ),
            (
                "",
                OCI_CONFIG,
                &["application/vnd.dsse.envelope.v1+json"],
                "an attestation (DSSE)",
            ),
            (
                "application/vnd.dev.sigstore.bundle.v0.3+json",
                OCI_EMPTY,
                &["application/vnd.dev.sigstore.bundle.v0.3+json"],
                "an attestation (Sigstore bundle)",
            ),
            (
                "",
                "application/vnd.wasm.config.v0+json",
                &["application/wasm"],
                "a WebAssembly module",
            ),
            (
                "",
                OCI_CONFIG,
                &["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"],
                "an image with an encrypted layer (application/vnd.oci.image.layer.v1.tar+gzip+encrypted)",
            ),
            (
                "application/vnd.example.thing", // an image may have a type of its own
                OCI_CONFIG,
                &[LAYER, LAYER],
                "an image",
            ),
            (
                "application/vnd.example.thing",
                DOCKER_CONFIG,
                &[],
                "an image",
            ),
            (
                "application/vnd.example.thing",
                OCI_CONFIG, // borrowed
                &["text/plain"],
                "an artifact of type \"application/vnd.example.thing\"",
            ),
            (
                "",
                OCI_CONFIG,
                &["application/vnd.oci.image.layer.v1.tar+bzip2"],
                "an image with a layer that is compressed with bzip2 (application/vnd.oci.image.layer.v1.tar+bzip2)",
            ),
            (
                "application/vnd.example.thing",
                OCI_EMPTY,
                &["text/plain"],
                "an artifact of type \"application/vnd.example.thing\"",
            ),
            (
                "",
                OCI_EMPTY,
                &["text/plain"],
                "an artifact of type \"text/plain\"",
            ),
        ] {
            let document = manifest(artifact_type, config, layers);
            let what = what_is(document.as_bytes(), "application/json");
            assert_eq!(what.to_string(), text, "{document}");
            assert_eq!(what.is_image(), text == "an image");
        }
    }

    #[test]
    fn what_states_no_type_is_known_by_its_shape() {
        for (document, media_type, what) in [
            (r#"{"manifests":[]}"#, "", What::ImageIndex),
            (
                r#"{"manifests":[{"artifactType":"a/b"}]}"#,
                "",
                What::ReferrersList,
            ),
            (
                r#"{"config":{"mediaType":"application/vnd.oci.image.config.v1+json"},"layers":[]}"#,
                "",
                What::Image,
            ),
            (
                r#"{"schemaVersion":1,"fsLayers":[]}"#,
                "",
                What::DockerSchema1,
            ),
            (r#"{"rootfs":{}}"#, "", What::ImageConfig),
            (r#"{"_type":"x"}"#, "", What::NoManifest),
            ("[]", "", What::NoManifest),
            ("", "", What::NoManifest),
            ("\u{feff}{}", "", What::NoManifest),
            (
                r#"{"artifactType":"a/b"}"#,
                "application/vnd.oci.artifact.manifest.v1+json",
                What::Artifact("a/b".into()),
            ),
            (r#"{"manifests":7}"#, OCI_INDEX, What::ImageIndex),
            (r#"{"config":7,"layers":7}"#, OCI_MANIFEST, What::NoManifest),
        ] {
            assert_eq!(what_is(document.as_bytes(), media_type), what, "{document}");
        }
    }

    #[test]
    fn a_type_from_outside_is_shortened() {
        let document = manifest(&"x".repeat(100_000), OCI_EMPTY, &[]);
        assert!(what_is(document.as_bytes(), "").to_string().len() < 300);
    }
}
