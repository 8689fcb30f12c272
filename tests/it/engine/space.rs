//! What images hold on the root: `df`, `prune`, `pin` and `unpin`, beside a daemon and without one.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::{Value, json};

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout, tar_of},
    support::{registry::Registry, seeded_noise as noise, wait},
};

fn layout(seeds: &[u64]) -> MadeLayout {
    let mut layout = MadeLayout::new();
    let layers: Vec<_> = seeds
        .iter()
        .map(|seed| (GZIP_LAYER, tar_of(&[("file", &noise(100_000, *seed))])))
        .collect();
    let image = layout.image("amd64", &layers);
    layout.tag(&image, "latest");
    layout
}

impl Host {
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.run(&[&["--json"], arguments].concat())).unwrap()
    }
}

/// The images of `df` as (name at the end of the reference, state).
fn images(df: &Value) -> Vec<(String, Vec<&'static str>)> {
    let images = df["images"].as_array().unwrap().iter();
    let mut images: Vec<_> = images
        .map(|image| {
            let name = image["reference"].as_str().unwrap().rsplit('/').next();
            let states = ["attached", "pinned", "replaced"];
            let states = states.into_iter().filter(|state| image[*state] == true);
            (name.unwrap().to_owned(), states.collect())
        })
        .collect();
    images.sort();
    images
}

fn removed(report: &Value) -> (usize, usize) {
    let count = |what: &str| report[what].as_array().unwrap().len();
    (count("images"), count("layers"))
}

#[test]
fn what_nobody_uses_is_removed_and_the_rest_is_told_apart() {
    let host = Host::new();
    host.fail(&["df"], 3);
    let registry = Registry::start();
    // both have the layer 2
    registry.add_layout("one", layout(&[1, 2]).path()).unwrap();
    registry.add_layout("two", layout(&[2, 3]).path()).unwrap();
    let [one, two] = ["one", "two"].map(|name| registry.reference(name));
    let mountpoints = ["first", "second"].map(|name| host.mountpoint(name));
    host.attach(&one, &mountpoints[0], &[]);
    host.attach(&two, &mountpoints[1], &[]);
    let df = host.json(&["df"]);
    let attached = vec!["attached"];
    let names = [
        ("one:latest".to_owned(), attached.clone()),
        ("two:latest".to_owned(), attached),
    ];
    assert_eq!(images(&df), names);
    let layers = df["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 3);
    let sizes: Vec<u64> = layers
        .iter()
        .map(|it| it["bytes"].as_u64().unwrap())
        .collect();
    assert!(sizes.iter().all(|bytes| *bytes > 100_000), "{sizes:?}");
    assert_eq!(df["bytes"].as_u64(), Some(sizes.iter().sum()));
    for image in df["images"].as_array().unwrap() {
        let bytes = |name: &str| image[name].as_u64().unwrap();
        assert!(
            bytes("own_bytes") > 100_000 && bytes("shared_bytes") > 100_000,
            "{image}"
        );
        assert_eq!(bytes("bytes"), bytes("own_bytes") + bytes("shared_bytes"));
    }
    assert!(host.run(&["df", "--layers"]).contains("sha256:"));
    assert_eq!(removed(&host.json(&["prune", "--all"])), (0, 0));

    host.detach(&mountpoints[0]);
    assert_eq!(
        removed(&host.json(&["prune", "--all", "--older-than", "1h"])),
        (0, 0)
    );
    assert_eq!(removed(&host.json(&["prune"])), (0, 0));
    host.run(&["pin", &one]);
    assert_eq!(removed(&host.json(&["prune", "--all"])), (0, 0));
    host.fail(&["pin", &registry.reference("unknown")], 3);
    host.run(&["unpin", &one]);
    let tried = host.json(&["prune", "--all", "--dry-run"]);
    assert_eq!((removed(&tried), &tried["dry_run"]), ((1, 1), &json!(true)));
    let pruned = host.json(&["prune", "--all"]);
    assert_eq!(
        (removed(&pruned), &pruned["bytes"]),
        ((1, 1), &tried["bytes"])
    );
    let df = host.json(&["df"]);
    assert_eq!(images(&df), [("two:latest".to_owned(), vec!["attached"])]);
    let second = std::fs::read(mountpoints[1].join("file")).unwrap();
    assert!(second == noise(100_000, 3));

    // without a daemon the same
    host.detach(&mountpoints[1]);
    host.attach(&one, &mountpoints[0], &[]);
    host.detach(&mountpoints[0]);
    host.end_daemon();
    host.run(&["pin", &two]);
    let pruned = host.json(&["prune", "--all"]);
    assert_eq!(removed(&pruned), (1, 1));
    let df = host.json(&["df"]);
    assert_eq!(images(&df), [("two:latest".to_owned(), vec!["pinned"])]);
    host.run(&["unpin", &two]);
    assert_eq!(removed(&host.json(&["prune", "--all"])), (1, 2));
    assert_eq!(host.json(&["df"])["bytes"], 0);
}

#[test]
fn an_image_whose_reference_leads_elsewhere_is_replaced() {
    let host = Host::new();
    let registry = Registry::start();
    registry.add_layout("app", layout(&[1, 2]).path()).unwrap();
    let app = registry.reference("app");
    let mountpoint = host.mountpoint("mnt");
    host.attach(&app, &mountpoint, &[]);
    host.detach(&mountpoint);
    registry.add_layout("app", layout(&[2, 3]).path()).unwrap();
    host.attach(&app, &mountpoint, &[]);
    let df = host.json(&["df"]);
    let name = || "app:latest".to_owned();
    assert_eq!(
        images(&df),
        [(name(), vec!["attached"]), (name(), vec!["replaced"])]
    );
    let pruned = host.json(&["prune"]);
    assert_eq!(removed(&pruned), (1, 1));
    assert_eq!(images(&host.json(&["df"])), [(name(), vec!["attached"])]);
    host.detach(&mountpoint);
    // a disk that no image has, as after a damaged record
    std::fs::remove_dir_all(host.root().join("images")).unwrap();
    assert_eq!(
        removed(&host.json(&["prune", "--older-than", "1h"])),
        (0, 0)
    );
    assert_eq!(removed(&host.json(&["prune"])), (0, 2));
}

#[test]
fn what_is_kept_for_after_a_reboot_stays() {
    let host = Host::new();
    let registry = Registry::start();
    registry.add_layout("app", layout(&[1]).path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &["--keep"]);
    host.end_daemon();
    assert_eq!(removed(&host.json(&["prune", "--all"])), (0, 0));
    assert_eq!(images(&host.json(&["df"]))[0].1, ["attached"]);
    host.detach(&mountpoint);
    assert_eq!(removed(&host.json(&["prune", "--all"])), (1, 1));
}

/// Bytes of the file of [`a_daemon_that_is_killed_while_it_evicts_serves_the_right_bytes`].
const BIG: usize = 6 << 20;

/// Reads parts of a file that the kernel has not cached, until it is stopped.
fn read_uncached(file: &Path, number: u64, content: &[u8], stop: &AtomicBool) -> u32 {
    let mut next = number;
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        next = next
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let start = (next >> 33) as usize % (BIG - 100_000);
        let file = fs::File::open(file).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut bytes = vec![0; 100_000];
        file.read_exact_at(&mut bytes, start as u64).unwrap();
        assert!(bytes == content[start..start + bytes.len()], "byte {start}");
        reads += 1;
    }
    reads
}

