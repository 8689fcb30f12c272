//! k3s and RKE2: distributions of Kubernetes with a containerd of their own, whose configuration they write at each start. They write it from a
//! template, their own or that of a person, and the result imports a directory of drop-ins.

use std::path::{Path, PathBuf};

use toml_edit::DocumentMut;

use super::root::{Root, UNITS};
use crate::error::Result;

/// Where they have their data, unless their option `data-dir` says otherwise.
const DATA: [&str; 2] = ["/var/lib/rancher/k3s", "/var/lib/rancher/rke2"];
/// Where the configuration of containerd is in the data.
const FOLDER: &str = "agent/etc/containerd";
/// The templates of a person. The first that is there counts.
const TEMPLATES: [&str; 2] = ["config-v3.toml.tmpl", "config.toml.tmpl"];
/// Their services: each is containerd and the kubelet in one.
const SERVICES: [&str; 4] = [
    "k3s.service",
    "k3s-agent.service",
    "rke2-server.service",
    "rke2-agent.service",
];
/// The socket of their containerd.
pub(super) const ADDRESS: &str = "/run/k3s/containerd/containerd.sock";

/// One that is on a node.
pub(super) struct Distribution {
    data: PathBuf,
}

impl Distribution {
    /// Those that have started on this node.
    pub(super) fn found(root: &Root) -> Vec<Self> {
        let all = DATA.map(|data| Self { data: data.into() });
        let has_started = |it: &Self| root.exists(&it.config());
        all.into_iter().filter(has_started).collect()
    }

    /// The one that writes this configuration file.
    pub(super) fn of(config: &Path) -> Option<Self> {
        let folder = config.parent().filter(|folder| folder.ends_with(FOLDER))?;
        let data = folder.ancestors().nth(Path::new(FOLDER).iter().count())?;
        Some(Self { data: data.into() })
    }

    /// The configuration file that it writes.
    pub(super) fn config(&self) -> PathBuf {
        self.data.join(FOLDER).join("config.toml")
    }

    /// The template of a person that is plain TOML: the file to change, because all of the configuration comes from it.
    pub(super) fn plain_template(&self, root: &Root) -> Result<Option<PathBuf>> {
        let paths = TEMPLATES.map(|name| self.data.join(FOLDER).join(name));
        let Some(path) = paths.into_iter().find(|path| root.exists(path)) else {
            return Ok(None);
        };
        let text = root.read(&path)?.unwrap_or_default();
        let is_plain = !text.contains("{{") && text.parse::<DocumentMut>().is_ok();
        Ok(is_plain.then_some(path))
    }

    /// Where its programs may be, `ctr` among them.
    pub(super) fn programs(&self) -> [PathBuf; 2] {
        ["data/current/bin", "bin"].map(|folder| self.data.join(folder))
    }

    /// Its services that the node has.
    pub(super) fn services(root: &Root) -> Vec<String> {
        let is_there = |service: &&str| {
            let folders = UNITS.iter().map(Path::new);
            folders.into_iter().any(|it| root.exists(&it.join(service)))
        };
        let there = SERVICES.iter().copied().filter(is_there);
        there.map(str::to_owned).collect()
    }

    /// The directory of the hosts of registries that it writes from `registries.yaml`, if it is there.
    pub(super) fn hosts(&self, root: &Root) -> Option<PathBuf> {
        let folder = self.data.join(FOLDER).join("certs.d");
        root.exists(&folder).then_some(folder)
    }
}
