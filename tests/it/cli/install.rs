//! `install` and `uninstall` on a root directory, with the containerds of the tests, and on a machine with a systemd of the test.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::{
    engine::Host,
    snapshotter::{
        Snapshotter,
        containerd::{Programs, built},
    },
    support::wait,
};

const MAIN: &str = "/etc/containerd/config.toml";
const UNIT: &str = "/etc/systemd/system/socinbd.service";

/// All files and directories below these that exist, with their modes.
pub(super) fn files_below(mut open: Vec<PathBuf>) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    while let Some(path) = open.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            open.extend(entries.map(|entry| entry.unwrap().path()));
        }
        let content = fs::read(&path).unwrap_or_default();
        found.insert(path, (metadata.permissions().mode(), content));
    }
    found
}

/// The root directory of a node.
struct Node {
    folder: TempDir,
}

impl Node {
    /// A node with a containerd and the libraries that it needs.
    fn new(containerd: &Path) -> Self {
        let node = Self {
            folder: TempDir::with_prefix("socinbd-node-").unwrap(),
        };
        node.program(containerd, "/usr/bin/containerd");
        node
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(&path[1..])
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn script(&self, path: &str, text: &str) {
        self.write(path, text);
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn read(&self, path: &str) -> String {
        let read = fs::read_to_string(self.path(path));
        read.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Puts a program of this machine on the node, with its libraries.
    fn program(&self, from: &Path, to: &str) {
        let copy = |from: &Path, to: &str| {
            let to = self.path(to);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            if !to.exists() && fs::hard_link(from, &to).is_err() {
                fs::copy(from, to).unwrap();
            }
        };
        copy(from, to);
        let output = Command::new("ldd").arg(from).output().unwrap();
        let libraries = String::from_utf8_lossy(&output.stdout).into_owned();
        for path in libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            let real = fs::canonicalize(path).unwrap();
            copy(&real, path);
        }
    }

    /// All files below `etc` and `usr/local`, with their modes.
    fn files(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        files_below(vec![self.path("/etc"), self.path("/usr/local")])
    }

    /// Runs socinbd with the addresses of a host on this node.
    fn socinbd(&self, host: &Host, arguments: &[&str]) -> Output {
        let mut command = host.command(&arguments[..1]);
        command.arg("--root-dir").arg(self.folder.path());
        command.args(&arguments[1..]).output().unwrap()
    }

    fn succeeds(&self, host: &Host, arguments: &[&str]) -> String {
        let output = self.socinbd(host, arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The containerd of a node, with its configuration and folders of its own.
struct Containerd(Child);

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// What `ctr plugins ls` says of the snapshotters and of CRI when a containerd runs with the configuration of the node.
fn plugins(node: &Node, programs: &Path) -> String {
    let state = TempDir::with_prefix("containerd-").unwrap();
    let path = |name: &str| state.path().join(name);
    let log = fs::File::create(path("log")).unwrap();
    let process = Command::new(programs.join("containerd"))
        .arg("--config")
        .arg(node.path(MAIN))
        .arg("--root")
        .arg(path("root"))
        .arg("--state")
        .arg(path("state"))
        .arg("--address")
        .arg(path("socket"))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut containerd = Containerd(process);
    let mut said = String::new();
    wait("containerd answers", || {
        let ended = containerd.0.try_wait().unwrap();
        assert!(
            ended.is_none(),
            "{}",
            fs::read_to_string(path("log")).unwrap()
        );
        let output = Command::new(programs.join("ctr"))
            .arg("--address")
            .arg(path("socket"))
            .args(["plugins", "ls"])
            .output()
            .unwrap();
        said = String::from_utf8(output.stdout).unwrap();
        output.status.success()
    });
    said
}

/// The state of a plugin of containerd.
fn state<'a>(plugins: &'a str, kind: &str, name: &str) -> Option<&'a str> {
    plugins.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.len() > 2 && words[..2] == [kind, name]).then(|| words[words.len() - 1])
    })
}

