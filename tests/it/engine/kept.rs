//! Images that are attached again after a reboot, from the state directory alone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    Host,
    lifecycle::{indexed, one_file_host},
};
use crate::{
    soci::make::MadeLayout,
    support::{
        credential_plugin::CredentialPlugin,
        registry::{Auth, DATED_PASSWORD, Registry, base64},
        seeded_noise, succeeds,
        tars::Layer,
    },
};

/// Ends the daemon as a shutdown does, and makes the records those of another boot.
fn reboot(host: &Host) {
    host.end_daemon();
    another_boot(host);
}

/// What is left of a power failure: nothing was unmounted or put away.
fn power_failure(host: &Host, mountpoints: &[&Path]) {
    host.kill_daemon();
    for mountpoint in mountpoints {
        succeeds(Command::new("umount").arg("-l").arg(mountpoint));
    }
    another_boot(host);
}

fn another_boot(host: &Host) {
    for entry in fs::read_dir(host.root().join("attachments")).unwrap() {
        let record = entry.unwrap().path().join("record.json");
        if let Ok(bytes) = fs::read(&record) {
            let mut value: Value = serde_json::from_slice(&bytes).unwrap();
            value["boot_id"] = "another boot".into();
            fs::write(&record, value.to_string()).unwrap();
        }
    }
}

fn keep(host: &Host, image: &str, mountpoint: &Path, options: &[&str]) -> String {
    let attachment = host.attach(image, mountpoint, &[&["--keep"], options].concat());
    assert_eq!(attachment["kept"], true);
    attachment["id"].as_str().unwrap().to_owned()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_mounted(mountpoint: &Path) -> bool {
    socinbd::kernel::mount::is_mount(mountpoint).unwrap()
}

/// The directory of an attachment.
fn directory(host: &Host, id: &str) -> PathBuf {
    host.root().join("attachments").join(id)
}

/// The files of all disks' states.
fn states(host: &Host) -> Vec<String> {
    let layers = host.root().join("layers/sha256");
    let below = |path: PathBuf| fs::read_dir(path).unwrap().map(|it| it.unwrap().path());
    let tables = below(layers).flat_map(below);
    tables
        .map(|table| fs::read_to_string(table.join("state.json")).unwrap())
        .collect()
}

#[test]
fn kept_images_are_back_without_the_registry_and_find_credentials_when_they_fetch() {
    let host = Host::new();
    let (first, second) = (seeded_noise(700_000, 1), seeded_noise(600_000, 2));
    let layers = vec![
        Layer::new().file("lower", &first),
        Layer::new().file("upper", &second),
    ];
    let layout = indexed(&host, layers);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    registry.set_auth(Auth::Dated {
        lifetime: Duration::from_secs(3600),
    });
    let plugin = CredentialPlugin::new(DATED_PASSWORD, "1h").for_registry(&registry.host());
    let mountpoint = host.mountpoint("mnt");
    let options = plugin.options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let id = keep(&host, &registry.reference("app"), &mountpoint, &options);
    // or a power failure would cost the disks
    for state in states(&host) {
        assert!(!state.contains("unsynced_since_boot"), "{state}");
    }
    assert_eq!(fs::read(mountpoint.join("lower")).unwrap(), first);
    reboot(&host);
    assert!(!is_mounted(&mountpoint));
    let listed = host.list();
    assert_eq!(
        (&listed[0]["state"], &listed[0]["id"]),
        (&"kept".into(), &id.clone().into())
    );

    registry.reset_counters();
    let runs = plugin.runs();
    let restored: Vec<Value> = serde_json::from_str(&host.run(&["--json", "restore"])).unwrap();
    assert_eq!(restored.len(), 1);
    assert_eq!(restored[0]["failure"], Value::Null);
    assert!(is_mounted(&mountpoint));
    assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), 2);
    assert_eq!(registry.counters().total().requests, 0);
    assert_eq!(plugin.runs(), runs);
    let listed = host.list();
    assert_eq!(listed[0]["kept"], true);
    assert_eq!(listed[0]["id"], id);
    // nothing more to do
    host.run(&["restore"]);
    assert_eq!(host.list().len(), 1);

    let challenged = || {
        let log = registry.counters().log;
        log.iter().filter(|entry| entry.status == 401).count()
    };
    assert_eq!(fs::read(mountpoint.join("upper")).unwrap(), second);
    assert!(challenged() > 0);
    registry.reset_counters();
    assert_eq!(fs::read(mountpoint.join("lower")).unwrap(), first);
    assert_eq!(plugin.runs(), runs + 1, "both layers have one registry");
    assert_eq!(challenged(), 0, "and one authorization");
    // no secret is stored
    let leaked = Command::new("grep")
        .args(["-r", "-l", "made-at-"])
        .arg(host.root())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&leaked.stdout), "");
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
    assert_eq!(host.run(&["restore"]), "");
}

