//! Kept connections: a server ends at any step or at any moment, and one that has its descriptors goes on. The kernel's part is played by
//! a client here; `kept_in_vm` has the real one.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Write as _},
    net::Shutdown,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::FileExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::{JoinHandle, ScopedJoinHandle},
    time::Duration,
};

use futures_util::future::BoxFuture;
use socinbd::{
    error::{Error, Kind},
    kernel::{
        fdpass,
        kept::{ServerPulse as _, SharedMemory},
    },
    layer::{Allocation, ServedDisk},
    nbd::{
        ConnectionError,
        kept::{Control, KeptConnection, Step},
    },
    units::DiskOffset,
};
use tokio::runtime::Runtime;

use super::client::{EINVAL, EIO, EPERM, FLUSH, READ, TRIM, be32, be64, request_bytes};
use crate::support::place_telling;

/// Bytes of a disk, and of one of its parts, which have the same state.
pub(crate) const SIZE: u64 = 24 << 20;
const PART: u64 = 1 << 20;

/// What a part of a disk is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Present,
    Absent,
    Failing,
}

/// What of a disk is absent at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    Nothing,
    /// A third, which comes after a short time.
    Third,
    /// A third, of which the last part never comes.
    ThirdAndFailing,
}

/// A disk in a file.
pub(crate) struct FileDisk {
    file: File,
    states: Mutex<Vec<State>>,
    splices: bool,
    /// One of so many reads finds what was present before; the others find that it was evicted.
    one_of: u32,
    reads: AtomicU32,
}

impl FileDisk {
    pub(crate) fn open(path: &Path, absent: Absent) -> Self {
        let file = File::open(path).unwrap();
        let parts = file.metadata().unwrap().len().div_ceil(PART) as usize;
        let states = (0..parts).map(|part| match part % 3 {
            1 if absent == Absent::ThirdAndFailing && part == parts - 2 => State::Failing,
            1 if absent != Absent::Nothing => State::Absent,
            _ => State::Present,
        });
        Self {
            file,
            states: Mutex::new(states.collect()),
            splices: true,
            one_of: 1,
            reads: AtomicU32::new(0),
        }
    }

    fn states(&self, range: &Range<DiskOffset>) -> Vec<State> {
        let parts = range.start.get() / PART..range.end.get().div_ceil(PART);
        self.states.lock().unwrap()[parts.start as usize..parts.end as usize].to_vec()
    }
}

impl ServedDisk for FileDisk {
    fn size(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        self.states(&range)
            .iter()
            .all(|state| *state == State::Present)
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let reads = self.reads.fetch_add(1, Ordering::Relaxed);
        if !reads.is_multiple_of(self.one_of) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.file.read_exact_at(buffer, offset.get())
    }

    fn would_wait(&self, range: Range<DiskOffset>) -> bool {
        range.start.get().is_multiple_of(7 * 4096)
    }

    fn splice_present(&self, range: Range<DiskOffset>, pipe: BorrowedFd<'_>) -> io::Result<bool> {
        if !self.splices {
            return Ok(false);
        }
        let (mut at, end) = (range.start.get(), range.end.get());
        // a part that is put aside half done
        if at.is_multiple_of(5 * 4096) && end - at > 65536 {
            let flags = rustix::pipe::SpliceFlags::NONBLOCK;
            rustix::pipe::splice(&self.file, Some(&mut at), pipe, None, 65536, flags)?;
            return Ok(false);
        }
        while at < end {
            let (left, flags) = ((end - at) as usize, rustix::pipe::SpliceFlags::NONBLOCK);
            rustix::pipe::splice(&self.file, Some(&mut at), pipe, None, left, flags)?;
        }
        Ok(true)
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(3)).await;
            if self.states(&range).contains(&State::Failing) {
                return Err(Arc::new(Error::new(Kind::Unavailable, "fails on purpose")));
            }
            let parts = range.start.get() / PART..range.end.get().div_ceil(PART);
            self.states.lock().unwrap()[parts.start as usize..parts.end as usize]
                .fill(State::Present);
            Ok(())
        })
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        vec![(range.end.get() - range.start.get(), Allocation::Present)]
    }
}

/// Bytes that tell their place.
pub(crate) fn content(size: u64) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    place_telling(0, &mut content);
    content
}

/// A disk's file, and what is in it.
struct Sample {
    file: tempfile::NamedTempFile,
    content: Vec<u8>,
}

