//! The configuration file of `soci-snapshotter-grpc` 0.16.1: each of its keys, and what it means here.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::keys::{Effect, KEYS};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    regular_file,
    source::socket_path,
};

/// The file where none is given; it need not exist.
pub(super) const DEFAULT: &str = "/etc/soci-snapshotter-grpc/config.toml";
/// Its size, at most.
const MAX_BYTES: u64 = 256 << 10;
/// The directory of the hosts of registries that containerd uses, which is used too.
const NODE_HOSTS_DIR: &str = "/etc/containerd/certs.d";

/// A configuration, as options of this program.
#[derive(Debug, Default)]
pub(super) struct Config {
    is_debug: bool,
    metrics: Option<String>,
    is_background_off: bool,
    containerd_address: Option<String>,
    index_policy: &'static str,
    label_headers: Vec<String>,
    mirrors: Vec<Mirrors>,
    /// The socket of containerd for the image service, if it is wanted; empty: the usual one.
    image_service: Option<String>,
    /// Layers of at least so many bytes are lazy.
    min_layer_size: u64,
    /// What is not done that the file asks for.
    pub(super) warnings: Vec<String>,
}

/// The mirrors of a registry.
#[derive(Debug)]
struct Mirrors {
    registry: String,
    /// URLs, in the order in which they are asked.
    hosts: Vec<String>,
}

impl Config {
    /// Reads a file; without one, the default file, if it exists.
    pub(super) fn read(path: Option<&Path>) -> Result<Self> {
        let file = path.unwrap_or(Path::new(DEFAULT));
        let context = || format!("the configuration {}", file.display());
        let read = file
            .canonicalize()
            .and_then(|file| regular_file::read(&file, MAX_BYTES));
        let bytes = match read {
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Self::parse("");
            }
            read => read.or_kind(Kind::InvalidArgument, context)?,
        };
        let text = String::from_utf8(bytes).or_kind(Kind::InvalidArgument, context)?;
        Self::parse(&text).map_err(|error| error.context(context()))
    }

    fn parse(text: &str) -> Result<Self> {
        let table: Table = toml::from_str(text).or_kind(Kind::InvalidArgument, || "TOML".into())?;
        let has_prometheus = !flag(&table, "no_prometheus")?.unwrap_or(false);
        let metrics = self::text(&table, "metrics_address")?.filter(|_| has_prometheus);
        let network = self::text(&table, "metrics_network")?;
        let v1 = flag(&table, "pull_modes.soci_v1.enable")?.unwrap_or(false);
        let v2 = flag(&table, "pull_modes.soci_v2.enable")?.unwrap_or(true);
        let mut warnings = Vec::new();
        warn(&table, &mut Vec::new(), &mut warnings);
        if v1 && !v2 {
            warnings.push(
                "pull_modes.soci_v2.enable = false has no effect while soci_v1 is enabled: an index that an image names is used too"
                    .to_owned(),
            );
        }
        Ok(Self {
            is_debug: flag(&table, "debug")?.unwrap_or(false),
            metrics: match metrics {
                Some(address) => Some(metrics_address(&address, network.as_deref())?),
                None => None,
            },
            is_background_off: flag(&table, "background_fetch.disable")?.unwrap_or(false),
            containerd_address: self::text(&table, "content_store.containerd_address")?,
            index_policy: match (v1, v2) {
                (true, _) => "any",
                (false, true) => "v2",
                (false, false) => "none",
            },
            label_headers: texts(&table, "resolver.custom_headers")?,
            mirrors: mirrors(&table)?,
            image_service: match flag(&table, "cri_keychain.enable_keychain")? {
                Some(true) => {
                    let path = self::text(&table, "cri_keychain.image_service_path")?;
                    Some(path.unwrap_or_default())
                }
                _ => None,
            },
            min_layer_size: number(&table, "snapshotter.min_layer_size")?,
            warnings,
        })
    }

    /// Whether it has mirrors of registries.
    pub(super) fn has_mirrors(&self) -> bool {
        !self.mirrors.is_empty()
    }

    /// Whether the log has debug messages.
    pub(super) fn is_debug(&self) -> bool {
        self.is_debug
    }

    /// Whether the CRI image service is at the socket of the snapshotter.
    pub(super) fn has_image_service(&self) -> bool {
        self.image_service.is_some()
    }

    /// The options of `socinbd snapshotter`. `hosts_dir` is the directory of [`Self::write_mirrors`], `socket` that of the snapshotter.
    pub(super) fn options(&self, hosts_dir: &Path, socket: &Path) -> Vec<OsString> {
        let mut options: Vec<OsString> = vec!["--index-policy".into(), self.index_policy.into()];
        if let Some(address) = &self.metrics {
            options.extend(["--metrics-address".into(), address.into()]);
        }
        if self.is_background_off {
            options.extend(["--unproven".into(), "lazy".into()]);
        }
        if let Some(address) = &self.containerd_address {
            options.extend(["--containerd-address".into(), address.into()]);
        }
        if let Some(containerd) = &self.image_service {
            options.extend(["--image-service".into(), socket.into()]);
            if !containerd.is_empty() {
                let path = socket_path(Path::new(containerd));
                options.extend(["--containerd".into(), path.into()]);
            }
        }
        // those below it are fetched whole by the snapshotter itself, as by soci
        if let Some(largest) = self.min_layer_size.checked_sub(1) {
            let rule = format!("disks,max-layer-size={largest}");
            options.extend(["--rule".into(), rule.into()]);
        }
        for name in &self.label_headers {
            options.extend(["--label-header".into(), name.into()]);
        }
        if !self.mirrors.is_empty() {
            options.extend(["--hosts-dir".into(), hosts_dir.into()]);
            if Path::new(NODE_HOSTS_DIR).is_dir() {
                options.extend(["--hosts-dir".into(), NODE_HOSTS_DIR.into()]);
            }
        }
        options
    }

    /// Writes the mirrors as a directory of `hosts.toml`, which replaces an earlier one.
    pub(super) fn write_mirrors(&self, hosts_dir: &Path) -> Result<()> {
        let context = || format!("writing the mirrors to {}", hosts_dir.display());
        match fs::remove_dir_all(hosts_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::with_source(Kind::Io, context(), error));
            }
            _ => {}
        }
        for mirrors in &self.mirrors {
            let name = match mirrors.registry.rsplit_once(':') {
                Some((host, port)) => format!("{host}_{port}_"),
                None => mirrors.registry.clone(),
            };
            let directory: PathBuf = hosts_dir.join(name);
            fs::create_dir_all(&directory).or_kind(Kind::Io, context)?;
            fs::write(directory.join("hosts.toml"), mirrors.file()).or_kind(Kind::Io, context)?;
        }
        Ok(())
    }
}

