//! How a source may be reached, as the person who asked would reach it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

/// How a source may be reached. Comes with each request, never from the daemon's environment, and is kept with a disk's sources.
/// Holds no secret itself: only where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Access {
    /// Docker's `config.json`; credential helpers are those that it names.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`, the same format; asked where Docker's has nothing for the registry.
    pub podman_auth: Option<PathBuf>,
    /// What a credential helper finds in its environment: `PATH`, `HOME` and the names of files and profiles that helpers know; no
    /// secrets.
    pub helper_environment: BTreeMap<String, String>,
    /// Plain HTTP also for hosts that are not loopback.
    pub plain_http: bool,
    /// Further CA certificates, PEM files.
    pub ca_certificates: Vec<PathBuf>,
    /// `HTTPS_PROXY` of the person who asked.
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
    /// The access of who runs this process: for command lines, which send it with each request.
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
