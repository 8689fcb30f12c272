//! What the daemon does when something runs short: descriptors, the size of files, room in the runtime directory.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{
    Host,
    lifecycle::{indexed, one_file, one_file_host},
};
use crate::{
    soci::make::MadeLayout,
    support::{
        registry::{Auth, Registry},
        succeeds,
        tars::Layer,
        wait,
    },
};

/// The soft and the hard limit of a process, as /proc lists them.
fn limits_of(pid: u32, name: &str) -> (String, String) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let row = limits.lines().find_map(|line| line.strip_prefix(name));
    let mut words = row.unwrap().split_whitespace().map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}

#[test]
fn a_daemon_without_a_free_descriptor_lives_on() {
    let (host, layout, mountpoint) = one_file_host();
    let arguments = [
        "attach",
        &layout.reference(""),
        mountpoint.to_str().unwrap(),
    ];
    succeeds(&mut host.limited(&["--nofile=100:100"], &arguments));
    let daemon = host.daemon().unwrap();
    for socket in ["socinbd.sock", "mounts.sock"] {
        let path = host.run_dir().join(socket);
        let open = || fs::read_dir(format!("/proc/{daemon}/fd")).unwrap().count();
        let held: Vec<_> = (0..100)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        wait("no descriptor is free", || open() >= 100);
        wait("it is told", || {
            let log = host.log();
            log.contains("accepting a connection") && log.contains("ulimit -n")
        });
        drop(held);
        wait("the daemon answers", || {
            host.output(&["list"]).status.success()
        });
    }
    assert_eq!(host.daemon(), Some(daemon));
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
}

#[test]
fn the_limit_of_open_files_is_the_hard_one() {
    let (host, layout, mountpoint) = one_file_host();
    let arguments = [
        "attach",
        &layout.reference(""),
        mountpoint.to_str().unwrap(),
    ];
    succeeds(&mut host.limited(&["--nofile=90:300"], &arguments));
    let (soft, hard) = limits_of(host.daemon().unwrap(), "Max open files");
    assert_eq!((soft.as_str(), hard.as_str()), ("300", "300"));
    host.detach(&mountpoint);
}

