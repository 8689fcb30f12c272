//! What fails half way leaves nothing; what fails for a while goes on.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use socinbd::{
    api::client::{AttachAnswer, Client},
    oci::Digest,
};

use super::{Host, interrupted::request, lifecycle::indexed};
use crate::{
    soci::make::{MadeLayout, digest},
    support::{
        noise,
        registry::{Auth, Fault, On, Redirects, Registry, Times, base64},
        tars::Layer,
        wait,
    },
};

/// The digest of a layout's image's only layer.
fn layer_of(layout: &MadeLayout) -> Digest {
    let read =
        |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let index = read(layout.path().join("index.json"));
    let manifest = read(layout.blob_path(&digest(&index["manifests"][0])));
    digest(&manifest["layers"][0])
}

/// Puts these bytes in the place of the zTOC of a layout's SOCI index, honestly digested.
fn replace_ztoc(layout: &MadeLayout, ztoc: &[u8]) {
    let path = layout.path().join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let entry = index["manifests"]
        .as_array_mut()
        .unwrap()
        .last_mut()
        .unwrap();
    let mut soci: Value =
        serde_json::from_slice(&fs::read(layout.blob_path(&digest(entry))).unwrap()).unwrap();
    let ztoc = layout.blob("application/octet-stream", ztoc);
    soci["layers"][0]["digest"] = ztoc["digest"].clone();
    soci["layers"][0]["size"] = ztoc["size"].clone();
    let soci = layout.blob("", soci.to_string().as_bytes());
    entry["digest"] = soci["digest"].clone();
    entry["size"] = soci["size"].clone();
    fs::write(path, index.to_string()).unwrap();
}

fn ztoc_of(layout: &MadeLayout) -> Vec<u8> {
    let index: Value =
        serde_json::from_slice(&fs::read(layout.path().join("index.json")).unwrap()).unwrap();
    let entry = index["manifests"].as_array().unwrap().last().unwrap();
    let soci: Value =
        serde_json::from_slice(&fs::read(layout.blob_path(&digest(entry))).unwrap()).unwrap();
    fs::read(layout.blob_path(&digest(&soci["layers"][0]))).unwrap()
}

/// Attaches in vain, through a daemon and without one, and finds nothing afterwards. What it said.
fn in_vain(host: &Host, image: &str, mountpoint: &Path, options: &[&str], status: i32) -> String {
    let place = mountpoint.to_str().unwrap();
    let error = host.fail(&[&["attach"], options, &[image, place]].concat(), status);
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
    if host.daemon().is_some() {
        host.end_daemon();
    }
    let again = host.fail(
        &[&["attach", "--foreground"], options, &[image, place]].concat(),
        status,
    );
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
    assert_eq!(host.daemon(), None);
    assert_eq!(error, again);
    error
}

#[test]
fn a_bad_mount_point_leaves_nothing() {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("f", b"f")]);
    let folder = host.mountpoint("folder");
    let error = in_vain(
        &host,
        &layout.reference(""),
        &folder.join("missing"),
        &[],
        2,
    );
    assert!(error.contains("create the directory first"), "{error}");
    fs::write(folder.join("file"), b"").unwrap();
    let error = in_vain(&host, &layout.reference(""), &folder.join("file"), &[], 2);
    assert!(error.contains("is not a directory"), "{error}");
}

#[test]
fn what_is_no_image_leaves_nothing() {
    let host = Host::new();
    let mountpoint = host.mountpoint("mnt");
    in_vain(&host, "oci:/nonexistent", &mountpoint, &[], 3);
    let registry = Registry::start();
    let error = in_vain(
        &host,
        &registry.reference("no/such:tag"),
        &mountpoint,
        &[],
        3,
    );
    assert!(error.contains("no/such"), "{error}");
    let layout = MadeLayout::of(vec![Layer::new().file("f", b"f")]);
    let error = in_vain(
        &host,
        &layout.reference(""),
        &mountpoint,
        &["--platform", "linux/s390x"],
        3,
    );
    assert!(
        error.contains("s390x") && error.contains("amd64"),
        "{error}"
    );
    let none = format!("sha256:{}", "0".repeat(64));
    in_vain(
        &host,
        &layout.reference(""),
        &mountpoint,
        &["--index", &none],
        3,
    );
}

