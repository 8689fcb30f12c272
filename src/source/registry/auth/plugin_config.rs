//! The configuration of the kubelet's credential plugins (`CredentialProviderConfig`), in YAML or JSON.

use std::{path::Path, time::Duration};

use serde::Deserialize;
use tokio::io::AsyncReadExt as _;

use super::image_pattern;
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    source::go_duration::GoDuration,
};

const MAX_FILE: u64 = 1 << 20;
const FILE_VERSIONS: [&str; 3] = [
    "kubelet.config.k8s.io/v1",
    "kubelet.config.k8s.io/v1beta1",
    "kubelet.config.k8s.io/v1alpha1",
];
/// The versions of the protocol. Their requests and answers have the same fields.
const PROTOCOLS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// A plugin, and the images that it has credentials for. It has no `Debug`: a variable of the environment may be secret.
#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PluginConfig {
    /// The file name of the program.
    pub(super) name: String,
    match_images: Vec<String>,
    #[serde(rename = "defaultCacheDuration")]
    default_cache_duration: GoDuration,
    /// The version of the protocol.
    #[serde(rename = "apiVersion")]
    pub(super) protocol: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<Present>,
}

#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
struct Variable {
    name: String,
    value: String,
}

/// A field whose content is ignored.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Present;

impl<'de> Deserialize<'de> for Present {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(from).map(|_| Self)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    api_version: String,
    kind: String,
    providers: Vec<PluginConfig>,
}

impl PluginConfig {
    /// Whether it has credentials for a repository.
    pub(super) fn matches(&self, host: &str, repository: &str) -> bool {
        let mut patterns = self.match_images.iter();
        patterns.any(|wanted| image_pattern::matches(wanted, host, repository))
    }

    pub(super) fn arguments(&self) -> &[String] {
        self.args.as_deref().unwrap_or_default()
    }

    /// Names and values of the variables that the plugin gets in addition to the others.
    pub(super) fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        let variables = self.env.iter().flatten();
        variables.map(|it| (it.name.as_str(), it.value.as_str()))
    }

    /// How long an answer is used that does not say how long it may be.
    pub(super) fn default_cache_duration(&self) -> Duration {
        self.default_cache_duration.0
    }

    fn check(&self) -> Result<(), String> {
        let is_plain = !matches!(self.name.as_str(), "" | "." | "..")
            && !self
                .name
                .contains(|it: char| it == '/' || it.is_whitespace());
        if !is_plain {
            return Err(format!("{:?} is not the name of a program", self.name));
        }
        if !PROTOCOLS.contains(&self.protocol.as_str()) {
            return Err(format!(
                "{} uses the protocol {:?}; {} is supported",
                self.name, self.protocol, PROTOCOLS[0]
            ));
        }
        if self.token_attributes.is_some() {
            return Err(format!(
                "{} needs the service account token of a pod (tokenAttributes), and there are no pods here; remove it from this file",
                self.name
            ));
        }
        Ok(())
    }
}

/// Reads the configuration.
pub(super) async fn read(path: &Path) -> Result<Vec<PluginConfig>> {
    let unreadable = || {
        format!(
            "reading the configuration of credential plugins {}",
            path.display()
        )
    };
    let file = tokio::fs::File::open(path).await;
    let file = file.or_kind(Kind::InvalidArgument, unreadable)?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes).await;
    read.or_kind(Kind::Io, unreadable)?;
    parse(&bytes)
        .map_err(|why| Error::new(Kind::InvalidArgument, format!("{}: {why}", path.display())))
}

