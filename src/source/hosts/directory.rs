//! The directory of a registry in a directory of hosts (`certs.d`), and what it has: `hosts.toml`, or certificates as Docker keeps them.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::{
    file::{self, HostSection},
    host::{Capabilities, ClientCertificate, DatedFile, RegistryHost},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    regular_file,
    source::Access,
};

/// The file of a registry.
const FILE: &str = "hosts.toml";
/// Its size, at most.
const MAX_FILE: u64 = 64 << 10;
/// The directory for registries that have none.
const DEFAULT: &str = "_default";
/// Files of a directory of certificates that are looked at.
const MAX_CERTIFICATES: usize = 64;
/// Warnings that are given once.
const MAX_WARNINGS: usize = 256;

/// The hosts that serve a registry, in the order in which they are asked: as the first directory of `access.hosts_dirs` says that knows the
/// registry, else the registry alone. Reads small files.
pub(crate) fn of_registry(registry: &str, access: &Access) -> Result<Vec<RegistryHost>> {
    let hosts = configured_hosts(registry, access)?.into_iter();
    Ok(hosts.map(|host| host.with_headers(access)).collect())
}

fn configured_hosts(registry: &str, access: &Access) -> Result<Vec<RegistryHost>> {
    let found = access
        .hosts_dirs
        .iter()
        .find_map(|hosts_dir| find(hosts_dir, registry).transpose());
    let Some(directory) = found.transpose()? else {
        return Ok(vec![RegistryHost::registry(registry, access)?]);
    };
    match read(&directory.join(FILE))? {
        Some(text) => from_file(&text, &directory, registry, access),
        None => from_certificates(&directory, registry, access),
    }
}

/// The directory of a registry; `None` if there is none.
fn find(hosts_dir: &Path, registry: &str) -> Result<Option<PathBuf>> {
    for name in names(registry) {
        let directory = hosts_dir.join(name);
        match fs::metadata(&directory) {
            Ok(facts) if facts.is_dir() => return Ok(Some(directory)),
            Ok(_) => {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!("{} is not a directory", directory.display()),
                ));
            }
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(unreadable(&directory, error)),
        }
    }
    Ok(None)
}

/// The names that the directory of a registry may have, in containerd's order.
fn names(registry: &str) -> Vec<String> {
    let with_port = registry
        .rsplit_once(':')
        .map(|(host, port)| format!("{host}_{port}_"));
    with_port
        .into_iter()
        .chain([registry.to_owned(), DEFAULT.to_owned()])
        .collect()
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn unreadable(path: &Path, error: io::Error) -> Error {
    Error::with_source(
        Kind::InvalidArgument,
        format!("{}: cannot be read", path.display()),
        error,
    )
}

/// The text of a file; `None` if there is none, or an empty one. Links are followed: Kubernetes makes such files of links.
fn read(path: &Path) -> Result<Option<String>> {
    let bytes = fs::canonicalize(path).and_then(|path| regular_file::read(&path, MAX_FILE));
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(unreadable(path, error)),
    };
    if bytes.is_empty() {
        return Ok(None);
    }
    String::from_utf8(bytes)
        .map(Some)
        .or_kind(Kind::InvalidArgument, || {
            format!("{}: it is not UTF-8", path.display())
        })
}

fn from_file(
    text: &str,
    directory: &Path,
    registry: &str,
    access: &Access,
) -> Result<Vec<RegistryHost>> {
    let path = directory.join(FILE);
    let parsed = file::parse(text).map_err(|place| {
        Error::new(
            Kind::InvalidArgument,
            format!("{}: {place}", path.display()),
        )
    })?;
    for warning in &parsed.warnings {
        warn_once(&format!("{}: {warning}", path.display()));
    }
    let mut hosts = Vec::new();
    for (root, section) in &parsed.hosts {
        let host = RegistryHost::at(root.clone(), registry);
        hosts.push(configured(host, section, directory));
    }
    hosts.push(match &parsed.server {
        Some(root) => configured(
            RegistryHost::at(root.clone(), registry),
            &parsed.root,
            directory,
        ),
        // as containerd: the registry itself, which may be asked for all
        None => {
            let host = RegistryHost::registry(registry, access)?;
            let mut host = configured(host, &parsed.root, directory);
            host.capabilities = Capabilities::ALL;
            with_tls_where_configured(host, access)
        }
    });
    Ok(hosts)
}