/// Stops the readers, also when the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_daemon_that_is_killed_while_it_evicts_serves_the_right_bytes() {
    let host = Host::new();
    let content = noise(BIG, 7);
    let mut layout = MadeLayout::new();
    let image = layout.image("amd64", &[(GZIP_LAYER, tar_of(&[("big", &content)]))]);
    layout.tag(&image, "latest");
    let size = ["--span-size", "65536", "--min-layer-size", "0"];
    host.run(&[&["index", "create", &layout.reference("")], &size[..]].concat());
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let limit = 4_u64 << 20;
    fs::create_dir_all(host.run_dir()).unwrap();
    let log = host.run_dir().join("daemon.log");
    let mut keeper = host
        .command(&[
            "daemon",
            "--disk-limit",
            "4MiB",
            "--log-file",
            log.to_str().unwrap(),
        ])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait("the daemon listens", || {
        host.output(&["list"]).status.success() && host.run_dir().join("mounts.sock").exists()
    });
    let mountpoint = host.mountpoint("mnt");
    host.attach(
        &registry.reference("app"),
        &mountpoint,
        &["--device", "fuse"],
    );
    let (stop, file) = (AtomicBool::new(false), mountpoint.join("big"));
    let reads: u32 = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|number| {
                let (file, content, stop) = (&file, &content, &stop);
                scope.spawn(move || read_uncached(file, number, content, stop))
            })
            .collect();
        let _stop = StopAtEnd(&stop);
        for _ in 0..6 {
            let before = host.daemon();
            let evicted = || {
                let status = host.output(&["--json", "df"]);
                let df: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
                let bytes = df["bytes"].as_u64().unwrap_or_default();
                assert!(bytes <= limit + (2 << 16), "{bytes}");
                df["space"]["evicted_spans"].as_u64().unwrap_or_default() > 20
            };
            wait("spans are evicted", evicted);
            host.kill_served_by_keeper();
            wait("the next daemon serves", || {
                host.daemon().is_some_and(|now| Some(now) != before)
            });
        }
        stop.store(true, Ordering::Relaxed);
        readers
            .into_iter()
            .map(|reader| reader.join().unwrap())
            .sum()
    });
    assert!(reads > 100, "{reads}");
    host.detach(&mountpoint);
    host.end_daemon();
    keeper.wait().unwrap();
}
