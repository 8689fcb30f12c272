//! Platforms (`linux/amd64`, `linux/arm/v7`): spellings, compatibility, and the choice from an image index.
//!
//! Names are Go's `GOOS` and `GOARCH`, as in the image specification. Spellings and the order of preference are containerd's
//! (`platforms.Only`): a newer variant runs older ones, amd64 runs 386, arm64 runs 32-bit arm; the nearest one is chosen.

use std::{fmt, str::FromStr};

use oci_spec::image::{Descriptor, ImageIndex};

use super::{
    artifact::{What, what_is_type},
    media_type,
};

/// An operating system, an architecture and its variant, in normal form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    os: String,
    architecture: String,
    /// Empty for the plain form of the architecture (amd64 v1, arm64 v8).
    variant: String,
}

/// The text is not a platform.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a platform: expected OS/ARCHITECTURE[/VARIANT], e.g. linux/amd64 or linux/arm/v7"
)]
pub struct ParseError(String);

impl Platform {
    /// A platform in normal form: aliases (`x86_64`, `aarch64`, `armhf`, ...) and redundant variants are resolved.
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            "" => "linux".to_owned(), // some builders leave it empty in an image's configuration
            other => other.to_owned(),
        };
        let architecture = architecture.to_ascii_lowercase();
        let variant = variant.unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386" | "386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
            ("aarch64" | "arm64", "9" | "v9" | "v9.0") => ("arm64", "v9"),
            ("aarch64" | "arm64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            (architecture, variant) => (architecture, variant),
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        }
    }

    /// The platform of the machine that this program was built for.
    pub fn host() -> Self {
        // Rust's names where they are not Go's
        let architecture = match std::env::consts::ARCH {
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "mips64" if cfg!(target_endian = "little") => "mips64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self::new("linux", architecture, None)
    }

    /// `unknown/unknown`: nothing runs it.
    pub fn unknown() -> Self {
        Self::new("unknown", "unknown", None)
    }

    /// The platform of a descriptor in an image index. `None` if it has none, or `unknown/unknown` (which marks entries that are not
    /// images).
    pub fn of_descriptor(descriptor: &Descriptor) -> Option<Self> {
        let platform = descriptor.platform().as_ref()?;
        let stated = Self::new(
            &platform.os().to_string(),
            &platform.architecture().to_string(),
            platform.variant().as_deref(),
        );
        (stated.os != "unknown" && stated.architecture != "unknown").then_some(stated)
    }

    /// e.g. `linux`.
    pub fn os(&self) -> &str {
        &self.os
    }

    /// e.g. `amd64`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// e.g. `v7`; empty for the architecture's plain form.
    pub fn variant(&self) -> &str {
        &self.variant
    }

    /// How well an image for `offered` suits this platform: 0 is best, `None` does not run.
    pub fn rank(&self, offered: &Self) -> Option<usize> {
        if self.os != offered.os {
            return None;
        }
        self.runnable().iter().position(|(architecture, variant)| {
            *architecture == offered.architecture && *variant == offered.variant
        })
    }

    /// The platforms that run on this machine, the best first.
    fn runnable(&self) -> Vec<(&str, String)> {
        let number = |text: &str| text.strip_prefix('v').and_then(|n| n.parse::<u8>().ok());
        let mut list = vec![(self.architecture.as_str(), self.variant.clone())];
        match self.architecture.as_str() {
            "amd64" => {
                if let Some(own) = number(&self.variant) {
                    list.extend((2..own).rev().map(|v| ("amd64", format!("v{v}"))));
                    list.push(("amd64", String::new()));
                }
                list.push(("386", String::new()));
            }
            "arm" => {
                if let Some(own) = number(&self.variant) {
                    list.extend((5..own).rev().map(|v| ("arm", format!("v{v}"))));
                }
            }
            "arm64" => {
                // v8.4 runs v8.3 to v8; v9.2 runs v9.1, v9 and v8.7 to v8
                let (major, minor) = match self.variant.strip_prefix('v') {
                    None => (8, 0),
                    Some(text) => {
                        let (major, minor) = text.split_once('.').unwrap_or((text, "0"));
                        (
                            major.parse::<u8>().unwrap_or(8),
                            minor.parse::<u8>().unwrap_or(0).min(9),
                        )
                    }
                };
                let name = |major: u8, minor: u8| match (major, minor) {
                    (8, 0) => String::new(),
                    (major, 0) => format!("v{major}"),
                    (major, minor) => format!("v{major}.{minor}"),
                };
                list.extend((0..minor).rev().map(|minor| ("arm64", name(major, minor))));
                if major == 9 {
                    let top = minor.saturating_add(5).min(9); // Arm's manual: v9.N has all of v8.(N+5)
                    list.extend((0..=top).rev().map(|minor| ("arm64", name(8, minor))));
                }
                list.extend((5..=8).rev().map(|v| ("arm", format!("v{v}"))));
            }
            _ => {}
        }
        list
    }
}

