//! A daemon that is killed while its keeper lives, and the other way round.

use std::{
    fs,
    io::Read as _,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use socinbd::api::client::Client;

use super::{Host, lifecycle::one_file_host, vm::served};
use crate::support::{
    registry::{Fault, On, Times},
    seeded_noise, succeeds, wait,
};

fn send(signal: &str, pid: u32) {
    succeeds(Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]));
}

/// The process that the daemon says that it is.
fn told_process(host: &Host) -> u32 {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let info = runtime.block_on(Client::new(&host.run_dir()).daemon());
    info.unwrap().expect("a daemon answers").pid
}

/// A variable of a process's environment.
fn variable(pid: u32, name: &str) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8(text).unwrap();
    let pair = |line: &str| {
        line.strip_prefix(name)?
            .strip_prefix('=')
            .map(str::to_owned)
    };
    text.split('\0').find_map(pair)
}

#[test]
fn a_killed_daemon_is_followed_by_another_one_and_clients_wait_for_it() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    let keeper = host.keeper().unwrap();
    for turn in 0..5 {
        let daemon = host.daemon().unwrap();
        assert_eq!(told_process(&host), daemon);
        if turn > 0 {
            // of the daemon before, in the order in which it has put them
            assert_eq!(variable(daemon, "LISTEN_PID"), Some(daemon.to_string()));
            let names = variable(daemon, "LISTEN_FDNAMES");
            assert_eq!(
                names.as_deref(),
                Some("lock-run-dir:lock-root:control:mounts")
            );
        }
        let begun = Instant::now();
        send("KILL", daemon);
        // no client fails, whenever it comes
        assert!(host.list().is_empty());
        assert_ne!(told_process(&host), daemon);
        if turn < 2 {
            // the first follows at once
            let time = begun.elapsed();
            assert!(time < Duration::from_secs(1 + turn), "{time:?}");
        }
        assert_eq!(host.keeper(), Some(keeper));
    }
    // it is a whole one
    host.attach(&layout.reference(""), &mountpoint, &[]);
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    host.end_daemon();
    let left: Vec<_> = fs::read_dir(host.run_dir())
        .unwrap()
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("notify-") || name.ends_with(".sock"))
        .collect();
    assert_eq!(left, [""; 0]);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_client_that_comes_while_no_daemon_runs_is_answered_by_the_next() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    let (daemon, keeper) = (host.daemon().unwrap(), host.keeper().unwrap());
    send("STOP", keeper);
    send("KILL", daemon);
    let process = format!("/proc/{daemon}/fd");
    wait("it is dead", || {
        fs::read_dir(&process).map_or(0, Iterator::count) == 0
    });
    // nobody is there, and yet it is connected
    let mut connected = UnixStream::connect(host.run_dir().join("socinbd.sock")).unwrap();
    connected.set_nonblocking(true).unwrap();
    assert!(connected.read(&mut [0]).is_err());
    let mut list = host.command(&["list"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(list.try_wait().unwrap(), None);
    send("CONT", keeper);
    assert!(list.wait().unwrap().success());
    assert_ne!(told_process(&host), daemon);
}

#[test]
fn a_daemon_outlives_its_keeper() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let (daemon, keeper) = (host.daemon().unwrap(), host.keeper().unwrap());
    send("KILL", keeper);
    wait("it is told", || {
        host.log().contains("starts no other one when it dies")
    });
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    assert_ne!(host.list()[0]["state"], "dead");
    assert_eq!(told_process(&host), daemon);
    // nobody can come in between: the daemon has its folders
    host.fail(&["daemon"], 6);
    assert_eq!(told_process(&host), daemon);
    host.detach(&mountpoint);
    host.end_daemon();
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn sockets_that_were_removed_are_new_ones_for_the_next_daemon_too() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    let sockets = ["socinbd.sock", "mounts.sock"].map(|name| host.run_dir().join(name));
    let are_there = || sockets.iter().all(|path| path.exists());
    // while a daemon runs: it binds them again
    for path in &sockets {
        fs::remove_file(path).unwrap();
    }
    wait("the sockets are back", are_there);
    let killed = host.daemon().unwrap();
    send("KILL", killed);
    assert!(host.list().is_empty());
    assert_ne!(told_process(&host), killed);
    // and while none runs
    let (killed, keeper) = (host.daemon().unwrap(), host.keeper().unwrap());
    send("STOP", keeper);
    send("KILL", killed);
    for path in &sockets {
        fs::remove_file(path).unwrap();
    }
    send("CONT", keeper);
    wait("the sockets are back", are_there);
    wait("a daemon answers", || {
        host.output(&["list"]).status.success()
    });
    assert_ne!(told_process(&host), killed);
    host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    host.end_daemon();
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_a_service_was_given_goes_to_no_other_program() {
    let (host, layout, mountpoint) = one_file_host();
    // as if the command ran in a service of somebody else
    let strange = host.mountpoint("strange").join("socket");
    let _strange = std::os::unix::net::UnixDatagram::bind(&strange).unwrap();
    let mut attach = host.command(&[
        "attach",
        &layout.reference(""),
        mountpoint.to_str().unwrap(),
    ]);
    succeeds(
        attach
            .env("NOTIFY_SOCKET", &strange)
            .env("WATCHDOG_USEC", "1"),
    );
    let (daemon, keeper) = (host.daemon().unwrap(), host.keeper().unwrap());
    assert_eq!(variable(keeper, "NOTIFY_SOCKET"), None);
    let own = variable(daemon, "NOTIFY_SOCKET").unwrap();
    assert_eq!(Path::new(&own).parent().unwrap(), host.run_dir());
    host.detach(&mountpoint);
}

#[test]
fn without_a_manager_at_its_socket_the_daemon_says_so() {
    let host = Host::new();
    let output = host
        .command(&["daemon"])
        .env("NOTIFY_SOCKET", host.root().join("none"))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{error}");
    assert!(error.contains("the notification socket"), "{error}");
}

#[test]
fn a_daemon_that_hangs_is_replaced_and_one_that_works_is_not() {
    let (works, layout, mountpoint) = one_file_host();
    works.attach(&layout.reference(""), &mountpoint, &[]);
    let daemon = works.daemon().unwrap();
    let (hangs, layout, other) = one_file_host();
    hangs.attach(&layout.reference(""), &other, &[]);
    hangs.detach(&other);
    let stopped = hangs.daemon().unwrap();
    send("STOP", stopped);
    wait("another one serves", || {
        hangs.daemon().is_some_and(|pid| pid != stopped)
    });
    let log = hangs.log();
    assert!(log.contains("does not answer, and is aborted"), "{log}");
    assert!(hangs.list().is_empty());
    // longer than it may be silent
    assert_eq!(works.daemon(), Some(daemon));
    works.detach(&mountpoint);
}

/// Stops one thread of a process until the process ends.
const STOP_THREAD: &str = r#"
import ctypes, os, sys
thread = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def ptrace(request):
    assert libc.ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())
