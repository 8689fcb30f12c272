use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use socinbd::{
    error::Kind,
    kernel::{
        blockdev,
        loopdev::{self, LoopOptions},
        mount::{
            self, info,
            overlay::{Lower, Overlay},
        },
        namespace::{self, ContainerSpec, Root},
        user::{self, Credentials},
    },
};
use tempfile::TempDir;

use super::{eventually, ext4_image};

/// A root with busybox in it, and a folder that all can write to.
fn rootfs() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for folder in ["bin", "etc", "out"] {
        fs::create_dir(root.path().join(folder)).unwrap();
    }
    // by a process of its own: a fork of another test must not inherit the file open for writing, it could not be started then
    let copied = std::process::Command::new("cp")
        .arg("/bin/busybox")
        .arg(root.path().join("bin/busybox"))
        .status();
    assert!(
        copied.unwrap().success(),
        "/bin/busybox: install the package busybox-static"
    );
    std::os::unix::fs::symlink("busybox", root.path().join("bin/sh")).unwrap();
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.path().join("etc/group"), "web:x:34:\nlog:x:44:web\n").unwrap();
    for path in ["", "out"] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(root.path().join(path), mode).unwrap();
    }
    root
}

/// What a root that cannot be written to must have.
fn mount_points() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["proc", "dev", "sys"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    folder
}

fn shell(root: &Path, script: &str) -> ContainerSpec {
    // applets without links: busybox runs its own by name
    let script = format!("alias b=busybox; {script}");
    ContainerSpec {
        root: Root::Directory(root.to_owned()),
        read_only: false,
        args: ["sh", "-c", &script].map(Into::into).to_vec(),
        env: Vec::new(),
        cwd: "/".into(),
        user: Credentials::root(),
        hostname: None,
    }
}

fn output(root: &Path, name: &str) -> String {
    fs::read_to_string(root.join("out").join(name)).unwrap()
}

#[test]
fn a_program_sees_what_its_image_says() {
    let root = rootfs();
    let user = user::resolve(fs::File::open(root.path()).unwrap(), "web").unwrap();
    let spec = ContainerSpec {
        env: vec!["GREETING=no".into(), "GREETING=hello, world".into()],
        cwd: "/srv/made/for it".into(),
        user,
        hostname: Some("box".into()),
        ..shell(
            root.path(),
            "{ echo $GREETING; pwd; busybox id; busybox hostname; busybox ps >/out/ps; busybox grep -c . /out/ps; echo $PATH $HOME; } >/out/text; exit 7",
        )
    };
    let status = namespace::run(spec.with_usual_environment()).unwrap();
    assert_eq!(status, 7);
    let text = output(root.path(), "text");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "hello, world");
    assert_eq!(lines[1], "/srv/made/for it");
    assert_eq!(lines[2], "uid=33(web) gid=34(web) groups=44(log)");
    assert_eq!(lines[3], "box");
    // the heading, the init, the shell, ps: nothing of the host
    assert_eq!(lines[4], "4");
    assert!(lines[5].ends_with(":/bin /srv"), "{}", lines[5]);
}

#[test]
fn the_statuses_of_programs() {
    let root = rootfs();
    let status = |script| namespace::run(shell(root.path(), script)).unwrap();
    assert_eq!(status("exit 0"), 0);
    assert_eq!(status("exit 255"), 255);
    assert_eq!(status("busybox kill -9 $$"), 137);
    assert_eq!(status("busybox kill -TERM $$"), 143);
}

#[test]
fn what_cannot_be_started_is_named() {
    let root = rootfs();
    let error = namespace::run(ContainerSpec {
        args: vec!["no-such-program".into()],
        ..shell(root.path(), "")
    })
    .unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.report().contains("no-such-program"), "{error}");

    let error = namespace::run(ContainerSpec {
        args: vec!["/etc/passwd".into()],
        ..shell(root.path(), "")
    })
    .unwrap_err();
    assert_eq!(error.kind(), Kind::Kernel);
    assert!(
        error.report().contains("Permission denied"),
        "{}",
        error.report()
    );

    let error = namespace::run(ContainerSpec {
        cwd: "/etc/passwd".into(),
        ..shell(root.path(), "")
    })
    .unwrap_err();
    assert!(error.report().contains("/etc/passwd"), "{}", error.report());
}

