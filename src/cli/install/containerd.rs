//! The containerd of a node: its version, its configuration files, and the settings that make it use the snapshotter.

use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item};

use super::{
    distribution::{self, Distribution},
    root::{Root, UNITS},
    settings::{Setting, at},
};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// The name of the plugin: the one that nerdctl knows.
pub(super) const NAME: &str = "soci";
const CONFIG: &str = "/etc/containerd/config.toml";
const ADDRESS: &str = "/run/containerd/containerd.sock";
/// The file in a directory of drop-ins.
const DROP_IN: &str = "socinbd.toml";
const TRANSFER: [&str; 3] = [
    "plugins",
    "io.containerd.transfer.v1.local",
    "unpack_config",
];
/// The section of CRI in a file of format 2.
const CRI_2: &[&str] = &["plugins", "io.containerd.grpc.v1.cri", "containerd"];
/// That in a file of format 3 and 4.
const CRI_3: &[&str] = &["plugins", "io.containerd.cri.v1.images"];
/// Where programs of containerd are.
const PROGRAMS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/usr/local/sbin"];
/// The unit of containerd.
pub(super) const SERVICE: &str = "containerd.service";

/// A version of containerd: major and minor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Version(pub(super) u64, pub(super) u64);

impl Version {
    const LEAST: Self = Self(1, 6);
    const END: Self = Self(3, 0);

    /// Whether this program knows how containerd of this version is configured.
    pub(super) fn check(self) -> Result<Self> {
        if self < Self::LEAST || self >= Self::END {
            return Err(refusal(&format!(
                "containerd {}.{} is not supported: install 1.6 or later, before 3.0, or configure it by hand (docs/containerd.md)",
                self.0, self.1
            )));
        }
        Ok(self)
    }

    /// That in the output of `containerd --version`.
    pub(super) fn of_output(output: &str) -> Option<Self> {
        output.split_whitespace().find_map(|word| word.parse().ok())
    }
}

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a version like 1.7 or 2.4.2");
        let mut parts = text.strip_prefix('v').unwrap_or(text).split('.');
        let mut part = || parts.next()?.parse().ok();
        let (major, minor) = (part(), part());
        Ok(Self(major.ok_or_else(wrong)?, minor.ok_or_else(wrong)?))
    }
}

/// Where the daemon is, as containerd is told.
pub(super) struct Snapshotter {
    pub(super) socket: String,
    pub(super) root: String,
    /// Whether another plugin or snapshotter is replaced.
    pub(super) replaces: bool,
    /// Whether it maps the owners of layers for user namespaces on this host.
    pub(super) maps_owners: bool,
}

/// A configuration file, before the change.
struct File {
    path: PathBuf,
    document: DocumentMut,
}

/// The file that is changed, the settings for it, and what a person should know.
pub(super) struct Wanted {
    pub(super) path: PathBuf,
    pub(super) settings: Vec<Setting>,
    /// The content of a file that is not there yet.
    pub(super) start: String,
    pub(super) warnings: Vec<String>,
    /// The socket of containerd.
    pub(super) address: String,
}

/// A containerd of a node.
pub(super) struct Containerd {
    /// The configuration file.
    pub(super) config: PathBuf,
    /// The distribution that writes this file at each start.
    pub(super) distribution: Option<Distribution>,
}

impl Containerd {
    /// That of a configuration file, or else the only one of the node.
    pub(super) fn find(root: &Root, config: Option<&Path>) -> Result<Self> {
        let config = match config {
            Some(path) if path.is_absolute() => path.to_owned(),
            Some(path) => {
                let what = format!(
                    "--containerd-config {}: give an absolute path",
                    path.display()
                );
                return Err(Error::new(Kind::InvalidArgument, what));
            }
            None => only_config(root)?,
        };
        Ok(Self {
            distribution: Distribution::of(&config),
            config,
        })
    }

    /// The directory of its programs.
    pub(super) fn programs(&self, root: &Root) -> Option<PathBuf> {
        let has_it = |folder: &PathBuf| root.exists(&folder.join("containerd"));
        match &self.distribution {
            Some(distribution) => distribution.programs().into_iter().find(has_it),
            None => PROGRAMS.into_iter().map(PathBuf::from).find(has_it),
        }
    }

