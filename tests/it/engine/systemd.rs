//! The daemon as a service of systemd itself, which runs in namespaces of its own, with no unit but those of the test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
};

use super::{Host, lifecycle::one_file_host};
use crate::support::{succeeds, wait};

/// Becomes systemd. The folder has the units and a cgroup file system, which is mounted in the folder `groups` before.
const BOOT: &str = r#"
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount --bind /etc /etc
mount -o remount,ro,bind /etc
mount -t tmpfs none /run
mkdir -p /run/systemd/system /run/lock
for unit in test sysinit basic shutdown; do printf '[Unit]\nDefaultDependencies=no\n' >"$0/$unit.target"; done
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
export container=other SYSTEMD_UNIT_PATH=/run/systemd/transient:$0
exec "$1" --system --unit=test.target --log-target=null --show-status=0
"#;

/// Makes a cgroup for systemd and goes there.
const ENTER: &str = r#"
set -e
# the copies of other tests' mounts, which would find their own in use
awk 'index($5, "/tmp/") == 1 { print $5 }' /proc/self/mountinfo | xargs -r -n 1 umount -q -l || true
mkdir -p "$0/groups"
mount -t cgroup2 none "$0/groups"
mkdir "$0/groups/$1"
echo $$ >"$0/groups/$1/cgroup.procs"
umount "$0/groups"
shift
exec "$@"
"#;

/// systemd, until this is dropped.
pub struct Systemd {
    unshare: Child,
    pid: u32,
    cgroup: String,
    folder: PathBuf,
}

impl Systemd {
    fn boot(host: &Host) -> Self {
        Self::boot_as(host, BOOT)
    }

    /// The folder of a host that the script of a boot gets.
    pub fn folder(host: &Host) -> PathBuf {
        host.mountpoint("units")
    }

    /// One that a script of sh becomes, in namespaces of its own. It gets a folder and the program of systemd, and finds a cgroup below its
    /// own root of cgroups.
    pub fn boot_as(host: &Host, script: &str) -> Self {
        let program = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
        let program = program.into_iter().find(|path| fs::exists(path).unwrap());
        let program = program.expect("this test needs systemd (scripts/setup test installs it)");
        let folder = Self::folder(host);
        let cgroup = folder.display().to_string().replace('/', "-");
        let unshare = Command::new("unshare")
            .args(["--mount", "sh", "-c", ENTER])
            .arg(&folder)
            .arg(&cgroup)
            .args("unshare --pid --fork --mount --uts --ipc --cgroup --kill-child sh -c".split(' '))
            .arg(script)
            .arg(&folder)
            .arg(program)
            .spawn()
            .unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let child = || {
            let children = fs::read_to_string(&children).unwrap();
            let child = children.trim().parse::<u32>().ok()?;
            let name = fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
            (name == "systemd\n").then_some(child)
        };
        wait("systemd is started", || child().is_some());
        let booted = Self {
            pid: child().unwrap(),
            unshare,
            cgroup,
            folder,
        };
        wait("systemd runs", || {
            let output = booted.run("systemctl", &["is-system-running"]);
            output.stdout == b"running\n"
        });
        booted
    }

