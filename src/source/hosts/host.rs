//! One host that serves a registry.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use crate::{
    error::{Error, Kind, Result},
    oci::reference::DOCKER_HUB,
    source::Access,
};

/// The host of Docker Hub's API.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// What a host is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) enum Request {
    /// Manifests and blobs by their digest.
    Pull,
    /// Manifests by tag, and the list of tags: the answer cannot be checked.
    Resolve,
    /// Everything that is written.
    Push,
    /// The list of the referrers of a manifest.
    Referrers,
}

/// What a host may be asked for: `capabilities`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) struct Capabilities {
    pub(in crate::source) pull: bool,
    pub(in crate::source) resolve: bool,
    pub(in crate::source) push: bool,
    pub(in crate::source) referrers: bool,
}

impl Capabilities {
    /// Those of a host for which none are named.
    pub(in crate::source) const ALL: Self = Self {
        pull: true,
        resolve: true,
        push: true,
        referrers: true,
    };
    pub(in crate::source) const NONE: Self = Self {
        pull: false,
        resolve: false,
        push: false,
        referrers: false,
    };
}

/// A file with the time of its last change: a file that has changed makes another host, and so a new connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) struct DatedFile {
    pub(in crate::source) path: PathBuf,
    changed: Option<SystemTime>,
}

impl DatedFile {
    pub(in crate::source) fn new(path: PathBuf) -> Self {
        let changed = std::fs::metadata(&path).and_then(|facts| facts.modified());
        Self {
            path,
            changed: changed.ok(),
        }
    }
}

/// A certificate with which a client shows who it is, and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) struct ClientCertificate {
    pub(in crate::source) certificate: DatedFile,
    /// `None`: the key is in the file of the certificate.
    pub(in crate::source) key: Option<DatedFile>,
}

/// How TLS is used with a host, beyond the system's certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::source) struct TlsFiles {
    /// Further CA certificates.
    pub(in crate::source) ca: Vec<DatedFile>,
    pub(in crate::source) client: Vec<ClientCertificate>,
    /// The host's certificate is not verified.
    pub(in crate::source) skip_verify: bool,
}

/// A host that serves a registry. Its headers may be secret: `Debug` leaves them out.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct RegistryHost {
    /// The root of the API with a slash at its end, e.g. `https://registry.example/v2/`.
    pub(in crate::source) root: Url,
    /// The registry that a mirror serves, for the parameter `ns` of its requests; `None` for the registry itself.
    pub(in crate::source) namespace: Option<String>,
    /// The host for which credentials are looked up.
    pub(in crate::source) login: String,
    pub(in crate::source) capabilities: Capabilities,
    pub(in crate::source) tls: TlsFiles,
    /// Sent with each request to this host, and to no other.
    pub(in crate::source) headers: HeaderMap,
    /// Time limit for a connection, where it is not the usual one.
    pub(in crate::source) connect: Option<Duration>,
}

impl RegistryHost {
    /// A registry that no file configures.
    pub(in crate::source) fn registry(registry: &str, access: &Access) -> Result<Self> {
        let scheme = match access.plain_http || (is_loopback(registry) && !access.tls) {
            true => "http",
            false => "https",
        };
        let host = match registry {
            DOCKER_HUB => DOCKER_HUB_API,
            host => host,
        };
        let root = format!("{scheme}://{host}/v2/").parse().map_err(|error| {
            Error::with_source(
                Kind::InvalidArgument,
                format!("{registry} is not valid in a URL"),
                error,
            )
        })?;
        Ok(Self {
            root,
            namespace: None,
            login: registry.to_owned(),
            capabilities: Capabilities::ALL,
            tls: TlsFiles::default(),
            headers: HeaderMap::new(),
            connect: None,
        })
    }

    /// A host with this root of the API, in the place of a registry.
    pub(in crate::source) fn at(mut root: Url, registry: &str) -> Self {
        if root.host_str() == Some(DOCKER_HUB) {
            // as which Docker Hub is known, but not served
            let _ = root.set_host(Some(DOCKER_HUB_API));
        }
        let host = authority(&root);
        let is_registry = host == registry || (registry == DOCKER_HUB && host == DOCKER_HUB_API);
        let login = match host.as_str() {
            DOCKER_HUB_API => DOCKER_HUB.to_owned(),
            _ => host,
        };
        Self {
            root,
            namespace: (!is_registry).then(|| registry.to_owned()),
            login,
            capabilities: Capabilities::ALL,
            tls: TlsFiles::default(),
            headers: HeaderMap::new(),
            connect: None,
        }
    }