/// Installs and uninstalls on a node with this containerd; `before` is its configuration.
fn installed_and_back(programs: &Path, before: &str, expected: &[&str]) {
    let snapshotter = Snapshotter::start(&[]);
    let host = &snapshotter.host;
    let node = Node::new(&programs.join("containerd"));
    node.write(MAIN, before);
    fs::set_permissions(node.path(MAIN), fs::Permissions::from_mode(0o640)).unwrap();
    // that of a package
    node.script("/usr/bin/socinbd", "");
    node.write("/lib/systemd/system/socinbd.service", "");
    let files = node.files();

    let shown = node.succeeds(host, &["install", "--dry-run"]);
    assert!(shown.contains("+++ /etc/containerd/config.toml"), "{shown}");
    assert!(shown.contains("+[proxy_plugins.soci]"), "{shown}");
    assert!(node.files() == files, "--dry-run has changed files");
    let told = node.succeeds(host, &["install"]);
    assert!(told.contains("to do: `systemctl daemon-reload`"), "{told}");
    let after = node.read(MAIN);
    let lines: Vec<&str> = before
        .lines()
        .filter(|line| !after.contains(line))
        .collect();
    assert_eq!(lines, [""; 0], "{after}");
    for text in expected {
        assert!(after.contains(text), "{text}: {after}");
    }
    let unit = node.read("/etc/systemd/system/socinbd.service.d/containerd.conf");
    assert!(
        unit.contains("\nExecStart=/usr/bin/socinbd --root "),
        "{unit}"
    );
    assert!(unit.contains(" snapshotter\n"), "{unit}");
    let plugins = plugins(&node, programs);
    let ours = state(&plugins, "io.containerd.snapshotter.v1", "soci");
    assert_eq!(ours, Some("ok"), "{plugins}");

    let installed = node.files();
    let again = node.succeeds(host, &["install"]);
    assert_eq!(again, "nothing to change\n");
    assert!(
        node.files() == installed,
        "the second installation has changed files"
    );
    node.succeeds(host, &["uninstall"]);
    assert!(
        node.files() == files,
        "{:?}\n{:?}",
        node.files().keys(),
        files.keys()
    );
    assert_eq!(node.succeeds(host, &["uninstall"]), "nothing to change\n");
    snapshotter.end();
}

#[test]
fn the_containerd_of_the_system_is_configured_and_restored() {
    let before = "# of Debian\nversion = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    # why\n    \
        [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n  \
        [plugins.\"io.containerd.internal.v1.opt\"]\n    path = \"/var/lib/containerd/opt\" # away\n";
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"soci\"\ndisable_snapshot_annotations = false\n";
    installed_and_back(Path::new("/usr/bin"), before, &[cri]);
}

