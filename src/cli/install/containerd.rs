//! The containerd of a node: its version, its configuration files, and the settings that make it use the snapshotter.

use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item};

use super::{
    root::Root,
    settings::{Setting, at},
};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// The name of the plugin: the one that nerdctl knows.
pub(super) const NAME: &str = "soci";
const CONFIG: &str = "/etc/containerd/config.toml";
/// The file in a directory of drop-ins.
const DROP_IN: &str = "socinbd.toml";
const TRANSFER: [&str; 3] = [
    "plugins",
    "io.containerd.transfer.v1.local",
    "unpack_config",
];
/// Where programs of containerd are.
pub(super) const PROGRAMS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/usr/local/sbin"];
/// Where units of systemd are, the first of a name counts.
pub(super) const UNITS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

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

/// The path of containerd's configuration file: as its unit says, or else the usual one.
pub(super) fn config_path(root: &Root) -> Result<PathBuf> {
    for folder in UNITS {
        let unit = Path::new(folder).join("containerd.service");
        let Ok(Some(text)) = root.read(&unit) else {
            continue;
        };
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
                return Ok(path.into());
            }
        }
        break;
    }
    Ok(CONFIG.into())
}

/// Plans the settings. `read` gives the content of a file as it is without an earlier installation.
pub(super) fn wanted(
    root: &Root,
    read: &dyn Fn(&Path) -> Result<Option<String>>,
    main: &Path,
    version: Version,
    snapshotter: &Snapshotter,
) -> Result<Wanted> {
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
    let cri: &[&str] = match format {
        1 => &["plugins", "cri", "containerd"],
        2 => &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
        _ => &["plugins", "io.containerd.cri.v1.images"],
    };
    for file in &all {
        file.check(cri, snapshotter)?;
    }
    for file in &imports {
        file.check_order(cri, version)?;
    }
    let has_transfer = all
        .iter()
        .any(|file| at(&file.document, &TRANSFER).is_some());
    // earlier versions replace whole sections of plugins by those of an imported file; all replace a list
    let drop_in = match &file {
        Some(file) if version >= Version(2, 0) && !has_transfer => file.drop_in_directory(),
        _ => None,
    };
    let path = drop_in.map_or(main.to_owned(), |folder| folder.join(DROP_IN));
    let plugin = |name: &'static str| ["proxy_plugins", NAME, name];
    let export = |name: &'static str| ["proxy_plugins", NAME, "exports", name];
    let mut settings = vec![
        Setting::new(&plugin("type"), "snapshot"),
        Setting::new(&plugin("address"), snapshotter.socket.as_str()),
    ];
    if version >= Version(2, 4) {
        let remap = snapshotter.maps_owners.then_some("remap-ids");
        let capabilities: toml_edit::Array = ["rebase"].into_iter().chain(remap).collect();
        settings.push(Setting::new(&plugin("capabilities"), capabilities));
    }
    settings.push(Setting::new(&export("root"), snapshotter.root.as_str()));
    let annotations = export("enable_remote_snapshot_annotations");
    settings.push(Setting::new(&annotations, "true"));
    let of_cri = |name: &'static str| [cri, &[name]].concat();
    settings.push(Setting::new(&of_cri("snapshotter"), NAME));
    settings.push(Setting::new(&of_cri("disable_snapshot_annotations"), false));
    if version >= Version(2, 0) {
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
    let address = file
        .as_ref()
        .and_then(|file| at(&file.document, &["grpc", "address"])?.as_str());
    Ok(Wanted {
        path,
        settings,
        start: format!("version = {format}\n"),
        warnings: all.iter().filter(disabled).map(warning).collect(),
        address: address
            .unwrap_or("/run/containerd/containerd.sock")
            .to_owned(),
    })
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
            Some(3) if version < Version(2, 0) => Err(refusal(&format!(
                "{path} has the format 3, which containerd {}.{} does not read",
                version.0, version.1
            ))),
            Some(format @ 1..=3) => Ok(format),
            _ => Err(refusal(&format!(
                "{path} has a format that is not 1, 2 or 3: configure it by hand (docs/containerd.md)"
            ))),
        }
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
    fn check(&self, cri: &[&str], snapshotter: &Snapshotter) -> Result<()> {
        let text = |path: &[&str]| at(&self.document, path).and_then(Item::as_str);
        let path = self.path.display();
        let advice = "remove it first, or give --replace";
        let address = text(&["proxy_plugins", NAME, "address"]);
        if let Some(address) = address.filter(|address| *address != snapshotter.socket)
            && !snapshotter.replaces
        {
            return Err(refusal(&format!(
                "{path} has a plugin {NAME} at {address} (soci-snapshotter?): {advice}"
            )));
        }
        let of_cri = [cri, &["snapshotter"]].concat();
        let other = text(&of_cri).filter(|name| !["", "overlayfs", "native", NAME].contains(name));
        match other {
            Some(other) if !snapshotter.replaces => Err(refusal(&format!(
                "{path} has the snapshotter {other:?} for CRI: {advice}"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses an imported file that would replace what is set: it counts more than the main one.
    fn check_order(&self, cri: &[&str], version: Version) -> Result<()> {
        let replaced: &[&str] = match version >= Version(2, 0) {
            // sections are merged
            true => &[cri, &["snapshotter"]].concat(),
            false => &cri[..2],
        };
        let plugin = ["proxy_plugins", NAME];
        for section in [replaced, &plugin] {
            if at(&self.document, section).is_some() {
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
