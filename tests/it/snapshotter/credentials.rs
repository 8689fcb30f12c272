//! Private registries: with the credentials that a pull by CRI has shown, layers are fetched later.

use std::{fs, io, path::PathBuf, process::Output};

use base64::Engine as _;
use tempfile::TempDir;

use super::{
    Snapshotter,
    containerd::Programs,
    image::{Container, Image},
    node::{Node, sandbox},
};
use crate::support::{
    noise,
    registry::{Auth, Registry},
    tars::Layer,
    wait,
};

const USER: &str = "AWS";

/// A node whose kubelet pulls through the image service of its snapshotter.
struct PrivateNode {
    folder: TempDir,
    registry: Registry,
    image: Image,
    snapshotter: Snapshotter,
    node: Node,
    programs: Programs,
}

impl PrivateNode {
    fn start() -> Self {
        let folder = TempDir::with_prefix("socinbd-credentials-").unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        // crictl takes no file of this machine then
        fs::write(at("crictl.yaml"), "").unwrap();
        let registry = Registry::start();
        // Files that are not read together, and so much more that two of them are no reason to fetch the rest.
        let layers = vec![
            Layer::new()
                .file("tag", b"lower")
                .file("first", &noise(1_000_000))
                .file("second", &noise(1_000_000))
                .file("rest", &noise(8_000_000))
                .file("third", &noise(1_000_000)),
            Layer::new().file("tag", b"upper"),
        ];
        let image = Image::push(&registry, "team/app", layers, true);
        let pause = sandbox(&registry);
        let snapshotter = Snapshotter::start(&[
            "--unproven",
            "lazy",
            "--image-service",
            &at("proxy.sock"),
            "--containerd",
            &at("containerd.sock"),
            "--auth-file",
            &at("auth.json"),
        ]);
        let programs = Programs::built();
        let node = Node::start(Some(&snapshotter), &programs, "", &pause);
        std::os::unix::fs::symlink(node.containerd.socket(), at("containerd.sock")).unwrap();
        Self {
            folder,
            registry,
            image,
            snapshotter,
            node,
            programs,
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("proxy.sock")
    }

    /// Pulls the image as the kubelet does it.
    fn pull(&self, options: &[&str]) -> Output {
        let of = |path: PathBuf| format!("unix://{}", path.display());
        let mut command = self.programs.crictl();
        command
            .arg("--config")
            .arg(self.folder.path().join("crictl.yaml"))
            .args(["--runtime-endpoint", &of(self.node.containerd.socket())])
            .args(["--image-endpoint", &of(self.socket())])
            .args(["--timeout", "60s", "pull"])
            .args(options)
            .arg(&self.image.reference);
        command.output().unwrap()
    }

    fn pull_with(&self, password: &str) {
        let output = self.pull(&["--creds", &format!("{USER}:{password}")]);
        assert!(
            output.status.success(),
            "{}\n{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.node.containerd.log(),
            self.snapshotter.host.log()
        );
    }

    fn fail_to_pull(&self, options: &[&str]) {
        let output = self.pull(options);
        assert!(!output.status.success(), "{options:?}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            error.contains("401") || error.contains("uthoriz"),
            "{error}"
        );
    }

    /// The topmost snapshot of the image.
    fn top(&self) -> String {
        let committed = self
            .snapshotter
            .client()
            .list(&["kind==committed"])
            .unwrap();
        assert_eq!(committed.len(), 2, "{committed:?}");
        let is_top = |name: &str| committed.iter().all(|other| other.parent != name);
        let top = committed.iter().find(|it| is_top(&it.name)).unwrap();
        top.name.clone()
    }

    /// A container of the image.
    fn container(&self, name: &str) -> Container {
        Container::start(&self.snapshotter, name, &self.top())
    }

    /// Nothing that was written has a secret.
    fn has_not_stored(&self, secrets: &[&str]) {
        let mut folders = vec![
            self.snapshotter.host.root(),
            self.snapshotter.host.run_dir(),
        ];
        let mut files = 0;
        // the daemon replaces its files meanwhile
        let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(folder) {
                Err(error) if is_gone(&error) => continue,
                entries => entries.unwrap(),
            };
            for entry in entries.map(Result::unwrap) {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() && entry.file_name() != "fs" {
                    folders.push(entry.path());
                }
                if !kind.is_file() || entry.file_name() == "disk.ext4" {
                    continue;
                }
                let bytes = match fs::read(entry.path()) {
                    Err(error) if is_gone(&error) => continue,
                    bytes => bytes.unwrap(),
                };
                files += 1;
                let text = String::from_utf8_lossy(&bytes);
                let found = secrets.iter().find(|secret| text.contains(**secret));
                assert!(found.is_none(), "{}", entry.path().display());
            }
        }
        assert!(files > 3, "{files}");
    }

    fn end(self) {
        self.node.remove_all();
        wait("garbage collection removes the snapshots", || {
            self.snapshotter.client().names(&[]).is_empty()
        });
        drop(self.node);
        self.snapshotter.end();
    }
}

fn basic(password: &str) -> Auth {
    Auth::Basic {
        user: USER.to_owned(),
        password: password.to_owned(),
    }
}

fn bearer(password: &str) -> Auth {
    Auth::Bearer {
        user: Some((USER.to_owned(), password.to_owned())),
        refresh_token: None,
        // containers read for longer
        lifetime: std::time::Duration::from_secs(1),
    }
}