#[test]
fn a_layer_with_other_bytes_leaves_nothing() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![Layer::new().file("f", &noise(100_000))]);
    let layer = layer_of(&layout);
    let mut bytes = fs::read(layout.blob_path(&layer)).unwrap();
    bytes[50_000] ^= 1;
    fs::write(layout.blob_path(&layer), bytes).unwrap();
    let mountpoint = host.mountpoint("mnt");
    let error = in_vain(&host, &layout.reference(""), &mountpoint, &[], 7);
    assert!(error.contains(&layer.to_string()), "{error}");
}

#[test]
fn a_layer_that_ext4_cannot_hold_is_refused_by_path_and_limit() {
    let host = Host::new();
    let name = format!("d/{}", "n".repeat(256));
    let layout = MadeLayout::of(vec![Layer::new().file(&name, b"f")]);
    let error = in_vain(
        &host,
        &layout.reference(""),
        &host.mountpoint("mnt"),
        &[],
        8,
    );
    assert!(error.contains("255") && error.contains("d/nnn"), "{error}");
}

/// It fails when its devices and its record are made.
#[test]
fn an_image_that_cannot_be_stacked_leaves_nothing() {
    let host = Host::new();
    let mountpoint = host.mountpoint("mnt");
    let names = || (0..20).map(|number| format!("lock{number}"));
    let turns = "d/../".repeat(800);
    let links = names().fold(Layer::new().directory("d", 0o755), |layer, name| {
        layer.symlink(&name, &format!("/{turns}{name}"))
    });
    let implied = names().fold(Layer::new(), |layer, name| {
        layer.file(&format!("{name}/x"), b"x")
    });
    let layout = MadeLayout::of(vec![links, implied]);
    for options in [&[][..], &["--rw"]] {
        let error = in_vain(&host, &layout.reference(""), &mountpoint, options, 1);
        assert!(error.contains("symlinks"), "{error}");
    }
}

#[test]
fn a_loop_device_needs_a_complete_disk() {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("f", b"f")]);
    let mountpoint = host.mountpoint("mnt");
    let error = in_vain(
        &host,
        &layout.reference(""),
        &mountpoint,
        &["--device", "loop"],
        2,
    );
    assert!(error.contains("--device auto"), "{error}");
    // read once, it is complete
    host.attach(&layout.reference(""), &mountpoint, &[]);
    fs::read(mountpoint.join("f")).unwrap();
    host.wait_complete(&mountpoint);
    host.detach(&mountpoint);
    let attachment = host.attach(&layout.reference(""), &mountpoint, &["--device", "loop"]);
    assert_eq!(attachment["layers"][0]["device"], "loop");
    host.detach(&mountpoint);
    let nbd = host.output(&[
        "attach",
        "--device",
        "nbd",
        &layout.reference(""),
        mountpoint.to_str().unwrap(),
    ]);
    if !socinbd::kernel::nbd::is_available() {
        let error = String::from_utf8_lossy(&nbd.stderr);
        assert_eq!(nbd.status.code(), Some(8), "{error}");
        assert!(error.contains("nbd"), "{error}");
    }
}

#[test]
fn tables_that_are_none_or_of_another_layer_are_streamed_around() {
    let host = Host::new();
    let other = indexed(&host, vec![Layer::new().file("other", &noise(50_000))]);
    let mountpoint = host.mountpoint("mnt");
    for (name, bytes) in [("garbage", noise(3000)), ("other", ztoc_of(&other))] {
        let layout = indexed(&host, vec![Layer::new().file(name, b"right")]);
        replace_ztoc(&layout, &bytes);
        let attachment = host.attach(&layout.reference(""), &mountpoint, &[]);
        let warnings = attachment["warnings"].to_string();
        assert!(
            warnings.contains("is not lazy") && warnings.contains(&layer_of(&layout).to_string()),
            "{name}: {warnings}"
        );
        assert_eq!(fs::read(mountpoint.join(name)).unwrap(), b"right");
        assert_eq!(host.list()[0]["state"], "complete");
        host.detach(&mountpoint);
    }
}

