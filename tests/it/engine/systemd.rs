//! The daemon as a service of systemd itself, which runs in namespaces of its own, with no unit but those of the test.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Output},
};

use super::{Host, lifecycle::one_file_host};
use crate::support::wait;

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
struct Systemd {
    unshare: Child,
    pid: u32,
    cgroup: String,
    folder: PathBuf,
}

impl Systemd {
    fn boot(host: &Host) -> Self {
        let program = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
        let program = program.into_iter().find(|path| fs::exists(path).unwrap());
        let program = program.expect("this test needs systemd (scripts/setup test installs it)");
        let folder = host.mountpoint("units");
        let cgroup = folder.display().to_string().replace('/', "-");
        let unshare = Command::new("unshare")
            .args(["--mount", "sh", "-c", ENTER])
            .arg(&folder)
            .arg(&cgroup)
            .args("unshare --pid --fork --mount --uts --ipc --cgroup --kill-child sh -c".split(' '))
            .arg(BOOT)
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

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        self.inside(command.args(arguments)).output().unwrap()
    }

    /// Runs the program socinbd, which must succeed.
    fn socinbd(&self, host: &Host, arguments: &[&str]) {
        let output = self.inside(&host.command(arguments)).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
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
    fn property(&self, unit: &str, name: &str) -> String {
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
    assert_eq!(property("NFileDescriptorStore"), "2");
    assert_eq!(property("WatchdogUSec"), "20s");
    assert!(host.keeper().is_none());
    // a crash loop, and systemd itself is executed anew meanwhile
    for turn in 1..=10 {
        let killed = systemd.signal(&unit, "KILL");
        systemd.socinbd(&host, &["list"]);
        assert_ne!(property("MainPID"), killed);
        assert_eq!(property("NRestarts"), turn.to_string());
        assert_eq!(property("NFileDescriptorStore"), "2");
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
    // a restart by hand, and then the end
    let restarted = property("MainPID");
    systemd.run("systemctl", &["restart", &unit]);
    assert_ne!(property("MainPID"), restarted);
    systemd.socinbd(&host, &["attach", &layout.reference(""), place]);
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
    fs::create_dir_all(host.run_dir().join("mounts.sock/x")).unwrap();
    let place = mountpoint.to_str().unwrap();
    let image = layout.reference("");
    let arguments = ["attach", &image, place];
    let mut attach = systemd.inside(&host.command(&arguments)).spawn().unwrap();
    wait("it has failed", || host.run_dir().join("lock").exists());
    // one that is repeated has a unit for ever
    wait("its unit is gone", || systemd.unit().is_empty());
    fs::remove_dir_all(host.run_dir().join("mounts.sock")).unwrap();
    // the command itself tries it again; on a slow machine it may have done so before
    if !attach.wait().unwrap().success() {
        systemd.socinbd(&host, &arguments);
    }
    systemd.socinbd(&host, &["detach", place]);
}
