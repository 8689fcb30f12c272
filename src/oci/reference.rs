//! Image references: `nginx:1.27`, `registry/repo@sha256:...`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `containerd://NAMESPACE/NAME`.
//!
//! Registry references follow the grammar and the normalisation of `github.com/distribution/reference` (Docker's). Layouts are written as
//! for skopeo: the first colon ends the path, and the rest may contain colons and slashes. The names of containerd's images are any text.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::Digest;
use crate::error::{Error, Kind};

/// The registry of references that name none.
pub const DOCKER_HUB: &str = "docker.io";

/// More than any path or name that a system takes.
const MAX_TEXT: usize = 8192;
/// The grammar's limit on host and repository together.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;
/// The beginning of references to images of containerd.
const CONTAINERD: &str = "containerd://";
/// containerd's limit on the name of a namespace.
const MAX_NAMESPACE: usize = 76;

/// An image reference.
///
/// `Display` gives the normalised form: parsing that gives the same reference.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(into = "String", try_from = "String")]
#[schemars(with = "String")]
pub enum Reference {
    /// A repository of a registry.
    Registry {
        /// Host and optional port, e.g. `docker.io`, `127.0.0.1:5000`.
        host: String,
        /// e.g. `library/nginx`.
        repository: String,
        /// e.g. `1.27`; `latest` when neither tag nor digest was given.
        tag: Option<String>,
        /// The digest of the manifest; it takes precedence over a tag.
        digest: Option<Digest>,
    },
    /// An OCI image layout in a folder.
    Layout {
        /// The folder, absolute.
        path: PathBuf,
        /// `org.opencontainers.image.ref.name` in its index; may be left out where there is one image.
        tag: Option<String>,
    },
    /// An OCI image layout in a tar file.
    Archive {
        /// The file, absolute.
        path: PathBuf,
        /// As in [`Reference::Layout`].
        tag: Option<String>,
    },
    /// An image of a containerd of this host.
    Containerd {
        /// The namespace, e.g. `default`, `k8s.io`.
        namespace: String,
        /// The name, as containerd has it, e.g. `docker.io/library/nginx:1.27`; none: the namespace as a whole.
        name: Option<String>,
    },
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.is_empty() {
            return Err(invalid(
                text,
                "expected an image, e.g. nginx:1.27 or oci:DIR:TAG",
            ));
        }
        if text.len() > MAX_TEXT {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "the reference has {} bytes, over the limit of {MAX_TEXT}",
                    text.len()
                ),
            ));
        }
        if text.chars().any(char::is_control) {
            return Err(invalid(text, "it has a control character"));
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, tag) = parse_layout(text, rest)?;
            return Ok(Self::Layout { path, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (path, tag) = parse_layout(text, rest)?;
            return Ok(Self::Archive { path, tag });
        }
        if let Some(rest) = text.strip_prefix(CONTAINERD) {
            return parse_containerd(text, rest);
        }
        refuse_other_transports(text)?;
        parse_registry(text, text.strip_prefix("docker://").unwrap_or(text))
    }
}

