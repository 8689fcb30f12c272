//! The daemon and its callers: how it is started, and callers from another mount namespace.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
};

use super::{
    Host,
    lifecycle::{SLEEP, asleep, indexed, one_file, one_file_host, sitting_in},
};
use crate::{
    soci::make::MadeLayout,
    support::{
        registry::{Fault, On, Registry, Times},
        succeeds,
        tars::Layer,
        unmount, wait,
    },
};

/// A command of the program, for a shell.
fn shell_words(host: &Host, arguments: &[&str]) -> String {
    let command = host.command(arguments);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| format!("'{}' ", word.to_str().unwrap()))
        .collect()
}

/// Runs a script in a mount namespace of its own; what it prints.
fn in_a_namespace(script: &str) -> String {
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .output()
        .expect("this test needs unshare (util-linux)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn the_daemon_survives_the_session_that_started_it() {
    let (host, layout, mountpoint) = one_file_host();
    // its own session with a hang-up of the whole group at the end, as a login ends
    let attach = host.command(&[
        "attach",
        &layout.reference(""),
        mountpoint.to_str().unwrap(),
    ]);
    let words: Vec<_> = std::iter::once(attach.get_program())
        .chain(attach.get_args())
        .collect();
    let status = Command::new("setsid")
        .args(["--wait", "env", "--default-signal=HUP"])
        .args(["sh", "-c", "\"$@\" && kill -HUP 0", "sh"])
        .args(words)
        .env("DOCKER_CONFIG", host.root())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success(), "the shell ends by its own hang-up");
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    let daemon = host.daemon().unwrap();
    let session = |pid: u32| -> String {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(") ")
            .next()
            .unwrap()
            .split(' ')
            .nth(3)
            .unwrap()
            .to_owned()
    };
    assert_ne!(session(daemon), session(std::process::id()));
    host.detach(&mountpoint);
}

/// systemd-run(1) as far as the daemon needs it: notes its arguments, and starts what follows its options in the background.
const SYSTEMD_RUN: &str = r#"#!/bin/sh
printf '%s\n' "$@" >"${0%/*}/arguments"
while [ "$1" != -- ]; do shift; done
shift
setsid "$@" </dev/null >/dev/null 2>&1 &
"#;

/// Attaches and reads where /run/systemd/system is, which is how sd_booted(3) knows it, with this systemd-run. What is printed.
fn attach_with_systemd(host: &Host, image: &str, systemd_run: &str) -> String {
    let (mountpoint, tools) = (host.mountpoint("mnt"), host.mountpoint("tools"));
    let (path, tools) = (mountpoint.to_str().unwrap(), tools.to_str().unwrap());
    let script = format!(
        "set -e
        mount -t tmpfs none /run; mkdir -p /run/systemd/system
        cat >{tools}/systemd-run <<'END'\n{systemd_run}END
        chmod +x {tools}/systemd-run; PATH={tools}:$PATH
        {} 2>&1; cat {path}/hello; {}",
        shell_words(host, &["attach", image, path]),
        shell_words(host, &["detach", path]),
    );
    in_a_namespace(&script)
}