    /// A command where systemd is.
    fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside
            .arg(format!("--target={}", self.pid))
            .args(["--mount", "--pid", "--uts", "--ipc", "--cgroup"])
            .arg(command.get_program())
            .args(command.get_args());
        inside.envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        inside
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        self.inside(command.args(arguments)).output().unwrap()
    }

    /// Runs the program socinbd, which must succeed; its standard output.
    fn socinbd(&self, host: &Host, arguments: &[&str]) -> String {
        let output = self.inside(&host.command(arguments)).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The unit of the daemon.
    fn unit(&self) -> String {
        let output = self.run(
            "systemctl",
            &["list-units", "--plain", "--no-legend", "socinbd-*"],
        );
        let text = String::from_utf8(output.stdout).unwrap();
        text.split(' ').next().unwrap().to_owned()
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let output = self.run("systemctl", &["show", "--value", "-p", name, unit]);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Sends a signal to the main process of a unit; its number where systemd is.
    fn signal(&self, unit: &str, signal: &str) -> String {
        let process = self.property(unit, "MainPID");
        assert_ne!(process, "0");
        let output = self.run("kill", &[&format!("-{signal}"), &process]);
        assert!(output.status.success());
        process
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // everything in its namespaces goes with it
        let _ = Command::new("kill")
            .args(["-KILL", &self.pid.to_string()])
            .status();
        let _ = self.unshare.wait();
        let remove = r#"
        mount -t cgroup2 none "$0/groups"
        find "$0/groups/$1" -depth -type d -exec rmdir {} \;"#;
        let remove = || {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", remove]);
            command.arg(&self.folder).arg(&self.cgroup);
            command.output().is_ok_and(|it| it.stderr.is_empty())
        };
        wait("its cgroup is removed", remove);
    }
}

#[test]
fn systemd_keeps_descriptors_and_replaces_daemons_that_die_or_hang() {
    let (host, layout, mountpoint) = one_file_host();
    let systemd = Systemd::boot(&host);
    let place = mountpoint.to_str().unwrap();
    systemd.socinbd(&host, &["attach", &layout.reference(""), place]);
    systemd.socinbd(&host, &["detach", place]);
    let unit = systemd.unit();
    let property = |name| systemd.property(&unit, name);
    assert_eq!(property("SubState"), "running");
    assert_eq!(property("NFileDescriptorStore"), "4");
    assert_eq!(property("WatchdogUSec"), "20s");
    assert!(host.keeper().is_none());
    // a crash loop, and systemd itself is executed anew meanwhile
    for turn in 1..=10 {
        let killed = systemd.signal(&unit, "KILL");
        systemd.socinbd(&host, &["list"]);
        assert_ne!(property("MainPID"), killed);
        assert_eq!(property("NRestarts"), turn.to_string());
        assert_eq!(property("NFileDescriptorStore"), "4");
        if turn == 5 {
            assert!(
                systemd
                    .run("systemctl", &["daemon-reexec"])
                    .status
                    .success()
            );
        }
    }
    let stopped = systemd.signal(&unit, "STOP");
    wait("it is replaced", || {
        !["0", &stopped].contains(&property("MainPID").as_str())
    });
    systemd.socinbd(&host, &["list"]);
    // a restart by hand, and a replacement by the same program: what is attached stays
    systemd.socinbd(&host, &["attach", &layout.reference(""), place]);
    let state = || systemd.socinbd(&host, &["--json", "list"]);
    let served = || serde_json::from_str::<serde_json::Value>(&state()).unwrap()[0].clone();
    let read = || systemd.run("cat", &[&format!("{place}/hello")]).stdout;
    for restart in [&["systemctl", "restart", &unit][..], &[]] {
        let restarted = property("MainPID");
        match restart {
            [program, arguments @ ..] => assert!(systemd.run(program, arguments).status.success()),
            [] => drop(systemd.socinbd(&host, &["daemon", "--replace"])),
        }
        assert_ne!(property("MainPID"), restarted);
        assert_eq!(
            served()["served_by"]["pid"].to_string(),
            property("MainPID")
        );
        assert_eq!(read(), b"hello\n");
    }
    // systemd starts the program of the unit, and no other
    let other = host.mountpoint("other").join("socinbd");
    succeeds(
        Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_socinbd"))
            .arg(&other),
    );
    let command = host.command(&["daemon", "--replace"]);
    let mut replace = Command::new(&other);
    replace.args(command.get_args());
    let refused = systemd.inside(&replace).output().unwrap();
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("the service manager starts"), "{error}");
    assert_eq!(refused.status.code(), Some(8));
    systemd.socinbd(&host, &["detach", place]);
    systemd.run("systemctl", &["stop", &unit]);
    wait("it is gone", || systemd.unit().is_empty());
    assert!(!host.run_dir().join("socinbd.sock").exists());
    drop(systemd);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_first_start_that_fails_is_not_repeated_by_systemd() {
    let (host, layout, mountpoint) = one_file_host();
    let systemd = Systemd::boot(&host);
    let layers = host.root().join("layers");
    fs::create_dir_all(&layers).unwrap();
    let taken = fs::File::create(layers.join("lock")).unwrap();
    taken.lock().unwrap();
    let place = mountpoint.to_str().unwrap();
    let image = layout.reference("");
    let arguments = ["attach", &image, place];
    let mut attach = systemd.inside(&host.command(&arguments)).spawn().unwrap();
    wait("it has failed", || host.run_dir().join("lock").exists());
    // one that is repeated has a unit for ever
    wait("its unit is gone", || systemd.unit().is_empty());
    drop(taken);
    // the command itself tries it again; on a slow machine it may have done so before
    if !attach.wait().unwrap().success() {
        systemd.socinbd(&host, &arguments);
    }
    systemd.socinbd(&host, &["detach", place]);
}

/// The units of the package, with the program and the directories of this test.
fn packaged_units(host: &Host, config: &str) -> PathBuf {
    let units = host.mountpoint("units");
    let packaged = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/systemd");
    for unit in ["socinbd.service", "socinbd.socket"] {
        fs::copy(packaged.join(unit), units.join(unit)).unwrap();
        fs::create_dir_all(units.join(format!("{unit}.d"))).unwrap();
    }
    let program = env!("CARGO_BIN_EXE_socinbd");
    let service = format!(
        "[Service]\nEnvironment=SOCINBD_CONFIG={config}\nExecStart=\nExecStart={program} daemon\n\
         ExecReload=\nExecReload={program} config reload\n"
    );
    fs::write(units.join("socinbd.service.d/test.conf"), service).unwrap();
    let run_dir = host.run_dir();
    let sockets = ["socinbd.sock", "mounts.sock"].map(|name| run_dir.join(name));
    let sockets = sockets.map(|path| format!("ListenStream={}\n", path.display()));
    let socket = format!("[Socket]\nListenStream=\n{}", sockets.concat());
    fs::write(units.join("socinbd.socket.d/test.conf"), socket).unwrap();
    units
}

#[test]
fn the_packaged_units_start_reload_restart_and_stop_the_daemon() {
    let (host, layout, mountpoint) = one_file_host();
    let config = host.mountpoint("etc").join("config.toml");
    let configure = |more: &str| {
        let (root, run_dir) = (host.root(), host.run_dir());
        let text =
            format!("[directories]\nroot = {root:?}\nrun-dir = {run_dir:?}\n[logging]\n{more}\n");
        fs::write(&config, text).unwrap();
    };
    configure("log = \"info\"");
    let units = packaged_units(&host, config.to_str().unwrap());
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(["socinbd.service", "socinbd.socket"].map(|unit| units.join(unit)))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && told.is_empty(), "{told}");

    let systemd = Systemd::boot(&host);
    let systemctl = |arguments: &[&str]| {
        let output = systemd.run("systemctl", arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), error)
    };
    let succeeds = |arguments: &[&str]| {
        let (is_well, error) = systemctl(arguments);
        assert!(is_well, "systemctl {arguments:?}: {error}");
    };
    let unit = "socinbd.service";
    let property = |name| systemd.property(unit, name);
    let level = || systemd.socinbd(&host, &["log-level"]);
    let socket = host.run_dir().join("socinbd.sock");
    // the first client starts it
    succeeds(&["start", "socinbd.socket"]);
    assert_eq!(property("MainPID"), "0");
    let place = mountpoint.to_str().unwrap();
    systemd.socinbd(&host, &["attach", &layout.reference(""), place]);
    assert_eq!(property("SubState"), "running");
    let read = || systemd.run("cat", &[&format!("{place}/hello")]).stdout;
    assert_eq!(read(), b"hello\n");
    let first = property("MainPID");
    // a reload, and one of a wrong file
    configure("log = \"socinbd=debug\"");
    succeeds(&["reload", unit]);
    assert_eq!(level(), "socinbd=debug\n");
    configure("log = debug");
    let (is_well, _) = systemctl(&["reload", unit]);
    assert!(!is_well);
    assert_eq!(
        (property("MainPID"), level()),
        (first.clone(), "socinbd=debug\n".to_owned())
    );
    // one that is killed is followed by one with the last good file
    systemd.signal(unit, "KILL");
    assert_eq!(level(), "socinbd=debug\n");
    assert_ne!(property("MainPID"), first);
    assert_eq!(read(), b"hello\n");
    configure("log = \"info\"");
    let second = property("MainPID");
    succeeds(&["restart", unit]);
    assert_ne!(property("MainPID"), second);
    assert_eq!(
        (level(), read()),
        ("info\n".to_owned(), b"hello\n".to_vec())
    );
    // the socket unit keeps its sockets
    systemd.socinbd(&host, &["detach", place]);
    succeeds(&["stop", unit]);
    assert!(socket.exists());
    assert_eq!(property("MainPID"), "0");
    assert_eq!(level(), "info\n");
    assert_ne!(property("MainPID"), "0");
    succeeds(&["stop", unit, "socinbd.socket"]);
    assert!(!socket.exists());
    // without a socket unit it has its own
    succeeds(&["start", unit]);
    assert_eq!(level(), "info\n");
    succeeds(&["stop", unit]);
    assert!(!socket.exists());
    // a first start that fails is not repeated
    configure("log = debug");
    assert!(!systemctl(&["start", unit]).0);
    wait("it is given up", || property("ActiveState") == "failed");
    assert_eq!(
        (property("ExecMainStatus"), property("NRestarts")),
        ("2".to_owned(), "0".to_owned())
    );
    drop(systemd);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn the_packaged_unit_has_the_properties_of_a_daemon_that_a_command_starts() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/systemd/socinbd.service");
    let unit = fs::read_to_string(path).unwrap();
    let source = include_str!("../../../src/cli/attached/start.rs");
    for property in [
        "Type=notify",
        "NotifyAccess=main",
        "TimeoutAbortSec=3",
        "TimeoutStopSec=30",
        "RestartSec=100ms",
        "StartLimitIntervalSec=0",
        "RestartKillSignal=SIGUSR2",
        "KillMode=mixed",
    ] {
        assert!(source.contains(&format!("\"{property}\"")), "{property}");
        assert!(unit.lines().any(|line| line == property), "{property}");
    }
    let number = |name: &str| {
        let line = unit
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.parse::<u64>().unwrap()
    };
    assert_eq!(
        number("FileDescriptorStoreMax="),
        socinbd::keeper::MAX_DESCRIPTORS as u64
    );
    assert_eq!(number("WatchdogSec="), socinbd::keeper::WATCHDOG.as_secs());
}
