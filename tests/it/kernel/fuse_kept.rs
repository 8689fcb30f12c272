//! A FUSE file whose server is killed under readers: at any moment, and at each step. The readers are processes of their own, so that
//! the test can end although one of them waits for ever.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use socinbd::{
    error::{Error, Kind},
    kernel::{
        fdpass,
        fuse::{self, AtStep, Recovery, Step},
        kept::SharedMemory,
        loopdev::{self, LoopDevice, LoopOptions},
    },
    layer::{Allocation, ServedDisk},
    units::DiskOffset,
};
use tokio::{runtime::Runtime, sync::watch};

use super::eventually;
use crate::support::place_telling;

const SIZE: u64 = 24 << 20;
/// Bytes of a part of the disk, which has one state.
const PART: u64 = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Present,
    /// Each read waits for a fetch of up to 20 ms.
    Absent,
    Failing,
}

fn state(offset: u64) -> State {
    match offset / PART % 8 {
        1 | 4 | 6 => State::Absent,
        3 => State::Failing,
        _ => State::Present,
    }
}

fn bytes(offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    place_telling(offset, &mut bytes);
    bytes
}

/// A disk whose bytes are computed.
struct ComputedDisk;

impl ServedDisk for ComputedDisk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        let mut parts = (range.start.get() / PART)..=(range.end.get() - 1) / PART;
        parts.all(|part| state(part * PART) == State::Present)
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        place_telling(offset.get(), buffer);
        Ok(())
    }

    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        if (offset.get() / 4096).is_multiple_of(3) {
            return Ok(false);
        }
        place_telling(offset.get(), buffer);
        Ok(true)
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async move {
            let start = range.start.get();
            tokio::time::sleep(Duration::from_millis(start / 4096 % 20)).await;
            match state(start) {
                State::Failing => Err(Arc::new(Error::new(Kind::Unavailable, "on purpose"))),
                _ => Ok(()),
            }
        })
    }

    fn allocation(&self, _: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        unreachable!("FUSE does not ask")
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

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

const SERVER: &str = "SOCINBD_TEST_FUSE_SERVER";
const RECOVERY: &str = "SOCINBD_TEST_FUSE_RECOVERY";
const KILL_AT: &str = "SOCINBD_TEST_FUSE_KILL_AT";
const READS_ITSELF: &str = "SOCINBD_TEST_FUSE_READS_ITSELF";
const READER: &str = "SOCINBD_TEST_FUSE_READER";

const RECOVERIES: [Recovery; 3] = [Recovery::Either, Recovery::Resend, Recovery::Journal];

const STEPS: [Step; 8] = [
    Step::Received,
    Step::Noted,
    Step::Cleared,
    Step::Fetched,
    Step::Answered,
    Step::Freed,
    Step::AskedAgain,
    Step::Emptied,
];

fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--nocapture",
            "--exact",
            &format!("kernel::fuse_kept::{name}"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// A process of this test binary. It is killed when this is dropped.
struct Process(Child);

impl Process {
    /// Waits for its end, up to some time; whether it succeeded.
    fn ends_within(&mut self, most: Duration) -> Option<bool> {
        let until = Instant::now() + most;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return Some(status.success());
            }
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // a reader that waits for ever does not end before this process
        self.ends_within(Duration::from_secs(5));
    }
}

/// Starts a successor. `kill_at`: the number of a step, and how often it is passed by.
fn start_server(
    kept: &[OwnedFd],
    recovery: Recovery,
    kill_at: Option<(usize, u64)>,
) -> (Process, UnixStream) {
    let command = this_test("serves_what_it_is_given");
    start_server_by(command, kept, recovery, kill_at)
}

fn start_server_by(
    mut command: Command,
    kept: &[OwnedFd],
    recovery: Recovery,
    kill_at: Option<(usize, u64)>,
) -> (Process, UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    command
        .env(SERVER, &path)
        .env(RECOVERY, format!("{recovery:?}"));
    if let Some((step, count)) = kill_at {
        command.env(KILL_AT, format!("{step} {count}"));
    }
    let process = Process(command.spawn().unwrap());
    let (socket, _) = listener.accept().unwrap();
    for descriptor in kept {
        fdpass::send(&socket, descriptor.as_fd()).unwrap();
    }
    (process, socket)
}

/// No test by itself: a server that others start and kill.
#[test]
fn serves_what_it_is_given() {
    let Some(path) = std::env::var_os(SERVER) else {
        return;
    };
    let socket = UnixStream::connect(PathBuf::from(path)).unwrap();
    let kept = vec![
        fdpass::receive(&socket).unwrap(),
        fdpass::receive(&socket).unwrap(),
    ];
    let name = std::env::var(RECOVERY).unwrap();
    let recovery = RECOVERIES.into_iter().find(|r| format!("{r:?}") == name);
    let kill_at = std::env::var(KILL_AT).ok().map(|text| {
        let (step, count) = text.split_once(' ').unwrap();
        let step: usize = step.parse().unwrap();
        (STEPS[step], AtomicU32::new(count.parse().unwrap()))
    });
    let at_step: AtStep = Arc::new(move |at| {
        if let Some((step, left)) = &kill_at
            && at == *step
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            let this = rustix::process::getpid();
            rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
        }
    });
    let runtime = runtime();
    let disk = Arc::new(ComputedDisk);
    let server =
        fuse::resume_in_steps(kept, disk, runtime.handle(), recovery.unwrap(), at_step).unwrap();
    (&socket).write_all(b"!").unwrap();
    if std::env::var_os(READS_ITSELF).is_some() {
        let device = File::from(rustix::stdio::stdin().try_clone_to_owned().unwrap());
        read_aligned(&device, PART);
    }
    // until the file system ends, or who has started this one
    let parent = rustix::process::getppid();
    while !server.is_finished() && rustix::process::getppid() == parent {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What readers do until a file appears.
fn start_reader(device: File, folder: &Path, number: u64) -> Process {
    let mut command = this_test("reads_what_it_is_given");
    command
        .stdin(device)
        .env(READER, format!("{number} {}", folder.display()));
    Process(command.spawn().unwrap())
}

/// No test by itself: a reader that others start. It reads from its standard input, which is open for direct I/O.
#[test]
fn reads_what_it_is_given() {
    let Ok(told) = std::env::var(READER) else {
        return;
    };
    let (number, folder) = told.split_once(' ').unwrap();
    let number: u64 = number.parse().unwrap();
    let folder = Path::new(folder);
    let device = File::from(rustix::stdio::stdin().try_clone_to_owned().unwrap());
    let mut random = Random(number);
    let mut space = vec![0; (PART + 4096) as usize];
    let aligned = space.as_ptr().align_offset(4096);
    let (mut reads, mut failures, mut longest) = (0_u64, 0_u64, Duration::ZERO);
    while !folder.join("stop").exists() {
        let length = [4096, 4096, 16 << 10, 128 << 10, PART][random.below(5) as usize];
        let part = random.below(SIZE / PART) * PART;
        let offset = part + random.below((PART - length) / 4096 + 1) * 4096;
        let buffer = &mut space[aligned..][..length as usize];
        buffer.fill(0);
        let began = Instant::now();
        let read = device.read_exact_at(buffer, offset);
        longest = longest.max(began.elapsed());
        match (read, state(offset)) {
            (Err(error), State::Failing) => {
                assert_eq!(error.raw_os_error(), Some(5));
                failures += 1;
            }
            (Ok(()), State::Present | State::Absent) => {
                assert!(*buffer == bytes(offset, buffer.len()), "at {offset}");
            }
            (read, _) => panic!("{length} bytes at {offset}: {read:?}"),
        }
        reads += 1;
    }
    let longest = longest.as_millis();
    std::fs::write(
        folder.join(number.to_string()),
        format!("{reads} {failures} {longest}"),
    )
    .unwrap();
}

/// A file with a loop device on it, that nobody serves at first.
struct Sample {
    device: LoopDevice,
    kept: Vec<OwnedFd>,
    reads_itself: File,
    folder: tempfile::TempDir,
    readers: Vec<Process>,
}

const READERS: usize = 4;

fn direct(device: &LoopDevice) -> File {
    let mut options = File::options();
    options.read(true).custom_flags(0o40000); // O_DIRECT
    options.open(device.path()).unwrap()
}

/// Reads a block, for direct I/O, and compares it.
fn read_aligned(device: &File, offset: u64) {
    let mut space = vec![0; 8192];
    let aligned = space.as_ptr().align_offset(4096);
    let buffer = &mut space[aligned..][..4096];
    device.read_exact_at(buffer, offset).unwrap();
    assert!(*buffer == bytes(offset, 4096));
}

impl Sample {
    fn new(name: &str, readers: usize) -> Self {
        let runtime = runtime();
        let file = fuse::serve(Arc::new(ComputedDisk), name, runtime.handle(), |_| ()).unwrap();
        let kept = owned(&file.descriptors());
        let options = LoopOptions {
            name: name.into(),
            ..LoopOptions::default()
        };
        let device = loopdev::attach(file.file(), &options).unwrap();
        let devices: Vec<_> = (0..readers).map(|_| direct(&device)).collect();
        let reads_itself = direct(&device);
        file.into_server().stop();
        let folder = tempfile::tempdir().unwrap();
        let readers = (0..).zip(devices);
        let readers = readers
            .map(|(number, device)| start_reader(device, folder.path(), number))
            .collect();
        Self {
            device,
            kept,
            reads_itself,
            folder,
            readers,
        }
    }

    /// Stops the readers under a last server; what they have seen is printed.
    fn finish(mut self, what: &str, recovery: Recovery, kills: u64) {
        let (mut server, _socket) = start_server(&self.kept, recovery, None);
        std::thread::sleep(Duration::from_millis(300));
        std::fs::write(self.folder.path().join("stop"), []).unwrap();
        let (mut reads, mut failures, mut longest) = (0, 0, 0);
        for (number, reader) in self.readers.iter_mut().enumerate() {
            let ended = reader.ends_within(Duration::from_secs(60));
            assert_eq!(ended, Some(true), "{what}: reader {number}");
            let told = self.folder.path().join(number.to_string());
            let told = std::fs::read_to_string(told).unwrap();
            let numbers: Vec<u64> = told.split(' ').map(|n| n.parse().unwrap()).collect();
            reads += numbers[0];
            failures += numbers[1];
            longest = longest.max(numbers[2]);
        }
        println!(
            "{what}, {recovery:?}: {kills} kills, {reads} reads of which {failures} failed as they should, the longest {longest} ms"
        );
        assert!(reads > kills && failures > 0, "{reads} reads");
        drop((self.device, self.reads_itself));
        let ended = server.ends_within(Duration::from_secs(60));
        assert_eq!(
            ended,
            Some(true),
            "{what}: the server ends with the last user"
        );
    }
}

fn owned(descriptors: &[std::os::fd::BorrowedFd<'_>]) -> Vec<OwnedFd> {
    let owned = descriptors.iter().map(|fd| fd.try_clone_to_owned());
    owned.map(Result::unwrap).collect()
}

/// Kills of a test; together they are as many as the variable says, about.
fn kills(parts: u64) -> u64 {
    let all = std::env::var("SOCINBD_TEST_KILLS").map_or(100, |text| text.parse().unwrap());
    all / parts
}

fn killed_at_any_moment(recovery: Recovery) {
    let sample = Sample::new("socinbd-test:killed", READERS);
    let mut random = Random(recovery as u64);
    let kills = kills(5);
    let mut longest = Duration::ZERO;
    for _ in 0..kills {
        let began = Instant::now();
        let (server, mut socket) = start_server(&sample.kept, recovery, None);
        // some are killed before they serve
        if random.below(4) > 0 {
            socket.read_exact(&mut [0]).unwrap();
            longest = longest.max(began.elapsed());
        }
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        drop(server);
    }
    let longest = longest.as_millis();
    let what = format!("at any moment, the longest start {longest} ms");
    sample.finish(&what, recovery, kills);
}

#[test]
fn a_server_is_killed_at_any_moment() {
    killed_at_any_moment(Recovery::Either);
}

#[test]
fn a_server_is_killed_at_any_moment_and_the_journal_alone_tells() {
    killed_at_any_moment(Recovery::Journal);
}

#[test]
fn a_server_is_killed_at_any_moment_and_the_kernel_alone_tells() {
    if has_resend() {
        killed_at_any_moment(Recovery::Resend);
    }
}

fn killed_at_each_step(recovery: Recovery, steps: Range<usize>) {
    let sample = Sample::new("socinbd-test:steps", READERS);
    let mut random = Random(7);
    let rounds = (kills(5) / steps.len() as u64).max(2);
    let mut kills = 0;
    for step in steps {
        let mut reached = 0;
        for _ in 0..rounds {
            // the last two steps are taken once, or a few times
            let count = if step < 6 { 1 + random.below(8) } else { 1 };
            // to have something that was not answered
            let (server, _socket) = start_server(&sample.kept, recovery, Some((0, 3)));
            drop(server);
            let (mut server, _socket) = start_server(&sample.kept, recovery, Some((step, count)));
            reached += u64::from(server.ends_within(Duration::from_secs(2)) == Some(false));
            kills += 2;
        }
        assert!(reached > 0, "{:?}: no server came there", STEPS[step]);
    }
    sample.finish("at each step", recovery, kills);
}

#[test]
fn a_server_is_killed_at_each_step_and_the_journal_alone_tells() {
    killed_at_each_step(Recovery::Journal, 0..6);
}

#[test]
fn a_server_is_killed_at_each_step_and_the_kernel_alone_tells() {
    if has_resend() {
        killed_at_each_step(Recovery::Resend, 0..STEPS.len());
    }
}

/// The kernel does not end a process one of whose threads waits for an answer of another one; a successor helps it to its end.
#[test]
fn a_killed_server_that_reads_its_own_file_ends_by_its_successor() {
    let sample = Sample::new("socinbd-test:itself", 0);
    let mut command = this_test("serves_what_it_is_given");
    command
        .stdin(sample.reads_itself.try_clone().unwrap())
        .env(READS_ITSELF, "1");
    let noted = Some((1, 1));
    let (mut first, _socket) = start_server_by(command, &sample.kept, Recovery::Journal, noted);
    assert_eq!(first.ends_within(Duration::from_secs(2)), None);
    let (mut second, _socket) = start_server(&sample.kept, Recovery::Either, None);
    assert_eq!(first.ends_within(Duration::from_secs(60)), Some(false));
    read_aligned(&sample.reads_itself, PART);
    drop((sample.device, sample.reads_itself));
    assert_eq!(second.ends_within(Duration::from_secs(60)), Some(true));
}

/// As a daemon does with the file of a dead one that belongs to nothing.
#[test]
fn reads_of_an_aborted_file_fail_though_its_descriptors_are_open_elsewhere() {
    let disk = Gate::new(false);
    let runtime = runtime();
    let served = fuse::serve(disk.clone(), "socinbd-test:abort", runtime.handle(), |_| ()).unwrap();
    let [dying, kept] = [(); 2].map(|()| owned(&served.descriptors()));
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    std::thread::scope(|scope| {
        // dropped when the test fails: then the file ends
        let dying = dying;
        let reader = scope.spawn(|| file.read_exact_at(&mut [0; 4096], 0));
        eventually(|| disk.waiting.load(Ordering::SeqCst) == 1);
        served.into_server().stop();
        fuse::abort(kept).unwrap();
        eventually(|| reader.is_finished());
        reader.join().unwrap().unwrap_err();
        // it has ended already
        fuse::abort(dying).unwrap();
    });
}

#[test]
fn a_file_that_has_the_number_of_one_that_has_ended_is_not_aborted_in_its_place() {
    let runtime = runtime();
    let serve = || {
        let disk = Gate::new(true);
        fuse::serve(disk, "socinbd-test:number", runtime.handle(), |_| ()).unwrap()
    };
    let number = |served: &fuse::FuseFile| rustix::fs::fstat(served.file()).unwrap().st_dev;
    let ended = serve();
    let (kept, its_number) = (owned(&ended.descriptors()), number(&ended));
    drop(ended);
    // other tests may take the number: then it is one of theirs
    let mut others: Vec<_> = std::iter::repeat_with(serve).take(3).collect();
    let same = others.iter().position(|other| number(other) == its_number);
    let same = same.map(|index| others.swap_remove(index));
    fuse::abort(kept).unwrap();
    if let Some(same) = same {
        let file = File::from(same.file().try_clone_to_owned().unwrap());
        file.read_exact_at(&mut [0; 4096], 0).unwrap();
    }
}

/// Whether the kernel can send requests again (Linux 6.9).
fn has_resend() -> bool {
    let release = rustix::system::uname();
    let release = release.release().to_str().unwrap();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap());
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

/// A disk in which all is absent until it opens; then reads of it wait while it is held.
struct Gate {
    is_open: watch::Sender<bool>,
    waiting: AtomicU64,
    is_held: Mutex<bool>,
    released: Condvar,
}

impl Gate {
    fn new(is_open: bool) -> Arc<Self> {
        Arc::new(Self {
            is_open: watch::Sender::new(is_open),
            waiting: AtomicU64::new(0),
            is_held: Mutex::new(false),
            released: Condvar::new(),
        })
    }

    fn hold(&self, is_held: bool) {
        *self.is_held.lock().unwrap() = is_held;
        self.released.notify_all();
    }
}

impl ServedDisk for Gate {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_present(&self, _: Range<DiskOffset>) -> bool {
        *self.is_open.borrow()
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let held = self.is_held.lock().unwrap();
        drop(self.released.wait_while(held, |held| *held).unwrap());
        place_telling(offset.get(), buffer);
        Ok(())
    }

    fn make_present(
        self: Arc<Self>,
        _: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async move {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let mut is_open = self.is_open.subscribe();
            is_open.wait_for(|is_open| *is_open).await.unwrap();
            Ok(())
        })
    }

    fn allocation(&self, _: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        unreachable!("FUSE does not ask")
    }
}

fn read_block(file: &File, block: u64) {
    let mut buffer = [0; 4096];
    file.read_exact_at(&mut buffer, block * 4096).unwrap();
    assert!(buffer[..] == bytes(block * 4096, 4096), "block {block}");
}

#[test]
fn a_planned_hand_over_leaves_reads_that_wait() {
    for recovery in [Recovery::Journal, Recovery::Either] {
        let (first, second) = (Gate::new(false), Gate::new(true));
        let (first_runtime, runtime) = (runtime(), runtime());
        let served = fuse::serve(
            first.clone(),
            "socinbd-test:stop",
            first_runtime.handle(),
            |_| (),
        )
        .unwrap();
        let file = File::from(served.file().try_clone_to_owned().unwrap());
        let mut kept = owned(&served.descriptors());
        kept.rotate_left(1); // in any order
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..5)
                .map(|block| {
                    let file = &file;
                    scope.spawn(move || read_block(file, block))
                })
                .collect();
            eventually(|| first.waiting.load(Ordering::SeqCst) == 5);
            let began = Instant::now();
            served.into_server().stop();
            assert!(began.elapsed() < Duration::from_secs(5));
            // fetches that fail with their process are no answers
            drop(first_runtime);
            std::thread::sleep(Duration::from_millis(50));
            assert!(readers.iter().all(|reader| !reader.is_finished()));
            let late = scope.spawn(|| read_block(&file, 77));
            let nothing: AtStep = Arc::new(|_| ());
            let server =
                fuse::resume_in_steps(kept, second, runtime.handle(), recovery, nothing).unwrap();
            late.join().unwrap();
            for reader in readers {
                reader.join().unwrap();
            }
            read_block(&file, 78);
            assert_eq!(server.descriptors().len(), 2);
        });
    }
}

