//! Planned restarts: another program takes the place of the daemon that runs, and its attachments stay.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use socinbd::{
    api::client::Client,
    engine::Formats,
    error::{Kind, Result},
};

use super::{Host, lifecycle::one_file_host};
use crate::support::{succeeds, wait};

const PROGRAM: &str = env!("CARGO_BIN_EXE_socinbd");

/// A copy of the program in a folder of this host.
pub(super) fn copy(host: &Host, name: &str) -> PathBuf {
    let path = host.mountpoint(name).join("socinbd");
    // in another process: one that forks meanwhile would keep it open for writing, and then it cannot be executed
    succeeds(Command::new("cp").arg(PROGRAM).arg(&path));
    path
}

/// `PROGRAM daemon --replace`, with the folders of the host.
pub(super) fn replace_by(host: &Host, program: &Path) -> Command {
    let usual = host.command(&["--json", "daemon", "--replace"]);
    let mut command = Command::new(program);
    command.args(usual.get_args());
    command
}

/// What the list says of the daemon: its process and its program.
pub(super) fn serving(host: &Host) -> (u64, PathBuf) {
    let program = &host.list()[0]["served_by"];
    let path = program["path"].as_str().unwrap();
    (program["pid"].as_u64().unwrap(), path.into())
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(work)
}

/// Asks the daemon for a successor, without the checks of the command.
fn hand_over(host: &Host, program: &str) -> Result<()> {
    block_on(Client::new(&host.run_dir()).hand_over(program.into()))
}

#[test]
fn another_program_takes_over_and_is_the_one_that_is_started_again() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let keeper = host.keeper().unwrap();
    let (first, path) = serving(&host);
    assert_eq!(path, Path::new(PROGRAM));
    let new = copy(&host, "new");
    let output = replace_by(&host, &new).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}{}", host.log());
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["before"]["pid"], first);
    assert_eq!(told["now"]["path"], new.to_str().unwrap());
    assert_eq!(told["attachments"], 1);
    let (second, path) = serving(&host);
    assert_ne!(second, first);
    assert_eq!(path, new);
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    // a crash later on is not a way back
    host.kill_served_by_keeper();
    wait("the next one serves", || serving(&host).0 != second);
    assert_eq!(serving(&host).1, new);
    // a program that is replaced on disk is said to be, and is the one that comes next
    assert!(!host.run(&["list"]).contains("another one by now"));
    fs::remove_file(&new).unwrap();
    copy(&host, "new");
    assert_eq!(host.list()[0]["served_by"]["is_replaced"], true);
    assert!(host.run(&["list"]).contains("another one by now"));
    succeeds(&mut replace_by(&host, &new));
    assert_eq!(host.list()[0]["served_by"]["is_replaced"], false);
    assert_eq!(host.keeper(), Some(keeper));
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    host.end_daemon();
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_program_that_does_not_serve_is_followed_by_the_one_before() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    for program in ["/bin/false", "/does/not/exist"] {
        let (before, path) = serving(&host);
        hand_over(&host, program).unwrap();
        wait("the one before serves", || serving(&host).0 != before);
        assert_eq!(serving(&host).1, path);
    }
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    // and it attaches again
    let other = host.mountpoint("other");
    host.attach(&layout.reference(""), &other, &[]);
    host.detach(&other);
    host.detach(&mountpoint);
}

#[test]
fn a_program_that_the_keeper_cannot_be_told_is_refused_and_the_daemon_goes_on() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let daemon = serving(&host).0;
    for program in ["relative", "", "/a\nREADY=1"] {
        let error = hand_over(&host, program).unwrap_err().report();
        assert!(error.contains("is not an absolute path"), "{error}");
    }
    assert_eq!(serving(&host).0, daemon);
    let other = host.mountpoint("other");
    host.attach(&layout.reference(""), &other, &[]);
    host.detach(&other);
    host.detach(&mountpoint);
}

#[test]
fn a_signal_restarts_the_daemon_and_nothing_else() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let keeper = host.keeper().unwrap();
    for of_keeper in [true, false] {
        let before = serving(&host).0;
        let process = if of_keeper { keeper.into() } else { before };
        succeeds(Command::new("kill").args(["-USR2", &process.to_string()]));
        wait("another one serves", || serving(&host).0 != before);
        assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    }
    assert_eq!(host.keeper(), Some(keeper));
    assert!(!host.log().contains("died"), "{}", host.log());
    host.detach(&mountpoint);
}

#[test]
fn attaches_go_on_while_daemons_are_replaced() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let image = layout.reference("");
    let other = host.mountpoint("other");
    let place = other.to_str().unwrap();
    let (sender, ended) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let sender = sender;
            for _ in 0..10 {
                host.run(&["attach", &image, place]);
                let read = fs::read(other.join("hello"));
                let read = read.unwrap_or_else(|error| panic!("{error}\n{}", host.log()));
                assert_eq!(read, b"hello\n");
                host.run(&["detach", place]);
            }
            sender.send(()).unwrap();
        });
        let mut replaced = 0;
        // each daemon lives longer than the one before: on a slow machine too, one answers in the end
        while matches!(
            ended.recv_timeout(Duration::from_millis(50 + 25 * replaced)),
            Err(mpsc::RecvTimeoutError::Timeout)
        ) {
            match hand_over(&host, PROGRAM) {
                Ok(()) => replaced += 1,
                // it has not left yet, or leaves at this moment
                Err(error) if matches!(error.kind(), Kind::Busy | Kind::Unavailable) => {}
                Err(error) => panic!("{}\n{}", error.report(), host.log()),
            }
        }
        assert!(replaced > 3, "{replaced}");
    });
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    // the daemon may be leaving
    let keeper = host.keeper().unwrap().to_string();
    succeeds(Command::new("kill").arg(keeper));
    wait("the keeper is gone", || host.keeper().is_none());
    assert_eq!(host.left_over(), [""; 0]);
}

