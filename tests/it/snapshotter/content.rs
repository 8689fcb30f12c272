//! Images and indexes in the content store of real containerds: that of the system, and 2.4.2.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{fs::symlink, net::UnixDatagram},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use socinbd::oci::Digest;

use super::{
    client::Client,
    containerd::{Containerd, Programs, Setup},
    image::Image,
};
use crate::{
    engine::Host,
    support::{
        noise,
        registry::{Auth, Link, Registry, base64},
        tars::Layer,
        wait,
    },
};

/// The SOCI index label of AWS's tool.
const LABEL: &str = "containerd.io/gc.ref.content.soci-index";
/// Indexes are made of layers of any size.
const SIZES: [&str; 4] = ["--min-layer-size", "0", "--span-size", "65536"];

/// The containerds to try.
fn containerds() -> [Programs; 2] {
    [Programs::of_the_system(), Programs::built()]
}

fn start(programs: &Programs) -> Containerd {
    Containerd::start(None, programs, &Setup::default())
}

fn socket_of(containerd: &Containerd) -> String {
    containerd.socket().display().to_string()
}

fn layers(seed: &str) -> Vec<Layer> {
    vec![
        Layer::new()
            .file("data/big", &noise(1_000_000))
            .file("etc/tag", b"lower"),
        Layer::new().file("etc/tag", seed.as_bytes()),
    ]
}

/// The content of a containerd that has nothing else.
fn content(containerd: &Containerd) -> BTreeSet<String> {
    let listed = containerd.run(&["content", "ls", "--quiet"]);
    listed.lines().map(str::to_owned).collect()
}

/// The index that `index create` reports.
fn index_of(report: &str) -> String {
    let report: Value = serde_json::from_str(report).unwrap();
    report["index"].as_str().unwrap().to_owned()
}

/// The digests of an index manifest, its configuration and its blobs.
fn parts(host: &Host, containerd: &Containerd, index: &str) -> BTreeSet<String> {
    let info = [
        "index",
        "info",
        index,
        "--at",
        "containerd://test",
        "--containerd-address",
        &socket_of(containerd),
    ];
    let document: Value = serde_json::from_str(&host.run(&info)).unwrap();
    let digest = |entry: &Value| entry["digest"].as_str().unwrap().to_owned();
    let layers = document["layers"].as_array().unwrap().iter().map(digest);
    layers
        .chain([digest(&document["config"]), index.to_owned()])
        .collect()
}

#[test]
fn an_index_in_containerd_survives_garbage_collection_and_is_pushed() {
    for programs in containerds() {
        let registry = Registry::start();
        let image = Image::push(&registry, "app", layers("index"), false);
        let containerd = start(&programs);
        let (host, socket) = (Host::new(), socket_of(&containerd));
        let access = ["--containerd-address", &socket];
        containerd.run(&["content", "fetch", "--plain-http", &image.reference]);
        let before = content(&containerd);
        let name = format!("containerd://test/{}", image.reference);
        let create = ["--json", "index", "create", &name];
        let report = host.run(&[&create[..], &access, &SIZES].concat());
        let index = index_of(&report);
        assert!(
            report.contains(&name),
            "it is stored with the image: {report}"
        );
        // a second one finds the tables of the first, and is the same
        let again = host.run(&[&create[..], &access, &SIZES].concat());
        assert_eq!(index_of(&again), index);
        assert!(again.contains("reused"), "{again}");
        let parts = parts(&host, &containerd, &index);
        let all: BTreeSet<String> = before.union(&parts).cloned().collect();
        assert_eq!(content(&containerd), all);
        let images = containerd.run(&["image", "ls"]);
        assert!(images.contains(&format!("{LABEL}={index}")), "{images}");
        assert_eq!(containerd.run(&["leases", "ls", "--quiet"]), "");
        // listed for the image, and for the namespace
        for place in [&name[..], "containerd://test"] {
            let list = host.run(&[&["index", "list", "--quiet", place], &access[..]].concat());
            assert_eq!(list.trim(), index);
            let tables = ["ztoc", "list", "--quiet", "--at", place];
            let tables = host.run(&[&tables[..], &access].concat());
            assert_eq!(tables.lines().count(), 2);
        }
        let cat = host.run(&[&["cat", &name, "etc/tag"], &access[..]].concat());
        assert_eq!(cat, "index");

        // what `ctr` removes: layers, whose labels it removes; and with a collection all that nothing names
        containerd.run(&["content", "prune", "references"]);
        let blobs: BTreeSet<String> = image.blobs.iter().map(Digest::to_string).collect();
        let rest: BTreeSet<String> = all.difference(&blobs).cloned().collect();
        assert_eq!(content(&containerd), rest);

        let push = ["index", "push", "--keep-tag", &name, &image.reference];
        let pushed = host.run(&[&push[..], &access].concat());
        assert!(pushed.contains(&format!("{index} pushed")), "{pushed}");
        let list = host.run(&["index", "list", "--quiet", &image.reference]);
        assert_eq!(list.trim(), index);

        containerd.run(&["image", "rm", "--sync", &image.reference]);
        assert_eq!(content(&containerd), BTreeSet::new());
    }
}