#[test]
fn more_reads_wait_than_there_are_slots() {
    let disk = Gate::new(false);
    let runtime = runtime();
    let served = fuse::serve(disk.clone(), "socinbd-test:slots", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    std::thread::scope(|scope| {
        for block in 0..400 {
            let file = &file;
            scope.spawn(move || read_block(file, block));
        }
        eventually(|| disk.waiting.load(Ordering::SeqCst) == 384);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(disk.waiting.load(Ordering::SeqCst), 384);
        disk.is_open.send_replace(true);
    });
    // in a hand-over, what has no slot stays in its landing
    disk.is_open.send_replace(false);
    let kept = owned(&served.descriptors());
    let waited = disk.waiting.load(Ordering::SeqCst);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..400)
            .map(|block| {
                let file = &file;
                scope.spawn(move || read_block(file, block))
            })
            .collect();
        eventually(|| disk.waiting.load(Ordering::SeqCst) == waited + 384);
        served.into_server().stop();
        let nothing: AtStep = Arc::new(|_| ());
        let recovery = Recovery::Journal;
        let second = Gate::new(false);
        let server =
            fuse::resume_in_steps(kept, second.clone(), runtime.handle(), recovery, nothing)
                .unwrap();
        eventually(|| second.waiting.load(Ordering::SeqCst) == 384);
        second.is_open.send_replace(true);
        // answers of the first server, too, are good ones
        disk.is_open.send_replace(true);
        for reader in readers {
            reader.join().unwrap();
        }
        drop(server);
    });
}