ptrace(0x4206) # PTRACE_SEIZE
ptrace(0x4207) # PTRACE_INTERRUPT
os.waitpid(thread, 0x40000000) # __WALL
print("stopped", flush=True)
while os.WIFSTOPPED(os.waitpid(thread, 0x40000000)[1]): pass
"#;

/// The first thread of a process with this name.
fn thread(pid: u32, name: &str) -> String {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut threads = threads.map(|it| it.unwrap().path());
    let is_it = |path: &PathBuf| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    let found = threads.find(is_it).unwrap();
    found.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_thread_that_serves_a_device_and_hangs_is_found_and_one_that_waits_is_not() {
    let waits = Host::new();
    let content = seeded_noise(400_000, 3);
    let (_layout, registry) = served(&waits, &[("file", content.clone())]);
    let lazy = waits.mountpoint("mnt");
    waits.attach(&registry.reference("app"), &lazy, &["--device", "fuse"]);
    let waiting_daemon = waits.daemon().unwrap();
    registry.fail(On::Data, Fault::Hang, Times::UntilHealed);
    let before = registry.counters().total().requests;
    let file = lazy.join("file");
    let reader = std::thread::spawn(move || fs::read(file).unwrap());
    wait("it reads", || registry.counters().total().requests > before);

    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &["--device", "fuse"]);
    let hung = host.daemon().unwrap();
    let mut stop = Command::new("python3");
    stop.args(["-c", STOP_THREAD, &thread(hung, "serve-fuse")]);
    let mut stop = stop.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 8];
    stop.stdout.take().unwrap().read_exact(&mut said).unwrap();
    wait("another daemon serves", || {
        host.daemon().is_some_and(|pid| pid != hung)
    });
    assert!(stop.wait().unwrap().success());
    let log = host.log();
    assert!(log.contains("has stood still for"), "{log}");
    assert!(log.contains("does not answer, and is"), "{log}");
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    // as long as the other one
    assert_eq!(waits.daemon(), Some(waiting_daemon));
    registry.heal();
    assert!(reader.join().unwrap() == content);
    waits.detach(&lazy);
}