impl Sample {
    fn new() -> Self {
        let content = content(SIZE);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&content).unwrap();
        Self { file, content }
    }

    fn disk(&self) -> Arc<FileDisk> {
        Arc::new(FileDisk::open(self.file.path(), Absent::ThirdAndFailing))
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Numbers that look random, the same each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What a request should get.
#[derive(Clone, Copy)]
struct Asked {
    offset: u64,
    length: u32,
    error: u32,
}

/// The kernel's part: keeps requests in flight, and compares each reply. Ends after so many requests, all answered once.
fn client(kernel: UnixStream, content: &[u8], requests: u64, most_in_flight: usize, is_slow: bool) {
    kernel
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut kernel = &kernel;
    let mut random = Random(7);
    let mut in_flight: HashMap<u64, Asked> = HashMap::new();
    let mut next = 0;
    let mut data = Vec::new();
    while next < requests || !in_flight.is_empty() {
        while next < requests && in_flight.len() < most_in_flight {
            next += 1;
            let length = match random.below(8) {
                0 => 1 << 20,
                1 | 2 => 131_072,
                3 => 16_384,
                _ => 4096,
            };
            // without CAP_SYS_RESOURCE the pipe is smaller
            let length = length.min(1008 << 10);
            let offset = random.below((SIZE - u64::from(length)) / 4096 + 1) * 4096;
            let last = SIZE / PART - 2;
            let is_failing = offset < (last + 1) * PART && offset + u64::from(length) > last * PART;
            let mut asked = Asked {
                offset,
                length,
                error: if is_failing { EIO } else { 0 },
            };
            let mut command = READ;
            match random.below(40) {
                0 => (asked.length, asked.error) = (33 << 20, EINVAL),
                1 => (asked.offset, asked.error) = (SIZE - 2048, EINVAL),
                2 => (command, asked.error) = (FLUSH, EINVAL),
                3 => (command, asked.error) = (TRIM, EPERM),
                _ => {}
            }
            let request = request_bytes(0, command, next, asked.offset, asked.length);
            kernel.write_all(&request).unwrap();
            in_flight.insert(next, asked);
        }
        let mut header = [0; 16];
        kernel.read_exact(&mut header).unwrap();
        assert_eq!(be32(&header), 0x6744_6698, "a reply starts");
        let asked = in_flight
            .remove(&be64(&header[8..]))
            .expect("a reply to a request in flight");
        assert_eq!(be32(&header[4..]), asked.error, "of {}", asked.offset);
        if asked.error == 0 {
            data.resize(asked.length as usize, 0);
            for piece in data.chunks_mut(100_000) {
                kernel.read_exact(piece).unwrap();
                if is_slow {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            let expected = &content[asked.offset as usize..][..asked.length as usize];
            assert!(data == expected, "wrong bytes at {}", asked.offset);
        }
    }
    // and nothing more
    kernel
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let more = kernel.read(&mut [0]).unwrap_err();
    assert_eq!(more.kind(), io::ErrorKind::WouldBlock);
}

pub(crate) fn owned(connection: &KeptConnection) -> Vec<OwnedFd> {
    let descriptors = connection.descriptors();
    let owned = descriptors.map(|descriptor| descriptor.try_clone_to_owned().unwrap());
    owned.into()
}

/// Stands for the end of a server.
struct Killed;

/// Serves until the `countdown` of a step is at zero; true where the server ended there.
fn serve_until(
    descriptors: Vec<OwnedFd>,
    disk: &Arc<FileDisk>,
    runtime: &Runtime,
    step: Step,
    countdown: u32,
) -> bool {
    let mut connection = KeptConnection::from_descriptors(descriptors).unwrap();
    let left = AtomicU32::new(countdown);
    let at_step = |at| {
        if at == step && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            resume_unwind(Box::new(Killed));
        }
    };
    let disk = Arc::clone(disk) as Arc<dyn ServedDisk>;
    let ended = catch_unwind(AssertUnwindSafe(|| {
        connection.serve_in_steps(&disk, runtime.handle(), at_step)
    }));
    match ended {
        Err(killed) => {
            assert!(killed.is::<Killed>());
            true
        }
        Ok(end) => {
            end.unwrap();
            false
        }
    }
}

pub(crate) const STEPS: [Step; 13] = [
    Step::Received,
    Step::Filling,
    Step::Header,
    Step::Data,
    Step::Messages,
    Step::Whole,
    Step::Sending,
    Step::SentSome,
    Step::Sent,
    Step::Freed,
    Step::AllFreed,
    Step::Empty,
    Step::Drained,
];

#[test]
fn a_server_that_ends_at_any_step_has_a_successor() {
    let sample = Sample::new();
    let runtime = runtime();
    std::thread::scope(|scope| {
        for step in STEPS {
            let (sample, runtime) = (&sample, &runtime);
            scope.spawn(move || {
                let (connection, kernel) = KeptConnection::new().unwrap();
                let kept = owned(&connection);
                drop(connection);
                let client = scope.spawn(|| {
                    client(kernel.into(), &sample.content, 400, 24, false);
                });
                let mut kills = 0;
                let mut random = Random(step as u64);
                loop {
                    let kept = kept.iter().map(|fd| fd.try_clone().unwrap()).collect();
                    // what was absent is so again for each server
                    let disk = sample.disk();
                    // later and later: all that is there may be less than one send
                    let countdown = 1 + random.below(3 + kills / 100) as u32;
                    if !serve_until(kept, &disk, runtime, step, countdown) {
                        break;
                    }
                    kills += 1;
                    assert!(kills < 10_000, "no progress with {step:?}");
                }
                client.join().unwrap();
                assert!(kills > 5, "{step:?}: {kills} kills");
            });
        }
    });
}

/// A program of the version before has made the connection, and may follow again.
#[test]
fn a_connection_of_the_version_before_is_served_without_messages() {
    let sample = Sample::new();
    let runtime = runtime();
    let (connection, kernel) = KeptConnection::new().unwrap();
    let kept = owned(&connection);
    drop(connection);
    let journal = SharedMemory::open(kept[2].try_clone().unwrap(), 2048).unwrap();
    let words = journal.words();
    words[2].store(1, Ordering::Release);
    let mut checksum = flate2::Crc::new();
    for word in &words[..8] {
        checksum.update(&word.load(Ordering::Acquire).to_le_bytes());
    }
    words[8].store(checksum.sum(), Ordering::Release);
    let mut connection = KeptConnection::from_descriptors(kept).unwrap();
    let disk = Arc::clone(&sample.disk()) as Arc<dyn ServedDisk>;
    std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            connection.serve_in_steps(&disk, runtime.handle(), |step| {
                assert!(step != Step::Messages);
            })
        });
        client(kernel.into(), &sample.content, 300, 24, false);
        server.join().unwrap().unwrap();
    });
    assert_eq!(words[2].load(Ordering::Acquire), 1);
}