/// An entry of an image index that is an image, or that may be one or lead to one.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// The entry.
    pub descriptor: &'a Descriptor,
    /// The platform that the entry names.
    pub platform: Option<Platform>,
    /// Whether the entry shows that it is an image. If not, its document must be read: it is an index, a manifest without a platform, or a
    /// manifest with an unknown artifact type.
    pub is_image: bool,
}

/// The candidates of an image index, in its order. Attestations, artifacts of known types, entries for `unknown/unknown` and entries with
/// a media type of another kind are not candidates.
pub fn candidates(index: &ImageIndex) -> Vec<Candidate<'_>> {
    index.manifests().iter().filter_map(candidate).collect()
}

/// An entry of an image index as a candidate, if it is one.
pub fn candidate(descriptor: &Descriptor) -> Option<Candidate<'_>> {
    let media_type = descriptor.media_type().to_string();
    let is_manifest = media_type::is_manifest(&media_type);
    let platform = Platform::of_descriptor(descriptor);
    let is_unknown = platform.is_none() && descriptor.platform().is_some();
    let is_index = media_type::is_index(&media_type);
    if is_attestation(descriptor) || is_unknown || !(is_manifest || is_index) {
        return None;
    }
    let artifact_type = descriptor.artifact_type().as_ref().map(ToString::to_string);
    let artifact_type =
        artifact_type.filter(|stated| !stated.is_empty() && !media_type::is_config(stated));
    if let Some(stated) = &artifact_type {
        // an image may have an artifact type of its own; then it also has a platform
        let may_be_image = matches!(what_is_type(stated), What::Artifact(_)) && platform.is_some();
        if !may_be_image {
            return None;
        }
    }
    Some(Candidate {
        is_image: is_manifest && platform.is_some() && artifact_type.is_none(),
        descriptor,
        platform,
    })
}

/// BuildKit marks its attestations so.
fn is_attestation(descriptor: &Descriptor) -> bool {
    descriptor
        .annotations()
        .as_ref()
        .is_some_and(|annotations| annotations.contains_key("vnd.docker.reference.type"))
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

impl FromStr for Platform {
    type Err = ParseError;

    /// Reads `linux/arm/v7`, `linux/amd64`, and an architecture alone (`arm64`), which means Linux.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError(text.to_owned());
        let parts: Vec<&str> = text.split('/').collect();
        let sound = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(sound) {
            return Err(bad());
        }
        match parts[..] {
            // an operating system alone is not enough
            ["linux" | "windows" | "darwin" | "freebsd"] => Err(bad()),
            [architecture] => Ok(Self::new("linux", architecture, None)),
            [os, architecture] => Ok(Self::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Self::new(os, architecture, Some(variant))),
            _ => Err(bad()),
        }
    }
}

impl schemars::JsonSchema for Platform {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Platform".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "os/architecture[/variant]"
        })
    }
}

impl serde::Serialize for Platform {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Platform {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn spellings_have_one_normal_form() {
        for (text, normal) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("Linux/AMD64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm/6", "linux/arm/v6"),
            ("i386", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("linux/riscv64", "linux/riscv64"),
        ] {
            assert_eq!(platform(text).to_string(), normal, "{text}");
        }
    }

    #[test]
    fn an_image_that_names_no_system_is_linuxs() {
        assert_eq!(
            Platform::new("", "amd64", Some("")).to_string(),
            "linux/amd64"
        );
    }

    #[test]
    fn what_is_no_platform_is_refused() {
        for text in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "linux/amd64/v2/x",
            "linux/am d64",
            "a\0b",
        ] {
            assert_eq!(
                text.parse::<Platform>(),
                Err(ParseError(text.to_owned())),
                "{text:?}"
            );
        }
    }