#[test]
fn where_systemd_runs_the_daemon_is_a_transient_service() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let text = attach_with_systemd(&host, &layout.reference(""), SYSTEMD_RUN);
    assert!(text.contains("hello\n"), "{text}");
    let (root, run_dir) = (host.root(), host.run_dir());
    let arguments = fs::read_to_string(host.mountpoint("tools").join("arguments")).unwrap();
    let mut arguments: Vec<&str> = arguments.lines().collect();
    let unit = arguments.remove(4);
    assert!(unit.starts_with("--unit=socinbd-"), "{unit}");
    let expected = [
        "--quiet",
        "--collect",
        "--no-block",
        "--description=socinbd daemon",
        "--property=Type=notify",
        "--property=NotifyAccess=main",
        "--property=FileDescriptorStoreMax=4096",
        "--property=WatchdogSec=20",
        "--property=TimeoutAbortSec=3",
        "--property=TimeoutStopSec=30",
        "--property=Restart=on-failure",
        "--property=RestartSec=100ms",
        "--property=RestartPreventExitStatus=1 2 3 4 5 6 7 8 9",
        "--property=StartLimitIntervalSec=0",
        "--property=RestartKillSignal=SIGUSR2",
        "--property=KillMode=mixed",
        "--",
        env!("CARGO_BIN_EXE_socinbd"),
        "daemon",
        "--root",
        root.to_str().unwrap(),
        "--run-dir",
        run_dir.to_str().unwrap(),
        "--idle-exit",
        "300",
    ];
    assert_eq!(arguments, expected);
    // the journal has its log
    assert!(!run_dir.join("daemon.log").exists());
    host.end_daemon();
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn where_no_service_manager_answers_the_daemon_is_started_directly() {
    for systemd_run in [
        "#!/bin/sh\necho 'Failed to connect to bus: No such file or directory' >&2\nexit 1\n",
        "#!/bin/sh\nexec sleep 600\n",
    ] {
        let host = Host::new();
        let layout = indexed(&host, one_file());
        let text = attach_with_systemd(&host, &layout.reference(""), systemd_run);
        assert!(text.contains("hello\n"), "{text}");
        assert!(text.contains("without systemd"), "{text}");
        host.end_daemon();
        assert_eq!(host.left_over(), [""; 0]);
    }
}

/// A process that has the lock of a runtime directory, until it is killed.
fn holding(host: &Host, lock: &str) -> super::lifecycle::Sleeper {
    fs::create_dir_all(host.run_dir()).unwrap();
    let mut command = Command::new("flock");
    command.arg("--no-fork");
    command
        .arg(host.run_dir().join(lock))
        .args(["sh", "-c", SLEEP]);
    asleep(command)
}

/// An attach while somebody else holds a lock says these words, and works once the lock is free.
fn attach_waits_for(lock: &str, words: &str) {
    let (host, layout, mountpoint) = one_file_host();
    let holder = holding(&host, lock);
    let image = layout.reference("");
    let mut attach = host.command(&["attach", &image, mountpoint.to_str().unwrap()]);
    let mut attaching = attach.stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(attaching.stderr.take().unwrap());
    said.read_line(&mut line).unwrap();
    assert!(line.contains(words), "{line}");
    drop(holder);
    assert!(attaching.wait().unwrap().success());
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
}

#[test]
fn a_daemon_that_does_not_listen_yet_is_waited_for() {
    attach_waits_for("lock", "waiting for the daemon of");
}

#[test]
fn who_holds_the_lock_of_starting_is_named_to_those_that_wait() {
    attach_waits_for("starting", "waiting for process");
}

#[test]
fn a_daemon_that_cannot_start_says_why() {
    let (host, layout, mountpoint) = one_file_host();
    fs::create_dir_all(host.run_dir()).unwrap();
    // where its socket should be
    fs::create_dir_all(host.run_dir().join("mounts.sock/x")).unwrap();
    let error = host.fail(
        &[
            "attach",
            &layout.reference(""),
            mountpoint.to_str().unwrap(),
        ],
        1,
    );
    assert!(
        error.contains("did not start") && error.contains("listening on"),
        "{error}"
    );
}

/// `socinbd daemon` with these options, which listens.
fn daemon(host: &Host, options: &[&str]) -> Child {
    let mut daemon = host.command(&[&["daemon"], options].concat());
    let daemon = daemon.stderr(Stdio::null()).spawn().unwrap();
    wait("the daemon listens", || {
        host.output(&["list"]).status.success() && host.run_dir().join("mounts.sock").exists()
    });
    daemon
}

fn has_ended(daemon: &mut Child) -> bool {
    daemon.try_wait().unwrap().is_some()
}