#[test]
fn a_watchdog_sees_a_thread_that_stands_still() {
    let disk = Gate::new(true);
    let runtime = runtime();
    let served = fuse::serve(disk.clone(), "socinbd-test:pulse", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    let server = served.into_server();
    let pulse = server.pulse();
    let all = |turns: u64| pulse.turns().iter().all(|it| it.unwrap() > turns);
    eventually(|| all(1));
    let most = pulse.turns().into_iter().flatten().max().unwrap();
    eventually(|| all(most));
    let stands_still = || {
        let before = pulse.turns();
        std::thread::sleep(Duration::from_millis(1500));
        pulse.turns().iter().zip(before).any(|it| *it.0 == it.1)
    };
    disk.hold(true);
    std::thread::scope(|scope| {
        for block in 0..2 {
            let file = &file;
            scope.spawn(move || read_block(file, block));
        }
        eventually(stands_still);
        disk.hold(false);
    });
    // what waits for a fetch holds up no thread
    disk.is_open.send_replace(false);
    std::thread::scope(|scope| {
        scope.spawn(|| read_block(&file, 3));
        eventually(|| disk.waiting.load(Ordering::SeqCst) == 1);
        let most = pulse.turns().into_iter().flatten().max().unwrap();
        eventually(|| all(most));
        disk.is_open.send_replace(true);
    });
}

#[test]
fn other_descriptors_are_refused_and_left_alone() {
    let runtime = runtime();
    let refused = |kept: &[&OwnedFd], why: &str| {
        let kept = kept.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let disk = Gate::new(true);
        let error = fuse::resume(kept, disk, runtime.handle()).err().unwrap();
        assert!(error.report().contains(why), "{}", error.report());
    };
    let serve = || {
        fuse::serve(
            Gate::new(true),
            "socinbd-test:other",
            runtime.handle(),
            |_| (),
        )
        .unwrap()
    };
    let served = serve();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    let [device, journal] = <[OwnedFd; 2]>::try_from(owned(&served.descriptors())).unwrap();
    refused(&[], "0 journals");
    refused(&[&device], "0 journals");
    refused(&[&journal], "0 devices");
    refused(&[&device, &journal, &journal], "2 journals");
    refused(&[&device, &device, &journal], "2 devices");
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    refused(&[&device, &journal, &null], "CharacterDevice");
    let (socket, _peer) = UnixStream::pair().unwrap();
    refused(&[&device, &journal, &socket.into()], "Socket");
    let disk_file: OwnedFd = tempfile::tempfile().unwrap().into();
    refused(&[&device, &disk_file], "not a memfd");
    let memory = SharedMemory::create("test", 12_288).unwrap();
    let memory = memory.as_fd().try_clone_to_owned().unwrap();
    refused(&[&device, &memory], "not a FUSE journal");
    let open = |is_nonblocking: bool| -> OwnedFd {
        let mut options = File::options();
        let flags = if is_nonblocking { 0o4000 } else { 0 };
        options.read(true).write(true).custom_flags(flags);
        options.open("/dev/fuse").unwrap().into()
    };
    refused(&[&open(true), &journal], "no file system");
    refused(&[&open(false), &journal], "not open as");
    let other = serve();
    let [_, other_journal] = <[OwnedFd; 2]>::try_from(owned(&other.descriptors())).unwrap();
    let info = std::os::fd::AsRawFd::as_raw_fd(&device);
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{info}")).unwrap();
    if info.contains("fuse_connection") {
        refused(&[&device, &other_journal], "different files");
    }
    let kept = vec![device.try_clone().unwrap(), journal.try_clone().unwrap()];
    struct Small;
    impl ServedDisk for Small {
        fn size(&self) -> u64 {
            SIZE - 4096
        }
        fn is_present(&self, _: Range<DiskOffset>) -> bool {
            true
        }
        fn read_present(&self, _: DiskOffset, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
        fn make_present(
            self: Arc<Self>,
            _: Range<DiskOffset>,
        ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
            unreachable!("all is present")
        }
        fn allocation(&self, _: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
            unreachable!("FUSE does not ask")
        }
    }
    let error = fuse::resume(kept, Arc::new(Small), runtime.handle());
    let report = error.err().unwrap().report();
    assert!(report.contains("and its disk"), "{report}");
    // the server of these descriptors was not disturbed
    read_block(&file, 5);
    served.into_server().stop();
    let server = fuse::resume(vec![journal, device], Gate::new(true), runtime.handle()).unwrap();
    read_block(&file, 6);
    drop(file);
    eventually(|| server.is_finished());
}
