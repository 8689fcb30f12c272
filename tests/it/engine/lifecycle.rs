//! Attaching and detaching, and what is left when processes die.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

use super::Host;
use crate::{
    soci::make::{MadeLayout, digest},
    support::{
        registry::{Auth, Fault, On, Registry, Times, base64},
        tars::Layer,
        wait,
    },
};

/// A layout with an image of these layers, the lowest first, each with a zTOC.
pub fn indexed(host: &Host, layers: Vec<Layer>) -> MadeLayout {
    let layout = MadeLayout::of(layers);
    index(host, &layout);
    layout
}

fn index(host: &Host, layout: &MadeLayout) {
    let image = layout.reference("");
    let small = ["--min-layer-size", "0", "--span-size", "65536"];
    host.run(&[&["index", "create", &image], &small[..]].concat());
}

/// A host, an indexed image of [`one_file`], and an empty folder to mount it on.
pub fn one_file_host() -> (Host, MadeLayout, PathBuf) {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let mountpoint = host.mountpoint("mnt");
    (host, layout, mountpoint)
}

pub fn one_file() -> Vec<Layer> {
    vec![Layer::new().file("hello", b"hello\n")]
}

/// The attributes of a mount, as the kernel lists them.
fn mount_options(mountpoint: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let here = |line: &&str| line.split(' ').nth(4) == mountpoint.to_str();
    let line = mounts
        .lines()
        .find(here)
        .unwrap_or_else(|| panic!("nothing is mounted at {mountpoint:?}"));
    line.split(' ').nth(5).unwrap().to_owned()
}

/// A program that does nothing, and is ended when this is dropped.
pub struct Sleeper(Child);

