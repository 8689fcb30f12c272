//! Whole daemons that are killed at random or replaced under readers: no error, no wrong byte.

use std::{
    fs::{self, File},
    io::Write as _,
    os::{fd::OwnedFd, unix::fs::FileExt as _, unix::fs::OpenOptionsExt as _},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use socinbd::keeper::{Plan, Times, keep};

use super::{
    Host,
    replace::{copy, replace_by, serving},
    vm::served,
};
use crate::{
    keeper::signals,
    nbd::kept_in_vm::kernel_log,
    support::{
        registry::{Fault, On, Registry, Times as Often},
        seeded_noise, succeeds,
        vm::in_vm,
        wait,
    },
};

/// Bytes of the file whose reads succeed, and of the one whose layer is not to be had.
const GOOD: usize = 24 << 20;
const BAD: usize = 4 << 20;
const READERS: u64 = 4;
/// Ends of daemons after which a new host begins, where nothing is present.
const ENDS_PER_HOST: u64 = 50;

/// How daemons end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// By SIGKILL, at any moment.
    Killed,
    /// By SIGUSR2 and `daemon --replace`: restarts, and upgrades to the program in another place and back.
    Replaced,
}

/// A keeper without pauses, in a thread of the test.
struct Keeper {
    signals: OwnedFd,
    thread: JoinHandle<u8>,
}

impl Keeper {
    fn start(host: &Host) -> Self {
        let daemon = host.command(&["--log", "info", "daemon"]);
        let mut arguments = vec![daemon.get_program().to_owned()];
        arguments.extend(daemon.get_args().map(ToOwned::to_owned));
        let log = host.run_dir().join("daemon.log");
        arguments.extend(["--log-file".into(), log.into()]);
        let plan = Plan {
            program: daemon.get_program().into(),
            own: daemon.get_program().into(),
            arguments,
            run_dir: host.run_dir(),
            times: Times {
                first_pause: Duration::ZERO,
                longest_pause: Duration::ZERO,
                ..Times::default()
            },
        };
        let (receiver, signals) = signals();
        let thread = thread::spawn(move || keep(&plan, &receiver, || ()).unwrap());
        Self { signals, thread }
    }

    fn end(self) {
        let mut told = [0; 128];
        told[..4].copy_from_slice(&15_u32.to_ne_bytes());
        let mut signals = File::from(self.signals);
        signals.write_all(&told).unwrap();
        assert_eq!(self.thread.join().unwrap(), 0);
    }
}

/// Numbers that look random, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What a reader has done.
#[derive(Clone, Copy, Default)]
struct Done {
    reads: u64,
    failures: u64,
    longest: Duration,
    longest_failure: Duration,
}

impl Done {
    fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.failures += other.failures;
        self.longest = self.longest.max(other.longest);
        self.longest_failure = self.longest_failure.max(other.longest_failure);
    }
}

/// What the readers of a host have done so far.
#[derive(Default)]
struct Readers {
    reads: AtomicU64,
    failures: AtomicU64,
    stop: AtomicBool,
}

/// Reads and compares until it is stopped; what cannot be had must fail, and nothing else.
fn reader(
    mountpoint: &Path,
    number: u64,
    content: Arc<Vec<u8>>,
    all: Arc<Readers>,
) -> JoinHandle<Done> {
    let open = |name: &str| {
        let mut options = File::options();
        options.read(true).custom_flags(0o40000); // O_DIRECT
        options.open(mountpoint.join(name)).unwrap()
    };
    let (good, bad) = (open("good"), open("bad"));
    thread::spawn(move || {
        let mut random = Random(number);
        let mut space = vec![0; (1 << 20) + 4096];
        let aligned = space.as_ptr().align_offset(4096);
        let mut done = Done::default();
        while !all.stop.load(Ordering::Relaxed) {
            let length = [4096, 4096, 65_536, 1 << 20][random.below(4) as usize];
            let buffer = &mut space[aligned..][..length];
            buffer.fill(0);
            let is_bad = random.below(16) == 0;
            let (file, size) = if is_bad { (&bad, BAD) } else { (&good, GOOD) };
            let offset = random.below(((size - length) / 4096) as u64 + 1) * 4096;
            let began = Instant::now();
            let read = file.read_exact_at(buffer, offset);
            let longest = match is_bad {
                true => &mut done.longest_failure,
                false => &mut done.longest,
            };
            *longest = began.elapsed().max(*longest);
            done.reads += 1;
            all.reads.fetch_add(1, Ordering::Relaxed);
            match read {
                Err(error) if is_bad => {
                    assert_eq!(error.raw_os_error(), Some(5), "{error}");
                    done.failures += 1;
                    all.failures.fetch_add(1, Ordering::Relaxed);
                }
                Ok(()) if !is_bad => {
                    let start = usize::try_from(offset).unwrap();
                    assert!(
                        *buffer == content[start..][..length],
                        "{length} at {offset}"
                    );
                }
                read => panic!("{length} bytes at {offset}: {read:?}"),
            }
        }
        done
    })
}