impl Mirrors {
    fn file(&self) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            let _ = writeln!(
                text,
                "[host.{}]\ncapabilities = [\"pull\", \"resolve\", \"referrers\"]\n",
                Value::from(host.as_str())
            );
        }
        text
    }
}

/// The value of a key, which may be written in any case.
fn get<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let (first, rest) = key.split_once('.').unwrap_or((key, ""));
    let value = table.get(first).or_else(|| {
        let mut entries = table.iter();
        entries
            .find(|(name, _)| name.eq_ignore_ascii_case(first))
            .map(|(_, value)| value)
    })?;
    match (rest, value) {
        ("", value) => Some(value),
        (rest, Value::Table(table)) => get(table, rest),
        _ => None,
    }
}

fn wrong(key: &str, wanted: &str, value: &Value) -> Error {
    let text = format!("{key}: expected {wanted}, not {}", value.type_str());
    Error::new(Kind::InvalidArgument, text)
}

fn flag(table: &Table, key: &str) -> Result<Option<bool>> {
    match get(table, key) {
        None => Ok(None),
        Some(Value::Boolean(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong(key, "true or false", other)),
    }
}

/// A string; none if it is empty.
fn text(table: &Table, key: &str) -> Result<Option<String>> {
    match get(table, key) {
        None => Ok(None),
        Some(Value::String(value)) => Ok(Some(value.clone()).filter(|value| !value.is_empty())),
        Some(other) => Err(wrong(key, "a string", other)),
    }
}

/// A size; 0 if it is negative.
fn number(table: &Table, key: &str) -> Result<u64> {
    match get(table, key) {
        None => Ok(0),
        Some(Value::Integer(value)) => Ok(u64::try_from(*value).unwrap_or(0)),
        Some(other) => Err(wrong(key, "a whole number", other)),
    }
}

/// A list of strings.
fn texts(table: &Table, key: &str) -> Result<Vec<String>> {
    let list = match get(table, key) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(key, "a list of strings", other)),
    };
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(wrong(key, "a list of strings", other)),
    };
    list.iter().map(text).collect()
}

/// The address of metrics, in the form of this program.
fn metrics_address(address: &str, network: Option<&str>) -> Result<String> {
    match network.unwrap_or("tcp") {
        "unix" => Ok(format!("unix:{address}")),
        "tcp" | "tcp4" | "tcp6" => Ok(match address.split_once(':') {
            Some(("", port)) => format!("[::]:{port}"),
            Some(("localhost", port)) => format!("127.0.0.1:{port}"),
            _ => address.to_owned(),
        }),
        other => Err(Error::new(
            Kind::InvalidArgument,
            format!("metrics_network: expected tcp or unix, not {other:?}"),
        )),
    }
}