#[test]
fn dev_proc_and_sys_are_a_containers() {
    let root = rootfs();
    let script = "exec >>/out/text 2>&1
        echo x >/dev/null && echo null
        busybox head -c 3 /dev/zero | busybox wc -c
        echo here >>/dev/stdout
        : >/dev/shm/file && echo shm
        busybox test -c /dev/ptmx && echo ptmx
        echo 1 >/proc/sys/kernel/hostname || echo sys is read-only
        echo b >/proc/sysrq-trigger || echo sysrq is read-only
        busybox mkdir /sys/x || echo sysfs is read-only
        busybox mknod /out/disk b 7 0 || echo no nodes
        busybox mount -t tmpfs x /out || echo no mounts
        busybox grep CapBnd /proc/self/status
        busybox cat /proc/self/mounts; busybox grep -c . /proc/self/mounts";
    assert_eq!(namespace::run(shell(root.path(), script)).unwrap(), 0);
    let text = output(root.path(), "text");
    for line in [
        "null",
        "3",
        "here",
        "shm",
        "ptmx",
        "sys is read-only",
        "sysrq is read-only",
        "sysfs is read-only",
        "no nodes",
        "no mounts",
        "CapBnd:\t00000000a00425fb",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in\n{text}"
        );
    }
    // nothing of the host is mounted there any more, under the container's root or over it
    let roots = text
        .lines()
        .filter(|line| line.split(' ').nth(1) == Some("/"));
    assert_eq!(roots.count(), 1, "{text}");
    let mounts: usize = text.lines().last().unwrap().parse().unwrap();
    assert!((6..25).contains(&mounts), "{mounts} mounts:\n{text}");
}

#[test]
fn a_read_only_root() {
    let root = rootfs();
    let status = namespace::run(ContainerSpec {
        read_only: true,
        ..shell(root.path(), "echo x >/dev/null && ! echo x >/out/file")
    })
    .unwrap();
    assert_eq!(status, 0);
    assert!(!root.path().join("out/file").exists());
    // a mount's other attributes stay
    let mount_points = mount_points();
    let nodev = Overlay {
        lowers: vec![
            Lower::Directory(mount_points.path().to_owned()),
            Lower::Directory(root.path().to_owned()),
        ],
        upper: None,
        devices: false,
        source: "socinbd-test".into(),
        by_mount_call: false,
    };
    let status = namespace::run(ContainerSpec {
        root: Root::Mount(nodev.mount().unwrap()),
        read_only: true,
        ..shell(
            root.path(),
            "busybox grep -q 'overlay ro,nodev' /proc/self/mounts",
        )
    });
    assert_eq!(status.unwrap(), 0);
}

#[test]
fn the_host_resolves_names() {
    let root = rootfs();
    let status = namespace::run(shell(
        root.path(),
        "busybox cat /etc/resolv.conf >/out/text; echo x >/etc/resolv.conf",
    ))
    .unwrap();
    assert_eq!(status, 1, "it cannot be written to");
    assert_eq!(
        output(root.path(), "text"),
        fs::read_to_string("/etc/resolv.conf").unwrap()
    );
}

#[test]
fn signals_reach_the_program_and_orphans_are_reaped() {
    let root = rootfs();
    let script = "trap 'exit 42' TERM
        for i in 1 2 3; do (busybox true &); done
        while busybox ps -o stat | busybox grep -q Z; do :; done
        echo ready >/out/ready
        while :; do busybox sleep 0.05; done";
    let container = namespace::spawn(shell(root.path(), script)).unwrap();
    eventually(|| root.path().join("out/ready").exists());
    container.signals().unwrap().send(Signal::TERM).unwrap();
    assert_eq!(container.wait().unwrap(), 42);
}