#[test]
fn a_disk_without_splice_is_served_by_copies() {
    let sample = Sample::new();
    let runtime = runtime();
    let (mut connection, kernel) = KeptConnection::new().unwrap();
    let mut disk = FileDisk::open(sample.file.path(), Absent::ThirdAndFailing);
    disk.splices = false;
    let disk: Arc<dyn ServedDisk> = Arc::new(disk);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| connection.serve(&disk, runtime.handle()));
        client(kernel.into(), &sample.content, 300, 24, false);
        server.join().unwrap().unwrap();
    });
}

/// Other readers may have a range evicted again and again before its read comes to it.
#[test]
fn a_range_that_is_evicted_many_times_is_read_in_the_end() {
    let sample = Sample::new();
    let runtime = runtime();
    let (mut connection, kernel) = KeptConnection::new().unwrap();
    let mut disk = FileDisk::open(sample.file.path(), Absent::ThirdAndFailing);
    disk.splices = false;
    disk.one_of = 8;
    let disk: Arc<dyn ServedDisk> = Arc::new(disk);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| connection.serve(&disk, runtime.handle()));
        client(kernel.into(), &sample.content, 200, 24, false);
        server.join().unwrap().unwrap();
    });
}

/// Starts this test binary as a server of these descriptors; see [`serves_what_it_is_given`].
pub(crate) struct ServerProcess {
    child: Child,
    _folder: tempfile::TempDir,
}

const SOCKET: &str = "SOCINBD_TEST_KEPT_SOCKET";
const DISK: &str = "SOCINBD_TEST_KEPT_DISK";
const KILL_AT: &str = "SOCINBD_TEST_KEPT_KILL_AT";