    /// With the headers of an access, unless a file has them.
    pub(in crate::source) fn with_headers(mut self, access: &Access) -> Self {
        for (name, value) in &access.headers {
            let header = (name.parse::<HeaderName>(), HeaderValue::from_str(value));
            if let (Ok(name), Ok(mut value)) = header {
                value.set_sensitive(true);
                self.headers.entry(name).or_insert(value);
            }
        }
        self
    }

    /// It may be asked for all: what is written to a host is read there too.
    pub(in crate::source) fn with_all_capabilities(self) -> Self {
        Self {
            capabilities: Capabilities::ALL,
            ..self
        }
    }

    /// Whether it may be asked for this.
    pub(in crate::source) fn allows(&self, request: Request) -> bool {
        match request {
            Request::Pull => self.capabilities.pull,
            Request::Resolve => self.capabilities.resolve,
            Request::Push => self.capabilities.push,
            Request::Referrers => self.capabilities.referrers,
        }
    }

    /// Whether blobs are read from it.
    pub(crate) fn serves_blobs(&self) -> bool {
        self.allows(Request::Pull)
    }

    /// Whether it serves the registry in the place of it.
    pub(crate) fn is_mirror(&self) -> bool {
        self.namespace.is_some()
    }

    /// The root of its API: what two hosts differ in.
    pub(crate) fn root(&self) -> &str {
        self.root.as_str()
    }

    /// `HOST` or `HOST:PORT`, for messages.
    pub(crate) fn name(&self) -> String {
        authority(&self.root)
    }
}

impl fmt::Debug for RegistryHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryHost")
            .field("root", &self.root.as_str())
            .field("namespace", &self.namespace)
            .field("capabilities", &self.capabilities)
            .field("tls", &self.tls)
            .field("headers", &self.headers.len())
            .field("connect", &self.connect)
            .finish_non_exhaustive()
    }
}

/// Host and port of a URL.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Whether a registry is on this machine: there, plain HTTP is the custom, and TLS is asked for ([`Access::tls`]).
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(inner) => inner.split(']').next().unwrap_or(inner),
        None => host.split(':').next().unwrap_or(host),
    };
    bare == "localhost"
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// A path as a file of this directory names it.
pub(super) fn absolute(path: &str, directory: &Path) -> DatedFile {
    DatedFile::new(directory.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts() {
        for host in [
            "localhost",
            "localhost:1",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:1",
            "[::1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "128.0.0.1",
            "docker.io",
            "[::2]",
            "127.0.0.1.example:1",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_mirror_has_its_own_login_and_names_the_registry() {
        let at = |root: &str, registry: &str| {
            let host = RegistryHost::at(root.parse().expect("a URL"), registry);
            (host.root.to_string(), host.namespace, host.login)
        };
        let some = |text: &str| Some(text.to_owned());
        let owned = str::to_owned;
        assert_eq!(
            at("https://mirror:5000/v2/", "docker.io"),
            (
                owned("https://mirror:5000/v2/"),
                some("docker.io"),
                owned("mirror:5000")
            )
        );
        for host in ["docker.io", "registry-1.docker.io"] {
            assert_eq!(
                at(&format!("https://{host}/v2/"), "docker.io"),
                (
                    owned("https://registry-1.docker.io/v2/"),
                    None,
                    owned("docker.io")
                )
            );
        }
        assert_eq!(
            at("https://quay.io/v2/", "quay.io"),
            (owned("https://quay.io/v2/"), None, owned("quay.io"))
        );
        // another port is another host
        assert_eq!(at("https://quay.io:8443/v2/", "quay.io").1, some("quay.io"));
    }

    #[test]
    fn headers_are_not_shown() {
        let mut host = RegistryHost::at("https://m/v2/".parse().expect("a URL"), "r.example");
        host.headers
            .insert("x-token", "secret".parse().expect("a value"));
        assert!(!format!("{host:?}").contains("secret"));
    }
}