/// A host with the settings of its section.
fn configured(mut host: RegistryHost, section: &HostSection, directory: &Path) -> RegistryHost {
    let file = |path: &String| super::host::absolute(path, directory);
    host.capabilities = section.capabilities.unwrap_or(Capabilities::ALL);
    host.tls.ca = section.ca.iter().map(file).collect();
    host.tls.client = section
        .client
        .iter()
        .map(|(certificate, key)| ClientCertificate {
            certificate: file(certificate),
            key: key.as_ref().map(file),
        })
        .collect();
    host.tls.skip_verify = section.skip_verify;
    host.headers = section.headers.clone();
    host.connect = section.dial_timeout;
    host
}

/// A registry at a loopback address is asked with TLS if there are certificates for it.
fn with_tls_where_configured(mut host: RegistryHost, access: &Access) -> RegistryHost {
    let tls = &host.tls;
    let is_configured = tls.skip_verify || !tls.ca.is_empty() || !tls.client.is_empty();
    if is_configured && !access.plain_http {
        // both schemes are of the kind that may be exchanged
        let _ = host.root.set_scheme("https");
    }
    host
}

/// Docker's way: `*.crt` are CA certificates, `*.cert` with `*.key` are those of the client.
fn from_certificates(
    directory: &Path,
    registry: &str,
    access: &Access,
) -> Result<Vec<RegistryHost>> {
    let entries = fs::read_dir(directory).map_err(|error| unreadable(directory, error))?;
    let mut files = Vec::new();
    for entry in entries.take(MAX_CERTIFICATES) {
        files.push(entry.map_err(|error| unreadable(directory, error))?.path());
    }
    files.sort();
    let mut host = RegistryHost::registry(registry, access)?;
    for path in files {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.tls.ca.push(DatedFile::new(path)),
            Some("cert") => {
                let key = path.with_extension("key");
                host.tls.client.push(ClientCertificate {
                    certificate: DatedFile::new(path),
                    key: key.exists().then(|| DatedFile::new(key)),
                });
            }
            _ => {}
        }
    }
    Ok(vec![with_tls_where_configured(host, access)])
}