/// The plugins of a file. The error has no text of the file, which may be secret.
fn parse(bytes: &[u8]) -> Result<Vec<PluginConfig>, String> {
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("the file is longer than {MAX_FILE} bytes"));
    }
    // JSON is YAML
    let file: File = serde_saphyr::from_slice(bytes).map_err(|error| {
        let place = error.location().map_or_else(String::new, |at| {
            format!(" (line {}, column {})", at.line(), at.column())
        });
        format!("the file is not a CredentialProviderConfig in YAML or JSON{place}")
    })?;
    if file.kind != "CredentialProviderConfig"
        || !FILE_VERSIONS.contains(&file.api_version.as_str())
    {
        return Err(format!(
            "the file is not a CredentialProviderConfig of {}",
            FILE_VERSIONS[0]
        ));
    }
    for (at, plugin) in file.providers.iter().enumerate() {
        plugin.check()?;
        if file.providers[..at].iter().any(|it| it.name == plugin.name) {
            return Err(format!("two providers have the name {}", plugin.name));
        }
    }
    Ok(file.providers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  # as in the documentation of the kubelet
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
      - "*.dkr.ecr.*.amazonaws.com.cn"
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args:
      - get-credentials
    env:
      - name: AWS_PROFILE
        value: example_profile
  - name: other
    matchImages: ["registry.io:8080/path"]
    defaultCacheDuration: 0s
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: null
"#;

    #[test]
    fn a_file_of_the_kubelet_is_read_in_yaml_and_in_json() {
        let json = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1",
            "kind": "CredentialProviderConfig",
            "providers": [{
                "name": "ecr-credential-provider",
                "matchImages": ["*.dkr.ecr.*.amazonaws.com", "*.dkr.ecr.*.amazonaws.com.cn"],
                "defaultCacheDuration": "12h0m0s",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "args": ["get-credentials"],
                "env": [{"name": "AWS_PROFILE", "value": "example_profile"}],
            }],
        });
        let indented = serde_json::to_string_pretty(&json)
            .unwrap()
            .replace("  ", "\t");
        for (text, count) in [(YAML, 2), (&json.to_string(), 1), (&indented, 1)] {
            let plugins = parse(text.as_bytes()).unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!(plugins.len(), count);
            let first = &plugins[0];
            assert_eq!(first.name, "ecr-credential-provider");
            assert_eq!(first.arguments(), ["get-credentials"]);
            assert_eq!(
                first.variables().collect::<Vec<_>>(),
                [("AWS_PROFILE", "example_profile")]
            );
            assert_eq!(
                first.default_cache_duration(),
                Duration::from_secs(12 * 3600)
            );
            assert!(first.matches("1.dkr.ecr.eu-west-1.amazonaws.com", "app"));
            assert!(!first.matches("registry.io:8080", "path"));
        }
        let plugins = parse(YAML.as_bytes()).unwrap();
        assert!(plugins[1].matches("registry.io:8080", "path/app"));
        assert_eq!(plugins[1].default_cache_duration(), Duration::ZERO);
        assert!(plugins[1].arguments().is_empty());
    }

    #[test]
    fn other_files_are_refused_without_a_word_of_them() {
        for (from, to, why) in [
            (
                "kubelet.config.k8s.io/v1\n",
                "v1\n",
                "not a CredentialProviderConfig",
            ),
            (
                "kind: CredentialProviderConfig",
                "kind: Pod",
                "not a CredentialProviderConfig",
            ),
            ("name: other", "name: ../other", "not the name of a program"),
            (
                "name: other",
                "name: ecr-credential-provider",
                "two providers",
            ),
            (
                "args: null",
                "tokenAttributes: {a: b}",
                "service account token",
            ),
            ("0s", "secret", "line "),
            ("args: null", "args: {secret: a}", "line "),
            ("providers:", "secret: [", "line "),
            ("providers:", "more:", "not a CredentialProviderConfig"),
            (
                "apiVersion: credentialprovider.kubelet.k8s.io/v1\n    args: null",
                "apiVersion: v9",
                "the protocol \"v9\"",
            ),
        ] {
            let text = YAML.replacen(from, to, 1);
            assert_ne!(text, YAML, "{from}");
            let Err(error) = parse(text.as_bytes()) else {
                panic!("{to}");
            };
            assert!(error.contains(why), "{to}: {error}");
            assert!(!error.contains("secret"), "{to}: {error}");
        }
        for bytes in [&b""[..], b"\0\xff", &vec![b' '; 2 << 20]] {
            assert!(parse(bytes).is_err());
        }
    }

    #[test]
    fn anchors_do_not_make_a_short_file_long() {
        let mut text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for (name, before) in "bcdefghi".chars().zip("abcdefgh".chars()) {
            let aliases = vec![format!("*{before}"); 10].join(", ");
            text.push_str(&format!("{name}: &{name} [{aliases}]\n"));
        }
        let begun = std::time::Instant::now();
        assert!(parse(text.as_bytes()).is_err());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