impl Reference {
    /// The same repository or layout with another tag, and no digest.
    pub fn with_tag(&self, tag: &str) -> Result<Self, Error> {
        if !is_tag(tag) {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "{tag:?} is not a tag: at most 128 characters of A-Z a-z 0-9 _ . -, and not . or - first"
                ),
            ));
        }
        let mut other = self.clone();
        match &mut other {
            Self::Registry {
                tag: own, digest, ..
            } => (*own, *digest) = (Some(tag.to_owned()), None),
            Self::Layout { tag: own, .. } | Self::Archive { tag: own, .. } => {
                *own = Some(tag.to_owned());
            }
            Self::Containerd { name, .. } => {
                *name = name.as_deref().map(|name| name_with_tag(name, tag));
            }
        }
        Ok(other)
    }

    /// The manifest of this digest in the same repository; a layout stays as it is.
    pub fn with_digest(&self, of: Digest) -> Self {
        let mut other = self.clone();
        if let Self::Registry { tag, digest, .. } = &mut other {
            (*tag, *digest) = (None, Some(of));
        }
        other
    }

    /// The repository, layout or namespace, without tag and digest.
    pub fn place(&self) -> Self {
        let mut place = self.clone();
        match &mut place {
            Self::Registry { tag, digest, .. } => (*tag, *digest) = (None, None),
            Self::Layout { tag, .. } | Self::Archive { tag, .. } => *tag = None,
            Self::Containerd { name, .. } => *name = None,
        }
        place
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry {
                host,
                repository,
                tag,
                digest,
            } => {
                write!(f, "{host}/{repository}")?;
                if let Some(tag) = tag {
                    write!(f, ":{tag}")?;
                }
                if let Some(digest) = digest {
                    write!(f, "@{digest}")?;
                }
                Ok(())
            }
            Self::Layout { path, tag } => write_layout(f, "oci", path, tag.as_deref()),
            Self::Archive { path, tag } => write_layout(f, "oci-archive", path, tag.as_deref()),
            Self::Containerd { namespace, name } => {
                write!(f, "{CONTAINERD}{namespace}")?;
                match name {
                    Some(name) => write!(f, "/{name}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// The name of an image of containerd with another tag, and no digest.
pub(crate) fn name_with_tag(name: &str, tag: &str) -> String {
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    let name = match name.rsplit_once(':') {
        Some((name, last)) if !last.contains('/') => name,
        _ => name,
    };
    format!("{name}:{tag}")
}

/// `NAMESPACE[/NAME]`.
fn parse_containerd(text: &str, rest: &str) -> Result<Reference, Error> {
    let (namespace, name) = match rest.split_once('/') {
        Some((namespace, name)) => (namespace, Some(name).filter(|name| !name.is_empty())),
        None => (rest, None),
    };
    let is_plain =
        |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if namespace.len() > MAX_NAMESPACE || !namespace.split(['.', '_', '-']).all(is_plain) {
        return Err(invalid(
            text,
            "expected containerd://NAMESPACE/NAME, with a namespace of at most 76 letters and digits, separated by dots, dashes or underscores",
        ));
    }
    Ok(Reference::Containerd {
        namespace: namespace.to_owned(),
        name: name.map(str::to_owned),
    })
}

fn write_layout(
    f: &mut fmt::Formatter<'_>,
    transport: &str,
    path: &Path,
    tag: Option<&str>,
) -> fmt::Result {
    write!(f, "{transport}:{}", path.display())?;
    match tag {
        Some(tag) => write!(f, ":{tag}"),
        None => Ok(()),
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

/// `DIR[:TAG]`.
fn parse_layout(text: &str, rest: &str) -> Result<(PathBuf, Option<String>), Error> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(invalid(text, "expected a path after the colon"));
    }
    let path = std::path::absolute(path).map_err(|error| {
        Error::with_source(
            Kind::InvalidArgument,
            format!("{text:?}: the path cannot be made absolute"),
            error,
        )
    })?;
    // a relative path takes the working directory in front, which may be anything
    match path.to_str() {
        Some(path) if !path.contains(':') => {}
        _ => {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{}: a layout's path may not hold a colon, or bytes that are not UTF-8 (the colon parts path and tag): move it, \
                     or go by a symbolic link",
                    path.display()
                ),
            ));
        }
    }
    Ok((path, tag.filter(|tag| !tag.is_empty()).map(str::to_owned)))
}

/// Forms that look like references and mean something else.
fn refuse_other_transports(text: &str) -> Result<(), Error> {
    if text.starts_with("http://") || text.starts_with("https://") {
        return Err(invalid(
            text,
            "it has a URL scheme: expected HOST/REPOSITORY:TAG",
        ));
    }
    const OTHERS: &[&str] = &[
        "containers-storage:",
        "dir:/",
        "dir:.",
        "docker-archive:",
        "docker-daemon:",
        "ostree:",
        "sif:",
    ];
    match OTHERS.iter().find(|prefix| text.starts_with(**prefix)) {
        Some(prefix) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "{text:?}: {:?} is not supported: copy the image to an OCI layout (skopeo copy {text} oci:DIR:TAG)",
                prefix.trim_end_matches(['/', '.'])
            ),
        )),
        None => Ok(()),
    }
}