#[test]
fn an_index_is_removed_from_containerd() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers("removed"), false);
    let containerd = start(&Programs::of_the_system());
    let (host, socket) = (Host::new(), socket_of(&containerd));
    let access = ["--containerd-address", &socket];
    containerd.run(&["content", "fetch", "--plain-http", &image.reference]);
    let before = content(&containerd);
    let name = format!("containerd://test/{}", image.reference);
    let create = ["--json", "index", "create", &name];
    for by_digest in [true, false] {
        let index = index_of(&host.run(&[&create[..], &access, &SIZES].concat()));
        assert_ne!(content(&containerd), before);
        let remove: &[&str] = match by_digest {
            true => &["index", "rm", &index, "--at", "containerd://test"],
            false => &["index", "rm", "--ref", &name],
        };
        host.run(&[remove, &access[..]].concat());
        // removes nothing but content without a name
        containerd.run(&["content", "prune", "references", "--dry"]);
        wait("the collection of containerd", || {
            content(&containerd) == before
        });
        let list = host.run(&[&["index", "list", &name], &access[..]].concat());
        assert!(!list.contains(&index), "{list}");
    }
    host.fail(&[&["index", "rm", "--ref", &name], &access[..]].concat(), 3);
}

#[test]
fn an_image_is_converted_in_containerd_and_copied_from_and_to_it() {
    for programs in containerds() {
        let registry = Registry::start();
        let image = Image::push(&registry, "app", layers("converted"), false);
        let containerd = start(&programs);
        let (host, socket) = (Host::new(), socket_of(&containerd));
        let access = ["--containerd-address", &socket];
        containerd.run(&["content", "fetch", "--plain-http", &image.reference]);
        let new = format!("{}-soci", image.reference);
        let (from, to) = (
            format!("containerd://test/{}", image.reference),
            format!("containerd://test/{new}"),
        );
        let convert = ["--json", "convert", &from, &to];
        let report: Value =
            serde_json::from_str(&host.run(&[&convert[..], &access, &SIZES].concat())).unwrap();
        assert_eq!(containerd.run(&["leases", "ls", "--quiet"]), "");
        containerd.run(&["image", "rm", "--sync", &image.reference]);
        // all that the new image needs is there: containerd pushes it, and it starts with its index
        containerd.run(&["image", "push", "--plain-http", &new]);
        let pushed = host.run(&["--json", "inspect", "--require-index", &new]);
        assert!(
            pushed.contains("\"v2\"") || pushed.contains("2"),
            "{pushed}"
        );
        // out of it, into another namespace, and the same digest everywhere
        let layout = format!("oci:{}:x", host.mountpoint("layout").display());
        let other = format!("containerd://other/{new}");
        for (from, to) in [(&to, &layout), (&layout, &other), (&other, &layout)] {
            let copy = ["--json", "copy", from, to];
            let copied: Value =
                serde_json::from_str(&host.run(&[&copy[..], &access].concat())).unwrap();
            assert_eq!(copied["digest"], report["digest"], "{copied}");
        }
        let cat = host.run(&[&["cat", &other, "etc/tag"], &access[..]].concat());
        assert_eq!(cat, "converted");
        containerd.run(&["image", "rm", "--sync", &new]);
        assert_eq!(content(&containerd), BTreeSet::new());
    }
}

#[test]
fn an_image_of_containerd_is_attached() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers("attached"), false);
    let containerd = start(&Programs::of_the_system());
    let (host, socket) = (Host::new(), socket_of(&containerd));
    let access = ["--containerd-address", &socket];
    containerd.run(&["content", "fetch", "--plain-http", &image.reference]);
    let name = format!("containerd://test/{}", image.reference);
    host.run(&[&["index", "create", &name], &access[..], &SIZES].concat());
    drop(registry);
    let mountpoint = host.mountpoint("mnt");
    host.attach(&name, &mountpoint, &access);
    assert_eq!(
        fs::read_to_string(mountpoint.join("etc/tag")).unwrap(),
        "attached"
    );
    assert_eq!(
        fs::read(mountpoint.join("data/big")).unwrap(),
        noise(1_000_000)
    );
    host.detach(&mountpoint);
}

