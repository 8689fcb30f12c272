//! `install` on a node that systemd has booted: with containerd, containers that read on, the init container for Kubernetes, and back.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use serde_json::Value;
use socinbd::oci::Digest;

use super::install::files_below;
use crate::{
    engine::{Host, systemd::Systemd},
    snapshotter::{
        containerd::{Programs, built},
        image::Image,
        node::base,
    },
    support::{
        registry::{Link, Registry},
        seeded_noise,
        tars::Layer,
        wait,
    },
};

/// Becomes the node: its root has the programs of this machine, and its own /etc, /root, /usr/local, /var and units, which are directories of
/// the folder.
const BOOT: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs none "$0/node"
cd "$0/node"
mkdir dev etc old proc root run sys tmp usr var
for name in bin lib lib64 sbin; do [ ! -e "/$name" ] || ln -s "usr/$name" "$name"; done
mount --bind /usr usr
mount -o remount,ro,bind usr
mount --bind "$0/units" usr/lib/systemd/system
for name in etc root usr/local var; do mount --bind "$0/$name" "$name"; done
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
umount -R sys/fs/cgroup
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none run
mkdir run/lock
cat /proc/sys/kernel/random/uuid >run/boot
mount --bind run/boot proc/sys/kernel/random/boot_id
pivot_root . old
umount -l old
export container=other
exec "$1" --system --log-target=null --show-status=0
"#;

const SOCINBD: &str = "/usr/local/bin/socinbd";
const CONTAINERD: &str = "[Unit]\nAfter=network.target local-fs.target\n\
    [Service]\nExecStart=/usr/local/bin/containerd\nType=notify\nDelegate=yes\nKillMode=process\nRestart=always\nRestartSec=5\n\
    [Install]\nWantedBy=multi-user.target\n";
/// containerd does not come up with the snapshotter.
const FAILING: &str =
    "[Service]\nExecStartPre=/bin/sh -c '! grep -q soci /etc/containerd/config.toml'\n";
const FAILING_PATH: &str = "etc/systemd/system/containerd.service.d/failing.conf";
/// Reads each file of the image, and says what it reads.
const READER: &str = "cd /data; for name in $(/bin/busybox seq 100 399); do \
    /bin/busybox sha256sum $name; done >>/volume/read 2>&1; echo end >>/volume/read; exec /bin/busybox sleep 1000000";
const FILE: usize = 32_768;

/// A node, with systemd while it is on.
struct Node {
    systemd: Option<Systemd>,
    host: Host,
    folder: PathBuf,
}

impl Node {
    fn new() -> Self {
        let host = Host::new();
        let folder = Systemd::folder(&host);
        for name in [
            "etc/containerd",
            "etc/systemd/system/multi-user.target.wants",
            "node",
            "root",
            "units",
            "usr/local/bin",
            "var/tmp",
        ] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        let node = Self {
            systemd: None,
            host,
            folder,
        };
        for name in ["passwd", "group", "ld.so.cache"] {
            fs::copy(Path::new("/etc").join(name), node.path("etc").join(name)).unwrap();
        }
        node.write("etc/machine-id", "6c34b4b1b1b14c8fa1d2f9a1c0ffee00\n");
        node.write("etc/resolv.conf", "");
        node.write("etc/hosts", "127.0.0.1 localhost\n");
        node.write("etc/containerd/config.toml", "# mine\nversion = 3\n");
        node.write("etc/systemd/system/containerd.service", CONTAINERD);
        std::os::unix::fs::symlink(
            "../containerd.service",
            node.path("etc/systemd/system/multi-user.target.wants/containerd.service"),
        )
        .unwrap();
        for (name, more) in [
            ("sysinit", ""),
            ("basic", "Requires=sysinit.target\nAfter=sysinit.target\n"),
            ("multi-user", "Requires=basic.target\nAfter=basic.target\n"),
            ("shutdown", ""),
        ] {
            let unit = format!("[Unit]\nDefaultDependencies=no\n{more}");
            node.write(&format!("units/{name}.target"), &unit);
        }
        std::os::unix::fs::symlink("multi-user.target", node.path("units/default.target")).unwrap();
        for name in ["containerd", "ctr", "containerd-shim-runc-v2"] {
            node.program(&built().join(name), &format!("usr/local/bin/{name}"));
        }
        node.program(Path::new(env!("CARGO_BIN_EXE_socinbd")), "root/socinbd");
        node
    }

    fn boot(&mut self) {
        self.systemd = Some(Systemd::boot_as(&self.host, BOOT));
        assert_eq!(self.property("containerd", "ActiveState"), "active");
    }