/// `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`.
fn parse_registry(text: &str, rest: &str) -> Result<Reference, Error> {
    let (name, digest) = match rest.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>()?)),
        None => (rest, None),
    };
    // a colon after the last slash is a tag's, one before it a port's
    let (name, tag) = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (name, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err(invalid(
            text,
            "a tag has 1 to 128 letters, digits, dots, dashes and underscores, and does not start with a dot or dash",
        ));
    }
    let (host, repository) = split_host(name);
    if !is_host(host) {
        return Err(invalid(text, "its host is not a host name or address"));
    }
    let repository = match repository.contains('/') || host != DOCKER_HUB {
        true => repository.to_owned(),
        false => format!("library/{repository}"),
    };
    if is_hex_64(name) {
        return Err(invalid(
            text,
            "64 hex digits are a digest, not a name: write REPOSITORY@sha256:...",
        ));
    }
    if host.len() + 1 + repository.len() > MAX_NAME {
        return Err(invalid(
            text,
            "host and repository are longer than 255 bytes",
        ));
    }
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(invalid(text, "a repository name is in lower case"));
    }
    if !repository.split('/').all(is_path_component) {
        return Err(invalid(
            text,
            "a repository name has lower-case letters and digits, separated by '/', '.', '_', '__' or dashes",
        ));
    }
    let tag = match (tag, digest) {
        (None, None) => Some("latest"),
        (tag, _) => tag,
    };
    Ok(Reference::Registry {
        host: host.to_owned(),
        repository,
        tag: tag.map(str::to_owned),
        digest,
    })
}

/// The first part is a host when it looks like none of Docker Hub's users: a dot, a port, an upper-case letter, or `localhost`.
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            match first {
                "index.docker.io" => (DOCKER_HUB, rest),
                _ => (first, rest),
            }
        }
        _ => (DOCKER_HUB, name),
    }
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(inner) => match inner.split_once(']') {
            Some((address, "")) => (address, None),
            Some((address, port)) => match port.strip_prefix(':') {
                Some(port) => (address, Some(port)),
                None => return false,
            },
            None => return false,
        },
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let named = match text.starts_with('[') {
        true => host.parse::<std::net::Ipv6Addr>().is_ok(),
        false => host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        }),
    };
    named
        && port.is_none_or(|port| {
            port.bytes().all(|byte| byte.is_ascii_digit())
                && port.parse::<u16>().is_ok_and(|port| port != 0)
        })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    alphanumeric(*first)
        && alphanumeric(*last)
        && bytes
            .split(|byte| alphanumeric(*byte))
            .filter(|separator| !separator.is_empty())
            .all(|separator| {
                matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
            })
}