#[test]
fn a_registry_that_is_away_leaves_nothing() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![Layer::new().file("f", b"f")]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    let layer = layer_of(&layout);
    registry.remove("app", &layer);
    let error = in_vain(&host, &registry.reference("app"), &mountpoint, &[], 3);
    assert!(error.contains(&layer.to_string()), "{error}");
    let gone = registry.reference("app");
    drop(registry);
    let place = mountpoint.to_str().unwrap();
    let error = host.fail(&["attach", &gone, place], 5);
    assert!(
        error.contains(gone.strip_suffix("/app").unwrap()),
        "{error}"
    );
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn an_offer_that_nobody_takes_is_taken_back() {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("f", b"f")]);
    let mountpoint = host.mountpoint("mnt");
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let request = request(&layout.reference(""), None);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Client::new(&host.run_dir());
    let offer = runtime.block_on(client.attach(&request, &|_| {})).unwrap();
    assert!(matches!(offer, AttachAnswer::Offer(_)));
    assert_eq!(host.list().len(), 2);
    drop(offer);
    wait("the daemon takes it back", || host.list().len() == 1);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

/// A registry with an image of one layer with this file `f`, indexed with spans of 64 KiB.
fn served(host: &Host, content: &[u8]) -> (Registry, Digest) {
    let layout = indexed(host, vec![Layer::new().file("f", content)]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    (registry, layer_of(&layout))
}

#[test]
fn a_read_outlasts_a_registry_that_fails_for_a_while() {
    let host = Host::new();
    let content = noise(300_000);
    let (registry, _) = served(&host, &content);
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    registry.fail(On::Data, Fault::status(503), Times::UntilHealed);
    let file = mountpoint.join("f");
    let reading = std::thread::spawn(move || fs::read(file));
    let state = || host.list()[0].clone();
    wait("it is degraded", || state()["state"] == "degraded");
    let why = state()["why"].to_string();
    assert!(
        why.contains(&registry.host()) && why.contains("503"),
        "{why}"
    );
    assert!(host.run(&["list"]).contains("503"));
    assert!(!reading.is_finished());
    registry.heal();
    assert_eq!(reading.join().unwrap().unwrap(), content);
    host.wait_complete(&mountpoint);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn eight_readers_get_right_bytes_and_each_span_is_fetched_once() {
    let host = Host::new();
    let content = noise(2_000_000);
    let (registry, layer) = served(&host, &content);
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (content, file) = (&content, mountpoint.join("f"));
            scope.spawn(move || {
                let file = fs::File::open(file).unwrap();
                let mut part = vec![0; 40_000];
                let parts = content.len() / part.len();
                for number in 0..parts {
                    let at = (number * 7 + reader * 5) % parts * part.len();
                    file.read_exact_at(&mut part, at as u64).unwrap();
                    assert!(
                        part == content[at..at + part.len()],
                        "reader {reader}, {at}"
                    );
                }
            });
        }
    });
    let mut ranges = registry.counters().ranges(&layer);
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        // two spans of deflated data may have one byte in common
        assert!(pair[1].start + 1 >= pair[0].end, "fetched twice: {pair:?}");
    }
    host.detach(&mountpoint);
}

