//! The labels of an extraction, as a checked request for a layer.
//!
//! containerd writes them, but some come from annotations of the manifest, which the author of the image has written. So nothing is
//! believed: `prepare` compares the request with the manifest that is fetched by its digest.

use std::collections::BTreeMap;

use super::{
    records::Labels,
    rules::{PULL_LABEL, Pull},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, Reference},
};

/// The chain ID of the snapshot that an extraction is for.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// The chain ID below it. A snapshot without a parent that has this label gets its parent when it is committed.
pub const PARENT_CHAIN: &str = "containerd.io/snapshot/parent-chain-id";
/// The reference of the image.
pub const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of the image's manifest.
pub const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// The digest of the layer's blob.
pub const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// The users of a container's user namespace on the host.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// The same for groups.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";
/// The SOCI index to use.
pub const INDEX: &str = "containerd.io/snapshot/remote/soci.index.digest";

/// The beginning of labels with headers for the requests to the registry; the rest is the name of a header.
pub const HEADER: &str = "containerd.io/snapshot/remote/soci.header.";

/// Headers that this program or HTTP sets.
const RESERVED_HEADERS: [&str; 16] = [
    "accept",
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "expect",
    "host",
    "proxy-authorization",
    "range",
    "referer",
    "te",
    "transfer-encoding",
    "user-agent",
];
/// Maximum size of a header's value in bytes.
const MAX_HEADER: usize = 4096;

/// The name of a header that labels may set, in lower case: a token of RFC 9110 that nothing else sets.
pub fn header_name(name: &str) -> Result<String, String> {
    let name = name.to_ascii_lowercase();
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    match name.as_str() {
        "" => Err("a header has a name".to_owned()),
        name if !name.bytes().all(is_token) => Err("it is not the name of a header".to_owned()),
        reserved if RESERVED_HEADERS.contains(&reserved) => {
            Err("this header is set by the program".to_owned())
        }
        _ => Ok(name),
    }
}

/// The headers that labels have, of those that are allowed. Images can set labels too, so any other header is left out.
pub fn headers(labels: &Labels, allowed: &[String]) -> BTreeMap<String, String> {
    let named = labels.iter().filter_map(|(label, value)| {
        let name = label.strip_prefix(HEADER)?.to_ascii_lowercase();
        let is_value = |byte: u8| byte == b'\t' || (b' '..=b'~').contains(&byte);
        let is_taken = allowed.contains(&name)
            && (1..=MAX_HEADER).contains(&value.len())
            && value.bytes().all(is_value);
        is_taken.then(|| (name, value.clone()))
    });
    named.collect()
}

/// The labels of an extraction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extraction {
    /// The chain ID that it is for.
    pub target: Digest,
    /// The chain ID below it, if it was told.
    pub parent_chain: Option<Digest>,
    /// The layer of an image; none without containerd's labels for snapshotters.
    pub layer: Option<LayerRequest>,
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayerRequest {
    /// The image. The digest of the reference is that of the manifest.
    pub image: Reference,
    /// The digest of its manifest for one platform.
    pub manifest: Digest,
    /// The digest of the layer's blob.
    pub layer: Digest,
    /// The SOCI index to use.
    pub index: Option<Digest>,
    /// How the image is pulled; `None`: as the rules say.
    pub pull: Option<Pull>,
    /// The image as it is pulled, by its tag or by the digest of an image index; `None`: it was pulled before.
    pub named: Option<Reference>,
    /// Headers for the requests to the registry, of those that are allowed.
    pub headers: BTreeMap<String, String>,
}

impl Extraction {
    /// The extraction that labels describe; `None`: they describe none. An error: a label is not what it should be.
    /// `allowed` are the headers that labels may set.
    pub fn of(labels: &Labels, allowed: &[String]) -> Result<Option<Self>> {
        let Some(target) = labels.get(TARGET) else {
            return Ok(None);
        };
        let digest = |name: &str| -> Result<Option<Digest>> {
            let value = labels.get(name).map(|value| value.parse::<Digest>());
            value
                .transpose()
                .or_kind(Kind::InvalidArgument, || format!("label {name}"))
        };
        // nerdctl and AWS's client give an empty one if their user names no index
        let index = || match labels.get(INDEX) {
            Some(value) if value.is_empty() => Ok(None),
            _ => digest(INDEX),
        };
        let target = target
            .parse()
            .or_kind(Kind::InvalidArgument, || format!("label {TARGET}"))?;
        Ok(Some(Self {
            target,
            parent_chain: digest(PARENT_CHAIN)?,
            layer: match (labels.get(IMAGE), digest(MANIFEST)?, digest(LAYER)?) {
                (Some(image), Some(manifest), Some(layer)) => {
                    let named = image_of(image)?;
                    Some(LayerRequest {
                        image: with_manifest(&named, manifest),
                        manifest,
                        layer,
                        index: index()?,
                        pull: pull_of(labels)?,
                        named: Some(named),
                        headers: headers(labels, allowed),
                    })
                }
                _ => None,
            },
        }))
    }
}

/// The label that chooses how an image is pulled.
fn pull_of(labels: &Labels) -> Result<Option<Pull>> {
    let Some(name) = labels.get(PULL_LABEL) else {
        return Ok(None);
    };
    match Pull::named(name) {
        Some(pull) => Ok(Some(pull)),
        None => Err(Error::new(
            Kind::InvalidArgument,
            format!("label {PULL_LABEL}: one of lazy, disks and containerd is wanted"),
        )),
    }
}

