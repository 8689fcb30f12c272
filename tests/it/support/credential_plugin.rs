//! A credential plugin of the kubelet, as a shell script.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use socinbd::source::CredentialPlugins;
use tempfile::TempDir;

/// A plugin for registries on 127.0.0.1 that prints `AWS` and a password.
pub struct CredentialPlugin {
    folder: TempDir,
}

impl CredentialPlugin {
    /// `password` is a shell command that prints one; the answer may be kept for `duration`.
    pub fn new(password: &str, duration: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let plugin = Self { folder };
        let script = format!(
            r#"#!/bin/sh
set -e
echo run >> {runs}
cat > /dev/null
password=$({password})
cat << END
{{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": "Registry",
"cacheDuration": "{duration}", "auth": {{"127.0.0.*:$PORT": {{"username": "AWS", "password": "$password"}}}}}}
END
"#,
            runs = plugin.file("runs").display()
        );
        fs::write(plugin.file("plugin"), script).unwrap();
        fs::set_permissions(plugin.file("plugin"), PermissionsExt::from_mode(0o755)).unwrap();
        plugin
    }

    /// Writes the configuration, for the registry at this address.
    pub fn for_registry(self, host: &str) -> Self {
        let (_, port) = host.split_once(':').unwrap();
        let config = format!(
            r#"apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: plugin
    matchImages: ["127.0.0.*:{port}"]
    defaultCacheDuration: 12h
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    env:
      - {{name: PORT, value: "{port}"}}
"#
        );
        fs::write(self.file("config.yaml"), config).unwrap();
        self
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What an access has of it.
    pub fn settings(&self) -> CredentialPlugins {
        CredentialPlugins {
            config: self.file("config.yaml"),
            bin_dir: self.folder.path().to_owned(),
        }
    }

    /// The options of the command line.
    pub fn options(&self) -> [String; 4] {
        [
            "--image-credential-provider-config".to_owned(),
            self.file("config.yaml").display().to_string(),
            "--image-credential-provider-bin-dir".to_owned(),
            self.folder.path().display().to_string(),
        ]
    }

    /// How often it has run.
    pub fn runs(&self) -> usize {
        let runs = fs::read_to_string(self.file("runs")).unwrap_or_default();
        runs.lines().count()
    }
}
