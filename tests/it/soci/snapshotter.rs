//! Under AWS's snapshotter, where there is one: what it fetches of images whose index was made here, with a compact index beside it and
//! without.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use socinbd::oci::Digest;
use tempfile::TempDir;

use super::{
    interop::{Containerd, output},
    make::{GZIP_LAYER, MadeLayout, digest},
};
use crate::{
    engine::Host,
    support::{noise, registry::Registry, tars::Layer, wait},
};

/// The snapshotter's daemon that the environment variable `SOCI_SNAPSHOTTER` names, and the `soci` that `SOCI_RPULL` names: one that still
/// has `image rpull` (0.4.1), for containerd's own `ctr` passes no labels to a snapshotter.
fn programs() -> Option<[OsString; 2]> {
    let program = |name| std::env::var_os(name).filter(|program| !program.is_empty());
    let programs = program("SOCI_SNAPSHOTTER").zip(program("SOCI_RPULL"));
    if programs.is_none() {
        eprintln!(
            "not run: the environment variables SOCI_SNAPSHOTTER and SOCI_RPULL name no snapshotter"
        );
    }
    programs.map(|(daemon, client)| [daemon, client])
}

/// The daemon, with a folder of its own; its mounts go when it is dropped.
struct Snapshotter {
    folder: TempDir,
    daemon: Child,
}

impl Snapshotter {
    fn start(program: &OsString) -> Self {
        let folder = TempDir::new().unwrap();
        let config = folder.path().join("config.toml");
        let text = "[background_fetch]\ndisable = true\n[content_store]\ntype = \"soci\"\n\
                    [pull_modes.soci_v1]\nenable = true\n[pull_modes.soci_v2]\nenable = true\n";
        fs::write(&config, text).unwrap();
        let daemon = Command::new(program)
            .arg("--config")
            .arg(config)
            .arg("--address")
            .arg(folder.path().join("socket"))
            .arg("--root")
            .arg(folder.path().join("root"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("what SOCI_SNAPSHOTTER names runs");
        wait("the snapshotter listens", || {
            folder.path().join("socket").exists()
        });
        Self { folder, daemon }
    }

    /// The places of its FUSE mounts.
    fn mounts(&self) -> Vec<String> {
        let below = self.folder.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts
            .lines()
            .filter(|line| line.contains(" fuse"))
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|place| place.starts_with(below))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        for place in self.mounts() {
            // it may have gone by itself
            let _ = Command::new("umount").arg("-l").arg(place).status();
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// What a pull and a start by the snapshotter have cost a registry.
#[derive(Debug, PartialEq, Eq)]
struct Cost {
    requests: u64,
    /// Of all blobs.
    bytes: u64,
}

fn start(
    programs: &[OsString; 2],
    registry: &Registry,
    image: &str,
    layer: &Digest,
    size: u64,
) -> Cost {
    let [daemon, client] = programs;
    let snapshotter = Snapshotter::start(daemon);
    let address = snapshotter.folder.path().join("socket");
    let containerd = Containerd::start_with(&format!(
        "[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = \"{}\"\n",
        address.display()
    ));
    registry.reset_counters();
    let pull = ["image", "rpull", "--plain-http", "--snapshotter", "soci"];
    output(
        Command::new(client)
            .arg("--address")
            .arg(containerd.socket())
            .args(pull)
            .arg(image),
    );
    assert_eq!(snapshotter.mounts().len(), 2, "both layers are lazy");
    // it tries a range of a few bytes
    assert!(registry.counters().blob(layer).bytes < 100, "before a read");
    let run = ["run", "--rm", "--snapshotter", "soci", image, "once"];
    let program = ["/bin/busybox", "cat", "/etc/tag"];
    let printed = output(&mut containerd.ctr(&[&run[..], &program].concat()));
    assert_eq!(printed, b"lazy");
    let counters = registry.counters();
    let fetched = counters.blob(layer).bytes;
    assert!((1..size / 2).contains(&fetched), "{fetched} of {size}");
    let removed = containerd.ctr(&["images", "rm", "--sync", image]).output();
    assert!(removed.unwrap().status.success());
    Cost {
        requests: counters.total().requests,
        bytes: counters.blobs().bytes,
    }
}

/// Needs AWS's snapshotter and a containerd that goes with it (2.1 with 0.15), and is not one of the tests that may never be skipped:
/// without the first it says so and returns.
#[test]
fn images_are_lazy_and_a_compact_index_costs_it_nothing() {
    let Some(programs) = programs() else { return };
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    let files = [
        Layer::new().program("bin/busybox", &busybox).tar(),
        Layer::new()
            .file("etc/tag", b"lazy")
            .file("data/big", &noise(2_000_000))
            .tar(),
    ];
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &files.map(|tar| (GZIP_LAYER, tar)));
    made.tag(&image, "1");
    let manifest = fs::read(made.blob_path(&digest(&image))).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layer = digest(&manifest["layers"][1]);
    let size = fs::metadata(Path::new(&made.blob_path(&layer)))
        .unwrap()
        .len();

    let small = ["--min-layer-size", "0", "--span-size", "65536"];
    let registry = Registry::start();
    for version in [1, 2] {
        let costs = [&[][..], &["--compact"]].map(|compact: &[&str]| {
            let host = Host::new();
            let name = format!("v{version}{}:1", compact.len());
            let image = registry.reference(&name);
            let from = made.reference("1");
            let options = [&small[..], compact].concat();
            if version == 1 {
                host.run(&["copy", &from, &image]);
                host.run(&[&["index", "create", &image, "--push"][..], &options].concat());
            } else {
                host.run(&[&["convert", &from, &image][..], &options].concat());
            }
            start(&programs, &registry, &image, &layer, size)
        });
        assert_eq!(
            costs[0], costs[1],
            "with a compact index, version {version}"
        );
    }
}
