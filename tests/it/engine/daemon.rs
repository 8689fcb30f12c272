//! The daemon and its callers: how it is started, and callers from another mount namespace.

use std::{
    fs,
    process::{Command, Stdio},
};

use super::{
    Host,
    lifecycle::{SLEEP, asleep, indexed, one_file, one_file_host, sitting_in},
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

#[test]
fn where_systemd_runs_the_daemon_is_a_transient_service() {
    let host = Host::new();
    let layout = indexed(&host, one_file());
    let (mountpoint, tools) = (host.mountpoint("mnt"), host.mountpoint("tools"));
    let image = layout.reference("");
    let (path, tools) = (mountpoint.to_str().unwrap(), tools.to_str().unwrap());
    // /run/systemd/system is how sd_booted(3) knows it
    let script = format!(
        "set -e
        mount -t tmpfs none /run; mkdir -p /run/systemd/system
        cat >{tools}/systemd-run <<'END'\n{SYSTEMD_RUN}END
        chmod +x {tools}/systemd-run; PATH={tools}:$PATH
        {}; cat {path}/hello; {}",
        shell_words(&host, &["attach", &image, path]),
        shell_words(&host, &["detach", path]),
    );
    let text = in_a_namespace(&script);
    assert!(text.contains("hello\n"), "{text}");
    let log = host.run_dir().join("daemon.log");
    let log = log.display();
    let (root, run_dir) = (host.root(), host.run_dir());
    let expected = [
        "--quiet",
        "--collect",
        "--description=socinbd daemon",
        &format!("--property=StandardOutput=append:{log}"),
        &format!("--property=StandardError=append:{log}"),
        "--",
        env!("CARGO_BIN_EXE_socinbd"),
        "daemon",
        "--root",
        root.to_str().unwrap(),
        "--run-dir",
        run_dir.to_str().unwrap(),
        "--log",
        "info",
    ];
    let arguments = fs::read_to_string(format!("{tools}/arguments")).unwrap();
    assert_eq!(arguments.lines().collect::<Vec<_>>(), expected);
    host.end_daemon();
    assert_eq!(host.left_over(), [""; 0]);
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
