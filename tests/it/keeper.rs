//! The keeper with daemons that are small scripts: what they put comes back, and who dies is followed by another one.

mod sleeping;

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::fs::OFlags;
use socinbd::keeper::{Plan, Times, keep};
use tempfile::TempDir;

use crate::support::wait;

/// What every daemon begins with: a line in `starts`, and functions to talk to the keeper. `turn` counts the starts.
const PRELUDE: &str = r#"
import array, os, signal, socket, sys, time
folder = sys.argv[2]
with open(folder + "/starts", "a") as starts: starts.write(f"{os.getpid()} {time.monotonic()}\n")
turn = len(open(folder + "/starts").readlines())
keeper = os.environ["NOTIFY_SOCKET"]
def tell(text, descriptors=()):
    sending = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with_it = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sending.sendmsg([text if isinstance(text, bytes) else text.encode()], with_it, 0, keeper)
def memory(text):
    descriptor = os.memfd_create("test"); os.write(descriptor, text.encode()); return descriptor
def report(*lines):
    with open(folder + "/report", "a") as file: print(*lines, file=file)
def inherited():
    count = int(os.environ.get("LISTEN_FDS", 0))
    assert not count or int(os.environ["LISTEN_PID"]) == os.getpid()
    return [os.pread(3 + n, 100, 0).decode() for n in range(count)], os.environ.get("LISTEN_FDNAMES")
def die(): os.kill(os.getpid(), signal.SIGKILL)
"#;

/// A keeper in a thread, and the folder of its daemons.
struct Kept {
    folder: TempDir,
    signals: OwnedFd,
    keeper: Option<JoinHandle<u8>>,
}

impl Kept {
    fn start(daemon: &str, times: Times) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("daemon.py"), [PRELUDE, daemon].concat()).unwrap();
        let arguments = ["python3".into(), path("daemon.py").into(), "daemon".into()];
        let plan = Plan {
            program: python(),
            own: python(),
            arguments: arguments
                .into_iter()
                .chain([folder.path().into()])
                .collect(),
            run_dir: path("run"),
            times,
        };
        let (receiver, sender) = signals();
        let ready = path("ready");
        let keeper = thread::spawn(move || {
            keep(&plan, &receiver, || fs::write(&ready, "").unwrap()).unwrap()
        });
        Self {
            folder,
            signals: sender,
            keeper: Some(keeper),
        }
    }

    fn signal(&self, number: u32) {
        let mut told = [0; 128];
        told[..4].copy_from_slice(&number.to_ne_bytes());
        let mut signals = File::from(self.signals.try_clone().unwrap());
        signals.write_all(&told).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The exit status of the keeper.
    fn end(&mut self) -> u8 {
        let status = self.keeper.take().unwrap().join().unwrap();
        let left: Vec<_> = fs::read_dir(self.path("run")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        status
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// When the daemons were started, in seconds.
    fn starts(&self) -> Vec<f64> {
        let text = self.text("starts");
        text.lines()
            .map(|line| line.split(' ').nth(1).unwrap().parse().unwrap())
            .collect()
    }
}

/// Signals to a keeper, as signalfd(2) has them, and where they are sent from.
pub fn signals() -> (File, OwnedFd) {
    let (receiver, sender) = std::io::pipe().unwrap();
    let receiver = File::from(OwnedFd::from(receiver));
    rustix::fs::fcntl_setfl(&receiver, OFlags::NONBLOCK).unwrap();
    (receiver, sender.into())
}

fn own_program() -> PathBuf {
    std::env::current_exe().unwrap()
}

fn python() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path)
        .map(|folder| folder.join("python3"))
        .find(|it| it.exists())
        .expect("this test needs python3")
}

/// Runs daemons until the keeper ends.
fn run(daemon: &str, times: Times) -> (u8, Kept) {
    let mut kept = Kept::start(daemon, times);
    (kept.end(), kept)
}