    #[test]
    fn the_nearest_platform_that_runs_ranks_best() {
        let order = |wanted: &str, offers: &[&str]| {
            let wanted = platform(wanted);
            let mut ranked: Vec<(usize, &str)> = offers
                .iter()
                .filter_map(|offer| Some((wanted.rank(&platform(offer))?, *offer)))
                .collect();
            ranked.sort();
            ranked
                .into_iter()
                .map(|(_, offer)| offer.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            order(
                "linux/amd64",
                &["linux/386", "linux/amd64/v2", "linux/amd64", "linux/arm64"]
            ),
            ["linux/amd64", "linux/386"]
        );
        assert_eq!(
            order(
                "linux/amd64/v3",
                &[
                    "linux/amd64",
                    "linux/amd64/v4",
                    "linux/amd64/v2",
                    "linux/amd64/v3"
                ]
            ),
            ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"]
        );
        assert_eq!(
            order(
                "linux/arm/v7",
                &[
                    "linux/arm/v5",
                    "linux/arm/v8",
                    "linux/arm/v6",
                    "linux/arm/v7"
                ]
            ),
            ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]
        );
        assert_eq!(
            order(
                "linux/arm64",
                &[
                    "linux/arm/v6",
                    "linux/arm/v7",
                    "linux/arm64",
                    "linux/arm64/v9"
                ]
            ),
            ["linux/arm64", "linux/arm/v7", "linux/arm/v6"]
        );
        assert_eq!(
            order(
                "linux/arm64/v9.1",
                &[
                    "linux/arm64",
                    "linux/arm64/v8.6",
                    "linux/arm64/v9",
                    "linux/arm64/v8.7"
                ]
            ),
            ["linux/arm64/v9", "linux/arm64/v8.6", "linux/arm64"]
        );
        assert_eq!(
            order("linux/s390x", &["linux/amd64", "linux/s390x"]),
            ["linux/s390x"]
        );
        assert_eq!(order("linux/amd64", &["windows/amd64"]), [""; 0]);
    }

    #[test]
    fn artifacts_and_attestations_are_no_candidates() {
        let entry = |hex: char, rest: &str| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{}","size":1{rest}}}"#,
                hex.to_string().repeat(64)
            )
        };
        let entries = [
            entry('a', r#","platform":{"os":"linux","architecture":"386"}"#),
            entry('b', r#","platform":{"os":"linux","architecture":"amd64"}"#),
            entry('c', r#","platform":{"os":"linux","architecture":"amd64"}"#),
            entry(
                'd',
                r#","platform":{"os":"unknown","architecture":"unknown"}"#,
            ),
            entry(
                'e',
                r#","platform":{"os":"linux","architecture":"amd64"},"artifactType":"application/x""#,
            ),
            entry('f', ""),
            entry(
                '0',
                r#","platform":{"os":"linux","architecture":"amd64"},"annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#,
            ),
            entry(
                '2',
                r#","platform":{"os":"linux","architecture":"amd64"},"artifactType":"application/vnd.amazon.soci.index.v2+json""#,
            ),
            entry('3', r#","artifactType":"application/x""#),
            entry('1', r#","platform":{"os":"linux","architecture":"amd64"}"#)
                .replace("image.manifest", "image.index"),
        ];
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            entries.join(",")
        );
        let index: ImageIndex = serde_json::from_str(&text).unwrap();
        let found: Vec<(char, Option<String>, bool)> = candidates(&index)
            .iter()
            .map(|candidate| {
                let first = candidate.descriptor.digest().digest().chars().next();
                let platform = candidate.platform.as_ref().map(Platform::to_string);
                (first.unwrap(), platform, candidate.is_image)
            })
            .collect();
        let amd64 = || Some("linux/amd64".to_owned());
        assert_eq!(
            found,
            [
                ('a', Some("linux/386".to_owned()), true),
                ('b', amd64(), true),
                ('c', amd64(), true),
                ('e', amd64(), false),
                ('f', None, false),
                ('1', amd64(), false),
            ]
        );
    }

    #[test]
    fn the_host_runs_its_own_images() {
        assert_eq!(Platform::host().rank(&Platform::host()), Some(0));
        assert_eq!(Platform::host().os(), "linux");
    }
}