/// Sends SIGTERM to the daemon, whichever it is at this moment, and not to a process that has ended already.
fn end_this_daemon(host: &Host) {
    let kill = |signal: &str, pid: &str| {
        let sent = Command::new("kill").args([signal, pid]).output();
        sent.unwrap().status.success()
    };
    wait("a daemon has the signal", || {
        let Some(daemon) = host.daemon().map(|it| it.to_string()) else {
            return false;
        };
        let state = || {
            let stat = fs::read_to_string(format!("/proc/{daemon}/stat"));
            let stat = stat.unwrap_or_default();
            stat.rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next())
        };
        // it cannot end before it has the signal
        if !kill("-STOP", &daemon) {
            return false;
        }
        wait("it is stopped", || {
            matches!(state(), Some('T' | 'Z' | 'X') | None)
        });
        let is_stopped = state() == Some('T');
        is_stopped && kill("-TERM", &daemon) && kill("-CONT", &daemon)
    });
}

#[test]
fn a_signal_that_comes_while_a_daemon_follows_another_ends_the_one_that_serves() {
    for (after, of_keeper) in [
        (0, false),
        (60, true),
        (90, false),
        (150, true),
        (210, false),
        (240, true),
        (300, false),
    ] {
        let (host, layout, mountpoint) = one_file_host();
        host.attach(&layout.reference(""), &mountpoint, &[]);
        let keeper = host.keeper().unwrap().to_string();
        // the daemon waits for 200 ms before it leaves, because a client is connected
        let _connected = UnixStream::connect(host.run_dir().join("socinbd.sock")).unwrap();
        succeeds(Command::new("kill").args(["-USR2", &keeper]));
        thread::sleep(Duration::from_millis(after));
        match of_keeper {
            true => succeeds(Command::new("kill").arg(&keeper)),
            false => end_this_daemon(&host),
        }
        wait("the keeper is gone", || host.keeper().is_none());
        assert!(host.daemon().is_none());
        assert_eq!(
            host.left_over(),
            [""; 0],
            "after {after} ms: {}",
            host.log()
        );
    }
}

#[test]
fn without_a_daemon_there_is_nothing_to_replace() {
    let host = Host::new();
    let error = host.fail(&["daemon", "--replace"], 3);
    assert!(error.contains("no daemon is running"), "{error}");
    assert!(host.daemon().is_none() && host.keeper().is_none());
}

#[test]
fn a_daemon_that_nothing_keeps_is_not_replaced() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    // its own keeper is gone for the one that comes next
    let address = host.mountpoint("manager").join("socket");
    let manager = std::os::unix::net::UnixDatagram::bind(&address).unwrap();
    host.detach(&mountpoint);
    host.end_daemon();
    // a manager that receives, and keeps nothing: the kernel closes the descriptors of what is received without room for them
    thread::spawn(move || while manager.recv(&mut [0; 4096]).is_ok() {});
    let mut daemon = host
        .command(&["daemon"])
        .env("NOTIFY_SOCKET", &address)
        .spawn()
        .unwrap();
    wait("it answers", || {
        block_on(Client::new(&host.run_dir()).daemon()).is_ok_and(|it| it.is_some())
    });
    let error = host.fail(&["daemon", "--replace"], 8);
    assert!(error.contains("nothing keeps the devices"), "{error}");
    assert!(host.list().is_empty());
    succeeds(Command::new("kill").arg(daemon.id().to_string()));
    daemon.wait().unwrap();
}

/// Answers requests as a daemon of another version, and gives the paths that were asked for.
fn other_daemon(host: &Host, info: Value) -> impl Fn() -> Vec<String> + use<> {
    fs::create_dir_all(host.run_dir()).unwrap();
    let listener = UnixListener::bind(host.run_dir().join("socinbd.sock")).unwrap();
    let (sender, asked) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut part = [0; 4096];
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                match stream.read(&mut part) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => request.extend(&part[..count]),
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let Some(line) = request.lines().next() else {
                continue; // a look whether somebody listens
            };
            sender.send(line.to_owned()).unwrap();
            let body = match line.contains("/v1/daemon") {
                true => info.to_string(),
                false => "[]".to_owned(),
            };
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    });
    move || asked.try_iter().collect()
}

#[test]
fn a_daemon_whose_state_cannot_be_read_is_left_alone() {
    let formats = serde_json::to_value(Formats::OWN).unwrap();
    let with = |name: &str, version: u64| {
        let mut formats = formats.clone();
        assert!(formats[name].is_u64(), "{name}");
        formats[name] = version.into();
        formats
    };
    let newer = |name: &str| with(name, formats[name].as_u64().unwrap() + 1);
    let cases = [
        (newer("nbd_journal"), "nbd journals of version"),
        (newer("fuse_journal"), "FUSE journals of version"),
        (newer("layer_directory"), "layer directories of version"),
        (
            with("attachment_record", 0),
            "attachment records of version 0",
        ),
        (Value::Null, "socinbd 0.0.1, cannot be replaced"),
    ];
    for (formats, why) in cases {
        let host = Host::new();
        let program = json!({"version": "0.0.1", "pid": 1, "path": "/a", "is_replaced": false});
        let info = json!({
            "version": "0.0.1", "pid": 1, "root": host.root(), "program": program, "formats": formats,
        });
        let asked = other_daemon(&host, info);
        let error = host.fail(&["daemon", "--replace"], 8);
        assert!(error.contains(why), "{error}");
        let asked = asked();
        assert!(
            !asked.is_empty() && asked.iter().all(|it| it.starts_with("GET ")),
            "{asked:?}"
        );
    }
}