#[test]
fn descriptors_come_back_with_their_names_in_order() {
    let (status, kept) = run(
        r#"
if turn == 1:
    assert inherited() == ([], None)
    tell("FDSTORE=1\nFDPOLL=0\nFDNAME=two words", [memory("a"), memory("b")])
    tell("FDSTORE=1\nFDNAME=gone", [memory("x")])
    tell("FDSTORE=1\nFDNAME=one", [memory("c")])
    tell("FDSTOREREMOVE=1\nFDNAME=gone")
    tell("READY=1")
    die()
if turn == 2:
    report(*inherited())
    tell("FDSTORE=1\nFDNAME=more", [memory("d")])
    tell("READY=1")
    die()
report(*inherited())
"#,
        Times::default(),
    );
    assert_eq!(status, 0);
    let two = "['a', 'b', 'c'] two words:two words:one\n";
    let three = "['a', 'b', 'c', 'd'] two words:two words:one:more\n";
    assert_eq!(kept.text("report"), [two, three].concat());
    assert!(kept.path("ready").exists());
}

#[test]
fn a_hang_up_waits_until_the_daemon_serves() {
    let mut kept = Kept::start(
        r#"
report("started")
while not os.path.exists(folder + "/go"): time.sleep(0.01)
# before this one a hang-up would have ended it
signal.signal(signal.SIGHUP, lambda *_: report("reload"))
tell("READY=1")
while "reload" not in open(folder + "/report").read(): time.sleep(0.01)
"#,
        Times::default(),
    );
    wait("it has started", || kept.text("report") == "started\n");
    kept.signal(1);
    wait("the keeper has the signal", || {
        rustix::io::ioctl_fionread(&kept.signals).unwrap() == 0
    });
    fs::write(kept.path("go"), "").unwrap();
    assert_eq!(kept.end(), 0);
    assert_eq!(kept.text("report"), "started\nreload\n");
    assert_eq!(kept.starts().len(), 1);
}

#[test]
fn many_descriptors_come_back() {
    let (status, kept) = run(
        r#"
if turn == 1:
    for first in range(0, 500, 250):
        tell("FDSTORE=1\nFDNAME=many", [memory(str(first + n)) for n in range(250)])
        os.closerange(3, 253)
    tell("READY=1")
    die()
texts, names = inherited()
assert texts == [str(n) for n in range(500)], texts
assert names == ":".join(["many"] * 500)
report("all")
"#,
        Times::default(),
    );
    assert_eq!((status, kept.text("report").as_str()), (0, "all\n"));
}

#[test]
fn only_the_daemon_itself_is_heard() {
    let (status, kept) = run(
        r#"
if turn == 1:
    end, other_end = os.pipe()
    if os.fork() == 0:
        tell("FDSTORE=1\nFDNAME=strange", [other_end])
        tell("STOPPING=1")
        os._exit(0)
    os.wait()
    tell("FDSTORE=1\nFDNAME=own", [memory("own")])
    tell("READY=1")
    os.close(other_end)
    # the stranger's was closed
    report(os.read(end, 1))
    die()
report(*inherited())
"#,
        Times::default(),
    );
    assert_eq!(status, 0);
    assert_eq!(kept.text("report"), "b''\n['own'] own\n");
}

#[test]
fn what_is_hostile_is_passed_over() {
    let (status, kept) = run(
        r#"
if turn == 1:
    for bad in ["", "\0", "=", "READY", "FDSTORE=1", "FDSTORE=1\nFDNAME=a:b", "FDSTORE=1\nFDNAME=" + "x" * 256,
                "READY=1\n" + "x" * 5000, b"READY=1\n\xff", "\n" * 4096]:
        end, other_end = os.pipe()
        tell(bad, [other_end])
        os.close(other_end)
        assert os.read(end, 1) == b""
        os.close(end)
    # more names than can be handed on
    for n in range(600):
        descriptor = memory(str(n))
        tell(f"FDSTORE=1\nFDNAME={n:0>255}", [descriptor])
        os.close(descriptor)
    end, other_end = os.pipe()
    tell("BARRIER=1", [other_end])
    os.close(other_end)
    assert os.read(end, 1) == b""
    assert not os.path.exists(folder + "/ready")
    tell("READY=1")
    die()
texts, names = inherited()
assert texts == [str(n) for n in range(len(texts))]
report(len(texts))
"#,
        Times::default(),
    );
    assert_eq!(status, 0);
    assert_eq!(kept.text("report"), "480\n");
}