impl ServerProcess {
    /// `kill_at`: the number of a step in [`STEPS`], and how often it is passed by.
    pub(crate) fn start(
        connections: &[Vec<OwnedFd>],
        disk: &Path,
        absent: Absent,
        kill_at: Option<(usize, u32)>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "nbd::kept::serves_what_it_is_given"])
            .env(SOCKET, &socket)
            .env(DISK, format!("{absent:?} {}", disk.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some((step, countdown)) = kill_at {
            command.env(KILL_AT, format!("{step} {countdown}"));
        }
        let child = command.spawn().unwrap();
        let (mut server, _) = listener.accept().unwrap();
        for descriptor in connections.iter().flatten() {
            fdpass::send(&server, descriptor.as_fd()).unwrap();
        }
        server.shutdown(Shutdown::Write).unwrap();
        // it begins to serve; or has ended, where it was to end early
        let _ = server.read(&mut [0]);
        Self {
            child,
            _folder: folder,
        }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end by its own hand; whether it was killed.
    pub(crate) fn wait(mut self) -> bool {
        !self.child.wait().unwrap().success()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

/// No test by itself: a server that others start and kill.
#[test]
fn serves_what_it_is_given() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let mut socket = UnixStream::connect(PathBuf::from(socket)).unwrap();
    let mut descriptors = Vec::new();
    // until the socket is closed
    while let Ok(descriptor) = fdpass::receive(&socket) {
        descriptors.push(descriptor);
    }
    let disk = std::env::var(DISK).unwrap();
    let (absent, path) = disk.split_once(' ').unwrap();
    let kinds = [Absent::Nothing, Absent::Third, Absent::ThirdAndFailing];
    let absent = kinds.into_iter().find(|kind| format!("{kind:?}") == absent);
    let disk: Arc<dyn ServedDisk> = Arc::new(FileDisk::open(Path::new(path), absent.unwrap()));
    let kill_at = std::env::var(KILL_AT).ok().map(|text| {
        let (step, countdown) = text.split_once(' ').unwrap();
        let step: usize = step.parse().unwrap();
        (STEPS[step], AtomicU32::new(countdown.parse().unwrap()))
    });
    let at_step = |at| {
        if let Some((step, left)) = &kill_at
            && at == *step
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            let this = rustix::process::getpid();
            rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
        }
    };
    let runtime = runtime();
    socket.write_all(&[1]).unwrap();
    std::thread::scope(|scope| {
        let mut rest = descriptors.into_iter();
        loop {
            let mut kept: Vec<OwnedFd> = rest.by_ref().take(3).collect();
            if kept.is_empty() {
                break;
            }
            kept.rotate_left(1); // in any order
            let (disk, runtime, at_step) = (&disk, runtime.handle(), &at_step);
            scope.spawn(move || {
                let mut connection = KeptConnection::from_descriptors(kept).unwrap();
                connection.serve_in_steps(disk, runtime, at_step).unwrap();
            });
        }
    });
}

#[test]
fn processes_are_killed_at_any_moment() {
    let sample = Sample::new();
    let (connection, kernel) = KeptConnection::new().unwrap();
    let kept = vec![owned(&connection)];
    drop(connection);
    std::thread::scope(|scope| {
        let client: ScopedJoinHandle<'_, ()> = scope.spawn(|| {
            client(kernel.into(), &sample.content, 1500, 24, true);
        });
        let mut random = Random(1);
        let mut kills = 0;
        while !client.is_finished() {
            let server =
                ServerProcess::start(&kept, sample.file.path(), Absent::ThirdAndFailing, None);
            std::thread::sleep(Duration::from_micros(random.below(40_000)));
            server.kill();
            kills += 1;
        }
        client.join().unwrap();
        assert!(kills >= 10, "{kills} kills");
        println!("{kills} kills");
    });
}

/// A connection that is served by a thread.
struct Served {
    kernel: UnixStream,
    kept: Vec<OwnedFd>,
    control: Arc<Control>,
    thread: JoinHandle<Result<(), ConnectionError>>,
    _runtime: Runtime,
}

fn serve(disk: Arc<FileDisk>) -> Served {
    let (mut connection, kernel) = KeptConnection::new().unwrap();
    let (kept, control) = (owned(&connection), connection.control());
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let disk: Arc<dyn ServedDisk> = disk;
    let thread = std::thread::spawn(move || connection.serve(&disk, &handle));
    Served {
        kernel: kernel.into(),
        kept,
        control,
        thread,
        _runtime: runtime,
    }
}

