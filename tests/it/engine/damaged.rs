//! Damage of the files of a daemon, before it starts and while it runs: it starts, and what is attached beside the damaged layers goes on.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use serde_json::Value;

use super::Host;
use crate::{
    layer::damage_matrix::{Harm, harm},
    soci::make::{GZIP_LAYER, MadeLayout, tar_of},
    support::{registry::Registry, seeded_noise as noise, wait},
};

/// The files of a layer's directory; each is damaged in a layer of its own. Where the second value is true the daemon needs the file of a
/// lazy layer at its next start, and names it in its log.
const FILES: [(&str, bool); 10] = [
    ("ztoc", true),
    ("layout", true),
    ("spans.table", true),
    ("headers", true),
    ("spans", true),
    ("rest", false),
    ("sources.json", true),
    ("stacking.json", true),
    ("state.json", true),
    ("disk.ext4", true),
];

/// The files of the runtime directory, and of the root beside the layers.
const OF_DAEMON: [&str; 7] = [
    "run/lock",
    "run/starting",
    "run/socinbd.sock",
    "run/mounts.sock",
    "run/daemon.log",
    "root/layers/lock",
    "root/layers/new",
];

/// Resident memory that a daemon may have had.
const MAX_RSS_KB: u64 = 300_000;

/// An image with a layer for each file, and a small one.
struct Images {
    registry: Registry,
    _layouts: [MadeLayout; 2],
}

fn name(number: usize) -> String {
    format!("file-{number}")
}

fn content(number: usize) -> Vec<u8> {
    noise(1_500_000, number as u64)
}

impl Images {
    fn new(host: &Host) -> Self {
        let registry = Registry::start();
        let made = [("many", 0..FILES.len()), ("one", 100..101)].map(|(repository, numbers)| {
            let mut layout = MadeLayout::new();
            let layers =
                numbers.map(|number| (GZIP_LAYER, tar_of(&[(&name(number), &content(number))])));
            let image = layout.image("amd64", &layers.collect::<Vec<_>>());
            layout.tag(&image, "latest");
            let reference = layout.reference("");
            let sizes = ["--span-size", "65536", "--min-layer-size", "0"];
            host.run(&[&["index", "create", &reference][..], &sizes].concat());
            registry.add_layout(repository, layout.path()).unwrap();
            layout
        });
        Self {
            registry,
            _layouts: made,
        }
    }

    fn attach(&self, host: &Host, repository: &str) -> (PathBuf, Value) {
        let mountpoint = host.mountpoint(repository);
        let reference = self.registry.reference(repository);
        let attached = host.attach(&reference, &mountpoint, &["--device", "fuse"]);
        (mountpoint, attached)
    }
}

/// The directories of the disks of an attached image, lowest layer first.
fn directories(host: &Host, attached: &Value) -> Vec<PathBuf> {
    let layers = attached["layers"].as_array().unwrap();
    let hex = |layer: &Value, field: &str| {
        let digest = layer[field].as_str().unwrap();
        digest.strip_prefix("sha256:").unwrap().to_owned()
    };
    let root = host.root().join("layers/sha256");
    let found = layers
        .iter()
        .rev()
        .map(|layer| root.join(hex(layer, "digest")).join(hex(layer, "table")));
    found.collect()
}

fn first_bytes(path: &Path) -> Vec<u8> {
    let mut bytes = [0; 100];
    let file = fs::File::open(path).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    bytes.to_vec()
}

/// Reads all files of the image of many layers.
fn assert_right(mountpoint: &Path, what: &str) {
    for (number, (file, _)) in FILES.iter().enumerate() {
        let found = fs::read(mountpoint.join(name(number)));
        let found = found.unwrap_or_else(|error| panic!("{what}: {file}: {error}"));
        assert!(found == content(number), "{what}: {file}");
    }
}

fn assert_little_memory(host: &Host, what: &str) {
    let status = format!("/proc/{}/status", host.daemon().unwrap());
    let status = fs::read_to_string(status).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let most: u64 = most
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(most < MAX_RSS_KB, "{what}: {most} kB");
}

/// Ends the reader, also when an assertion fails.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const HARMS: [Harm; 8] = [
    Harm::Flipped(7),
    Harm::Half,
    Harm::Empty,
    Harm::Gone,
    Harm::Directory,
    Harm::Fifo,
    Harm::EndlessDevice,
    Harm::Huge,
];

#[test]
fn a_daemon_starts_beside_any_damage_and_names_it() {
    let host = Host::new();
    let images = Images::new(&host);
    for how in HARMS {
        let what = format!("{how:?}");
        let (mountpoint, attached) = images.attach(&host, "many");
        for (number, (file, _)) in FILES.iter().enumerate() {
            let start = first_bytes(&mountpoint.join(name(number)));
            assert!(start == content(number)[..100], "{what}: {file}");
        }
        host.detach(&mountpoint);
        host.end_daemon();
        let directories = directories(&host, &attached);
        let _ = fs::remove_file(host.run_dir().join("daemon.log"));
        let mut damaged = Vec::new();
        for (directory, (file, is_named)) in directories.iter().zip(FILES) {
            let path = directory.join(file);
            // these are read in parts, and what follows after the parts is not read
            let is_same = how == Harm::Huge && ["ztoc", "spans"].contains(&file);
            if harm(&path, how) && is_named && !is_same {
                damaged.push(path);
            }
        }
        for file in OF_DAEMON {
            let path = host.root().parent().unwrap().join(file);
            if path.exists() && !matches!(how, Harm::Flipped(_) | Harm::Half) {
                harm(&path, how);
            }
        }
        let (mountpoint, _) = images.attach(&host, "many");
        assert_right(&mountpoint, &what);
        assert_eq!(host.list().len(), 1, "{what}");
        host.wait_complete(&mountpoint);
        let log = host.log();
        for path in damaged {
            // a directory that is made again is named as a whole
            let directory = path.parent().unwrap().to_str().unwrap();
            assert!(log.contains(directory), "{what}: {}: {log}", path.display());
        }
        assert_little_memory(&host, &what);
        host.detach(&mountpoint);
        host.end_daemon();
        fs::remove_dir_all(host.root()).unwrap();
        fs::remove_dir_all(host.run_dir()).unwrap();
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn damage_beside_an_attached_image_does_not_affect_it() {
    let host = Host::new();
    let images = Images::new(&host);
    let (beside, _) = images.attach(&host, "one");
    let (file, expected) = (beside.join(name(100)), content(100));
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert!(fs::read(&file).unwrap() == expected);
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop = SetAtEnd(&stop);
        for how in HARMS {
            let what = format!("{how:?}");
            let (mountpoint, attached) = images.attach(&host, "many");
            for number in 0..FILES.len() {
                first_bytes(&mountpoint.join(name(number)));
            }
            for (directory, (file, _)) in directories(&host, &attached).iter().zip(FILES) {
                harm(&directory.join(file), how);
            }
            for (number, (file, _)) in FILES.iter().enumerate() {
                // right, or an error
                if let Ok(bytes) = fs::read(mountpoint.join(name(number))) {
                    assert!(bytes == content(number), "{what}: {file}");
                }
            }
            host.detach(&mountpoint);
            let (mountpoint, _) = images.attach(&host, "many");
            assert_right(&mountpoint, &what);
            host.detach(&mountpoint);
            let before = reads.load(Ordering::Relaxed);
            wait("the image beside it is read", || {
                reads.load(Ordering::Relaxed) > before + 1
            });
        }
    });
    assert_little_memory(&host, "at the end");
    host.detach(&beside);
    assert_eq!(host.left_over(), [""; 0]);
}