#[test]
fn a_dropped_container_leaves_nothing() {
    let root = rootfs();
    let container =
        namespace::spawn(shell(root.path(), "echo >/out/ready; busybox sleep 1000")).unwrap();
    let process = PathBuf::from(format!("/proc/{}", container.pid()));
    eventually(|| root.path().join("out/ready").exists());
    assert!(process.exists());
    drop(container);
    assert!(!process.exists());
    let left = info::own().unwrap();
    assert!(left.iter().all(|mount| !mount.is_below(root.path())));
    root.close().unwrap();
}

#[test]
fn a_root_that_is_mounted_nowhere() {
    let root = rootfs();
    let mount_points = mount_points();
    let mount = Overlay {
        lowers: vec![
            Lower::Directory(mount_points.path().to_owned()),
            Lower::Directory(root.path().to_owned()),
        ],
        upper: None,
        devices: false,
        source: "socinbd-test".into(),
        by_mount_call: false,
    }
    .mount()
    .unwrap();
    let user = user::resolve(mount.as_fd(), "33").unwrap();
    assert_eq!(user.home.as_deref(), Some(Path::new("/srv")));
    let status = namespace::run(ContainerSpec {
        root: Root::Mount(mount),
        ..shell(
            root.path(),
            "busybox test -e /proc/self && busybox test -c /dev/null && ! echo x 2>/dev/null >/out/x",
        )
    })
    .unwrap();
    assert_eq!(status, 0);
}

#[test]
fn a_read_only_root_needs_no_mount_points() {
    let root = rootfs();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o751);
    fs::set_permissions(root.path(), mode).unwrap();
    let (empty, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(proc.path().join("proc")).unwrap();
    for second in [&empty, &proc] {
        let mount = Overlay {
            lowers: vec![
                Lower::Directory(root.path().to_owned()),
                Lower::Directory(second.path().to_owned()),
            ],
            upper: None,
            devices: false,
            source: "socinbd-test".into(),
            by_mount_call: false,
        };
        let status = namespace::run(ContainerSpec {
            root: Root::Mount(mount.mount().unwrap()),
            ..shell(
                root.path(),
                "busybox test -e /proc/self && echo x >/dev/null && busybox test -d /sys/kernel \
                && busybox test -f /etc/group && busybox stat -c %a / | busybox grep -qx 751 \
                && ! echo x 2>/dev/null >/out/x && ! busybox mkdir /x",
            )
        });
        assert_eq!(status.unwrap(), 0);
    }
}

#[test]
fn a_device_is_free_when_its_program_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let root = rootfs();
    let image = ext4_image(root.path(), &folder.path().join("root.ext4"));
    let file = fs::File::open(image).unwrap();
    let device = loopdev::attach(file.as_fd(), &LoopOptions::default()).unwrap();
    let mount_points = mount_points();
    // a namespace that goes late shows in some of the runs only
    for _ in 0..20 {
        let mount = Overlay {
            lowers: vec![
                Lower::Directory(mount_points.path().to_owned()),
                Lower::Mount(mount::ext4(device.path()).unwrap()),
            ],
            upper: None,
            devices: false,
            source: "socinbd-test".into(),
            by_mount_call: false,
        }
        .mount()
        .unwrap();
        assert!(blockdev::is_in_use(device.path()));
        let status = namespace::run(ContainerSpec {
            root: Root::Mount(mount),
            ..shell(root.path(), "(busybox sleep 1000 &) ; exit 3")
        });
        assert_eq!(status.unwrap(), 3);
        // a program that another test starts at this moment has our descriptors until it is exec'ed
        eventually(|| !blockdev::is_in_use(device.path()));
    }
}