#[test]
fn a_daemon_ends_a_while_after_its_last_attachment() {
    let (host, layout, mountpoint) = one_file_host();
    let mut daemon = daemon(&host, &["--idle-exit", "1"]);
    host.attach(&layout.reference(""), &mountpoint, &[]);
    // two of its turns
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert!(!has_ended(&mut daemon));
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    let daemon = std::cell::RefCell::new(daemon);
    wait("it ends", || has_ended(&mut daemon.borrow_mut()));
    assert!(!host.run_dir().join("socinbd.sock").exists());
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_daemon_ends_when_its_folders_are_gone() {
    for gone in [Host::root, Host::run_dir] {
        let host = Host::new();
        let daemon = std::cell::RefCell::new(daemon(&host, &[]));
        fs::remove_dir_all(gone(&host)).unwrap();
        // another one in its place is not its own
        fs::create_dir_all(gone(&host)).unwrap();
        wait("it ends", || has_ended(&mut daemon.borrow_mut()));
    }
}

#[test]
fn a_mount_is_served_on_when_the_run_directory_is_gone() {
    let (host, layout, mountpoint) = one_file_host();
    let mut daemon = daemon(&host, &[]);
    host.attach(&layout.reference(""), &mountpoint, &[]);
    fs::remove_dir_all(host.run_dir()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert!(!has_ended(&mut daemon));
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    unmount(&mountpoint);
    let daemon = std::cell::RefCell::new(daemon);
    wait("it ends", || has_ended(&mut daemon.borrow_mut()));
    assert_eq!(host.left_over(), [""; 0]);
}

/// Stops a process until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Self {
        succeeds(Command::new("kill").args(["-STOP", &pid.to_string()]));
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = Command::new("kill")
            .args(["-CONT", &self.0.to_string()])
            .status();
    }
}

#[test]
fn a_frozen_daemon_is_told_of_with_its_process() {
    let (host, layout, mountpoint) = one_file_host();
    let other = host.mountpoint("other");
    let (image, path, other) = (
        layout.reference(""),
        mountpoint.to_str().unwrap(),
        other.to_str().unwrap(),
    );
    host.attach(&image, &mountpoint, &[]);
    let pid = host.daemon().unwrap();
    let stopped = Stopped::new(pid);
    let commands = [
        &["list"][..],
        &["why", path],
        &["attach", &image, other],
        &["run", &image, "--", "x"],
        &["detach", path],
        &["detach", path],
    ];
    std::thread::scope(|scope| {
        for arguments in commands {
            let host = &host;
            scope.spawn(move || {
                let begun = std::time::Instant::now();
                let error = host.fail(arguments, 5);
                assert!(
                    error.contains(&format!("process {pid}, does not answer: it is stopped")),
                    "{error}"
                );
                assert!(
                    begun.elapsed().as_secs() < 10,
                    "{arguments:?}: {:?}",
                    begun.elapsed()
                );
            });
        }
    });
    drop(stopped);
    // nothing has been done to it
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    assert_eq!(host.list().len(), 1);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_daemon_that_freezes_while_it_attaches_is_told_of_and_one_that_is_slow_is_not() {
    let host = Host::new();
    let layout = MadeLayout::of(one_file());
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    let mut daemon = daemon(&host, &[]);
    registry.fail(On::Data, Fault::Hang, Times::UntilHealed);
    let image = registry.reference("app");
    let mut attach = host.command(&["attach", &image, mountpoint.to_str().unwrap()]);
    let mut attaching = attach.stderr(Stdio::piped()).spawn().unwrap();
    wait("the registry is asked for data", || {
        registry.counters().blobs().requests > 0
    });
    // more than it waits for a frozen one
    std::thread::sleep(std::time::Duration::from_secs(10));
    assert!(!has_ended(&mut attaching), "a slow daemon is not frozen");
    let stopped = Stopped::new(host.daemon().unwrap());
    let begun = std::time::Instant::now();
    assert_eq!(attaching.wait().unwrap().code(), Some(5));
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    let mut error = String::new();
    attaching
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut error)
        .unwrap();
    assert!(error.contains("it is stopped"), "{error}");
    drop(stopped);
    registry.heal();
    wait("the daemon forgets it", || host.list().is_empty());
    host.end_daemon();
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn attaching_works_in_another_mount_namespace() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    // the daemon is in ours
    let ours = host.mountpoint("ours");
    host.attach(&layout.reference(""), &ours, &[]);
    let theirs = host.mountpoint("theirs");
    let path = theirs.to_str().unwrap();
    let image = layout.reference("");
    let script = format!(
        "set -e; {}; cat {path}/hello; {}",
        shell_words(&host, &["attach", &image, path]),
        shell_words(&host, &["detach", path])
    );
    let text = in_a_namespace(&script);
    assert!(text.contains("hello\n"), "{text}");
    assert!(!theirs.join("hello").exists());
    assert_eq!(host.list().len(), 1);
    host.detach(&ours);
    assert_eq!(host.left_over(), [""; 0]);
}