#[test]
fn images_are_back_after_a_power_failure_in_their_order() {
    let (host, layout, outer) = one_file_host();
    // one is mounted in the directory of another image
    let nested = vec![Layer::new().directory("inner", 0o755).file("f", b"outer\n")];
    let nested = indexed(&host, nested);
    keep(&host, &nested.reference(""), &outer, &[]);
    keep(&host, &layout.reference(""), &outer.join("inner"), &[]);
    let last = host.mountpoint("last");
    keep(&host, &layout.reference(""), &last, &[]);
    power_failure(&host, &[&outer.join("inner"), &outer, &last]);
    // a daemon that starts for another reason attaches them
    let other = host.mountpoint("other");
    host.attach(&layout.reference(""), &other, &[]);
    assert_eq!(fs::read(outer.join("f")).unwrap(), b"outer\n");
    assert_eq!(fs::read(outer.join("inner/hello")).unwrap(), b"hello\n");
    assert_eq!(fs::read(last.join("hello")).unwrap(), b"hello\n");
    // an ordinary attachment is not attached again
    let list = host.run(&["list"]);
    let kept = |path: &Path| {
        let line = list
            .lines()
            .find(|it| it.split(' ').next() == path.to_str());
        line.unwrap().split_whitespace().nth(3).unwrap() == "yes"
    };
    assert!(kept(&last) && !kept(&other), "{list}");
    reboot(&host);
    host.run(&["restore"]);
    assert!(is_mounted(&last) && !is_mounted(&other));
    for mountpoint in [&outer.join("inner"), &outer, &last] {
        host.detach(mountpoint);
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn files_of_a_writable_layer_stay_until_it_is_detached() {
    let (host, layout, mountpoint) = one_file_host();
    let id = keep(&host, &layout.reference(""), &mountpoint, &["--rw"]);
    fs::write(mountpoint.join("mine"), b"mine\n").unwrap();
    fs::remove_file(mountpoint.join("hello")).unwrap();
    succeeds(Command::new("chmod").arg("711").arg(&mountpoint));
    reboot(&host);
    let work = directory(&host, &id).join("work");
    assert!(!work.exists());
    host.run(&["restore"]);
    assert_eq!(fs::read(mountpoint.join("mine")).unwrap(), b"mine\n");
    assert!(!mountpoint.join("hello").exists());
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&mountpoint).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o711);
    power_failure(&host, &[&mountpoint]);
    host.run(&["restore"]);
    assert_eq!(fs::read(mountpoint.join("mine")).unwrap(), b"mine\n");
    host.detach(&mountpoint);
    assert!(!directory(&host, &id).exists());
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn an_image_is_kept_until_it_is_detached_without_keep_record() {
    let (host, layout, mountpoint) = one_file_host();
    let at = mountpoint.to_str().unwrap();
    let id = keep(&host, &layout.reference(""), &mountpoint, &[]);
    host.run(&["detach", "--keep-record", at]);
    assert_eq!(host.list()[0]["state"], "kept");
    let why = host.run(&["why", at]);
    assert!(why.contains("kept"), "{why}");
    host.run(&["restore"]);
    assert!(is_mounted(&mountpoint));
    // unmounted by hand: a daemon that starts later attaches it
    succeeds(Command::new("umount").arg(&mountpoint));
    reboot(&host);
    host.run(&["restore"]);
    assert!(is_mounted(&mountpoint));
    assert_eq!(host.list()[0]["id"], id);
    // detached when it is not attached, with a daemon and without one
    host.run(&["detach", "--keep-record", at]);
    host.run(&["detach", at]);
    assert!(host.list().is_empty());
    keep(&host, &layout.reference(""), &mountpoint, &[]);
    host.end_daemon();
    host.run(&["detach", at]);
    assert!(host.list().is_empty());
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_cannot_be_restored_is_named_with_the_command_that_helps_and_the_others_come() {
    let host = Host::new();
    let layouts: Vec<MadeLayout> = (0..5_u8)
        .map(|number| indexed(&host, vec![Layer::new().file("f", &[number; 9000])]))
        .collect();
    let places: Vec<PathBuf> = (0..5)
        .map(|it| host.mountpoint(&format!("m{it}")))
        .collect();
    let ids: Vec<String> = layouts
        .iter()
        .zip(&places)
        .map(|(layout, place)| keep(&host, &layout.reference(""), place, &[]))
        .collect();
    let first_layer = host.list();
    let layer_of = |place: &Path| {
        let here = first_layer
            .iter()
            .find(|it| it["mountpoint"] == *place.to_str().unwrap());
        here.unwrap()["layers"][0]["digest"].as_str().unwrap()[7..].to_owned()
    };
    let lost = layer_of(&places[1]);
    reboot(&host);
    fs::remove_dir(&places[0]).unwrap();
    fs::remove_dir_all(host.root().join("layers/sha256").join(lost)).unwrap();
    succeeds(
        Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs"])
            .arg(&places[2]),
    );
    fs::write(directory(&host, &ids[3]).join("kept.json"), b"{}").unwrap();

    let output = host.output(&["restore"]);
    let error = text(&output);
    assert_eq!(output.status.code(), Some(7), "{error}");
    let line = |of: usize| {
        let line = error.lines().find(|line| line.contains(&ids[of]));
        line.unwrap_or_else(|| panic!("{of}: {error}")).to_owned()
    };
    assert!(
        line(0).contains("make the directory, then `socinbd restore`"),
        "{error}"
    );
    let again = format!(
        "`socinbd attach --keep {} {}`",
        layouts[1].reference("latest"),
        places[1].display()
    );
    assert!(line(1).contains("is not in the state directory"), "{error}");
    assert!(
        line(1).contains("socinbd attach --keep oci:"),
        "{again} {error}"
    );
    assert!(
        line(2).contains("unmount it, then `socinbd restore`"),
        "{error}"
    );
    assert!(
        line(3).contains(&format!("`socinbd detach {}`", ids[3])),
        "{error}"
    );
    assert_eq!(error.lines().count(), 4, "{error}");
    assert_eq!(fs::read(places[4].join("f")).unwrap(), [4; 9000]);
    let why: Vec<String> = host
        .list()
        .iter()
        .filter(|it| it["state"] == "kept")
        .map(|it| it["why"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(why.len(), 3, "{why:?}");
    assert!(
        why.iter().all(|why| why.starts_with("not restored: ")),
        "{why:?}"
    );

    // each is helped
    fs::create_dir(&places[0]).unwrap();
    succeeds(Command::new("umount").arg(&places[2]));
    host.run(&["detach", places[1].to_str().unwrap()]);
    host.run(&["detach", &ids[3]]);
    host.run(&["restore"]);
    for number in [0_u8, 2, 4] {
        let place = &places[usize::from(number)];
        assert_eq!(fs::read(place.join("f")).unwrap(), [number; 9000]);
        host.detach(place);
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_mount_point_in_use_is_not_kept() {
    let (host, layout, mountpoint) = one_file_host();
    let at = mountpoint.to_str().unwrap();
    succeeds(Command::new("mount").args(["-t", "tmpfs", "tmpfs", at]));
    let error = host.fail(&["attach", "--keep", &layout.reference(""), at], 6);
    assert!(
        error.contains("with --keep the mount point must be free"),
        "{error}"
    );
    succeeds(Command::new("umount").arg(at));
    assert_eq!(host.run(&["restore"]), "");
    host.fail(
        &[
            "attach",
            "--keep",
            "--foreground",
            &layout.reference(""),
            at,
        ],
        2,
    );
}

#[test]
fn a_killed_daemon_finds_kept_images_in_use_as_they_are() {
    let (host, layout, mountpoint) = one_file_host();
    // so that its device is a loop device, which needs no daemon
    host.attach(&layout.reference(""), &mountpoint, &[]);
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.wait_complete(&mountpoint);
    host.detach(&mountpoint);
    keep(&host, &layout.reference(""), &mountpoint, &[]);
    host.kill_served_by_keeper();
    host.run(&["restore"]);
    let list = host.list();
    assert_eq!(list.len(), 1, "{list:?}");
    assert_eq!(
        (&list[0]["state"], &list[0]["kept"]),
        (&"complete".into(), &true.into())
    );
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn twenty_layers_are_back_in_a_second() {
    let host = Host::new();
    let layers = (0..20_u64).map(|number| {
        let name = format!("file-{number}");
        Layer::new().file(&name, &seeded_noise(300_000, number))
    });
    let layout = indexed(&host, layers.collect());
    let mountpoint = host.mountpoint("mnt");
    keep(&host, &layout.reference(""), &mountpoint, &[]);
    host.run(&["detach", "--keep-record", mountpoint.to_str().unwrap()]);
    let begun = Instant::now();
    host.run(&["restore"]);
    let time = begun.elapsed();
    println!("20 layers were restored in {} ms", time.as_millis());
    assert_eq!(fs::read_dir(&mountpoint).unwrap().count(), 20);
    // a debug build, and other tests beside it; scripts/bench-attach measures
    assert!(time < Duration::from_secs(10), "{time:?}");
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_password_of_a_proxy_is_not_stored_and_comes_from_the_environment_of_the_daemon() {
    let host = Host::new();
    let files = [seeded_noise(600_000, 1), seeded_noise(600_000, 2)];
    let layers = files.iter().zip(["first", "second"]);
    let layers = layers.map(|(content, name)| Layer::new().file(name, content));
    let layout = indexed(&host, layers.collect());
    // the registry is the proxy too
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let proxy = format!("http://me:hunter2@{}", registry.host());
    let mountpoint = host.mountpoint("mnt");
    let at = mountpoint.to_str().unwrap();
    succeeds(
        host.command(&["attach", "--keep", "--plain-http", "registry.test/app", at])
            .env("http_proxy", &proxy),
    );
    let password = format!("Basic {}", base64(b"me:hunter2"));
    let with_password = || {
        let log = registry.counters().log;
        assert!(!log.is_empty());
        let shown = log
            .iter()
            .map(|entry| entry.headers.get("proxy-authorization"));
        let with = shown.filter(|shown| *shown == Some(&password));
        (with.count(), log.len())
    };
    let (with, all) = with_password();
    assert_eq!(with, all);
    let stored = Command::new("grep")
        .args(["-r", "-l", "hunter2"])
        .args([host.root(), host.run_dir()])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&stored.stdout), "");
    reboot(&host);
    registry.reset_counters();
    succeeds(host.command(&["restore"]).env("http_proxy", &proxy));
    assert_eq!(fs::read(mountpoint.join("first")).unwrap(), files[0]);
    let (with, all) = with_password();
    assert_eq!(with, all);
    reboot(&host);
    registry.reset_counters();
    host.run(&["restore"]);
    assert_eq!(fs::read(mountpoint.join("second")).unwrap(), files[1]);
    assert_eq!(with_password().0, 0);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}