#[test]
fn private_registry_by_cri() {
    let node = PrivateNode::start();
    for (round, auth) in [basic as fn(&str) -> Auth, bearer].into_iter().enumerate() {
        node.registry.set_auth(auth("pass-word-1"));
        node.fail_to_pull(&[]);
        node.fail_to_pull(&["--creds", "AWS:pass-word-0"]);
        assert_eq!(node.snapshotter.client().names(&[]).len(), 0);
        node.registry.reset_counters();
        node.pull_with("pass-word-1");
        let fetched = node.registry.counters().blob(&node.image.blobs[0]);
        assert!(fetched.bytes < 1_000_000, "it is lazy: {fetched:?}");
        let container = node.container(&format!("container-{round}"));
        assert_eq!(container.root.read("tag"), "upper");
        let read = |name: &str| fs::read(container.root.path().join(name)).unwrap();
        assert!(read("first") == noise(1_000_000));
        // a pull with wrong credentials does not disturb it
        node.fail_to_pull(&["--creds", "AWS:pass-word-0"]);
        assert!(read("second") == noise(1_000_000));
        // their tokens are gone, and the next pull shows others
        node.registry.set_auth(auth("pass-word-2"));
        node.registry.revoke_tokens();
        node.pull_with("pass-word-2");
        assert!(read("third") == noise(1_000_000));
        node.has_not_stored(&["pass-word", "cGFzcy13b3Jk"]);
        container.end();
        node.node.remove_all();
        wait("garbage collection removes the snapshots", || {
            node.snapshotter.client().names(&[]).is_empty()
        });
        node.snapshotter.host.run(&["prune", "--all"]);
    }
    node.end();
}

#[test]
fn expired_credentials() {
    let node = PrivateNode::start();
    let lasting = |milliseconds| Auth::Dated {
        lifetime: std::time::Duration::from_millis(milliseconds),
    };
    let now = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .unwrap()
        .as_millis();
    let hour = 3_600_000;
    node.registry.set_auth(lasting(hour));
    node.pull_with(&format!("made-at-{now}"));
    let container = node.container("container");
    let read = |name: &str| fs::read(container.root.path().join(name));
    assert!(read("first").unwrap() == noise(1_000_000));
    // the registry says that they have expired; the next pull brings others
    node.registry.set_auth(lasting(1));
    node.pull_with(&format!("made-at-{}", now + u128::from(hour)));
    assert!(read("second").unwrap() == noise(1_000_000));
    // those are refused too, and no other pull comes: the other places are asked
    node.registry.set_auth(basic("pass-word"));
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:pass-word"));
    let auths = serde_json::json!({"auths": {node.registry.host(): {"auth": auth}}});
    fs::write(node.folder.path().join("auth.json"), auths.to_string()).unwrap();
    assert!(read("third").unwrap() == noise(1_000_000));
    container.end();
    node.end();
}

#[test]
fn credentials_survive_the_daemon_and_come_back_with_a_pull_when_its_keeper_has_died_too() {
    let mut node = PrivateNode::start();
    node.registry.set_auth(basic("pass-word-1"));
    node.pull_with("pass-word-1");
    let running = node.container("running");
    let read = |container: &Container, name: &str| fs::read(container.root.path().join(name));
    // spans that were read in the last second before a kill are fetched again
    let tables = node.snapshotter.host.root().join("layers/sha256");
    let tables = fs::read_dir(tables.join(node.image.blobs[0].hex())).unwrap();
    let spans: Vec<_> = tables.map(|it| it.unwrap().path().join("spans")).collect();
    let recorded = |bytes: usize| {
        wait("the spans of what was read are recorded", || {
            let records = fs::read(&spans[0]).unwrap();
            let is_present = |record: &&[u8]| record.iter().any(|&byte| byte != 0);
            records.chunks(16).filter(is_present).count() >= bytes / 100_000
        });
    };
    assert!(read(&running, "first").unwrap() == noise(1_000_000));
    recorded(1_000_000);
    // the next daemon has them from the keeper, and nobody pulls
    node.snapshotter.host.kill_served_by_keeper();
    assert!(read(&running, "second").unwrap() == noise(1_000_000));
    node.has_not_stored(&["pass-word", "cGFzcy13b3Jk"]);
    recorded(2_000_000);
    // without a keeper the devices of containers that run end on FUSE, and the credentials are gone
    node.snapshotter.host.kill_daemon();
    drop(running.root);
    node.snapshotter.start_again();
    node.snapshotter
        .client()
        .remove("default/9/running")
        .unwrap();
    let container = node.container("after");
    for present in ["first", "second"] {
        assert!(read(&container, present).unwrap() == noise(1_000_000));
    }
    let read_now = read(&container, "third").map(|bytes| bytes.len());
    let error = read_now.map_err(|error| error.raw_os_error());
    assert_eq!(error, Err(Some(5)));
    let why = node.snapshotter.host.run(&["why", &node.top()]);
    assert!(why.contains("requires a user name and password"), "{why}");
    // the next pull of the image heals it under the container
    node.pull_with("pass-word-1");
    assert!(read(&container, "third").unwrap() == noise(1_000_000));
    node.has_not_stored(&["pass-word", "cGFzcy13b3Jk"]);
    container.end();
    node.end();
}