/// As in a privileged container, whose /sys is read-only: nothing of the kernel can be tuned there.
#[test]
fn what_cannot_be_tuned_is_a_warning_and_attaching_goes_on() {
    let host = Host::new();
    let mut layers = one_file();
    layers.push(Layer::new().file("second", b"second\n"));
    let layout = indexed(&host, layers);
    let image = layout.reference("");
    let mountpoint = host.mountpoint("mnt");
    let path = mountpoint.to_str().unwrap();
    for kind in ["fuse", "auto"] {
        let script = format!(
            "set -e; mount -o remount,ro,bind /sys; {}; cat {path}/hello {path}/second; {}",
            shell_words(&host, &["attach", "--device", kind, &image, path]),
            shell_words(&host, &["detach", path])
        );
        let text = in_a_namespace(&script);
        assert!(text.contains("hello\nsecond\n"), "{text}");
        host.end_daemon();
        let log = fs::read_to_string(host.run_dir().join("daemon.log")).unwrap();
        let warnings = log.lines().filter(|line| line.contains("read-ahead"));
        let warnings: Vec<_> = warnings.collect();
        assert_eq!(warnings.len(), 1, "{log}");
        assert!(
            warnings[0].contains("WARN") && warnings[0].contains("/sys"),
            "{log}"
        );
        fs::remove_file(host.run_dir().join("daemon.log")).unwrap();
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_is_used_in_another_mount_namespace_is_not_detached_and_its_user_is_named() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    // a namespace with a copy of the mount, and no file of it in use; the copies of other tests' mounts are let go of, or those tests
    // would find their own in use
    let mut command = Command::new("unshare");
    let others = r#"awk -v own="$0" 'index($5, "/tmp/") == 1 && $5 != own { print $5 }' /proc/self/mountinfo | xargs -r -n 1 umount -q -l; "#;
    command
        .args(["-m", "--propagation", "private", "sh", "-c"])
        .arg(format!("{others}{SLEEP}"))
        .arg(mountpoint.canonicalize().unwrap());
    let elsewhere = asleep(command);
    let path = mountpoint.to_str().unwrap();
    let named = |error: &str, pid: u32| {
        assert!(
            error.contains(&format!("by {pid} (sleep)")),
            "{pid}: {error}"
        );
    };
    named(&host.fail(&["detach", path], 6), elsewhere.id());
    // it is unmounted here; and now its daemon dies
    named(&host.fail(&["detach", path], 6), elsewhere.id());
    host.kill_daemon();
    named(&host.fail(&["detach", path], 6), elsewhere.id());
    drop(elsewhere);
    host.detach(&mountpoint);
    // out of every namespace, with a file open
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let user = sitting_in(&mountpoint);
    let status = Command::new("umount").args(["-l", path]).status();
    assert!(status.unwrap().success());
    named(&host.fail(&["detach", path], 6), user.id());
    drop(user);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}