#[test]
fn a_write_to_containerd_that_was_killed_is_resumed() {
    let registry = Registry::start();
    let size = 8_000_000;
    let layers = vec![Layer::new().file("big", &noise(size))];
    let image = Image::push(&registry, "app", layers, false);
    let containerd = start(&Programs::of_the_system());
    let (host, socket) = (Host::new(), socket_of(&containerd));
    let to = format!("containerd://test/{}", image.reference);
    let copy = [
        "copy",
        &image.reference,
        &to,
        "--containerd-address",
        &socket,
    ];
    registry.set_link(Link {
        round_trip: Duration::ZERO,
        bytes_per_second: 1_000_000,
    });
    let mut killed = host.command(&copy).spawn().unwrap();
    wait("a part of the layer is written", || {
        let active = containerd.run(&["content", "active"]);
        active.contains("MB") || active.contains("MiB")
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    registry.set_link(Link {
        round_trip: Duration::ZERO,
        bytes_per_second: 0,
    });
    registry.reset_counters();
    host.run(&copy);
    let sent = registry.counters().blob(&image.blobs[0]);
    assert!(sent.bytes < size as u64, "only the rest was sent: {sent:?}");
    let cat = ["cat", &to, "big", "--containerd-address", &socket];
    let bytes = host.output(&cat).stdout;
    assert_eq!(bytes, noise(size));
}

#[test]
fn the_command_lines_of_soci_work_with_containerd() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers("soci"), false);
    let containerd = start(&Programs::of_the_system());
    let host = Host::new();
    let soci = host.mountpoint("bin").join("soci");
    symlink(env!("CARGO_BIN_EXE_socinbd"), &soci).unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(&soci)
            .args(["--address", &socket_of(&containerd), "--namespace", "test"])
            .args(arguments)
            .env("SOCINBD_ROOT", host.root())
            .env("SOCINBD_RUN_DIR", host.run_dir())
            .env("DOCKER_CONFIG", host.root())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "soci {arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    containerd.run(&["content", "fetch", "--plain-http", &image.reference]);
    run(&["create", "--min-layer-size", "0", &image.reference]);
    let index = run(&["index", "list", "--quiet"]);
    run(&[
        "push",
        "--plain-http",
        "--snapshotter",
        "soci",
        &image.reference,
    ]);
    let pushed = host.run(&["index", "list", "--quiet", &image.reference]);
    assert_eq!(pushed, index);
    let new = format!("{}-soci", image.reference);
    run(&["convert", "--min-layer-size", "0", &image.reference, &new]);
    containerd.run(&["image", "push", "--plain-http", &new]);
    host.run(&["inspect", "--require-index", &new]);
    // in the state directory
    assert_eq!(
        run(&["--content-store", "soci", "index", "list", "--quiet"]),
        ""
    );
    run(&[
        "--content-store",
        "soci",
        "create",
        "--min-layer-size",
        "0",
        &image.reference,
    ]);
    assert_eq!(
        run(&["--content-store", "soci", "index", "list", "--quiet"]),
        index
    );
}

#[test]
fn soci_push_takes_credentials_and_shows_them_to_nobody() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers("soci"), false);
    let containerd = start(&Programs::of_the_system());
    let host = Host::new();
    let soci = host.mountpoint("bin").join("soci");
    symlink(env!("CARGO_BIN_EXE_socinbd"), &soci).unwrap();
    let docker = host.mountpoint("docker");
    let run = |arguments: &[&str]| {
        let output = Command::new(&soci)
            .args(["--address", &socket_of(&containerd), "--namespace", "test"])
            .args(arguments)
            .env("SOCINBD_ROOT", host.root())
            .env("SOCINBD_RUN_DIR", host.run_dir())
            .env("DOCKER_CONFIG", &docker)
            .env("SOCINBD_LOG", "trace")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(
            !said.contains("s3cret") && !said.contains(&base64(b"me:s3cret")),
            "{said}"
        );
        (output.status.code(), said)
    };
    containerd.run(&["content", "fetch", "--plain-http", &image.reference]);
    let created = run(&["create", "--min-layer-size", "0", &image.reference]);
    assert_eq!(created.0, Some(0), "{}", created.1);
    let basic = Auth::Basic {
        user: "me".to_owned(),
        password: "s3cret".to_owned(),
    };
    let bearer = Auth::Bearer {
        user: Some(("me".to_owned(), "s3cret".to_owned())),
        refresh_token: Some("refresh s3cret".to_owned()),
        lifetime: Duration::from_secs(60),
    };
    // another login does not count beside the one that is given
    let config = format!(
        "{{\"auths\":{{\"{}\":{{\"auth\":\"{}\"}}}}}}",
        registry.host(),
        base64(b"me:s3cret")
    );
    for (auth, arguments, expected) in [
        (&basic, &["--user", "me:wrong-s3cret"][..], Some(4)),
        (&basic, &["-u", "me:s3cret"], Some(0)),
        (&bearer, &["--refresh", "wrong s3cret"], Some(4)),
        (&bearer, &["--refresh", "refresh s3cret"], Some(0)),
        (&bearer, &["--user=me:s3cret"], Some(0)),
    ] {
        fs::write(docker.join("config.json"), &config).unwrap();
        registry.set_auth(auth.clone());
        let push = ["push", "--plain-http", "--existing-index", "allow"];
        let (status, said) = run(&[&push[..], arguments, &[&image.reference]].concat());
        assert_eq!(status, expected, "{arguments:?}: {said}");
        if expected != Some(0) {
            assert!(said.contains("the command line"), "{said}");
        }
    }
    registry.set_auth(Auth::Open);
    let pushed = host.run(&["index", "list", "--quiet", &image.reference]);
    assert_eq!(pushed.lines().count(), 1, "{pushed}");
}

