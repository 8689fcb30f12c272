//! What signals do to the processes that hold devices.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{
    Host,
    lifecycle::{foreground, one_file_host},
};
use crate::support::{succeeds, wait};

fn send(signal: &str, pid: u32) {
    succeeds(Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]));
}

/// Signals that end a process by default, and that mean nothing to one that serves.
const MEANINGLESS: [&str; 9] = [
    "USR1", "USR2", "ALRM", "PIPE", "VTALRM", "PROF", "IO", "PWR", "XCPU",
];

/// Sends signals that must not end it.
fn survives(child: &mut Child, signals: &[&str]) {
    for signal in signals {
        send(signal, child.id());
        // signals are delivered before the next system call returns
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(child.try_wait().unwrap(), None, "{signal}");
    }
}

/// A command that has written its first line.
fn started(command: &mut Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(!line.is_empty());
    child
}

fn serve(host: &Host, image: &str, socket: &Path) -> Child {
    started(&mut host.command(&["serve", image, "--socket", socket.to_str().unwrap()]))
}

#[test]
fn a_hang_up_ends_attach_foreground_and_serve_as_a_termination_does() {
    let (host, layout, mountpoint) = one_file_host();
    let socket = host.mountpoint("out").join("nbd.sock");
    for signal in ["HUP", "TERM", "INT", "QUIT"] {
        let mut child = foreground(&host, &layout.reference(""), &mountpoint);
        send(signal, child.id());
        assert!(
            child.wait().unwrap().success(),
            "attach --foreground, {signal}"
        );
        assert_eq!(host.left_over(), [""; 0], "{signal}");
        let mut child = serve(&host, &layout.reference(""), &socket);
        send(signal, child.id());
        assert!(child.wait().unwrap().success(), "serve, {signal}");
        assert!(!socket.exists(), "{signal}");
    }
}

#[test]
fn other_signals_end_neither_attach_foreground_nor_serve() {
    let (host, layout, mountpoint) = one_file_host();
    let mut child = foreground(&host, &layout.reference(""), &mountpoint);
    survives(&mut child, &MEANINGLESS);
    assert_eq!(std::fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    assert!(child.wait().unwrap().success());
    let socket = host.mountpoint("out").join("nbd.sock");
    let mut child = serve(&host, &layout.reference(""), &socket);
    survives(&mut child, &MEANINGLESS);
    send("TERM", child.id());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_process_that_was_started_with_nohup_lives_on() {
    let (host, layout, _) = one_file_host();
    let socket = host.mountpoint("out").join("nbd.sock");
    let image = layout.reference("");
    let serve = host.command(&["serve", &image, "--socket", socket.to_str().unwrap()]);
    let mut command = Command::new("env");
    command
        .arg("--ignore-signal=HUP")
        .arg(serve.get_program())
        .args(serve.get_args());
    let mut child = started(&mut command);
    // it is still nothing to it
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
    assert!(ignored & 1 != 0, "{status}");
    survives(&mut child, &["HUP"]);
    send("TERM", child.id());
    assert!(child.wait().unwrap().success());
}

#[test]
fn only_what_is_meant_to_ends_the_daemon() {
    let (host, layout, mountpoint) = one_file_host();
    let mut daemon = host
        .command(&["--log", "socinbd=debug", "daemon"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait("the daemon listens", || {
        host.run_dir().join("socinbd.sock").exists()
    });
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let serves = host.daemon().unwrap();
    assert_ne!(serves, daemon.id());
    // after this one another daemon follows (`engine::replace`)
    let meaningless = MEANINGLESS.iter().filter(|signal| **signal != "USR2");
    for signal in meaningless.chain(&["HUP"]) {
        send(signal, serves);
        survives(&mut daemon, &[signal]);
    }
    assert_eq!(host.daemon(), Some(serves));
    assert_eq!(std::fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    // no core file: it ends in order
    send("QUIT", daemon.id());
    let status = daemon.wait().unwrap();
    assert!(status.success() && status.signal().is_none(), "{status}");
    assert_eq!(host.left_over(), [""; 0]);
}

/// A program that is started with SIGCHLD ignored and every other signal blocked, as some supervisors leave them.
fn with_odd_signals(command: &Command) -> Command {
    let script = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n\
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); os.execv(sys.argv[1], sys.argv[1:])";
    let mut odd = Command::new("python3");
    odd.args(["-c", script]).arg(command.get_program());
    odd.args(command.get_args());
    odd
}

#[test]
fn what_a_process_was_started_to_ignore_or_block_does_not_hang_it() {
    let (host, layout, mountpoint) = one_file_host();
    let image = layout.reference("");
    // no program: its end is told all the same
    let run = host.command(&["run", &image, "--", "/none"]);
    let output = with_odd_signals(&run).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let socket = host.mountpoint("out").join("nbd.sock");
    let serve = ["serve", &image, "--socket", socket.to_str().unwrap()];
    let status = |run: &str| {
        let command = host.command(&[&serve[..], &["--run", run]].concat());
        with_odd_signals(&command).status().unwrap().code()
    };
    host.end_daemon();
    assert_eq!(status("exit 5"), Some(5));
    let attach = [
        "attach",
        &image,
        mountpoint.to_str().unwrap(),
        "--foreground",
    ];
    let mut child = started(&mut with_odd_signals(&host.command(&attach)));
    send("TERM", child.id());
    assert!(child.wait().unwrap().success());
    assert_eq!(host.left_over(), [""; 0]);
}