#[test]
fn registries_that_ignore_ranges_or_redirect_give_right_bytes() {
    let content = noise(400_000);
    for how in ["ignores", "redirects"] {
        let host = Host::new();
        let (registry, layer) = served(&host, &content);
        let mountpoint = host.mountpoint("mnt");
        if how == "ignores" {
            registry.fail(On::Data, Fault::IgnoreRange, Times::UntilHealed);
        } else {
            let lifetime = Duration::from_secs(600);
            registry.set_redirects(Some(Redirects {
                lifetime,
                expired_status: 403,
            }));
        }
        host.attach(&registry.reference("app"), &mountpoint, &[]);
        assert_eq!(registry.counters().blob(&layer).requests, 0, "{how}");
        let file = fs::File::open(mountpoint.join("f")).unwrap();
        let mut block = [0; 4096];
        file.read_exact_at(&mut block, 200_704).unwrap();
        assert!(block == content[200_704..204_800], "{how}");
        registry.expire_signatures();
        drop(file);
        assert!(fs::read(mountpoint.join("f")).unwrap() == content, "{how}");
        host.detach(&mountpoint);
    }
}

#[test]
fn a_disk_remembers_its_sources_with_their_credentials() {
    let host = Host::new();
    let content = noise(300_000);
    let layout = indexed(&host, vec![Layer::new().file("f", &content)]);
    let attach = |registry: &Registry, name: &str| {
        registry.add_layout("app", layout.path()).unwrap();
        registry.set_auth(Auth::Basic {
            user: name.into(),
            password: "secret".into(),
        });
        let folder = host.mountpoint(&format!("config-{name}"));
        let auth = base64(format!("{name}:secret").as_bytes());
        let config = json!({"auths": {registry.host(): {"auth": auth}}});
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let mountpoint = host.mountpoint(name);
        let attached = host
            .command(&[
                "attach",
                &registry.reference("app"),
                mountpoint.to_str().unwrap(),
            ])
            .env("DOCKER_CONFIG", folder)
            .output()
            .unwrap();
        assert!(
            attached.status.success(),
            "{}",
            String::from_utf8_lossy(&attached.stderr)
        );
        mountpoint
    };
    let (first, second) = (Registry::start(), Registry::start());
    let (one, two) = (attach(&first, "first"), attach(&second, "second"));
    drop(second);
    assert!(fs::read(two.join("f")).unwrap() == content);
    assert!(first.counters().blob(&layer_of(&layout)).bytes > 0);
    host.detach(&one);
    host.detach(&two);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn list_says_which_source_is_down() {
    let host = Host::new();
    let content = noise(300_000);
    let layers = ["a", "b", "c"].map(|name| Layer::new().file(name, &content));
    let layout = indexed(&host, layers.into());
    let (first, second) = (Registry::start(), Registry::start());
    let mut mountpoint = host.mountpoint("none");
    for registry in [&first, &second] {
        registry.add_layout("app", layout.path()).unwrap();
        mountpoint = host.mountpoint(&registry.host());
        host.attach(&registry.reference("app"), &mountpoint, &[]);
    }
    second.fail(On::Data, Fault::Hang, Times::UntilHealed);
    for name in ["a", "b"] {
        assert!(fs::read(mountpoint.join(name)).unwrap() == content);
    }
    let down = format!("the source {} is down", second.reference("app:latest"));
    for attachment in host.list() {
        assert_eq!(attachment["state"], "degraded");
        let why = attachment["why"].as_str().unwrap();
        assert!(why.contains(&down), "{why}");
        let sources = attachment["sources_down"].as_array().unwrap();
        assert_eq!(sources.len(), 1);
        let source = sources[0]["source"].as_str().unwrap();
        assert!(source.contains(&second.host()), "{source}");
    }
    let why = host.run(&["why", mountpoint.to_str().unwrap()]);
    assert!(why.contains(&down), "{why}");
    let log = fs::read_to_string(host.run_dir().join("daemon.log")).unwrap();
    assert_eq!(log.matches(&down).count(), 1, "{log}");
    for registry in [&first, &second] {
        host.detach(&host.mountpoint(&registry.host()));
    }
    assert_eq!(host.left_over(), [""; 0]);
}