/// Logs a warning that was not given yet: files are read again and again.
pub(crate) fn warn_once(warning: &str) {
    static GIVEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let given = given.get_or_insert_default();
    if given.len() < MAX_WARNINGS && given.insert(warning.to_owned()) {
        tracing::warn!("{warning}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Certs(tempfile::TempDir);

    impl Certs {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a directory"))
        }

        fn file(&self, below: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(below);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(&path, text).expect("a file");
            path
        }

        fn access(&self) -> Access {
            Access {
                hosts_dirs: vec![self.0.path().to_owned()],
                ..Access::default()
            }
        }

        fn hosts(&self, registry: &str) -> Vec<RegistryHost> {
            of_registry(registry, &self.access()).expect("hosts")
        }

        fn roots(&self, registry: &str) -> Vec<String> {
            let hosts = self.hosts(registry);
            hosts.iter().map(|host| host.root.to_string()).collect()
        }
    }

    #[test]
    fn the_directory_of_a_registry_is_found_in_containerds_order() {
        let certs = Certs::new();
        assert_eq!(certs.roots("r.example"), ["https://r.example/v2/"]);
        assert_eq!(
            certs.roots("docker.io"),
            ["https://registry-1.docker.io/v2/"]
        );
        assert_eq!(certs.roots("localhost:5000"), ["http://localhost:5000/v2/"]);
        certs.file("_default/hosts.toml", "server = \"https://default\"");
        assert_eq!(certs.roots("r.example"), ["https://default/v2/"]);
        certs.file("r.example/hosts.toml", "server = \"https://own\"");
        certs.file("r.example:5000/hosts.toml", "server = \"https://colon\"");
        assert_eq!(certs.roots("r.example"), ["https://own/v2/"]);
        assert_eq!(certs.roots("r.example:5000"), ["https://colon/v2/"]);
        certs.file("r.example_5000_/hosts.toml", "server = \"https://line\"");
        assert_eq!(certs.roots("r.example:5000"), ["https://line/v2/"]);
        assert_eq!(certs.roots("r.example:5001"), ["https://default/v2/"]);
        // the first of several directories that has one
        let second = Certs::new();
        second.file("r.example/hosts.toml", "server = \"https://second\"");
        let mut access = certs.access();
        access.hosts_dirs.insert(0, second.0.path().to_owned());
        let hosts = of_registry("r.example", &access).expect("hosts");
        assert_eq!(hosts[0].root.as_str(), "https://second/v2/");
    }

    #[test]
    fn mirrors_come_first_and_the_registry_last() {
        let certs = Certs::new();
        certs.file(
            "docker.io/hosts.toml",
            r#"
capabilities = ["pull"]
ca = "own.pem"
[host."https://z.example"]
  capabilities = ["pull"]
[host."http://a.example:5000/proxy"]
  skip_verify = true
"#,
        );
        let hosts = certs.hosts("docker.io");
        let seen: Vec<_> = hosts
            .iter()
            .map(|host| (host.root.as_str(), host.namespace.as_deref()))
            .collect();
        assert_eq!(
            seen,
            [
                ("https://z.example/v2/", Some("docker.io")),
                ("http://a.example:5000/proxy/v2/", Some("docker.io")),
                ("https://registry-1.docker.io/v2/", None),
            ]
        );
        assert!(hosts[0].capabilities.pull && !hosts[0].capabilities.push);
        assert!(hosts[1].tls.skip_verify && hosts[1].capabilities.push);
        // without `server` the registry may be asked for all, and has the certificates of the root
        assert_eq!(hosts[2].capabilities, Capabilities::ALL);
        let ca = certs.0.path().join("docker.io/own.pem");
        assert_eq!(hosts[2].tls.ca, [DatedFile::new(ca)]);
    }

    #[test]
    fn certificates_as_docker_keeps_them() {
        let certs = Certs::new();
        let ca = certs.file("localhost:5000/ca.crt", "");
        let cert = certs.file("localhost:5000/client.cert", "");
        let key = certs.file("localhost:5000/client.key", "");
        let both = certs.file("localhost:5000/both.cert", "");
        certs.file("localhost:5000/readme", "");
        // an empty file counts as missing
        certs.file("localhost:5000/hosts.toml", "");
        let hosts = certs.hosts("localhost:5000");
        assert_eq!(hosts.len(), 1);
        assert_eq!(hosts[0].root.as_str(), "https://localhost:5000/v2/");
        assert_eq!(hosts[0].tls.ca, [DatedFile::new(ca)]);
        assert_eq!(
            hosts[0].tls.client,
            [
                ClientCertificate {
                    certificate: DatedFile::new(both),
                    key: None
                },
                ClientCertificate {
                    certificate: DatedFile::new(cert),
                    key: Some(DatedFile::new(key))
                },
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_file_line_and_key() {
        let certs = Certs::new();
        let path = certs.file("r.example/hosts.toml", "\n\nskip_verify = \"yes\"\n");
        let error = of_registry("r.example", &certs.access()).expect_err("malformed");
        assert_eq!(error.kind(), Kind::InvalidArgument);
        let report = error.report();
        let place = format!("{}: line 3: skip_verify", path.display());
        assert!(report.starts_with(&place), "{report}");

        // in the place of a file: another kind of file, or one that is too long; in the place of a directory, a file
        fs::remove_file(&path).expect("removed");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).expect("a FIFO");
        let report = of_registry("r.example", &certs.access()).expect_err("a FIFO");
        assert!(report.report().contains("not a regular file"), "{report:?}");
        fs::remove_file(&path).expect("removed");
        certs.file("r.example/hosts.toml", &"#".repeat(65 << 10));
        let report = of_registry("r.example", &certs.access()).expect_err("long");
        assert!(report.report().contains("the limit is"), "{report:?}");
        certs.file("other.example", "");
        let report = of_registry("other.example", &certs.access()).expect_err("a file");
        assert!(report.report().contains("not a directory"), "{report:?}");
    }

    #[test]
    fn a_file_that_has_changed_makes_another_host() {
        let certs = Certs::new();
        let ca = certs.file("r.example/ca.crt", "");
        let before = certs.hosts("r.example");
        assert!(before == certs.hosts("r.example"));
        let time = std::time::SystemTime::UNIX_EPOCH;
        let file = fs::File::options().write(true).open(ca).expect("open");
        file.set_modified(time).expect("a time");
        assert!(before != certs.hosts("r.example"));
    }
}