#[test]
fn who_dies_again_and_again_is_started_after_pauses() {
    let times = Times {
        first_pause: Duration::from_millis(100),
        longest_pause: Duration::from_millis(400),
        ..Times::default()
    };
    let daemon = "if turn < 7: tell('READY=1'); sys.exit(3)\n";
    let (status, kept) = run(daemon, times);
    assert_eq!(status, 0);
    let starts = kept.starts();
    let between: Vec<f64> = starts.windows(2).map(|two| two[1] - two[0]).collect();
    assert_eq!(between.len(), 6);
    for (between, pause) in between.iter().zip([0.0, 0.1, 0.2, 0.4, 0.4, 0.4]) {
        assert!(*between >= pause, "{between} < {pause}");
    }
}

#[test]
fn a_first_start_that_fails_is_not_repeated() {
    for (daemon, expected) in [
        ("sys.exit(6)", 6),
        ("die()", 137),
        (
            "signal.pthread_sigmask(signal.SIG_BLOCK, []); os.kill(os.getpid(), signal.SIGTERM)",
            143,
        ),
    ] {
        let (status, kept) = run(daemon, Times::default());
        assert_eq!((status, kept.starts().len()), (expected, 1), "{daemon}");
        assert!(!kept.path("ready").exists());
    }
}

#[test]
fn a_later_start_that_fails_is_repeated() {
    let (status, kept) = run(
        r#"
if turn == 1:
    tell("FDSTORE=1\nFDNAME=a", [memory("a")])
    tell("READY=1")
    die()
if turn == 2: sys.exit(6)
if turn == 3: die()
report(*inherited())
"#,
        Times::default(),
    );
    assert_eq!((status, kept.starts().len()), (0, 4));
    assert_eq!(kept.text("report"), "['a'] a\n");
}

#[test]
fn a_daemon_that_hangs_is_killed() {
    let times = Times {
        watchdog: Duration::from_secs(1),
        abort: Duration::from_millis(100),
        ..Times::default()
    };
    let (status, kept) = run(
        r#"
import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
assert os.environ["WATCHDOG_USEC"] == "1000000"
def told(number, frame): report("aborted"); os._exit(1)
if turn == 1:
    # stopped, it does not get the first signal
    tell("READY=1")
    os.kill(os.getpid(), signal.SIGSTOP)
if turn == 2:
    signal.signal(signal.SIGABRT, told)
    tell("READY=1")
    time.sleep(1000)
if turn == 3:
    signal.signal(signal.SIGABRT, told)
    tell("READY=1\nWATCHDOG=trigger")
    time.sleep(1000)
tell("READY=1")
for n in range(8):
    time.sleep(0.2)
    tell("WATCHDOG=1")
tell("STOPPING=1")
time.sleep(1.5)
"#,
        times,
    );
    assert_eq!((status, kept.starts().len()), (0, 4));
    assert_eq!(kept.text("report"), "aborted\naborted\n");
}

#[test]
fn a_start_that_hangs_is_killed_and_repeated_when_a_daemon_has_served() {
    let times = Times {
        start: Duration::from_secs(5),
        abort: Duration::from_millis(100),
        ..Times::default()
    };
    let daemon = "if turn == 1: tell('READY=1'); die()\nif turn == 2: os.kill(os.getpid(), signal.SIGSTOP)\n";
    let (status, kept) = run(daemon, times);
    assert_eq!((status, kept.starts().len()), (0, 3));
}

#[test]
fn signals_go_on_to_the_daemon_and_its_end_is_the_keepers() {
    let daemon = r#"
def told(number, frame): report(number); sys.exit(5)
signal.signal(signal.SIGTERM, told); signal.signal(signal.SIGQUIT, told)
tell("READY=1")
time.sleep(1000)
"#;
    for number in [15, 3] {
        let mut kept = Kept::start(daemon, Times::default());
        wait("the daemon is ready", || kept.path("ready").exists());
        kept.signal(number);
        assert_eq!(kept.end(), 5);
        assert_eq!(kept.text("report"), format!("{number}\n"));
        assert_eq!(kept.starts().len(), 1);
    }
    // and one that does not end in order is not followed by another one
    let daemon =
        "signal.signal(signal.SIGINT, lambda *_: die())\ntell('READY=1')\ntime.sleep(1000)";
    let mut kept = Kept::start(daemon, Times::default());
    wait("the daemon is ready", || kept.path("ready").exists());
    kept.signal(2);
    assert_eq!((kept.end(), kept.starts().len()), (137, 1));
}