    /// The services that start it.
    pub(super) fn services(&self, root: &Root) -> Vec<String> {
        match &self.distribution {
            Some(_) => Distribution::services(root),
            None => vec![SERVICE.to_owned()],
        }
    }
}

/// The configuration file of the only containerd of a node.
fn only_config(root: &Root) -> Result<PathBuf> {
    let of_unit = config_of_unit(root);
    let own = of_unit.or_else(|| root.exists(Path::new(CONFIG)).then(|| CONFIG.into()));
    let distributions = Distribution::found(root);
    let mut all: Vec<PathBuf> = own.into_iter().collect();
    all.extend(distributions.iter().map(Distribution::config));
    if all.len() > 1 {
        let paths: Vec<_> = all.iter().map(|path| path.display().to_string()).collect();
        return Err(refusal(&format!(
            "this node has more than one containerd ({}): name the file of one with --containerd-config",
            paths.join(", ")
        )));
    }
    Ok(all.pop().unwrap_or_else(|| CONFIG.into()))
}

/// The configuration file of the containerd that has a unit of its own: as the unit says, or else the usual one.
fn config_of_unit(root: &Root) -> Option<PathBuf> {
    let units = UNITS.map(|folder| Path::new(folder).join(SERVICE));
    let texts = units.iter().map(|unit| root.read(unit).ok().flatten());
    let text = texts.into_iter().flatten().next()?;
    let start = text
        .lines()
        .rev()
        .find(|line| line.starts_with("ExecStart=/"));
    let mut words = start.unwrap_or_default().split_whitespace();
    while let Some(word) = words.next() {
        let given = match word.split_once('=') {
            Some(("--config" | "-c", path)) => Some(path),
            _ if word == "--config" || word == "-c" => words.next(),
            _ => None,
        };
        if let Some(path) = given.filter(|path| path.starts_with('/')) {
            return Some(path.into());
        }
    }
    Some(CONFIG.into())
}

