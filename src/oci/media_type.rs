//! Media types of manifests, configurations and layers: OCI image specification 1.1 and Docker image manifest version 2, schema 2.

use std::fmt;

/// An OCI image manifest (also the form in which artifacts are stored).
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The configuration of an OCI image.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Docker's image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// The configuration of a Docker image.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// The empty descriptor `{}` of artifacts without a configuration.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// Media types that a client offers in `Accept` when it asks a registry for a manifest.
pub const MANIFESTS: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];

/// Whether this names a manifest of one image (or artifact).
pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// Whether this names a list of manifests.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_LIST)
}

/// Whether this names an image's configuration.
pub fn is_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// The prefix of the media types of image layers; the compression follows.
pub(super) const LAYER_STEMS: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// Whether this names a layer that registries need not keep (a *foreign* layer): its descriptor has URLs of where it is.
pub fn is_foreign_layer(media_type: &str) -> bool {
    let [_, oci, _, docker] = LAYER_STEMS;
    media_type.starts_with(oci) || media_type.starts_with(docker)
}

/// The compression of the blob of a layer, from its media type (or from its first bytes, if the media type is wrong or has none).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// gzip, one or several members.
    Gzip,
    /// Zstandard.
    Zstd,
    /// A plain tar.
    Plain,
}

impl Packing {
    /// The compression that the media type of a layer states; `None` for any other media type.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        let suffix = LAYER_STEMS
            .iter()
            .find_map(|stem| media_type.strip_prefix(stem))?;
        // OCI joins the compression with `+`, Docker with `.`; both have been seen under the other's name
        match suffix {
            "" => Some(Self::Plain),
            "+gzip" | ".gzip" => Some(Self::Gzip),
            "+zstd" | ".zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The packing that a blob's first bytes (4 are enough) show. A tar has no magic at its start: all else is `Plain`.
    pub fn of_bytes(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // RFC 8878: a frame, or a skippable frame before it
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Plain => "tar",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_follows_the_media_type_of_oci_and_docker_layers() {
        for (media_type, packing) in [
            (
                "application/vnd.oci.image.layer.v1.tar",
                Some(Packing::Plain),
            ),
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                Some(Packing::Gzip),
            ),
            (
                "application/vnd.oci.image.layer.v1.tar+zstd",
                Some(Packing::Zstd),
            ),
            (
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
                Some(Packing::Gzip),
            ),
            (
                "application/vnd.docker.image.rootfs.diff.tar",
                Some(Packing::Plain),
            ),
            (
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                Some(Packing::Gzip),
            ),
            (
                "application/vnd.docker.image.rootfs.diff.tar.zstd",
                Some(Packing::Zstd),
            ),
            (
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                Some(Packing::Gzip),
            ),
            (
                "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
                None,
            ),
            ("application/vnd.oci.image.layer.v1.tarball", None),
            ("application/vnd.dev.cosign.simplesigning.v1+json", None),
            ("application/octet-stream", None),
            ("", None),
        ] {
            assert_eq!(Packing::of_media_type(media_type), packing, "{media_type}");
        }
    }

    #[test]
    fn packing_follows_the_magic() {
        assert_eq!(Packing::of_bytes(&[0x1f, 0x8b, 8, 0]), Packing::Gzip);
        assert_eq!(Packing::of_bytes(&[0x28, 0xb5, 0x2f, 0xfd]), Packing::Zstd);
        assert_eq!(
            Packing::of_bytes(&[0x5a, 0x2a, 0x4d, 0x18, 9]),
            Packing::Zstd
        );
        assert_eq!(Packing::of_bytes(b"bin/"), Packing::Plain);
        assert_eq!(Packing::of_bytes(&[0x1f]), Packing::Plain);
        assert_eq!(Packing::of_bytes(&[]), Packing::Plain);
    }
}