/// A daemon that serves and then ends in a way of its own; the next one does not receive signals before it is told to `go`, and reports the
/// one that it gets then.
fn ending_between(first: &str) -> String {
    let next = r#"
    if turn == 1: sys.exit(99)
    report("started")
    while not os.path.exists(folder + "/go"): time.sleep(0.01)
    def told(number, frame): report(number); tell("STOPPING=1"); sys.exit(0)
    signal.signal(signal.SIGTERM, told)
    tell("READY=1")
    time.sleep(1000)
"#;
    // in a function: the first may be indented
    format!(
        "def serve():\n    if turn == 1:\n        tell('READY=1')\n        {}{next}serve()\n",
        first.replace('\n', "\n        ")
    )
}

#[test]
fn a_signal_that_comes_before_the_next_daemon_receives_signals_waits_until_it_serves() {
    let mut kept = Kept::start(&ending_between("die()"), Times::default());
    wait("the next has started", || {
        kept.text("report") == "started\n"
    });
    kept.signal(15);
    wait("the keeper has the signal", || {
        rustix::io::ioctl_fionread(&kept.signals).unwrap() == 0
    });
    fs::write(kept.path("go"), "").unwrap();
    assert_eq!((kept.end(), kept.starts().len()), (0, 2));
    assert_eq!(kept.text("report"), "started\n15\n");
}

#[test]
fn a_signal_that_a_daemon_gets_when_it_leaves_is_for_the_next_one() {
    // one that is sent to the keeper is not received any more; one that is sent to the daemon itself ends it
    let leaves = "tell(f'X_SOCINBD_SUCCESSOR={sys.executable}')\n";
    let received = "signal.signal(signal.SIGTERM, lambda *_: report('lost'))\n\
        report('leaves')\n\
        while 'lost' not in open(folder + '/report').read(): time.sleep(0.01)\n\
        sys.exit(75)";
    let ended = "os.kill(os.getpid(), signal.SIGTERM)";
    let mut kept = Kept::start(
        &ending_between(&[leaves, received].concat()),
        Times::default(),
    );
    wait("it leaves", || kept.text("report") == "leaves\n");
    kept.signal(15);
    fs::write(kept.path("go"), "").unwrap();
    assert_eq!((kept.end(), kept.starts().len()), (0, 2));
    assert_eq!(kept.text("report"), "leaves\nlost\nstarted\n15\n");
    for first in [[leaves, ended].concat(), ended.to_owned()] {
        let mut kept = Kept::start(&ending_between(&first), Times::default());
        fs::write(kept.path("go"), "").unwrap();
        assert_eq!((kept.end(), kept.starts().len()), (0, 2));
        assert_eq!(kept.text("report"), "started\n15\n");
    }
}

#[test]
fn a_signal_ends_a_pause() {
    let times = Times {
        first_pause: Duration::from_secs(1000),
        longest_pause: Duration::from_secs(1000),
        ..Times::default()
    };
    let begun = Instant::now();
    let mut kept = Kept::start("tell('READY=1'); die()", times);
    // the keeper has waited for it: a signal before that is for the daemon
    wait("the second has died", || {
        let text = kept.text("starts");
        let second = text.lines().nth(1).and_then(|line| line.split(' ').next());
        second.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    });
    kept.signal(15);
    assert_eq!(kept.end(), 0);
    assert_eq!(kept.starts().len(), 2);
    assert!(begun.elapsed() < Duration::from_secs(100));
}

#[test]
fn a_program_that_is_being_replaced_is_not_missed() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan {
        program: folder.path().join("none"),
        own: own_program(),
        arguments: ["test", "--list", "--exact", "none"].map(Into::into).into(),
        run_dir: folder.path().join("run"),
        times: Times::default(),
    };
    let (receiver, _sender) = signals();
    // the keeper's own: this test's
    assert_eq!(keep(&plan, &receiver, || ()).unwrap(), 0);
}