/// Whether this is a tag by the distribution specification: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
pub fn is_tag(tag: &str) -> bool {
    (1..=MAX_TAG).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

fn is_hex_64(name: &str) -> bool {
    name.len() == 64
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn invalid(text: &str, why: &str) -> Error {
    // the text may be long; its beginning is enough to recognise it
    let shown: String = text.chars().take(300).collect();
    Error::new(
        Kind::InvalidArgument,
        format!("{shown:?} is not an image reference: {why}"),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn parsed(text: &str) -> String {
        text.parse::<Reference>()
            .unwrap_or_else(|error| panic!("{text}: {}", error.report()))
            .to_string()
    }

    fn refused(text: &str) -> Kind {
        match text.parse::<Reference>() {
            Ok(reference) => panic!("{text:?} was taken as {reference}"),
            Err(error) => error.kind(),
        }
    }

    #[test]
    fn registries_are_normalised_as_docker_does() {
        for (text, normal) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
            ("docker.io/user/app:1", "docker.io/user/app:1"),
            ("docker://quay.io/a/b:c", "quay.io/a/b:c"),
            ("docker://nginx", "docker.io/library/nginx:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("127.0.0.1:5000/a/b/c:t", "127.0.0.1:5000/a/b/c:t"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("[2001:db8::1]/app:x", "[2001:db8::1]/app:x"),
            ("Registry/app", "Registry/app:latest"),
            (
                "host.name/a__b.c-d--e_f:T_a.g-1",
                "host.name/a__b.c-d--e_f:T_a.g-1",
            ),
            // no slash: a name and a tag, however much it looks like a host and a port
            ("localhost:5000", "docker.io/library/localhost:5000"),
            (
                "registry.example:80",
                "docker.io/library/registry.example:80",
            ),
        ] {
            assert_eq!(parsed(text), normal, "{text}");
            assert_eq!(parsed(normal), normal);
        }
    }

    #[test]
    fn a_digest_counts_and_the_tag_stays() {
        for (text, normal) in [
            (
                format!("nginx@sha256:{HEX}"),
                format!("docker.io/library/nginx@sha256:{HEX}"),
            ),
            (
                format!("h.x:1/nginx:1.27@sha256:{HEX}"),
                format!("h.x:1/nginx:1.27@sha256:{HEX}"),
            ),
        ] {
            assert_eq!(parsed(&text), normal);
        }
        let Ok(Reference::Registry { tag, digest, .. }) =
            format!("nginx@sha256:{HEX}").parse::<Reference>()
        else {
            panic!("a registry reference");
        };
        assert_eq!(tag, None);
        assert_eq!(digest.map(|digest| digest.hex()).as_deref(), Some(HEX));
    }

    #[test]
    fn layouts_end_their_path_at_the_first_colon() {
        assert_eq!(
            "oci:/images/a:docker.io/library/nginx:1.27"
                .parse::<Reference>()
                .expect("a layout"),
            Reference::Layout {
                path: "/images/a".into(),
                tag: Some("docker.io/library/nginx:1.27".to_owned()),
            }
        );
        assert_eq!(
            "oci-archive:/a b/c.tar".parse::<Reference>().expect("one"),
            Reference::Archive {
                path: "/a b/c.tar".into(),
                tag: None,
            }
        );
        assert_eq!(parsed("oci:/x:"), "oci:/x");
        let Ok(Reference::Layout { path, .. }) = "oci:folder/x".parse::<Reference>() else {
            panic!("a layout");
        };
        assert!(path.is_absolute() && path.ends_with("folder/x"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long_name = "a".repeat(240);
        let long_tag = format!("a:{}", "t".repeat(129));
        let long = "a".repeat(MAX_TEXT + 1);
        for text in [
            "",
            ":",
            "@",
            "/",
            "a:",
            "a@",
            "nginx:",
            ":1",
            "NGINX",
            "user/App",
            "a//b",
            "/a",
            "a/",
            "a:b:c",
            "a b",
            "a\n",
            "a:\u{e9}",
            "-a",
            "a-",
            "a___b",
            "a._b",
            "a..b",
            "a:.t",
            "a:-t",
            "a.b:99999/c",
            "a.b:0/c",
            "a.b:/c",
            "a.b:+5/c",
            "[::1/a",
            "[zz]/a",
            "[::1]x/a",
            "-a.b/c",
            "a.b-/c",
            "a..b/c",
            "oci:",
            "oci::tag",
            "oci-archive:",
            "https://a.b/c",
            "http://x",
            &long_name,
            &long_tag,
            &long,
            HEX,
            "a@sha256:12",
            "a@sha256",
            "a@b@c",
            "?",
            "a?b",
            "a#b",
            "a/../b",
            "a.b/..",
            "user:pw@host.x/a",
        ] {
            assert_eq!(refused(text), Kind::InvalidArgument, "{text}");
        }
        for text in [
            "docker-daemon:nginx:latest",
            "dir:/x",
            "containers-storage:x",
            &format!("a@sha512:{HEX}{HEX}"),
        ] {
            assert_eq!(refused(text), Kind::Unsupported, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused_and_what_is_taken_comes_back(text in "\\PC{0,60}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().ok(), Some(reference));
            }
        }

        #[test]
        fn likely_text_comes_back(text in "(oci:|oci-archive:|docker://)?[a-zA-Z0-9.:/@_\\[\\]-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().ok(), Some(reference));
            }
        }
    }
}