/// Plans the settings. `read` gives the content of a file as it is without an earlier installation.
pub(super) fn wanted(
    root: &Root,
    read: &dyn Fn(&Path) -> Result<Option<String>>,
    containerd: &Containerd,
    version: Version,
    snapshotter: &Snapshotter,
) -> Result<Wanted> {
    let distribution = containerd.distribution.as_ref();
    let template = distribution.map_or(Ok(None), |it| it.plain_template(root))?;
    // what a distribution has written is written again at its next start
    let is_written = distribution.is_some() && template.is_none();
    let main = template.as_ref().unwrap_or(&containerd.config);
    let file = match read(main)? {
        Some(text) => Some(File::parse(main.to_owned(), &text)?),
        None => None,
    };
    let format = match &file {
        Some(file) => file.format(version)?,
        None if version >= Version(2, 0) => 3,
        None => 2,
    };
    let imports = match &file {
        Some(file) => file.imports(root, read)?,
        None => Vec::new(),
    };
    let all: Vec<&File> = file.iter().chain(&imports).collect();
    let sections = match version >= Version(2, 0) {
        true => &[CRI_2, CRI_3],
        false => sections(format, version),
    };
    for file in &all {
        file.check(sections, snapshotter)?;
    }
    for file in &imports {
        file.check_order(sections, version)?;
    }
    let has_transfer = all
        .iter()
        .any(|file| at(&file.document, &TRANSFER).is_some());
    // earlier versions replace whole sections of plugins by those of an imported file
    let is_merged = version >= Version(2, 0);
    let folder = file.as_ref().and_then(File::drop_in_directory);
    let drop_in = match folder.filter(|_| is_merged) {
        // all replace a list
        Some(_) if has_transfer && !is_written => None,
        None if is_written => {
            let why = match is_merged {
                _ if file.is_none() => "it does not exist yet: start them once",
                true => "it has no imports of `*.toml`",
                false => "containerd before 2.0 does not merge imported files",
            };
            return Err(refusal(&format!(
                "{} is written by k3s or RKE2 at each start, but {why} (docs/install.md, \"k3s and RKE2\")",
                main.display()
            )));
        }
        folder => folder,
    };
    // each file is converted by itself
    let format = if drop_in.is_some() { 3 } else { format };
    let path = drop_in.map_or(main.to_owned(), |folder| folder.join(DROP_IN));
    let plugin = |name: &'static str| ["proxy_plugins", NAME, name];
    let export = |name: &'static str| ["proxy_plugins", NAME, "exports", name];
    let mut settings = vec![
        Setting::new(&plugin("type"), "snapshot"),
        Setting::new(&plugin("address"), snapshotter.socket.as_str()),
    ];
    let rebase = (version >= Version(2, 4)).then_some("rebase");
    let maps_owners = snapshotter.maps_owners && version >= Version(2, 3);
    let remap = maps_owners.then_some("remap-ids");
    let capabilities: toml_edit::Array = rebase.into_iter().chain(remap).collect();
    if !capabilities.is_empty() {
        settings.push(Setting::new(&plugin("capabilities"), capabilities));
    }
    settings.push(Setting::new(&export("root"), snapshotter.root.as_str()));
    let annotations = export("enable_remote_snapshot_annotations");
    settings.push(Setting::new(&annotations, "true"));
    for section in self::sections(format, version) {
        let of_cri = |name: &'static str| [section, &[name][..]].concat();
        settings.push(Setting::new(&of_cri("snapshotter"), NAME));
        settings.push(Setting::new(&of_cri("disable_snapshot_annotations"), false));
    }
    if is_merged && !(has_transfer && is_written) {
        // a list replaces the default one, which has overlayfs
        let names = if has_transfer {
            &[NAME][..]
        } else {
            &["overlayfs", NAME]
        };
        let platform = crate::oci::Platform::new("linux", std::env::consts::ARCH, None).to_string();
        settings.extend(names.iter().map(|name| {
            let pairs = [("platform", platform.as_str()), ("snapshotter", name)];
            Setting::element(&TRANSFER, &pairs)
        }));
    }
    let disabled = |file: &&&File| {
        let list = file
            .document
            .get("disabled_plugins")
            .and_then(Item::as_array);
        let names = list.into_iter().flatten().filter_map(|name| name.as_str());
        names
            .into_iter()
            .any(|name| name == "cri" || name == "io.containerd.grpc.v1.cri")
    };
    let warning = |file: &&File| {
        let path = file.path.display();
        format!(
            "CRI is in disabled_plugins of {path}: only ctr and nerdctl will use the snapshotter"
        )
    };
    let address = file.as_ref().and_then(File::address);
    let usual = distribution.map_or(ADDRESS, |_| distribution::ADDRESS);
    Ok(Wanted {
        path,
        settings,
        start: format!("version = {format}\n"),
        warnings: all.iter().filter(disabled).map(warning).collect(),
        address: address.unwrap_or(usual).to_owned(),
    })
}

/// The sections of CRI that count in a file of this format.
fn sections(format: i64, version: Version) -> &'static [&'static [&'static str]] {
    match format {
        1 => &[&["plugins", "cri", "containerd"]],
        2 if version < Version(2, 0) => &[CRI_2],
        // containerd converts the older section, but not these settings unless the section has runtimes
        2 => &[CRI_2, CRI_3],
        _ => &[CRI_3],
    }
}

impl File {
    fn parse(path: PathBuf, text: &str) -> Result<Self> {
        let document = text
            .parse::<DocumentMut>()
            .or_kind(Kind::InvalidArgument, || {
                format!("{}: correct it first", path.display())
            })?;
        Ok(Self { path, document })
    }

    /// The version of the file's format.
    fn format(&self, version: Version) -> Result<i64> {
        let path = self.path.display();
        let format = self
            .document
            .get("version")
            .map_or(Some(1), Item::as_integer);
        match format {
            Some(1) if version >= Version(2, 0) => Err(refusal(&format!(
                "{path} has the format 1: bring it to a later one first (`containerd config migrate`)"
            ))),
            Some(format @ 3..=4) if version < Version(2, 0) => Err(refusal(&format!(
                "{path} has the format {format}, which containerd {}.{} does not read",
                version.0, version.1
            ))),
            Some(format @ 1..=4) => Ok(format),
            _ => Err(refusal(&format!(
                "{path} has a format that is not 1, 2, 3 or 4: configure it by hand (docs/containerd.md)"
            ))),
        }
    }