impl Sleeper {
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A program whose working directory is on the mount. It runs once it has said so.
pub fn sitting_in(folder: &Path) -> Sleeper {
    let mut command = Command::new("sh");
    command.args(["-c", SLEEP]).current_dir(folder);
    asleep(command)
}

/// Says that it runs, and sleeps.
pub const SLEEP: &str = "echo here; exec sleep 600";

/// Starts a command that ends in [`SLEEP`]; it sleeps when this returns.
pub fn asleep(mut command: Command) -> Sleeper {
    let mut child = Sleeper(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(child.0.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    wait("the program is sleep", || {
        fs::read_to_string(format!("/proc/{}/comm", child.id())).is_ok_and(|name| name == "sleep\n")
    });
    child
}

#[test]
fn a_writable_attachment_takes_writes_and_forgets_them() {
    let host = Host::new();
    let layout = indexed(
        &host,
        vec![
            Layer::new()
                .directory("d", 0o755)
                .file("d/f", b"old")
                .file("gone", b"x"),
        ],
    );
    let mountpoint = host.mountpoint("mnt");
    let attachment = host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
    assert_eq!(attachment["writable"], true);
    fs::write(mountpoint.join("d/f"), b"new").unwrap();
    fs::write(mountpoint.join("d/added"), b"added").unwrap();
    fs::remove_file(mountpoint.join("gone")).unwrap();
    assert_eq!(fs::read(mountpoint.join("d/f")).unwrap(), b"new");
    let other = host.mountpoint("other");
    host.attach(&layout.reference(""), &other, &[]);
    assert_eq!(fs::read(other.join("d/f")).unwrap(), b"old");
    assert!(other.join("gone").exists() && !other.join("d/added").exists());
    let refused = fs::write(other.join("d/f"), b"new").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    host.detach(&mountpoint);
    host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
    assert_eq!(fs::read(mountpoint.join("d/f")).unwrap(), b"old");
    assert!(!mountpoint.join("d/added").exists());
    host.detach(&mountpoint);
    host.detach(&other);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_busy_mount_is_not_detached_and_its_user_is_named() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let user = sitting_in(&mountpoint);
    let error = host.fail(&["detach", mountpoint.to_str().unwrap()], 6);
    assert!(error.contains(&format!("{} (sleep)", user.id())), "{error}");
    // it goes on working
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    drop(user);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn device_files_work_only_when_asked() {
    let (host, layout, mountpoint) = one_file_host();
    for (options, nodev) in [(&[][..], true), (&["--dev"], false)] {
        host.attach(&layout.reference(""), &mountpoint, options);
        let found = mount_options(&mountpoint);
        assert_eq!(
            found.split(',').any(|option| option == "nodev"),
            nodev,
            "{found}"
        );
        host.detach(&mountpoint);
    }
}

#[test]
fn two_mount_points_share_disks_and_devices() {
    let host = Host::new();
    let layout = indexed(
        &host,
        vec![Layer::new().file("a", b"a"), Layer::new().file("b", b"b")],
    );
    let (first, second) = (host.mountpoint("1"), host.mountpoint("2"));
    let one = host.attach(&layout.reference(""), &first, &[]);
    let two = host.attach(&layout.reference(""), &second, &[]);
    assert_ne!(one["id"], two["id"]);
    assert_eq!(one["layers"], two["layers"]);
    assert_eq!(fs::read(second.join("a")).unwrap(), b"a");
    host.detach(&first);
    assert_eq!(fs::read(second.join("b")).unwrap(), b"b");
    host.detach(&second);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn hosts_do_not_meet() {
    let (one, two) = (Host::new(), Host::new());
    let layout = indexed(&one, one_file());
    let (first, second) = (one.mountpoint("mnt"), two.mountpoint("mnt"));
    let a = one.attach(&layout.reference(""), &first, &[]);
    let b = two.attach(&layout.reference(""), &second, &[]);
    assert_ne!(a["layers"][0]["device_path"], b["layers"][0]["device_path"]);
    assert_eq!((one.list().len(), two.list().len()), (1, 1));
    assert_ne!(one.daemon(), two.daemon());
    two.fail(&["detach", first.to_str().unwrap()], 3);
    two.end_daemon();
    assert_eq!(fs::read(first.join("hello")).unwrap(), b"hello\n");
    one.detach(&first);
    assert_eq!((one.left_over(), two.left_over()), (vec![], vec![]));
}

#[test]
fn what_is_kept_is_for_its_owner_only() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
    let mut wrong = Vec::new();
    let mut kinds = std::collections::BTreeSet::new();
    let mut folders = vec![host.root(), host.run_dir()];
    while let Some(folder) = folders.pop() {
        let mode = fs::metadata(&folder).unwrap().mode() & 0o7777;
        // what is in the writable layer's folders is the image's own business
        let of_image = folder
            .parent()
            .is_some_and(|parent| parent.ends_with(host.list()[0]["id"].as_str().unwrap()));
        if of_image {
            continue;
        }
        if mode != 0o700 {
            wrong.push((folder.clone(), format!("{mode:o}")));
        }
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = match fs::symlink_metadata(&path) {
                // the daemon replaces its files meanwhile
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                metadata => metadata.unwrap(),
            };
            if metadata.is_dir() {
                folders.push(path);
                continue;
            }
            let kind = if metadata.file_type().is_socket() {
                "socket"
            } else if path.ends_with("disk.ext4") {
                "disk"
            } else {
                "other"
            };
            kinds.insert(kind);
            if kind != "other" && metadata.permissions().mode() & 0o7777 != 0o600 {
                wrong.push((path, format!("{:o}", metadata.permissions().mode())));
            }
        }
    }
    assert_eq!(wrong, []);
    assert!(
        kinds.contains("socket") && kinds.contains("disk"),
        "{kinds:?}"
    );
    host.detach(&mountpoint);
}

/// An `attach --foreground` that has said that the image is mounted.
pub fn foreground(host: &Host, image: &str, mountpoint: &Path) -> Child {
    let arguments = [
        "attach",
        "--foreground",
        image,
        mountpoint.to_str().unwrap(),
    ];
    let mut child = host
        .command(&arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("is mounted on"), "{line:?}");
    child
}

#[test]
fn a_foreground_attachment_ends_with_its_process_or_its_mount() {
    let (host, layout, mountpoint) = one_file_host();
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}: {status}");
    };
    let path = mountpoint.to_str().unwrap();
    for how in ["signal", "umount", "detach"] {
        let mut child = foreground(&host, &layout.reference(""), &mountpoint);
        assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
        host.wait_complete(&mountpoint);
        // it takes no other attachment
        let other = host.mountpoint("other");
        let error = host.fail(
            &["attach", &layout.reference(""), other.to_str().unwrap()],
            6,
        );
        assert!(error.contains("--run-dir"), "{error}");
        match how {
            "signal" => run("kill", &["-TERM", &child.id().to_string()]),
            "umount" => run("umount", &[path]),
            _ => host.detach(&mountpoint),
        }
        assert!(child.wait().unwrap().success(), "{how}");
        assert_eq!(host.left_over(), [""; 0], "{how}");
        assert_eq!(host.list(), [json!(null); 0], "{how}");
    }
}

#[test]
fn a_second_daemon_is_refused() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let error = host.fail(&["daemon"], 6);
    assert!(error.contains("--run-dir"), "{error}");
    // and so is one that has only the root in common
    let elsewhere = Command::new(env!("CARGO_BIN_EXE_socinbd"))
        .arg("--root")
        .arg(host.root())
        .arg("--run-dir")
        .arg(host.mountpoint("run2"))
        .arg("daemon")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&elsewhere.stderr);
    assert_eq!(elsewhere.status.code(), Some(6), "{error}");
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
}