/// The configuration that a containerd makes of its files in the root directory of a node.
fn dumped(node: &Node, containerd: &str, config: &str) -> toml::Table {
    let output = Command::new("chroot")
        .arg(node.folder.path())
        .args([containerd, "--config", config, "config", "dump"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.parse()
        .unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Whether containerd asks the snapshotter for images of CRI, with labels.
fn is_used(config: &toml::Table) -> bool {
    let plugins = &config["plugins"];
    let images = plugins.get("io.containerd.cri.v1.images");
    let cri = images.unwrap_or_else(|| &plugins["io.containerd.grpc.v1.cri"]["containerd"]);
    cri["snapshotter"].as_str() == Some("soci")
        && cri["disable_snapshot_annotations"].as_bool() == Some(false)
        && config["proxy_plugins"]["soci"]["type"].as_str() == Some("snapshot")
}

#[test]
fn every_format_that_containerd_reads_is_configured() {
    let programs = built();
    let host = Host::new();
    let default = Command::new(programs.join("containerd"))
        .args(["config", "default"])
        .output()
        .unwrap();
    let default = String::from_utf8(default.stdout).unwrap();
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"pause\"\n";
    let runtimes = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"overlayfs\"\n\
        [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.other]\nruntime_type = \"io.containerd.runc.v2\"\n";
    let mut files = vec![
        default,
        format!("version = 2\n{cri}"),
        format!("version = 2\n{cri}{runtimes}"),
    ];
    if Programs::built().version >= (2, 0) {
        files.push("version = 3\n".to_owned());
        files.push(format!(
            "version = 2\nimports = [\"conf.d/*.toml\"]\n{cri}{runtimes}"
        ));
    }
    for main in files {
        let node = Node::new(&programs.join("containerd"));
        node.write(MAIN, &main);
        node.script("/usr/bin/socinbd", "");
        let files = node.files();
        node.succeeds(&host, &["install"]);
        let config = dumped(&node, "/usr/bin/containerd", MAIN);
        assert!(is_used(&config), "{main}\n{config}");
        node.succeeds(&host, &["uninstall"]);
        assert!(node.files() == files, "{main}");
    }
}

#[test]
fn k3s_has_the_settings_in_its_drop_ins() {
    const DATA: &str = "/var/lib/rancher/k3s";
    if Programs::built().version < (2, 0) {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let host = Host::new();
    let node = Node {
        folder: TempDir::with_prefix("socinbd-node-").unwrap(),
    };
    let program = format!("{DATA}/data/current/bin/containerd");
    node.program(&built().join("containerd"), &program);
    let folder = format!("{DATA}/agent/etc/containerd");
    let main = format!("{folder}/config.toml");
    let written = format!(
        "# File generated by k3s. DO NOT EDIT. Use config-v3.toml.tmpl instead.\nversion = 3\n\
        imports = [\"{folder}/config-v3.toml.d/*.toml\"]\nroot = \"{DATA}/agent/containerd\"\n\
        state = \"/run/k3s/containerd\"\n\n[grpc]\n  address = \"/run/k3s/containerd/containerd.sock\"\n\n\
        [plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"overlayfs\"\n  \
        disable_snapshot_annotations = true\n  use_local_image_pull = true\n"
    );
    node.write(&main, &written);
    node.write("/etc/systemd/system/k3s-agent.service", "");
    node.write(&format!("{folder}/certs.d/_default/hosts.toml"), "");
    node.script("/usr/bin/socinbd", "");
    assert!(!is_used(&dumped(&node, &program, &main)));
    let files = node.files();
    let drop_in = format!("{folder}/config-v3.toml.d/socinbd.toml");

    let shown = node.succeeds(&host, &["install", "--dry-run"]);
    assert!(shown.contains(&format!("+++ {drop_in}")), "{shown}");
    assert!(node.files() == files && !node.path(&drop_in).exists());
    let told = node.succeeds(&host, &["install"]);
    let last = "`systemctl restart socinbd`, `systemctl try-restart k3s-agent`, in this order\n";
    assert!(told.ends_with(last), "{told}");
    assert_eq!(node.read(&main), written);
    assert!(is_used(&dumped(&node, &program, &main)));
    let hosts = format!(" snapshotter --hosts-dir {folder}/certs.d\n");
    assert!(node.read(UNIT).contains(&hosts));
    let after = node.read("/etc/systemd/system/k3s-agent.service.d/socinbd.conf");
    assert!(after.contains("After=socinbd.service"), "{after}");
    // k3s starts again
    node.write(&main, &written);
    assert_eq!(node.succeeds(&host, &["install"]), "nothing to change\n");
    let told = node.succeeds(&host, &["uninstall"]);
    assert!(told.contains("`systemctl try-restart k3s-agent`"), "{told}");
    assert!(node.files() == files);
    assert!(!node.path(&drop_in).parent().unwrap().exists());
}

#[test]
fn containerd_2_4_is_configured_by_a_file_of_its_own_and_restored() {
    let version = Programs::built().version;
    if version < (2, 0) {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let programs = built();
    let snapshotter = Snapshotter::start(&[]);
    let host = &snapshotter.host;
    let node = Node::new(&programs.join("containerd"));
    node.write(
        "/etc/containerd/conf.d/cri.toml",
        "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\nmax_concurrent_downloads = 7\n",
    );
    node.write(MAIN, "version = 3\nimports = [\"conf.d/*.toml\"] # mine\n");
    let files = node.files();
    let told = node.succeeds(host, &["install"]);
    assert!(
        told.starts_with("program: /usr/local/bin/socinbd\n"),
        "{told}"
    );
    assert_eq!(
        node.read(MAIN),
        "version = 3\nimports = [\"conf.d/*.toml\"] # mine\n"
    );
    let own = node.read("/etc/containerd/conf.d/socinbd.toml");
    let rebases = own.contains("capabilities = [\"rebase\"]");
    assert_eq!(rebases, version >= (2, 4), "{own}");
    let unit = node.read(UNIT);
    assert!(
        unit.contains("\nExecStart=/usr/local/bin/socinbd --root "),
        "{unit}"
    );
    assert!(!unit.contains("/usr/bin/socinbd"), "{unit}");
    assert!(node.path("/usr/local/bin/socinbd").exists());
    let plugins = plugins(&node, &programs);
    for (kind, name) in [
        ("io.containerd.snapshotter.v1", "soci"),
        ("io.containerd.snapshotter.v1", "overlayfs"),
        ("io.containerd.transfer.v1", "local"),
        ("io.containerd.cri.v1", "images"),
    ] {
        assert_eq!(
            state(&plugins, kind, name),
            Some("ok"),
            "{kind} {name}: {plugins}"
        );
    }
    assert_eq!(node.succeeds(host, &["install"]), "nothing to change\n");
    // what was changed by hand is kept
    node.write("/etc/containerd/conf.d/socinbd.toml", "# mine\n");
    let told = node.succeeds(host, &["uninstall"]);
    let saved = "/etc/containerd/conf.d/socinbd.toml.saved";
    assert!(
        told.contains(&format!("changes by hand: {saved}")),
        "{told}"
    );
    assert_eq!(node.read(saved), "# mine\n");
    fs::remove_file(node.path(saved)).unwrap();
    assert!(
        node.files() == files,
        "{:?}\n{:?}",
        node.files().keys(),
        files.keys()
    );
    snapshotter.end();
}

#[test]
fn snapshots_and_foreign_plugins_are_in_the_way() {
    let host = Host::new();
    let node = Node {
        folder: TempDir::with_prefix("socinbd-node-").unwrap(),
    };
    let fails = |arguments: &[&str], status: i32| {
        let output = node.socinbd(&host, arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{error}");
        error
    };
    let error = fails(&["install"], 3);
    assert!(
        error.contains(
            "containerd is not installed: install it first, or give --containerd-version"
        ),
        "{error}"
    );
    let soci =
        "version = 2\n[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = \"/run/soci.sock\"\n";
    node.write(MAIN, soci);
    node.script("/usr/bin/socinbd", "");
    let files = node.files();
    let error = fails(&["install", "--containerd-version", "1.7"], 8);
    assert!(
        error.contains("has a plugin soci at /run/soci.sock"),
        "{error}"
    );
    assert!(node.files() == files);
    node.succeeds(
        &host,
        &["install", "--containerd-version", "1.7", "--replace"],
    );
    let record = host.root().join("snapshots/snapshotter/7/record.json");
    let record = node.path(record.to_str().unwrap());
    fs::create_dir_all(record.parent().unwrap()).unwrap();
    let error = fails(&["uninstall"], 6);
    assert!(
        error.contains("1 snapshots of containerd: remove their containers and images first"),
        "{error}"
    );
    node.succeeds(&host, &["uninstall", "--force"]);
    assert!(node.files() == files);
}

/// systemctl that writes down what it was asked to do; a restart of containerd shows it its configuration. The process of the daemon is the one
/// that asks, if no file says another.
const SYSTEMCTL: &str = "#!/bin/sh\n[ \"$1\" != show ] || { cat \"/$4\" || echo $PPID; exit; }\necho \"$@\" >>/calls\n[ \"$2\" != containerd.service ] || cp /etc/containerd/config.toml /seen\n";
/// ctr that knows the plugin if containerd has seen it.
const CTR: &str = "#!/bin/sh\necho TYPE ID PLATFORMS STATUS\n! grep -q soci /seen || echo io.containerd.snapshotter.v1 soci - $(cat /state)\n";

/// The root directory of a machine with this systemctl, and the socket of its snapshotter.
fn machine() -> (Node, UnixListener) {
    let node = Node {
        folder: TempDir::with_prefix("socinbd-node-").unwrap(),
    };
    node.program(Path::new("/bin/busybox"), "/bin/busybox");
    for name in ["sh", "cp", "cat", "grep"] {
        std::os::unix::fs::symlink("busybox", node.path("/bin").join(name)).unwrap();
    }
    node.program(Path::new(env!("CARGO_BIN_EXE_socinbd")), "/usr/bin/socinbd");
    node.script("/bin/systemctl", SYSTEMCTL);
    for folder in ["/proc", "/run/systemd/system", "/run/socinbd", "/tmp"] {
        fs::create_dir_all(node.path(folder)).unwrap();
    }
    let daemon = UnixListener::bind(node.path("/run/socinbd/snapshotter.sock")).unwrap();
    (node, daemon)
}

/// Runs socinbd on a machine. Returns its status and output, and what systemctl was asked for.
fn run_on(node: &Node, arguments: &[&str]) -> (Option<i32>, String, String) {
    let _ = fs::remove_file(node.path("/calls"));
    let output = Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            "mount -t proc proc \"$0/proc\" && exec chroot \"$0\" /usr/bin/socinbd \"$@\"",
        ])
        .arg(node.folder.path())
        .args(arguments)
        .env("PATH", "/bin:/usr/bin:/usr/sbin")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let calls = fs::read_to_string(node.path("/calls")).unwrap_or_default();
    (
        output.status.code(),
        text(&output.stdout) + &text(&output.stderr),
        calls,
    )
}

#[test]
fn k3s_is_restarted_and_asked() {
    let (node, _daemon) = machine();
    let programs = "/var/lib/rancher/k3s/data/current/bin";
    node.script(
        &format!("{programs}/containerd"),
        "#!/bin/sh\necho containerd github.com/k3s-io/containerd v2.3.4-k3s1 05044ec0\n",
    );
    node.script(
        &format!("{programs}/ctr"),
        "#!/bin/sh\n[ \"$2\" != /run/k3s/containerd/containerd.sock ] || echo io.containerd.snapshotter.v1 soci - ok\n",
    );
    let folder = "/var/lib/rancher/k3s/agent/etc/containerd";
    let written = format!("version = 3\nimports = [\"{folder}/config-v3.toml.d/*.toml\"]\n");
    node.write(&format!("{folder}/config.toml"), &written);
    node.write("/etc/systemd/system/k3s.service", "");
    let files = node.files();
    let restarts =
        "daemon-reload\nrestart socinbd.service\ndaemon-reload\ntry-restart k3s.service\n";
    let (status, said, calls) = run_on(&node, &["install"]);
    assert_eq!((status, calls.as_str()), (Some(0), restarts), "{said}");
    let settings = node.read(&format!("{folder}/config-v3.toml.d/socinbd.toml"));
    assert!(
        settings.contains("snapshotter = \"soci\"") && !settings.contains("rebase"),
        "{settings}"
    );
    let (status, said, calls) = run_on(&node, &["uninstall"]);
    let back = "daemon-reload\ntry-restart k3s.service\nstop socinbd.service\n";
    assert_eq!((status, calls.as_str()), (Some(0), back), "{said}");
    assert!(node.files() == files);
}

#[test]
fn services_are_restarted_and_checked_and_a_failure_takes_all_back() {
    let (node, _daemon) = machine();
    node.script(
        "/usr/bin/containerd",
        "#!/bin/sh\necho containerd github.com/containerd/containerd v1.7.27 05044ec0\n",
    );
    node.script("/bin/ctr", CTR);
    node.write(MAIN, "version = 2\n");
    let files = node.files();
    let run = |arguments: &[&str]| run_on(&node, arguments);
    let restarts =
        "daemon-reload\nrestart socinbd.service\ndaemon-reload\nrestart containerd.service\n";
    let back = "daemon-reload\nrestart containerd.service\n";

    // no daemon was there before
    node.write("/MainPID", "0");
    node.write("/state", "error");
    let (status, said, calls) = run(&["install"]);
    assert_eq!(status, Some(5), "{said}");
    assert!(
        said.contains("containerd does not use the snapshotter; its configuration was restored"),
        "{said}"
    );
    assert_eq!(calls, format!("{restarts}stop socinbd.service\n{back}"));
    assert_eq!(node.read("/seen"), "version = 2\n");
    assert_eq!(node.files(), files);
    // one that was there goes on with what it had
    fs::remove_file(node.path("/MainPID")).unwrap();
    let (status, said, calls) = run(&["install"]);
    assert_eq!(status, Some(5), "{said}");
    let daemon = "daemon-reload\nrestart socinbd.service\n";
    assert_eq!(calls, format!("{restarts}{daemon}{back}"));
    assert_eq!(node.files(), files);

    node.write("/state", "ok");
    let (status, said, calls) = run(&["install"]);
    assert_eq!((status, calls.as_str()), (Some(0), restarts), "{said}");
    assert!(
        said.ends_with("\ncontainerd has the plugin soci\n"),
        "{said}"
    );
    assert!(
        node.read("/seen")
            .contains("address = \"/run/socinbd/snapshotter.sock\"")
    );
    assert!(
        node.read(UNIT)
            .contains("\nExecStart=/usr/bin/socinbd snapshotter\n")
    );
    let (status, said, calls) = run(&["install"]);
    assert_eq!((status, calls.as_str()), (Some(0), ""), "{said}");
    // a daemon that runs the program of before, or none
    for process in [std::process::id(), 0] {
        node.write("/MainPID", &process.to_string());
        let (status, said, calls) = run(&["install"]);
        assert_eq!((status, calls.as_str()), (Some(0), daemon), "{said}");
        assert!(said.contains("the daemon was started anew"), "{said}");
    }
    let (status, said, calls) = run(&["uninstall"]);
    assert_eq!(
        (status, calls),
        (Some(0), format!("{back}stop socinbd.service\n")),
        "{said}"
    );
    assert_eq!(node.files(), files);
    // a service that has ended and has no unit cannot be stopped
    assert_eq!(run(&["install"]).0, Some(0));
    node.write("/ActiveState", "inactive");
    let (status, said, calls) = run(&["uninstall"]);
    assert_eq!((status, calls.as_str()), (Some(0), back), "{said}");
    assert_eq!(node.read("/seen"), "version = 2\n");
}