    /// Cuts the power.
    fn cut(&mut self) {
        self.systemd = None;
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn program(&self, from: &Path, to: &str) {
        let to = self.path(to);
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).unwrap();
        }
    }

    /// All below `etc`, with the modes.
    fn files(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        files_below(vec![self.path("etc")])
    }

    fn output(&self, program: &str, arguments: &[&str]) -> Output {
        self.systemd.as_ref().unwrap().run(program, arguments)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.output(program, arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {error}\n{}",
            self.units()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn units(&self) -> String {
        let output = self.output("systemctl", &["list-units", "--all", "--no-legend"]);
        String::from_utf8(output.stdout).unwrap()
    }

    fn systemctl(&self, arguments: &[&str]) {
        self.run("systemctl", arguments);
    }

    fn ctr(&self, arguments: &[&str]) -> String {
        self.run("/usr/local/bin/ctr", arguments)
    }

    /// Runs socinbd, which ends with this status; what it says.
    fn socinbd(&self, program: &str, arguments: &[&str], status: i32) -> String {
        let output = self.output(program, arguments);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        said
    }

    fn property(&self, unit: &str, name: &str) -> String {
        self.systemd.as_ref().unwrap().property(unit, name)
    }

    /// The state of the plugin.
    fn plugin(&self) -> Option<String> {
        let plugins = self.ctr(&["plugins", "ls"]);
        let mut lines = plugins.lines().map(str::split_whitespace);
        let line = lines.find(|line| line.clone().nth(1) == Some("soci"));
        line.and_then(|line| line.last().map(str::to_owned))
    }

    /// Starts a container, with these options and the network of the node.
    fn start(&self, options: &[&str], image: &str, name: &str, program: &[&str]) {
        // of cgroup controllers the node has none
        let run = ["run", "--detach", "--cpu-shares", "0", "--net-host"];
        self.ctr(&[&run, options, &[image, name], program].concat());
    }

    /// Runs the init container of the manifest, with a program that is not yet on the node.
    fn init_container(&self, image: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kubernetes/install.yaml");
        let text = fs::read_to_string(path).unwrap();
        let set: Value = serde_saphyr::from_str(text.split("\n---\n").nth(1).unwrap()).unwrap();
        let init = &set["spec"]["template"]["spec"]["initContainers"][0];
        let command: Vec<_> = init["command"].as_array().unwrap().iter().collect();
        let command: Vec<_> = command.iter().map(|word| word.as_str().unwrap()).collect();
        let options = [
            "--privileged",
            "--with-ns",
            "pid:/proc/1/ns/pid",
            "--mount",
            "type=bind,src=/usr/local/bin,dst=/host/usr/local/bin,options=rbind:rw",
            // as if it were in the image
            "--mount",
            "type=bind,src=/root/socinbd,dst=/usr/bin/socinbd,options=bind:ro",
        ];
        self.start(&options, image, "init", &command);
        wait("the init container has ended", || {
            let tasks = self.output("/usr/local/bin/ctr", &["task", "ls"]);
            String::from_utf8(tasks.stdout).unwrap().contains("STOPPED")
        });
        // with its status
        self.ctr(&["task", "rm", "init"]);
        self.ctr(&["container", "rm", "init"]);
    }

    /// What the reader has read.
    fn lines(&self) -> usize {
        let read = fs::read_to_string(self.path("root/read")).unwrap_or_default();
        read.lines().count()
    }

    /// Waits until the reader has read more.
    fn reads_on(&self, after: &str) {
        let before = self.lines();
        wait(&format!("the container reads on after {after}"), || {
            self.lines() > before + 1
        });
    }
}

/// An image whose container reads for a while, and the lines that it then has written.
fn reader(registry: &Registry) -> (Image, String) {
    let mut layer = base().directory("data", 0o755);
    let mut lines = String::new();
    for name in 100..400 {
        let content = seeded_noise(FILE, name);
        let digest = Digest::of(&content).to_string();
        lines += &format!("{}  {name}\n", digest.trim_start_matches("sha256:"));
        layer = layer.file(&format!("data/{name}"), &content);
    }
    (
        Image::push(registry, "app", vec![layer], true),
        lines + "end\n",
    )
}

/// The image of the init container.
fn installer(registry: &Registry) -> Image {
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    let mut layer = Layer::new()
        .directory("bin", 0o755)
        .program("bin/busybox", &busybox);
    for name in ["cp", "mv", "nsenter", "sh"] {
        layer = layer.symlink(&format!("bin/{name}"), "busybox");
    }
    for place in ["dev", "host", "proc", "sys", "usr", "usr/bin"] {
        layer = layer.directory(place, 0o755);
    }
    Image::push(registry, "installer", vec![layer], false)
}

#[test]
fn a_node_with_systemd_is_installed_upgraded_booted_and_uninstalled() {
    if Programs::built().version < (2, 0) {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let registry = Registry::start();
    let (app, lines) = reader(&registry);
    let installer = installer(&registry).reference;
    let mut node = Node::new();
    node.boot();

    // an installation that fails leaves nothing
    let before = node.files();
    node.write(FAILING_PATH, FAILING);
    let failing = node.files();
    let said = node.socinbd("/root/socinbd", &["install"], 5);
    assert!(said.contains("its configuration was restored"), "{said}");
    assert_eq!(node.files(), failing);
    assert_eq!(node.property("socinbd", "LoadState"), "not-found");
    assert_eq!(node.property("socinbd", "ActiveState"), "inactive");
    assert_eq!(node.property("containerd", "ActiveState"), "active");
    fs::remove_dir_all(node.path(FAILING_PATH).parent().unwrap()).unwrap();
    node.systemctl(&["daemon-reload"]);

    node.ctr(&["image", "pull", "--plain-http", &installer]);
    node.init_container(&installer);
    assert_eq!(node.plugin().as_deref(), Some("ok"));
    assert_eq!(node.property("socinbd", "ActiveState"), "active");

    // small images are lazy too
    node.write(
        "etc/socinbd/config.toml",
        "[[snapshotter.rule]]\npull = \"lazy\"\n",
    );
    node.systemctl(&["restart", "socinbd"]);
    let pull = ["image", "pull", "--plain-http", "--snapshotter", "soci"];
    node.ctr(&[&pull[..], &[&app.reference]].concat());
    // from now on
    registry.set_link(Link {
        round_trip: Duration::ZERO,
        bytes_per_second: 200_000,
    });
    let options = [
        "--snapshotter",
        "soci",
        "--mount",
        "type=bind,src=/root,dst=/volume,options=rbind:rw",
    ];
    let program = ["/bin/busybox", "sh", "-c", READER];
    node.start(&options, &app.reference, "reader", &program);
    node.reads_on("its start");
    let listed = node.run(SOCINBD, &["list", "--snapshots"]);
    assert!(listed.contains("  lazy  "), "{listed}");
    let process = |unit| node.property(unit, "MainPID");
    for command in [
        "restart containerd",
        "restart socinbd",
        "kill --signal=KILL socinbd",
        "daemon-reexec",
        "kill --signal=KILL socinbd",
    ] {
        let daemon = process("socinbd");
        node.systemctl(&command.split(' ').collect::<Vec<_>>());
        wait("the next daemon is ready", || {
            !command.ends_with(" socinbd")
                || (process("socinbd") != daemon
                    && node.property("socinbd", "ActiveState") == "active")
        });
        node.reads_on(command);
    }
    assert_eq!(node.property("socinbd", "NRestarts"), "2");
    // another program takes over, and containerd is left alone
    let (daemon, containerd) = (process("socinbd"), process("containerd"));
    node.init_container(&installer);
    node.reads_on("the upgrade");
    assert_ne!(process("socinbd"), daemon);
    assert_eq!(process("containerd"), containerd);
    let running = node.run(
        "stat",
        &[
            "-L",
            "-c",
            "%i",
            &format!("/proc/{}/exe", process("socinbd")),
        ],
    );
    let installed = fs::metadata(node.path("usr/local/bin/socinbd")).unwrap();
    assert_eq!(running.trim(), installed.ino().to_string());
    let said = node.socinbd(SOCINBD, &["uninstall"], 6);
    assert!(
        said.contains("remove their containers and images first"),
        "{said}"
    );

    node.cut();
    node.boot();
    let started = |unit| -> u64 {
        let time = node.property(unit, "ActiveEnterTimestampMonotonic");
        time.parse().unwrap()
    };
    let (daemon, containerd) = (started("socinbd"), started("containerd"));
    assert!(0 < daemon && daemon < containerd, "{daemon} {containerd}");
    registry.set_link(Link::default());
    fs::remove_file(node.path("root/read")).unwrap();
    node.ctr(&["task", "start", "--detach", "reader"]);
    wait("the container has read all", || {
        node.lines() == lines.lines().count()
    });
    assert_eq!(fs::read_to_string(node.path("root/read")).unwrap(), lines);

    node.ctr(&["task", "rm", "--force", "reader"]);
    node.ctr(&["container", "rm", "reader"]);
    node.ctr(&["image", "rm", "--sync", &app.reference]);
    fs::remove_file(node.path("etc/socinbd/config.toml")).unwrap();
    node.systemctl(&["stop", "socinbd"]);
    node.socinbd(SOCINBD, &["uninstall"], 0);
    assert_eq!(node.files(), before);
    assert_eq!(node.plugin(), None);
    assert_eq!(node.property("socinbd", "LoadState"), "not-found");
    assert_eq!(node.property("containerd", "ActiveState"), "active");
    node.cut();
    assert_eq!(node.host.left_over(), [""; 0]);
}