fn kills() -> u64 {
    std::env::var("SOCINBD_TEST_KILLS").map_or(0, |text| text.parse().unwrap())
}

/// Ends daemons of new hosts, each some times, under readers.
fn under_readers(device: &str, ends: Ends, count: u64) {
    let content = Arc::new(seeded_noise(GOOD, 7));
    let maker = Host::new();
    let bad = seeded_noise(BAD, 8);
    let files = [("bad", bad), ("good", content.to_vec())];
    let (_layout, registry) = served(&maker, &files);
    let mut all = Done::default();
    let mut left = count;
    while left > 0 {
        let now = left.min(ENDS_PER_HOST);
        left -= now;
        let done = on_a_host(device, ends, now, left + 1, &registry, &content);
        all.add(&done);
    }
    println!(
        "{device}: {count} ends, {} reads, the longest {:.1?}, and {} that failed as they should, the longest {:.1?}",
        all.reads - all.failures,
        all.longest,
        all.failures,
        all.longest_failure
    );
    assert!(all.reads > count / 5 && all.failures > 0);
}

fn on_a_host(
    device: &str,
    ends: Ends,
    count: u64,
    seed: u64,
    registry: &Registry,
    content: &Arc<Vec<u8>>,
) -> Done {
    let host = Host::new();
    fs::create_dir_all(host.run_dir()).unwrap();
    let keeper = Keeper::start(&host);
    wait("the daemon serves", || {
        host.run_dir().join("socinbd.sock").exists()
    });
    let mountpoint = host.mountpoint("mnt");
    let attachment = host.attach(
        &registry.reference("app"),
        &mountpoint,
        &["--device", device],
    );
    let layers = attachment["layers"].as_array().unwrap();
    let digest = |index: usize| layers[index]["digest"].as_str().unwrap().parse().unwrap();
    // the lowest is the one with the file `bad`
    let bad = layers
        .iter()
        .position(|it| it["size"].as_u64() < Some(8 << 20));
    let bad = bad.unwrap();
    registry.heal();
    registry.fail(
        On::DataOf(digest(bad)),
        Fault::status(404),
        Often::UntilHealed,
    );
    let slow = Fault::Delay(Duration::from_millis(30));
    registry.fail(On::DataOf(digest(1 - bad)), slow, Often::UntilHealed);
    let kernel = kernel_log().len();
    let all_readers = Arc::new(Readers::default());
    let readers: Vec<_> = (0..READERS)
        .map(|number| {
            let number = seed * READERS + number;
            reader(
                &mountpoint,
                number,
                Arc::clone(content),
                Arc::clone(&all_readers),
            )
        })
        .collect();
    match ends {
        Ends::Killed => kill(&host, &all_readers, count, seed),
        Ends::Replaced => replace(&host, count, seed),
    }
    thread::sleep(Duration::from_millis(500));
    wait("a read fails", || {
        all_readers.failures.load(Ordering::Relaxed) > 0
    });
    all_readers.stop.store(true, Ordering::Relaxed);
    let mut all = Done::default();
    for reader in readers {
        let done = reader.join().unwrap_or_else(|_| panic!("{}", host.log()));
        all.add(&done);
    }
    registry.heal();
    // all of it, through the page cache
    assert!(fs::read(mountpoint.join("good")).unwrap() == **content);
    let log = host.log();
    let mut unwanted = vec![
        "cannot be resumed",
        "cannot be taken over",
        "replaced an nbd connection",
    ];
    if ends == Ends::Replaced {
        unwanted.push("died");
    }
    for unwanted in unwanted {
        assert!(!log.contains(unwanted), "{log}");
    }
    // on FUSE other tests of this host may be the reason
    if device == "nbd" {
        let failing = layers[bad]["device_path"].as_str().unwrap();
        let failing = failing.strip_prefix("/dev/").unwrap();
        let reads_fail = [
            format!("block {failing}: Other side returned error (5)"),
            format!("I/O error, dev {failing}, "),
        ];
        let is_expected = |line: &String| reads_fail.iter().any(|text| line.contains(text));
        let mut log = kernel_log().split_off(kernel);
        log.retain(|line| !is_expected(line));
        assert_eq!(log, [""; 0]);
    }
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
    keeper.end();
    all
}

