//! Access to a source, with the settings of the person who makes the request.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

/// How a source may be reached. Comes with each request, never from the daemon's environment, and is kept with a disk's sources.
/// Holds no registry's secret itself: only where they are.
#[derive(
    Clone, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(default)]
pub struct Access {
    /// Docker's `config.json`; credential helpers are those that it names.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`, the same format; asked where Docker's has nothing for the registry.
    pub podman_auth: Option<PathBuf>,
    /// Whether the credentials of pulls by the CRI image service of this daemon are used; they are asked first.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pull_credentials: bool,
    /// The kubelet's credential plugins; asked before the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credential_plugins: Option<CredentialPlugins>,
    /// The environment of credential helpers and plugins: `PATH`, `HOME` and the names of files and profiles that helpers know; no secrets.
    pub helper_environment: BTreeMap<String, String>,
    /// Plain HTTP also for hosts that are not loopback.
    pub plain_http: bool,
    /// TLS also for hosts that are loopback, which get plain HTTP otherwise.
    pub tls: bool,
    /// Directories with the configuration of registries (`certs.d` of containerd): the first that knows a registry counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts_dirs: Vec<PathBuf>,
    /// The socket of containerd, for its images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd_address: Option<PathBuf>,
    /// Headers of the requests to the hosts of the registry, with names in lower case. They are not stored with the sources of a disk,
    /// and `Debug` leaves their values out.
    #[serde(skip)]
    pub headers: BTreeMap<String, String>,
    /// Credentials of a command line. They are not stored or sent with the access.
    #[serde(skip)]
    pub given_credentials: Option<GivenCredentials>,
    /// Further CA certificates, PEM files.
    pub ca_certificates: Vec<PathBuf>,
    /// `HTTPS_PROXY` of the request. The URL of a proxy may have a password, the only secret here; `Debug` leaves it out.
    pub https_proxy: Option<String>,
    /// `HTTP_PROXY`.
    pub http_proxy: Option<String>,
    /// `NO_PROXY`.
    pub no_proxy: Option<String>,
}

/// Credentials that a command line gives for one registry. Nothing else is asked for it. Without a useful `Debug`: they must not reach a log.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct GivenCredentials {
    /// The registry.
    pub(super) host: String,
    pub(super) login: GivenLogin,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum GivenLogin {
    Password {
        user: String,
        password: String,
    },
    /// A refresh token of the registry's token service.
    RefreshToken(String),
}

impl GivenCredentials {
    /// `user`: `USER[:PASSWORD]` for the registry of this host; it is above the refresh token. `None`: there are none.
    pub fn new(host: &str, user: Option<String>, refresh_token: Option<String>) -> Option<Self> {
        let user = user.filter(|user| !user.is_empty());
        let refresh_token = refresh_token.filter(|token| !token.is_empty());
        let login = match (user, refresh_token) {
            (Some(user), _) => {
                let parts = user.split_once(':').filter(|(name, _)| !name.is_empty());
                let (user, password) = parts.unwrap_or((&user, ""));
                GivenLogin::Password {
                    user: user.to_owned(),
                    password: password.to_owned(),
                }
            }
            (None, Some(token)) => GivenLogin::RefreshToken(token),
            (None, None) => return None,
        };
        Some(Self {
            host: host.to_owned(),
            login,
        })
    }
}

impl fmt::Debug for GivenCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GivenCredentials").finish_non_exhaustive()
    }
}