    /// The socket of containerd.
    fn address(&self) -> Option<&str> {
        let old: &[&str] = &["grpc", "address"];
        let new: &[&str] = &["plugins", "io.containerd.server.v1.grpc", "address"];
        let mut found = [old, new].into_iter().filter_map(|path| {
            at(&self.document, path)?
                .as_str()
                .filter(|it| !it.is_empty())
        });
        found.next()
    }

    /// The patterns of imported files, as absolute paths.
    fn patterns(&self) -> Vec<PathBuf> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let list = self.document.get("imports").and_then(Item::as_array);
        let names = list.into_iter().flatten().filter_map(|name| name.as_str());
        names.map(|name| folder.join(name)).collect()
    }

    /// A directory whose files with the suffix `.toml` are all imported.
    fn drop_in_directory(&self) -> Option<PathBuf> {
        let patterns = self.patterns();
        let all = patterns.iter().find(|path| path.ends_with("*.toml"))?;
        let folder = all.parent()?;
        let is_plain = folder
            .to_str()
            .is_some_and(|folder| !folder.contains(['*', '?', '[']));
        is_plain.then(|| folder.to_owned())
    }

    /// The imported files. Those of imported files are not followed.
    fn imports(
        &self,
        root: &Root,
        read: &dyn Fn(&Path) -> Result<Option<String>>,
    ) -> Result<Vec<Self>> {
        let mut files = Vec::new();
        for pattern in self.patterns() {
            let (Some(folder), Some(name)) = (pattern.parent(), pattern.file_name()) else {
                continue;
            };
            let name = name.to_string_lossy();
            let names = match name.split_once('*') {
                None => vec![name.into_owned()],
                Some((start, end)) => {
                    let is_meant = |name: &String| {
                        name.len() >= start.len() + end.len()
                            && name.starts_with(start)
                            && name.ends_with(end)
                    };
                    root.names(folder).into_iter().filter(is_meant).collect()
                }
            };
            for name in names {
                let path = folder.join(name);
                if path.file_name().is_some_and(|name| name != DROP_IN)
                    && let Some(text) = read(&path)?
                {
                    files.push(Self::parse(path, &text)?);
                }
            }
        }
        Ok(files)
    }

    /// Refuses what would be replaced although a person has chosen it.
    fn check(&self, sections: &[&[&str]], snapshotter: &Snapshotter) -> Result<()> {
        if snapshotter.replaces {
            return Ok(());
        }
        let text = |path: &[&str]| at(&self.document, path).and_then(Item::as_str);
        let path = self.path.display();
        let advice = "remove it first, or give --replace";
        let address = text(&["proxy_plugins", NAME, "address"]);
        if let Some(address) = address.filter(|address| *address != snapshotter.socket) {
            return Err(refusal(&format!(
                "{path} has a plugin {NAME} at {address} (soci-snapshotter?): {advice}"
            )));
        }
        for section in sections {
            let other = text(&[section, &["snapshotter"][..]].concat());
            let usual = ["", "overlayfs", "native", NAME];
            if let Some(other) = other.filter(|name| !usual.contains(name)) {
                return Err(refusal(&format!(
                    "{path} has the snapshotter {other:?} for CRI: {advice}"
                )));
            }
        }
        Ok(())
    }

    /// Refuses an imported file that would replace what is set: it counts more than the main one.
    fn check_order(&self, sections: &[&[&str]], version: Version) -> Result<()> {
        let replaced = sections
            .iter()
            .map(|section| match version >= Version(2, 0) {
                // sections are merged
                true => [section, &["snapshotter"][..]].concat(),
                false => section[..2].to_vec(),
            });
        for section in replaced.chain([vec!["proxy_plugins", NAME]]) {
            if at(&self.document, &section).is_some() {
                return Err(refusal(&format!(
                    "{} is imported, and its {} replaces that of the main file: move it there first",
                    self.path.display(),
                    section.join(".")
                )));
            }
        }
        Ok(())
    }
}

fn refusal(what: &str) -> Error {
    Error::new(Kind::Unsupported, what)
}