fn mirrors(table: &Table) -> Result<Vec<Mirrors>> {
    let hosts = match get(table, "resolver.host") {
        None => return Ok(Vec::new()),
        Some(Value::Table(hosts)) => hosts,
        Some(other) => return Err(wrong("resolver.host", "a table", other)),
    };
    let mut all = Vec::new();
    for (registry, host) in hosts {
        // it becomes the name of a directory
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-:".contains(&byte);
        if registry.is_empty() || registry.starts_with('.') || !registry.bytes().all(is_host) {
            let text = format!("resolver.host: {registry:?} is not the host of a registry");
            return Err(Error::new(Kind::InvalidArgument, text));
        }
        let list = match host.as_table().and_then(|host| get(host, "mirrors")) {
            None => continue,
            Some(Value::Array(list)) => list,
            Some(other) => return Err(wrong("resolver.host.*.mirrors", "a list", other)),
        };
        let mut mirrors = Mirrors {
            registry: registry.clone(),
            hosts: Vec::new(),
        };
        for mirror in list.iter().filter_map(Value::as_table) {
            let host = text(mirror, "host")?.unwrap_or_default();
            let is_plain = flag(mirror, "insecure")?.unwrap_or(false);
            mirrors.hosts.push(match host.contains("://") {
                true => host,
                false if is_plain => format!("http://{host}"),
                false => format!("https://{host}"),
            });
        }
        all.push(mirrors);
    }
    Ok(all)
}

/// Warns of keys that are not known, and of values that ask for something that is not done.
fn warn(table: &Table, path: &mut Vec<String>, warnings: &mut Vec<String>) {
    for (name, value) in table {
        let above: Vec<&str> = path.iter().map(String::as_str).collect();
        // names that the file's author chooses
        let name = match above.as_slice() {
            ["resolver", "host"] | [.., "decompress_streams"] => "*".to_owned(),
            _ => name.to_ascii_lowercase(),
        };
        path.push(name);
        match value {
            Value::Table(inner) => warn(inner, path, warnings),
            Value::Array(list) if list.iter().all(Value::is_table) && !list.is_empty() => {
                for inner in list.iter().filter_map(Value::as_table) {
                    warn(inner, path, warnings);
                }
            }
            value => warnings.extend(warning(&path.join("."), value)),
        }
        path.pop();
    }
}