/// The kubelet's credential plugins.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub struct CredentialPlugins {
    /// The kubelet's `CredentialProviderConfig`, in YAML or JSON.
    pub config: PathBuf,
    /// The directory of the programs.
    pub bin_dir: PathBuf,
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
            pull_credentials: false,
            credential_plugins: None,
            helper_environment: HELPER_VARIABLES
                .iter()
                .filter_map(|name| Some(((*name).to_owned(), text(name)?)))
                .collect(),
            plain_http: false,
            tls: false,
            hosts_dirs: Vec::new(),
            containerd_address: None,
            headers: BTreeMap::new(),
            given_credentials: None,
            ca_certificates: path("SSL_CERT_FILE").map(absolute).into_iter().collect(),
            https_proxy: either("https_proxy", "HTTPS_PROXY")
                .or_else(|| either("all_proxy", "ALL_PROXY")),
            // HTTP_PROXY in upper case is not read by curl, because a CGI's caller can set it; Docker and Go read both
            http_proxy: either("http_proxy", "HTTP_PROXY")
                .or_else(|| either("all_proxy", "ALL_PROXY")),
            no_proxy: either("no_proxy", "NO_PROXY"),
        }
    }

    /// Without the passwords of proxies: the form that may be stored.
    pub(crate) fn without_passwords(&self) -> Self {
        let stripped = |proxy: &Option<String>| proxy.as_deref().map(strip_password);
        Self {
            https_proxy: stripped(&self.https_proxy),
            http_proxy: stripped(&self.http_proxy),
            ..self.clone()
        }
    }

    /// Without headers.
    pub(crate) fn without_headers(&self) -> Self {
        Self {
            headers: BTreeMap::new(),
            ..self.clone()
        }
    }

    /// With the passwords of proxies that another access has for the same user of the same proxy.
    pub(crate) fn with_passwords_of(&self, other: &Self) -> Self {
        let others = [&other.https_proxy, &other.http_proxy];
        let completed = |proxy: &Option<String>| {
            let proxy = proxy.as_deref()?;
            let mut others = others.into_iter().flatten();
            let same = others.find(|other| strip_password(other) == proxy);
            Some(same.map_or(proxy, String::as_str).to_owned())
        };
        Self {
            https_proxy: completed(&self.https_proxy),
            http_proxy: completed(&self.http_proxy),
            ..self.clone()
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |proxy: &Option<String>| proxy.as_deref().map(without_password);
        f.debug_struct("Access")
            .field("docker_config", &self.docker_config)
            .field("podman_auth", &self.podman_auth)
            .field("pull_credentials", &self.pull_credentials)
            .field("credential_plugins", &self.credential_plugins)
            .field("plain_http", &self.plain_http)
            .field("tls", &self.tls)
            .field("hosts_dirs", &self.hosts_dirs)
            .field("containerd_address", &self.containerd_address)
            .field("headers", &self.headers.keys().collect::<Vec<_>>())
            .field("ca_certificates", &self.ca_certificates)
            .field("https_proxy", &shown(&self.https_proxy))
            .field("http_proxy", &shown(&self.http_proxy))
            .field("no_proxy", &self.no_proxy)
            .finish_non_exhaustive()
    }
}

/// The path of a Unix socket, which may be written as a URL.
pub(crate) fn socket_path(address: &Path) -> &Path {
    let path = address.to_str().and_then(|it| it.strip_prefix("unix://"));
    path.map_or(address, Path::new)
}

/// A proxy's URL without its user part, however broken the rest is.
pub(super) fn without_password(proxy: &str) -> String {
    match (proxy.rsplit_once('@'), proxy.split_once("://")) {
        (Some((_, host)), Some((scheme, _))) => format!("{scheme}://...@{host}"),
        (Some((_, host)), None) => format!("...@{host}"),
        (None, _) => proxy.to_owned(),
    }
}

/// A proxy's URL without the password of its user part, however broken the rest is.
fn strip_password(proxy: &str) -> String {
    let (scheme, rest) = match proxy.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), proxy),
    };
    match rest.rsplit_once('@') {
        Some((user, host)) => {
            let user = user.split(':').next().unwrap_or(user);
            format!("{scheme}{user}@{host}")
        }
        None => proxy.to_owned(),
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
    fn credentials_of_a_command_line_are_not_shown_or_stored() {
        let given = |user: &str, token: &str| {
            let some = |text: &str| Some(text.to_owned());
            GivenCredentials::new("a.b", some(user), some(token))
        };
        let password = |user: &str, password: &str| GivenLogin::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        };
        for (user, token, expected) in [
            ("me:secret", "", password("me", "secret")),
            ("me:se:cret", "token", password("me", "se:cret")),
            ("me", "", password("me", "")),
            (":secret", "", password(":secret", "")),
            ("", "secret", GivenLogin::RefreshToken("secret".to_owned())),
        ] {
            let found = given(user, token).expect("credentials");
            assert!(found.login == expected, "{user} {token}");
            let access = Access {
                given_credentials: Some(found),
                ..Access::default()
            };
            let json = serde_json::to_string(&access).expect("JSON");
            assert!(!json.contains("secret") && !format!("{access:?}").contains("secret"));
            let found = &access.given_credentials;
            assert!(!format!("{found:?}").contains("secret"));
        }
        assert_eq!(given("", ""), None);
        assert_eq!(GivenCredentials::new("a.b", None, None), None);
    }

    #[test]
    fn what_is_stored_has_no_password_of_a_proxy_and_gets_it_back_for_the_same_user() {
        let with = |https: &str, http: &str| from(&[("https_proxy", https), ("http_proxy", http)]);
        let given = with("http://me:se:c@ret@proxy:3128/x", "you:secret@proxy");
        let stored = given.without_passwords();
        assert_eq!(
            stored.https_proxy.as_deref(),
            Some("http://me@proxy:3128/x")
        );
        assert_eq!(stored.http_proxy.as_deref(), Some("you@proxy"));
        assert_eq!(stored.without_passwords(), stored);
        assert_eq!(stored.with_passwords_of(&given), given);
        // another user, another proxy, none
        for other in [
            with("http://you:secret@proxy:3128/x", ""),
            with("http://me:secret@proxy:3129/x", ""),
            with("http://me@proxy:3128/x", ""),
            Access::default(),
        ] {
            assert_eq!(stored.with_passwords_of(&other), stored);
        }
        let none = with("http://proxy", "");
        assert_eq!(none.without_passwords(), none);
        assert_eq!(none.with_passwords_of(&given), none);
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