/// A credential helper that says which limit it has.
fn write_helper(folder: &Path, said: &Path) {
    let helper = folder.join("docker-credential-limits");
    let answer = r#"{"Username":"me","Secret":"secret"}"#;
    let script = format!(
        "#!/bin/sh\ncat >{0}.in; ulimit -S -n >{0}; echo '{answer}'\n",
        said.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn programs_that_are_started_have_the_limit_that_was_given() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    registry.set_auth(Auth::Basic {
        user: "me".into(),
        password: "secret".into(),
    });
    let (tools, out) = (host.mountpoint("tools"), host.mountpoint("out"));
    let said = out.join("limit");
    write_helper(&tools, &said);
    let config = json!({"credHelpers": {registry.host(): "limits"}}).to_string();
    fs::write(tools.join("config.json"), config).unwrap();
    let socket = out.join("nbd.sock");
    // a shell may look before it has it
    let until = "while [ $(ulimit -S -n) != 90 ]; do :; done";
    let image = registry.reference("app");
    let arguments = [
        "serve",
        &image,
        "--socket",
        socket.to_str().unwrap(),
        "--run",
        until,
    ];
    let mut command = host.limited(&["--nofile=90:300"], &arguments);
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    succeeds(command.env("DOCKER_CONFIG", &tools).env("PATH", path));
    assert_eq!(fs::read_to_string(said).unwrap(), "90\n");
}

/// An image of twenty layers, each with one file.
fn twenty_layers(host: &Host) -> MadeLayout {
    let layers = (0..20).map(|n: u32| Layer::new().file(&format!("file-{n}"), b"content"));
    indexed(host, layers.collect())
}

/// Twenty lazy layers, of a daemon that may have 200 descriptors: four a layer, and fifty for files that need not stay open.
struct TwentyLayers {
    mountpoint: PathBuf,
    _layout: MadeLayout,
}

impl TwentyLayers {
    fn attach(host: &Host) -> Self {
        let layout = twenty_layers(host);
        let mountpoint = host.mountpoint("mnt");
        let (image, place) = (layout.reference(""), mountpoint.to_str().unwrap());
        let attach = ["attach", "--device", "fuse", &image, place];
        succeeds(&mut host.limited(&["--nofile=200:200"], &attach));
        Self {
            mountpoint,
            _layout: layout,
        }
    }

    fn read_and_detach(&self, host: &Host) {
        for n in 0..20 {
            let file = self.mountpoint.join(format!("file-{n}"));
            assert_eq!(fs::read(file).unwrap(), b"content");
        }
        host.detach(&self.mountpoint);
    }
}

#[test]
fn many_lazy_layers_do_with_few_descriptors() {
    let host = Host::new();
    let attached = TwentyLayers::attach(&host);
    attached.read_and_detach(&host);
}

/// Files that need not stay open are closed for clients that wait for a descriptor, and opened again.
#[test]
fn files_that_can_be_spared_make_room_for_clients() {
    let host = Host::new();
    let attached = TwentyLayers::attach(&host);
    let daemon = host.daemon().unwrap();
    let spare = || {
        let open = fs::read_dir(format!("/proc/{daemon}/fd")).unwrap();
        let paths = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        let of_a_disk = |path: &std::path::PathBuf| {
            let name = path.file_name().unwrap_or_default();
            path.starts_with(host.root().join("layers/sha256")) && name != "disk.ext4"
        };
        paths.filter(of_a_disk).count()
    };
    assert!(spare() > 10, "{} are open", spare());
    let socket = host.run_dir().join("socinbd.sock");
    let held: Vec<_> = (0..200)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    wait("they are closed", || spare() == 0);
    drop(held);
    attached.read_and_detach(&host);
}

#[test]
fn an_attach_that_finds_no_free_descriptor_says_so() {
    let host = Host::new();
    let layout = twenty_layers(&host);
    let mountpoint = host.mountpoint("mnt");
    let (image, place) = (layout.reference(""), mountpoint.to_str().unwrap());
    let output = host
        .limited(&["--nofile=60:60"], &["attach", &image, place])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("LimitNOFILE") && error.contains("ulimit -n"),
        "{error}"
    );
    assert!(!error.contains("modprobe"), "{error}");
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_limit_of_files_sizes_is_an_error_that_says_so() {
    let (host, layout, mountpoint) = one_file_host();
    let (image, place) = (layout.reference(""), mountpoint.to_str().unwrap());
    for arguments in [
        &["attach", &image, place][..],
        &[
            "index",
            "create",
            "--force",
            "--min-layer-size",
            "0",
            &image,
        ],
    ] {
        let output = host.limited(&["--fsize=100"], arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(
            error.contains("ulimit -f") && error.contains("LimitFSIZE"),
            "{error}"
        );
    }
    assert_eq!(host.left_over(), [""; 0]);
}

/// Limits what a runtime directory holds: a tmpfs of its own, full but for a few bytes.
fn small_run_dir(host: &Host, limit: &str) {
    fs::create_dir_all(host.run_dir()).unwrap();
    succeeds(
        std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("{limit},mode=700"), "none"])
            .arg(host.run_dir()),
    );
}

#[test]
fn a_full_run_directory_is_named_with_its_reason() {
    let (host, layout, mountpoint) = one_file_host();
    let (image, place) = (layout.reference(""), mountpoint.to_str().unwrap());
    let run_dir = host.run_dir();
    // no file can be made
    small_run_dir(&host, "nr_inodes=1");
    let error = host.fail(&["attach", &image, place], 1);
    assert!(
        error.contains(run_dir.to_str().unwrap()) && error.contains("No space left"),
        "{error}"
    );
    succeeds(std::process::Command::new("umount").arg(&run_dir));
    // no data can be written: a daemon needs no room there
    small_run_dir(&host, "size=64k");
    fs::write(run_dir.join("filler"), vec![0; 1 << 20]).unwrap_err();
    host.attach(&image, &mountpoint, &["--rw"]);
    assert_eq!(host.list().len(), 1);
    host.detach(&mountpoint);
    assert_eq!(host.list(), [json!(null); 0]);
}