fn kill(host: &Host, readers: &Readers, kills: u64, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..kills {
        // some live long enough for a read, and for one that fails, which takes a third of a second
        let is_long = random.below(4) == 3;
        let pause = match is_long {
            true => 300 + random.below(400),
            false => random.below(200),
        };
        let before = readers.reads.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(pause));
        wait("a daemon runs", || host.daemon().is_some());
        if is_long {
            wait("a read ends", || {
                readers.reads.load(Ordering::Relaxed) > before
            });
        }
        host.kill_served_by_keeper();
        wait("the next one runs", || host.daemon().is_some());
    }
}

/// Four times in five the program that serves is restarted.
fn replace(host: &Host, count: u64, seed: u64) {
    let mut random = Random(seed);
    let (_, first) = serving(host);
    let mut programs = [copy(host, "build"), first].into_iter().cycle();
    for number in 1..=count {
        thread::sleep(Duration::from_millis(random.below(600)));
        let (before, mut program) = serving(host);
        if number % 5 == 0 {
            program = programs.next().unwrap();
            succeeds(&mut replace_by(host, &program));
        } else {
            succeeds(Command::new("kill").args(["-USR2", &before.to_string()]));
        }
        wait("another one serves", || serving(host).0 != before);
        assert_eq!(serving(host).1, program);
    }
}

#[test]
fn daemons_that_serve_fuse_files_are_killed_at_random() {
    under_readers("fuse", Ends::Killed, kills().max(20));
}

#[test]
fn daemons_that_serve_fuse_files_are_replaced() {
    under_readers("fuse", Ends::Replaced, kills().max(20));
}

/// With SOCINBD_TEST_KILLS as many as that.
#[test]
fn daemons_that_serve_nbd_devices_are_killed_at_random() {
    in_vm(|| under_readers("nbd", Ends::Killed, kills().max(100)));
}

#[test]
fn daemons_that_serve_nbd_devices_are_replaced() {
    in_vm(|| under_readers("nbd", Ends::Replaced, kills().max(20)));
}

/// Kills daemons in the middle of attaches: what they have begun is taken over or removed, and no thread of theirs waits for ever.
fn killed_in_attaches(device: &str, kills: u64) {
    let host = Host::new();
    let content = seeded_noise(200_000, 9);
    let (_layout, registry) = served(&host, &[("one", content.clone()), ("two", content.clone())]);
    let reference = registry.reference("app");
    fs::create_dir_all(host.run_dir()).unwrap();
    let keeper = Keeper::start(&host);
    wait("the daemon serves", || {
        host.run_dir().join("socinbd.sock").exists()
    });
    let mountpoint = host.mountpoint("mnt");
    let began = Instant::now();
    host.attach(&reference, &mountpoint, &["--device", device]);
    let usual = began.elapsed();
    host.detach(&mountpoint);
    let mut random = Random(kills);
    let (mut killed, mut attached) = (Vec::new(), 0);
    for _ in 0..kills {
        let place = mountpoint.to_str().unwrap();
        let mut attach = host.command(&["attach", "--device", device, &reference, place]);
        attach.stdout(Stdio::null()).stderr(Stdio::null());
        let mut attach = attach.spawn().unwrap();
        thread::sleep(usual.mul_f64(random.below(1000) as f64 / 1000.0));
        killed.push(host.daemon().unwrap());
        host.kill_served_by_keeper();
        attached += u64::from(attach.wait().unwrap().success());
        wait("the next one runs", || host.daemon().is_some());
        // whether it was attached or not: from here on it is
        if host.list().is_empty() {
            host.attach(&reference, &mountpoint, &["--device", device]);
        }
        assert!(fs::read(mountpoint.join("two")).unwrap() == content);
        host.detach(&mountpoint);
        let left = host.left_over();
        assert_eq!(left, [""; 0], "{}", host.log());
    }
    println!(
        "{device}: {kills} kills in attaches, of which {attached} succeeded, usually {usual:?}"
    );
    for pid in killed {
        let is_there = || fs::exists(format!("/proc/{pid}")).unwrap();
        wait("the dead daemon is reaped", || !is_there());
    }
    keeper.end();
}

#[test]
fn daemons_are_killed_in_the_middle_of_attaches_on_fuse() {
    killed_in_attaches("fuse", kills().max(20));
}

#[test]
fn daemons_are_killed_in_the_middle_of_attaches_on_nbd() {
    in_vm(|| killed_in_attaches("nbd", kills().max(20)));
}