fn warning(key: &str, value: &Value) -> Option<String> {
    let Some((_, effect)) = KEYS.iter().find(|(known, _)| *known == key) else {
        return Some(format!("{key}: the key is not known"));
    };
    let is_none = match value {
        Value::Boolean(value) => !value,
        Value::Integer(value) => *value == 0,
        Value::String(value) => value.is_empty(),
        Value::Array(value) => value.is_empty(),
        _ => false,
    };
    match effect {
        Effect::Option(_) | Effect::None => None,
        Effect::Warning(_) | Effect::Limit(_) if is_none => None,
        Effect::Warning(advice) => Some(format!("{key} = {value} has no effect: {advice}")),
        Effect::Limit(default) if value.as_integer() == Some(*default) => None,
        Effect::Limit(_) => Some(format!(
            "{key} = {value} has no effect: the time limits and retries of requests are fixed"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> String {
        let options = Config::parse(text).unwrap();
        let options = options.options(Path::new("/hosts"), Path::new("/run/s.sock"));
        let options: Vec<_> = options.iter().map(|it| it.to_string_lossy()).collect();
        options.join(" ")
    }

    #[test]
    fn keys_become_options() {
        for (text, expected) in [
            ("", "--index-policy v2"),
            (
                "metrics_address = \":1338\"\n[pull_modes.soci_v1]\nenable = true",
                "--index-policy any --metrics-address [::]:1338",
            ),
            (
                "metrics_address = \"/run/m.sock\"\nmetrics_network = \"unix\"\n[pull_modes.soci_v2]\nenable = false",
                "--index-policy none --metrics-address unix:/run/m.sock",
            ),
            (
                "metrics_address = \"localhost:1\"\nno_prometheus = true",
                "--index-policy v2",
            ),
            (
                "[resolver]\ncustom_headers = [\"X-A\", \"x-b\"]",
                "--index-policy v2 --label-header X-A --label-header x-b",
            ),
            (
                "[background_fetch]\nDisable = true\n[content_store]\ntype = \"containerd\"\ncontainerd_address = \"/run/c.sock\"",
                "--index-policy v2 --unproven lazy --containerd-address /run/c.sock",
            ),
            (
                "[cri_keychain]\nenable_keychain = true\n[snapshotter]\nmin_layer_size = 1048576",
                "--index-policy v2 --image-service /run/s.sock --rule disks,max-layer-size=1048575",
            ),
            (
                "[cri_keychain]\nenable_keychain = true\nimage_service_path = \"unix:///run/c.sock\"",
                "--index-policy v2 --image-service /run/s.sock --containerd /run/c.sock",
            ),
            (
                "[cri_keychain]\nimage_service_path = \"/run/c.sock\"\n[snapshotter]\nmin_layer_size = -1",
                "--index-policy v2",
            ),
        ] {
            assert_eq!(options(text), expected, "{text}");
            let line = format!("socinbd snapshotter {expected}");
            let parsed = crate::cli::command().try_get_matches_from(line.split(' '));
            assert!(parsed.is_ok(), "{line}: {:?}", parsed.err());
        }
        assert!(Config::parse("debug = true").unwrap().is_debug());
    }

    #[test]
    fn mirrors_become_hosts_files() {
        let config = Config::parse(
            "[resolver.host.\"registry.example:5000\"]\nmirrors = [{host = \"a.example\", insecure = true}, {host = \"b.example/v2\"}]",
        )
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let hosts = folder.path().join("hosts");
        config.write_mirrors(&hosts).unwrap();
        config.write_mirrors(&hosts).unwrap();
        let access = crate::source::Access {
            hosts_dirs: vec![hosts],
            ..Default::default()
        };
        let found = crate::source::hosts::of_registry("registry.example:5000", &access).unwrap();
        let roots: Vec<&str> = found.iter().map(|host| host.root()).collect();
        let expected = [
            "http://a.example/v2/",
            "https://b.example/v2/",
            "https://registry.example:5000/v2/",
        ];
        assert_eq!(roots, expected);
        for name in ["../x", ".", "", "a/b"] {
            let text = format!("[resolver.host.\"{name}\"]\nmirrors = []");
            assert!(Config::parse(&text).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_not_done_is_a_warning() {
        let warnings = |text: &str| Config::parse(text).unwrap().warnings;
        let defaults = "max_concurrency = 100\ndisable_verification = false\n[http]\nMaxRetries = 8\n[snapshotter]\nmin_layer_size = 0";
        assert_eq!(warnings(defaults), [""; 0]);
        for (text, expected) in [
            ("disable_verification = true", "always verified"),
            ("[http]\nMaxRetries = 1", "limits and retries"),
            (
                "[pull_modes.parallel_pull_unpack]\nenable = true",
                "snapshotter.rule",
            ),
            (
                "[kubeconfig_keychain]\nenable_keychain = true",
                "image-credential-provider-config",
            ),
            ("new_key = 1", "new_key: the key is not known"),
            (
                "[pull_modes]\nsoci_v1 = {enable = true}\nsoci_v2 = {enable = false}",
                "is used too",
            ),
        ] {
            let warnings = warnings(text);
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert!(warnings[0].contains(expected), "{warnings:?}");
        }
    }

    #[test]
    fn wrong_values_are_errors_with_their_key() {
        for (text, key) in [
            ("debug = 1", "debug"),
            (
                "metrics_network = \"udp\"\nmetrics_address = \":1\"",
                "metrics_network",
            ),
            (
                "[pull_modes]\nsoci_v1 = {enable = \"yes\"}",
                "pull_modes.soci_v1.enable",
            ),
            ("[resolver]\nhost = 1", "resolver.host"),
            (
                "[snapshotter]\nmin_layer_size = \"1MB\"",
                "snapshotter.min_layer_size",
            ),
            (
                "[resolver]\ncustom_headers = [1]",
                "resolver.custom_headers",
            ),
            ("[resolver.host.a]\nmirrors = 1", "resolver.host.*.mirrors"),
            ("[[", "TOML"),
        ] {
            let error = Config::parse(text).unwrap_err().report();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn all_keys_of_soci_are_known() {
        let mut known: Vec<&str> = KEYS.iter().map(|(key, _)| *key).collect();
        known.sort_unstable();
        let all = include_str!("../../../tests/vectors/soci-config-keys.txt");
        assert_eq!(known, all.lines().collect::<Vec<_>>());
    }

    #[test]
    fn the_document_has_each_key() {
        let document = include_str!("../../../docs/soci-snapshotter.md");
        let rows: Vec<(String, String)> = document
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
            .map(|(key, meaning)| (key.to_ascii_lowercase(), meaning.to_owned()))
            .collect();
        for (key, effect) in KEYS {
            let row = rows.iter().find(|(known, _)| known == key);
            let meaning = row.map(|(_, meaning)| meaning.as_str());
            let begin = match effect {
                Effect::Option(option) => format!("mapped | `{option}`"),
                Effect::None => "not needed | ".to_owned(),
                Effect::Warning(_) | Effect::Limit(_) => "warning | ".to_owned(),
            };
            let is_told = meaning.is_some_and(|meaning| meaning.starts_with(&begin));
            assert!(
                is_told,
                "{key}: expected a row with {begin:?}, found {meaning:?}"
            );
        }
    }
}