/// The image of a label. Only registries: a path of this host must not come from an image.
fn image_of(text: &str) -> Result<Reference> {
    let parsed = text
        .parse()
        .or_kind(Kind::InvalidArgument, || format!("label {IMAGE}"))?;
    match parsed {
        Reference::Registry { .. } => Ok(parsed),
        Reference::Layout { .. } | Reference::Archive { .. } | Reference::Containerd { .. } => {
            Err(Error::new(
                Kind::InvalidArgument,
                format!("label {IMAGE}: it names an image of this host, not of a registry"),
            ))
        }
    }
}

/// The same image with the digest of its manifest for one platform.
fn with_manifest(image: &Reference, manifest: Digest) -> Reference {
    let mut image = image.clone();
    if let Reference::Registry { digest, .. } = &mut image {
        *digest = Some(manifest);
    }
    image
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(changes: &[(&str, &str)]) -> Labels {
        let digest = |byte: u8| Digest::new([byte; 32]).to_string();
        let mut labels: Labels = [
            (TARGET, digest(1)),
            (IMAGE, "registry.example/app:1".to_owned()),
            (MANIFEST, digest(2)),
            (LAYER, digest(3)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        for (name, value) in changes {
            match *value {
                "" => labels.remove(*name),
                value => labels.insert((*name).to_owned(), value.to_owned()),
            };
        }
        labels
    }

    #[test]
    fn the_labels_of_containerd_name_a_layer() {
        let found = Extraction::of(&labels(&[]), &[]).unwrap().unwrap();
        let layer = found.layer.unwrap();
        let manifest = Digest::new([2; 32]);
        assert_eq!(
            layer.image.to_string(),
            format!("registry.example/app:1@{manifest}")
        );
        assert_eq!(
            (found.target, layer.manifest),
            (Digest::new([1; 32]), manifest)
        );
        assert_eq!((found.parent_chain, layer.index), (None, None));
        assert_eq!(layer.pull, None);
        // as nerdctl writes it without --soci-index-digest
        let mut without_index = labels(&[]);
        without_index.insert(INDEX.to_owned(), String::new());
        let found = Extraction::of(&without_index, &[]).unwrap().unwrap();
        assert_eq!(found.layer.unwrap(), layer);
        let found = Extraction::of(&labels(&[(PULL_LABEL, "disks")]), &[]).unwrap();
        assert_eq!(found.unwrap().layer.unwrap().pull, Some(Pull::Disks));
        // the digest of the reference may be that of an image index
        let by_digest = format!("registry.example/app@{}", Digest::new([9; 32]));
        let found = Extraction::of(&labels(&[(IMAGE, &by_digest)]), &[])
            .unwrap()
            .unwrap();
        let image = found.layer.unwrap().image.to_string();
        assert_eq!(image, format!("registry.example/app@{manifest}"));
        // some are missing
        for name in [IMAGE, MANIFEST, LAYER] {
            let found = Extraction::of(&labels(&[(name, "")]), &[])
                .unwrap()
                .unwrap();
            assert_eq!(found.layer, None, "{name}");
        }
        assert_eq!(Extraction::of(&labels(&[(TARGET, "")]), &[]).unwrap(), None);
    }

    #[test]
    fn headers_are_those_that_are_allowed() {
        let mut labels = labels(&[]);
        for (name, value) in [
            ("X-Request-ID", "4711"),
            ("x-other", "1"),
            ("x-split", "a\r\nhost: other"),
            ("", "1"),
        ] {
            labels.insert(format!("{HEADER}{name}"), value.to_owned());
        }
        let allowed = ["x-request-id", "x-split"].map(str::to_owned);
        let found = headers(&labels, &allowed);
        let found: Vec<_> = found
            .iter()
            .map(|(name, value)| (&**name, &**value))
            .collect();
        assert_eq!(found, [("x-request-id", "4711")]);
        assert_eq!(headers(&labels, &[]), BTreeMap::new());
        for name in ["", "a b", "Host", "authorization", "Range", "a:b"] {
            assert!(header_name(name).is_err(), "{name}");
        }
        assert_eq!(header_name("X-Team").as_deref(), Ok("x-team"));
    }

    #[test]
    fn hostile_labels_are_refused() {
        for (name, value) in [
            (TARGET, "latest"),
            (TARGET, "sha256:00"),
            (MANIFEST, "../../etc/passwd"),
            (LAYER, "md5:00000000000000000000000000000000"),
            (PARENT_CHAIN, "\n"),
            (INDEX, "sha256:"),
            (PULL_LABEL, "everything"),
            (IMAGE, "oci:/etc"),
            (IMAGE, "containerd://default/app:1"),
            (IMAGE, "oci-archive:/var/lib/secret.tar"),
            (IMAGE, "http://169.254.169.254/"),
            (IMAGE, "registry.example/../app"),
            (IMAGE, "registry.example/app:1\r\nHost: other"),
        ] {
            let error = Extraction::of(&labels(&[(name, value)]), &[]).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{name} {value}");
            assert!(error.report().contains(name), "{}", error.report());
        }
    }

    proptest! {
        #[test]
        fn any_value_is_taken_or_refused(
            name in prop::sample::select(vec![TARGET, PARENT_CHAIN, IMAGE, MANIFEST, LAYER, INDEX, PULL_LABEL]),
            value in any::<String>(),
        ) {
            if let Ok(Some(Extraction { layer: Some(layer), .. })) = Extraction::of(&labels(&[(name, &value)]), &[]) {
                let is_registry = matches!(layer.image, Reference::Registry { .. });
                prop_assert!(is_registry);
            }
        }
    }
}
