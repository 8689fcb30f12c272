//! Access to a source, with the settings of the person who makes the request.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

/// How a source may be reached. Comes with each request, never from the daemon's environment, and is kept with a disk's sources.
/// Holds no registry's secret itself: only where they are.
#[derive(Clone, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Access {
    /// Docker's `config.json`; credential helpers are those that it names.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`, the same format; asked where Docker's has nothing for the registry.
    pub podman_auth: Option<PathBuf>,
    /// The environment of credential helpers: `PATH`, `HOME` and the names of files and profiles that helpers know; no secrets.
    pub helper_environment: BTreeMap<String, String>,
    /// Plain HTTP also for hosts that are not loopback.
    pub plain_http: bool,
    /// TLS also for hosts that are loopback, which get plain HTTP otherwise.
    pub tls: bool,
    /// Further CA certificates, PEM files.
    pub ca_certificates: Vec<PathBuf>,
    /// `HTTPS_PROXY` of the request. The URL of a proxy may have a password, the only secret here; `Debug` leaves it out.
    pub https_proxy: Option<String>,
    /// `HTTP_PROXY`.
    pub http_proxy: Option<String>,
    /// `NO_PROXY`.
    pub no_proxy: Option<String>,
}

/// Variables that tell credential helpers where things are. Those that carry a secret themselves (`AWS_SECRET_ACCESS_KEY`, ...) are
/// left out: an access is kept on disk.
const HELPER_VARIABLES: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
    "GNUPGHOME",
    "PASSWORD_STORE_DIR",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_EC2_METADATA_DISABLED",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "CLOUDSDK_CONFIG",
    "AZURE_CONFIG_DIR",
];