#[test]
fn list_shows_what_is_attached_and_how_much_of_it_is_here() {
    let host = Host::new();
    assert_eq!(host.list(), [json!(null); 0]);
    let indexed = indexed(&host, one_file());
    let streamed = MadeLayout::of(vec![Layer::new().file("other", b"other")]);
    let (lazy, complete) = (host.mountpoint("lazy"), host.mountpoint("complete"));
    host.attach(&indexed.reference(""), &lazy, &[]);
    host.attach(&streamed.reference(""), &complete, &[]);
    let by_place = |host: &Host| -> std::collections::BTreeMap<String, Value> {
        let rows = host.list().into_iter();
        rows.map(|row| (row["mountpoint"].as_str().unwrap().to_owned(), row))
            .collect()
    };
    let rows = by_place(&host);
    let (a, b) = (
        &rows[lazy.to_str().unwrap()],
        &rows[complete.to_str().unwrap()],
    );
    assert_eq!(
        (&a["state"], &b["state"]),
        (&json!("lazy"), &json!("complete"))
    );
    assert_eq!(
        a["layers"][0]["device"],
        json!("fuse"),
        "this kernel has no nbd"
    );
    assert_eq!(b["layers"][0]["device"], json!("loop"));
    assert_eq!(a["index"]["version"], json!(1));
    assert_eq!(a["spans"], json!([0, 1]));
    fs::read(lazy.join("hello")).unwrap();
    host.wait_complete(&lazy);
    let row = &by_place(&host)[lazy.to_str().unwrap()];
    assert_eq!(
        (&row["spans"], &row["state"]),
        (&json!([1, 1]), &json!("complete"))
    );
    assert!(row["fetched_bytes"].as_u64().unwrap() > 0);
    let table = host.run(&["list"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("MOUNTPOINT"), "{table}");
    let line = lines
        .iter()
        .find(|line| line.starts_with(lazy.to_str().unwrap()))
        .unwrap();
    for word in ["complete", "fuse", "1/1", "v1"] {
        assert!(line.contains(word), "{word}: {line}");
    }
    host.detach(&lazy);
    host.detach(&complete);
    assert_eq!(host.run(&["list"]).lines().count(), 1);
}

#[test]
fn after_a_kill_of_the_daemon_everything_can_be_cleared_away() {
    let host = Host::new();
    let layout = indexed(
        &host,
        vec![
            Layer::new().file("hello", b"hello\n"),
            Layer::new().file("b", b"b"),
        ],
    );
    let (first, second) = (host.mountpoint("1"), host.mountpoint("2"));
    host.attach(&layout.reference(""), &first, &[]);
    host.attach(&layout.reference(""), &second, &["--rw"]);
    host.kill_daemon();
    let rows = host.list();
    assert_eq!(
        rows.iter().map(|row| &row["state"]).collect::<Vec<_>>(),
        ["dead", "dead"]
    );
    assert!(host.run(&["list"]).contains("detach"));
    // detached without a daemon
    host.detach(&first);
    assert_eq!(host.list().len(), 1);
    // and with a new one that works beside what is dead
    let third = host.mountpoint("3");
    host.attach(&layout.reference(""), &third, &[]);
    assert_eq!(fs::read(third.join("hello")).unwrap(), b"hello\n");
    let mut states: Vec<_> = host
        .list()
        .iter()
        .map(|row| row["state"].to_string())
        .collect();
    states.sort();
    assert_eq!(states, ["\"dead\"", "\"lazy\""]);
    host.detach(&second);
    assert_eq!(host.list().len(), 1);
    // over a dead mount
    host.kill_daemon();
    host.attach(&layout.reference(""), &third, &[]);
    assert_eq!(fs::read(third.join("hello")).unwrap(), b"hello\n");
    host.detach(&third);
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_killed_client_leaves_nothing() {
    let host = Host::new();
    let layout = MadeLayout::of(one_file());
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    // a daemon that has nothing
    host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    fs::remove_dir_all(host.root().join("layers/sha256")).unwrap();
    registry.fail(On::Data, Fault::Hang, Times::UntilHealed);
    let image = registry.reference("app");
    let mut client = host
        .command(&["attach", &image, mountpoint.to_str().unwrap()])
        .spawn()
        .unwrap();
    wait("the registry is asked for data", || {
        registry.counters().blobs().requests > 0
    });
    client.kill().unwrap();
    client.wait().unwrap();
    wait("the daemon forgets it", || host.list().is_empty());
    assert_eq!(host.left_over(), [""; 0]);
    // and the same image can be attached at once
    registry.heal();
    host.attach(&image, &mountpoint, &[]);
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
}

#[test]
fn an_image_whose_folders_were_removed_in_use_attaches_again() {
    let host = Host::new();
    let layer = Layer::new()
        .file("hello", b"hello\n")
        .file("more", &[7; 300_000]);
    let layout = indexed(&host, vec![layer]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let image = registry.reference("app");
    let (first, second) = (host.mountpoint("first"), host.mountpoint("second"));
    for device in [["--device", "auto"], ["--device", "fuse"]] {
        host.attach(&image, &first, &device);
        assert_eq!(fs::read(first.join("hello")).unwrap(), b"hello\n");
        fs::remove_dir_all(host.root().join("layers/sha256")).unwrap();
        host.attach(&image, &second, &device);
        for mountpoint in [&second, &first] {
            assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
            assert_eq!(fs::read(mountpoint.join("more")).unwrap(), [7; 300_000]);
        }
        host.detach(&first);
        host.detach(&second);
        assert_eq!(host.left_over(), [""; 0]);
    }
}

#[test]
fn a_daemon_that_is_ended_unmounts_what_is_idle() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let (idle, busy) = (host.mountpoint("idle"), host.mountpoint("busy"));
    host.attach(&layout.reference(""), &idle, &[]);
    host.attach(&layout.reference(""), &busy, &[]);
    let user = sitting_in(&busy);
    host.end_daemon();
    assert!(!idle.join("hello").exists());
    let rows = host.list();
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["state"], rows[0]["mountpoint"].as_str()),
        (&json!("dead"), busy.to_str())
    );
    assert!(!host.run_dir().join("socinbd.sock").exists());
    drop(user);
    host.detach(&busy);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_mount_point_in_or_over_the_daemons_folders_is_refused() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let image = layout.reference("");
    let inside = [host.root().join("mnt"), host.run_dir().join("mnt")];
    for folder in &inside {
        fs::create_dir_all(folder).unwrap();
    }
    let around = host.root().parent().unwrap().to_owned();
    for (place, words) in [
        (&inside[0], "--root"),
        (&inside[1], "--run-dir"),
        (&host.root(), "--root"),
        (&around, "over the daemon's own directory"),
    ] {
        for options in [&["attach"][..], &["attach", "--foreground"]] {
            let place = place.to_str().unwrap();
            let error = host.fail(&[options, &[&image, place]].concat(), 2);
            assert!(error.contains(words), "{place}: {error}");
            if host.daemon().is_some() {
                host.end_daemon();
            }
        }
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn credentials_come_with_each_request() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    // a daemon whose starter knew none
    let mountpoint = host.mountpoint("mnt");
    host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    fs::remove_dir_all(host.root().join("layers/sha256")).unwrap();
    registry.set_auth(Auth::Basic {
        user: "me".into(),
        password: "secret".into(),
    });
    let image = registry.reference("app");
    let error = host.fail(&["attach", &image, mountpoint.to_str().unwrap()], 4);
    assert!(
        error.contains("credentials") || error.contains("log"),
        "{error}"
    );
    let known = host.mountpoint("known");
    let config = json!({"auths": {registry.host(): {"auth": base64(b"me:secret")}}});
    fs::write(known.join("config.json"), config.to_string()).unwrap();
    let attached = host
        .command(&["attach", &image, mountpoint.to_str().unwrap()])
        .env("DOCKER_CONFIG", &known)
        .output()
        .unwrap();
    assert!(
        attached.status.success(),
        "{}",
        String::from_utf8_lossy(&attached.stderr)
    );
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    // no secret is kept
    let kept = Command::new("grep")
        .args(["-r", "-l", "-e", "secret", "-e", &base64(b"me:secret")])
        .arg(host.root())
        .arg(host.run_dir())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&kept.stdout), "");
}

