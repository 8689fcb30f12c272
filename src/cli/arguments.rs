//! Arguments that several commands share.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::Args;

use super::absolute;
use crate::{
    engine::open::policy::{IndexChoice, IndexPolicy},
    error::{Error, Kind, Result},
    oci::{Digest, Platform, Reference},
    source::{Access, CredentialPlugins, socket_path},
};

/// A section of the help after the command's own options.
pub(super) const INDEX: &str = "Index options";
/// A section of the help after the command's own options.
pub(super) const REGISTRY: &str = "Registry options";

/// The directory of the hosts of registries that containerd's CRI and nerdctl use.
const NODE_HOSTS_DIR: &str = "/etc/containerd/certs.d";

/// Access to the registry of an image.
#[derive(Args, Clone, Debug)]
pub(super) struct AccessArgs {
    /// Docker configuration file with credentials or credential helpers
    ///
    /// Default: $DOCKER_CONFIG/config.json, else ~/.docker/config.json.
    #[arg(help_heading = REGISTRY, long, value_name = "FILE")]
    auth_file: Option<PathBuf>,
    /// The kubelet's configuration of credential plugins (YAML or JSON)
    ///
    /// The plugins are asked when credentials are needed, before Docker's configuration.
    #[arg(
        help_heading = REGISTRY,
        long,
        value_name = "FILE",
        hide_short_help = true,
        requires = "image_credential_provider_bin_dir"
    )]
    image_credential_provider_config: Option<PathBuf>,
    /// Directory with the programs of the credential plugins
    #[arg(
        help_heading = REGISTRY,
        long,
        value_name = "DIR",
        hide_short_help = true,
        requires = "image_credential_provider_config"
    )]
    image_credential_provider_bin_dir: Option<PathBuf>,
    /// Use HTTP without TLS (the default for a loopback address)
    #[arg(help_heading = REGISTRY, long)]
    plain_http: bool,
    /// Use TLS for a loopback address too
    #[arg(help_heading = REGISTRY, long, conflicts_with = "plain_http")]
    tls: bool,
    /// PEM file with additional trusted CA certificates (repeatable)
    #[arg(help_heading = REGISTRY, long, value_name = "FILE")]
    ca_cert: Vec<PathBuf>,
    /// Directory with the hosts of registries, as containerd's certs.d (repeatable)
    ///
    /// DIR/REGISTRY/hosts.toml names the mirrors of a registry, and certificates and headers for it; DIR/_default/hosts.toml is for all
    /// others. Of several directories the first that knows the registry counts. An empty value: none. Default: /etc/containerd/certs.d, if
    /// it exists.
    #[arg(help_heading = REGISTRY, long, value_name = "DIR", hide_short_help = true)]
    hosts_dir: Vec<OsString>,
    /// Socket of containerd, for images of containerd
    ///
    /// Default: /run/containerd/containerd.sock.
    #[arg(
        help_heading = REGISTRY,
        long,
        value_name = "FILE",
        env = "CONTAINERD_ADDRESS",
        hide_env = true,
        hide_short_help = true
    )]
    containerd_address: Option<PathBuf>,
}

impl AccessArgs {
    /// The access, with the credentials, proxies and certificates of the caller's environment.
    pub(super) fn access(&self) -> Result<Access> {
        let mut access = Access::from_environment();
        if let Some(file) = &self.auth_file {
            access.docker_config = Some(absolute(file)?);
        }
        if let (Some(config), Some(bin_dir)) = (
            &self.image_credential_provider_config,
            &self.image_credential_provider_bin_dir,
        ) {
            access.credential_plugins = Some(CredentialPlugins {
                config: absolute(config)?,
                bin_dir: absolute(bin_dir)?,
            });
        }
        access.plain_http = self.plain_http;
        access.tls = self.tls;
        access.hosts_dirs = self.hosts_dirs()?;
        if let Some(address) = &self.containerd_address {
            access.containerd_address = Some(absolute(socket_path(address))?);
        }
        for file in &self.ca_cert {
            access.ca_certificates.push(absolute(file)?);
        }
        Ok(access)
    }

    fn hosts_dirs(&self) -> Result<Vec<PathBuf>> {
        if self.hosts_dir.is_empty() {
            let nodes = Path::new(NODE_HOSTS_DIR);
            let found = nodes.is_dir().then(|| nodes.to_owned());
            return Ok(found.into_iter().collect());
        }
        let mut found = Vec::new();
        for path in self.hosts_dir.iter().filter(|path| !path.is_empty()) {
            let path = absolute(Path::new(path))?;
            if !path.is_dir() {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!("--hosts-dir {}: no such directory", path.display()),
                ));
            }
            found.push(path);
        }
        Ok(found)
    }
}

/// An image and one of its platforms.
#[derive(Args, Clone, Debug)]
pub(super) struct ImageArgs {
    /// Image: NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    ///
    /// Or containerd://NAMESPACE/NAME, an image of containerd.
    pub(super) image: Reference,
    /// Platform, e.g. linux/arm64 [default: the host's]
    #[arg(long, short, value_name = "PLATFORM")]
    pub(super) platform: Option<Platform>,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// The SOCI index to use.
#[derive(Args, Clone, Debug)]
pub(super) struct IndexArgs {
    /// Digest of the SOCI index to use
    ///
    /// Default: the index that the image names (v2), else the newest that refers to it in the registry (v1), else the newest in the state
    /// directory.
    #[arg(help_heading = INDEX, long, value_name = "DIGEST")]
    pub(super) index: Option<Digest>,
    /// SOCI indexes to trust: v2, any or none
    ///
    /// v2: the index that the image names, the one given with --index, and those in the state directory. any: also the indexes that refer to
    /// the image in its repository (v1). none: no index; each layer is downloaded whole and checked against the image.
    #[arg(
        help_heading = INDEX,
        long,
        value_enum,
        value_name = "POLICY",
        default_value_t,
        hide_possible_values = true
    )]
    pub(super) index_policy: IndexPolicy,
    /// Fail if no SOCI index, or not this one, can be used
    #[arg(help_heading = INDEX, long, value_name = "DIGEST", num_args = 0..=1, require_equals = true, conflicts_with = "index")]
    pub(super) require_index: Option<Option<Digest>>,
}

impl IndexArgs {
    pub(super) fn choice(&self) -> IndexChoice {
        IndexChoice {
            digest: self.index.or(self.require_index.flatten()),
            policy: self.index_policy,
            is_required: self.require_index.is_some(),
        }
    }
}