impl Access {
    /// The access of the user of this process: for command lines, which send it with each request.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// The access that these variables describe.
    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name: &str| {
            variable(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let text = |name: &str| {
            variable(name)
                .and_then(|value| value.into_string().ok())
                .filter(|value| !value.is_empty())
        };
        // curl's order: the lower-case name first
        let either = |lower: &str, upper: &str| text(lower).or_else(|| text(upper));
        let home = path("HOME");
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let present = |path: PathBuf| path.is_file().then(|| absolute(path));

        let docker_config = path("DOCKER_CONFIG")
            .or_else(|| home.as_deref().map(|home| home.join(".docker")))
            .map(|folder| folder.join("config.json"));
        let podman_auth = path("REGISTRY_AUTH_FILE").or_else(|| {
            let in_folder = |folder: &Path| present(folder.join("containers/auth.json"));
            path("XDG_RUNTIME_DIR")
                .and_then(|folder| in_folder(&folder))
                .or_else(|| path("XDG_CONFIG_HOME").and_then(|folder| in_folder(&folder)))
                .or_else(|| home.and_then(|home| in_folder(&home.join(".config"))))
        });
        Self {
            docker_config: docker_config.and_then(present),
            podman_auth: podman_auth.map(absolute),
            helper_environment: HELPER_VARIABLES
                .iter()
                .filter_map(|name| Some(((*name).to_owned(), text(name)?)))
                .collect(),
            plain_http: false,
            tls: false,
            ca_certificates: path("SSL_CERT_FILE").map(absolute).into_iter().collect(),
            https_proxy: either("https_proxy", "HTTPS_PROXY")
                .or_else(|| either("all_proxy", "ALL_PROXY")),
            // HTTP_PROXY in upper case is not read by curl, because a CGI's caller can set it; Docker and Go read both
            http_proxy: either("http_proxy", "HTTP_PROXY")
                .or_else(|| either("all_proxy", "ALL_PROXY")),
            no_proxy: either("no_proxy", "NO_PROXY"),
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |proxy: &Option<String>| proxy.as_deref().map(without_password);
        f.debug_struct("Access")
            .field("docker_config", &self.docker_config)
            .field("podman_auth", &self.podman_auth)
            .field("plain_http", &self.plain_http)
            .field("tls", &self.tls)
            .field("ca_certificates", &self.ca_certificates)
            .field("https_proxy", &shown(&self.https_proxy))
            .field("http_proxy", &shown(&self.http_proxy))
            .field("no_proxy", &self.no_proxy)
            .finish_non_exhaustive()
    }
}

/// A proxy's URL without its user part, however broken the rest is.
pub(super) fn without_password(proxy: &str) -> String {
    match (proxy.rsplit_once('@'), proxy.split_once("://")) {
        (Some((_, host)), Some((scheme, _))) => format!("{scheme}://...@{host}"),
        (Some((_, host)), None) => format!("...@{host}"),
        (None, _) => proxy.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Access {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        Access::from_variables(|name| variables.get(name).map(OsString::from))
    }

    #[test]
    fn nothing_in_the_environment() {
        assert_eq!(from(&[]), Access::default());
        assert_eq!(
            from(&[("HTTPS_PROXY", ""), ("SSL_CERT_FILE", "")]),
            Access::default()
        );
    }

    #[test]
    fn proxies_in_both_cases() {
        let access = from(&[
            ("HTTPS_PROXY", "upper"),
            ("https_proxy", "lower"),
            ("HTTP_PROXY", "http"),
            ("NO_PROXY", "a,b"),
        ]);
        assert_eq!(access.https_proxy.as_deref(), Some("lower"));
        assert_eq!(access.http_proxy.as_deref(), Some("http"));
        assert_eq!(access.no_proxy.as_deref(), Some("a,b"));
        let access = from(&[("all_proxy", "all"), ("http_proxy", "own")]);
        assert_eq!(access.https_proxy.as_deref(), Some("all"));
        assert_eq!(access.http_proxy.as_deref(), Some("own"));
    }

    #[test]
    fn files_where_docker_and_podman_have_them() {
        let home = tempfile::tempdir().expect("a folder");
        let make = |below: &str| {
            let file = home.path().join(below);
            std::fs::create_dir_all(file.parent().expect("a parent")).expect("a folder");
            std::fs::write(&file, "{}").expect("a file");
            file
        };
        let at_home = home.path().to_str().expect("UTF-8");
        assert_eq!(
            from(&[("HOME", at_home)]).docker_config,
            None,
            "no such file"
        );
        let docker = make(".docker/config.json");
        let podman = make(".config/containers/auth.json");
        let access = from(&[("HOME", at_home)]);
        assert_eq!(access.docker_config.as_ref(), Some(&docker));
        assert_eq!(access.podman_auth.as_ref(), Some(&podman));
        assert_eq!(access.helper_environment["HOME"], at_home);

        let running = make("run/containers/auth.json");
        let run = home.path().join("run");
        let run = run.to_str().expect("UTF-8");
        let other = make("other/config.json");
        let folder = other.parent().and_then(Path::to_str).expect("UTF-8");
        let access = from(&[
            ("HOME", at_home),
            ("XDG_RUNTIME_DIR", run),
            ("DOCKER_CONFIG", folder),
        ]);
        assert_eq!(access.docker_config.as_ref(), Some(&other));
        assert_eq!(access.podman_auth.as_ref(), Some(&running));
        let access = from(&[
            ("SSL_CERT_FILE", "/x/ca.pem"),
            ("REGISTRY_AUTH_FILE", "/x/auth.json"),
        ]);
        assert_eq!(access.ca_certificates, [PathBuf::from("/x/ca.pem")]);
        assert_eq!(access.podman_auth, Some(PathBuf::from("/x/auth.json")));
    }

    #[test]
    fn secrets_of_the_environment_stay_there() {
        let access = from(&[
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_PROFILE", "work"),
            ("HTTPS_PROXY", "http://user:secret@proxy:3128"),
        ]);
        assert_eq!(access.helper_environment.len(), 1);
        assert!(!format!("{access:?}").contains("secret"));
        assert!(format!("{access:?}").contains("http://...@proxy:3128"));
        assert_eq!(without_password("user:secret@proxy"), "...@proxy");
        assert_eq!(without_password("proxy:1"), "proxy:1");
    }

    #[test]
    fn what_is_sent_comes_back_and_fields_may_lack() {
        let access = from(&[
            ("HTTPS_PROXY", "p"),
            ("SSL_CERT_FILE", "/c"),
            ("PATH", "/bin"),
        ]);
        let json = serde_json::to_string(&access).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Access>(&json).expect("the same"),
            access
        );
        assert_eq!(
            serde_json::from_str::<Access>("{}").expect("empty"),
            Access::default()
        );
    }
}