#[test]
fn twenty_layers_and_twenty_attachments_at_once() {
    let host = Host::new();
    let layers =
        (0..20).map(|n: u32| Layer::new().file(&format!("file-{n}"), n.to_string().as_bytes()));
    let layout = indexed(&host, layers.collect());
    fs::remove_dir_all(host.root().join("layers")).unwrap_or_default();
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let manifest = layout.path().join("index.json");
    let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
    let manifest: Value = serde_json::from_slice(
        &fs::read(layout.blob_path(&digest(&manifest["manifests"][0]))).unwrap(),
    )
    .unwrap();
    let places: Vec<_> = (0..20)
        .map(|n| host.mountpoint(&format!("mnt-{n}")))
        .collect();
    // no daemon runs yet: they all want to start one
    std::thread::scope(|scope| {
        for place in &places {
            scope.spawn(|| host.attach(&registry.reference("app"), place, &[]));
        }
    });
    let rows = host.list();
    assert_eq!(rows.len(), 20);
    assert!(rows.iter().all(|row| row["layers"] == rows[0]["layers"]));
    assert_eq!(rows[0]["layers"].as_array().unwrap().len(), 20);
    for layer in manifest["layers"].as_array().unwrap() {
        assert_eq!(registry.counters().blob(&digest(layer)).requests, 0);
    }
    for (n, place) in places.iter().enumerate() {
        assert_eq!(
            fs::read(place.join(format!("file-{n}"))).unwrap(),
            n.to_string().as_bytes()
        );
    }
    std::thread::scope(|scope| {
        for place in &places {
            scope.spawn(|| host.detach(place));
        }
    });
    assert_eq!(host.left_over(), [""; 0]);
}