#[test]
fn errors_of_containerd_say_what_to_do() {
    let host = Host::new();
    let socket = host.mountpoint("none").join("socket");
    let socket = socket.display().to_string();
    let access = ["--containerd-address", &socket];
    let inspect = |name: &str| [&["inspect", name], &access[..]].concat().join(" ");
    let fail = |words: String, status| host.fail(&words.split(' ').collect::<Vec<_>>(), status);
    let said = fail(inspect("containerd://test/app:1"), 5);
    assert!(
        said.contains("CONTAINERD_ADDRESS") && said.contains(&socket),
        "{said}"
    );
    let said = fail(
        inspect("containerd://te st/app:1").replace("te st", "te--st"),
        2,
    );
    assert!(said.contains("containerd://NAMESPACE/NAME"), "{said}");
    let said = fail(inspect("containerd://test"), 2);
    assert!(said.contains("expected an image"), "{said}");

    let containerd = start(&Programs::of_the_system());
    let absent = ["inspect", "containerd://test/app:1", "--containerd-address"];
    let said = host.fail(&[&absent[..], &[&socket_of(&containerd)]].concat(), 3);
    assert!(said.contains("ctr --namespace test image ls"), "{said}");
}

#[test]
fn started_as_soci_snapshotter_grpc_it_reads_its_configuration_and_takes_the_socket_of_its_unit() {
    let host = Host::new();
    let folder = host.mountpoint("unit");
    let path = |name: &str| folder.join(name).display().to_string();
    // what systemd is to the daemon: it receives messages, and closes the descriptors in them
    let notified = UnixDatagram::bind(path("notify")).unwrap();
    thread::spawn(move || while notified.recv(&mut [0; 4096]).is_ok() {});
    symlink(env!("CARGO_BIN_EXE_socinbd"), path("soci-snapshotter-grpc")).unwrap();
    let metrics = path("metrics.sock");
    let config = format!("metrics_address = {metrics:?}\nmetrics_network = \"unix\"\n");
    fs::write(path("config.toml"), config).unwrap();
    let log = fs::File::create(path("log")).unwrap();
    let mut daemon = Command::new("systemd-socket-activate")
        .args(["--listen", &path("soci.sock"), "--fdname", "soci.socket"])
        .arg(format!("-ENOTIFY_SOCKET={}", path("notify")))
        .arg(format!("-ESOCINBD_RUN_DIR={}", host.run_dir().display()))
        .arg(path("soci-snapshotter-grpc"))
        .args(["--address", "fd://", "--config", &path("config.toml")])
        .args(["--root", &host.root().display().to_string()])
        .stderr(log)
        .spawn()
        .expect("this test needs systemd-socket-activate (systemd)");
    wait("the snapshotter answers at the socket of the unit", || {
        let ended = daemon.try_wait().unwrap();
        let log = || fs::read_to_string(path("log")).unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", log());
        Client::connect(&folder.join("soci.sock")).is_some_and(|client| client.list(&[]).is_ok())
    });
    let curl = [
        "--silent",
        "--fail",
        "--unix-socket",
        &metrics,
        "http://localhost/metrics",
    ];
    // it answers containerd first
    wait("the metrics are at their address", || {
        let scraped = Command::new("curl").args(curl).output().unwrap();
        String::from_utf8_lossy(&scraped.stdout).contains("socinbd_build_info")
    });
    let id = daemon.id().to_string();
    assert!(Command::new("kill").arg(&id).status().unwrap().success());
    daemon.wait().unwrap();
    // the socket is that of the unit, which stays
    assert!(folder.join("soci.sock").exists());
}