#[test]
fn a_read_larger_than_the_pipe_is_answered_and_does_not_survive() {
    let sample = Sample::new();
    let mut served = serve(sample.disk());
    let (offset, length) = (PART / 2, 5 << 20);
    let request = request_bytes(0, READ, 5, offset, length);
    served.kernel.write_all(&request).unwrap();
    let mut reply = vec![0; 16 + length as usize];
    served.kernel.read_exact(&mut reply).unwrap();
    assert_eq!((be32(&reply[4..]), be64(&reply[8..])), (0, 5));
    assert!(reply[16..] == sample.content[offset as usize..][..length as usize]);
    // one that fails is answered as well
    let request = request_bytes(0, READ, 6, SIZE - (5 << 20), 5 << 20);
    served.kernel.write_all(&request).unwrap();
    served.kernel.read_exact(&mut reply[..16]).unwrap();
    assert_eq!((be32(&reply[4..]), be64(&reply[8..])), (EIO, 6));
    // one that is half sent when its server ends
    let request = request_bytes(0, READ, 7, offset, length);
    served.kernel.write_all(&request).unwrap();
    served.kernel.read_exact(&mut reply[..1000]).unwrap();
    let error = KeptConnection::from_descriptors(served.kept).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
    drop(served.kernel);
    served.thread.join().unwrap().unwrap_err();
}

#[test]
fn a_watchdog_sees_a_thread_that_stands_still() {
    let sample = Sample::new();
    let mut served = serve(sample.disk());
    let control = Arc::clone(&served.control);
    let turns = || control.turns()[0].unwrap();
    let first = turns();
    crate::support::wait("a turn without requests", || turns() > first + 1);
    // nobody takes the replies
    for cookie in 0..4 {
        let request = request_bytes(0, READ, cookie, 0, 1000 << 10);
        served.kernel.write_all(&request).unwrap();
    }
    crate::support::wait("no turn for longer than one takes", || {
        let last = turns();
        std::thread::sleep(Duration::from_millis(1500));
        turns() == last
    });
    drop(served.kernel);
    // in the middle of a reply
    served.thread.join().unwrap().unwrap_err();
}

#[test]
fn other_descriptors_are_refused_and_left_alone() {
    let refused = |descriptors: Vec<OwnedFd>, why: &str| {
        let error = KeptConnection::from_descriptors(descriptors).unwrap_err();
        assert!(error.report().contains(why), "{}", error.report());
    };
    let (connection, _kernel) = KeptConnection::new().unwrap();
    let (other, _other_kernel) = KeptConnection::new().unwrap();
    let [socket, pipe, journal] = <[OwnedFd; 3]>::try_from(owned(&connection)).unwrap();
    let [other_socket, other_pipe, _] = <[OwnedFd; 3]>::try_from(owned(&other)).unwrap();
    let set = |set: &[&OwnedFd]| -> Vec<OwnedFd> {
        set.iter().map(|fd| fd.try_clone().unwrap()).collect()
    };
    refused(vec![], "0 journals");
    refused(set(&[&socket, &pipe]), "0 journals");
    refused(set(&[&socket, &journal]), "0 pipes");
    refused(set(&[&pipe, &journal]), "0 sockets");
    refused(set(&[&socket, &socket, &pipe, &journal]), "2 sockets");
    refused(set(&[&socket, &pipe, &journal, &journal]), "2 journals");
    refused(set(&[&other_socket, &pipe, &journal]), "different");
    refused(set(&[&socket, &other_pipe, &journal]), "different");
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    refused(set(&[&socket, &reader, &journal]), "not a pipe");
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    refused(set(&[&socket, &pipe, &file]), "not a memfd");
    let tcp: OwnedFd = std::net::TcpListener::bind("127.0.0.1:0").unwrap().into();
    refused(set(&[&tcp, &pipe, &journal]), "not a Unix stream socket");
    let device: OwnedFd = File::open("/dev/null").unwrap().into();
    refused(
        set(&[&socket, &pipe, &journal, &device]),
        "a kept descriptor",
    );
    for set in [
        set(&[&journal, &socket, &pipe]),
        set(&[&pipe, &journal, &socket]),
    ] {
        KeptConnection::from_descriptors(set).unwrap();
    }
}
