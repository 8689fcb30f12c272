//! One FUSE file that is a disk, for kernels without nbd; a loop device uses it as its backing file.
//!
//! The file system consists of this file: its root is a regular file, it is not mounted anywhere, and it ends with the last user of the
//! file. The thread that takes a request answers it at once if the data is present. Otherwise the request is answered when the data has
//! been fetched, in any order, and the thread continues. The pages of the file are not cached (`FOPEN_DIRECT_IO`): the ext4 above caches
//! them, once.

mod protocol;

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
};

use rustix::{
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::MountAttrFlags,
    time::Timespec,
};
use tokio::runtime::Handle;
use zerocopy::{FromBytes, IntoBytes};

use self::protocol::{
    AttrOut, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FUSE_ASYNC_DIO, FUSE_ASYNC_READ, FUSE_BATCH_FORGET,
    FUSE_DESTROY, FUSE_FORGET, FUSE_GETATTR, FUSE_INIT, FUSE_MAX_PAGES, FUSE_OPEN, FUSE_READ,
    FUSE_RELEASE, FUSE_ROOT_ID, FUSE_STATFS, InHeader, InitIn, InitOut, KERNEL_MINOR_VERSION,
    KERNEL_VERSION, OpenOut, OutHeader, ReadIn, StatfsOut,
};
use crate::{
    buffer::Buffer,
    error::{Kind, Result, ResultExt},
    kernel::mount::FsContext,
    layer::ServedDisk,
    units::DiskOffset,
};

/// Threads that take requests of one file: a copy of present data keeps one busy for a moment.
const THREADS: usize = 2;
/// The largest read: the kernel's bound of 256 pages.
const MAX_READ: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Reads that the kernel has open with us at a time. Many absent ones must not hold up a present one.
const MAX_BACKGROUND: u16 = 256;
/// Nothing is written; this is the least that the kernel takes.
const MAX_WRITE: u32 = 4096;
/// The kernel asks for 8 KiB at least (FUSE_MIN_READ_BUFFER), and room for a write.
const REQUEST_BUFFER: usize = 16 << 10;
const BLOCK: u32 = 4096;
/// Times that a range is made present for one read: more only where it goes again before it is read.
const MAX_ATTEMPTS: u32 = 4;
/// How long it is waited when a request cannot be read.
const READ_PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// A regular file that root can read.
const MODE: u32 = 0o100_400;

/// A disk as a file. Dropping it ends the server; the file's other users (a loop device) get errors from then on, so their mounts are
/// taken down before.
pub struct FuseFile {
    file: OwnedFd,
    server: Server,
}

impl FuseFile {
    /// The file, open for reading.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The server alone, once something else has the file open. It ends by itself when the last user of the file is gone.
    pub fn into_server(self) -> Server {
        self.server
    }
}

/// The threads that answer for one file.
pub struct Server {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Whether the last user of the file is gone.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.queue.end_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Serves a disk as a file. `name` is shown in mount tables. Fetches run on `runtime`.
pub fn serve(disk: Arc<dyn ServedDisk>, name: &str, runtime: &Handle) -> Result<FuseFile> {
    let device = openat(
        CWD,
        "/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(|errno| super::driver_error("/dev/fuse", "fuse", errno))?;
    let context = FsContext::open("fuse")?;
    context.string("source", name)?;
    context.string("fd", device.as_raw_fd().to_string())?;
    context.string("rootmode", format!("{MODE:o}"))?;
    context.string("user_id", "0")?;
    context.string("group_id", "0")?;
    context.string("max_read", MAX_READ.to_string())?;
    context.flag("ro")?;
    context.create()?;
    // the threads first: opening the file is a request to them
    let server = start(Arc::new(device), disk, runtime)?;
    let mount =
        context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    let file = openat(
        CWD,
        format!("/proc/self/fd/{}", mount.as_raw_fd()),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .or_kind(Kind::Kernel, || format!("opening the FUSE file of {name}"))?;
    Ok(FuseFile { file, server })
}

fn start(device: Arc<OwnedFd>, disk: Arc<dyn ServedDisk>, runtime: &Handle) -> Result<Server> {
    let queue = Queue::of(&device).or_kind(Kind::Io, || "creating an epoll instance".into())?;
    let mut server = Server {
        queue: Arc::new(queue),
        threads: Vec::with_capacity(THREADS),
    };
    for _ in 0..THREADS {
        let worker = Worker {
            device: device.clone(),
            queue: server.queue.clone(),
            disk: disk.clone(),
            runtime: runtime.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || worker.run())
            .or_kind(Kind::Io, || "starting a thread".into())?;
        server.threads.push(thread);
    }
    Ok(server)
}

/// The wait queue of all threads of a file: an epoll instance with the FUSE device in it. A request wakes one of them (`EPOLLET`), and
/// each takes requests until there are none. With poll(2), each request woke all threads, and they spun on the kernel's lock of its queue.
struct Queue {
    epoll: OwnedFd,
    device: Arc<OwnedFd>,
}

/// The meaning of an event of a [`Queue`].
const REQUEST: u64 = 0;
const STOP: u64 = 1;

impl Queue {
    fn of(device: &Arc<OwnedFd>) -> rustix::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let requests = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, device, EventData::new_u64(REQUEST), requests)?;
        Ok(Self {
            epoll,
            device: Arc::clone(device),
        })
    }

    /// Ends all threads: the device can always be written to, so from now on each of them finds an event that means this.
    fn end_all(&self) {
        // the descriptor is in the epoll instance, and its memory is allocated
        let _ = epoll::modify(
            &self.epoll,
            &*self.device,
            EventData::new_u64(STOP),
            EventFlags::OUT,
        );
    }

    /// Waits for a request, up to a maximum time. False when the threads are to end.
    fn wait(&self, at_most: Option<&Timespec>) -> bool {
        let mut events = [MaybeUninit::uninit()];
        match epoll::wait(&self.epoll, &mut events, at_most) {
            Ok(([event], _)) => event.data.u64() != STOP,
            Ok(_) => true,
            Err(errno) => errno == Errno::INTR,
        }
    }
}

struct Worker {
    device: Arc<OwnedFd>,
    queue: Arc<Queue>,
    disk: Arc<dyn ServedDisk>,
    runtime: Handle,
}

impl Worker {
    fn run(self) {
        let mut buffer = vec![0; REQUEST_BUFFER];
        loop {
            match rustix::io::read(&self.device, &mut buffer[..]) {
                Ok(count) => {
                    if let Some((header, body)) = protocol::request(&buffer[..count]) {
                        self.handle(header, body);
                    } else {
                        tracing::error!("a malformed FUSE request of {count} bytes");
                    }
                }
                Err(Errno::AGAIN) => {
                    if !self.queue.wait(None) {
                        return;
                    }
                }
                // taken back before it was read
                Err(Errno::INTR | Errno::NOENT) => {}
                // the last user is gone, or the kernel has ended the file system before it
                Err(Errno::NODEV | Errno::CONNABORTED) => return self.queue.end_all(),
                // a shortage of memory, for example; without this thread the readers of the file would wait for ever
                Err(errno) => {
                    tracing::error!("reading a FUSE request: {errno}");
                    if !self.queue.wait(Some(&READ_PAUSE)) {
                        return;
                    }
                }
            }
        }
    }

    fn handle(&self, header: InHeader, body: &[u8]) {
        let unique = header.unique;
        let reply = |result: Result<&[u8], Errno>| reply(&self.device, unique, result);
        match header.opcode {
            FUSE_INIT => match InitIn::read_from_prefix(body) {
                Ok((init, _))
                    if init.major == KERNEL_VERSION && init.minor >= KERNEL_MINOR_VERSION =>
                {
                    reply(Ok(init_out(&init).as_bytes()));
                }
                _ => reply(Err(Errno::PROTO)),
            },
            FUSE_GETATTR if header.nodeid == FUSE_ROOT_ID => {
                reply(Ok(self.attributes().as_bytes()));
            }
            FUSE_OPEN if header.nodeid == FUSE_ROOT_ID => reply(Ok(OpenOut {
                open_flags: FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE,
                ..OpenOut::default()
            }
            .as_bytes())),
            FUSE_READ if header.nodeid == FUSE_ROOT_ID => self.read(unique, body),
            FUSE_RELEASE | FUSE_DESTROY => reply(Ok(&[])),
            FUSE_STATFS => reply(Ok(StatfsOut {
                blocks: self.disk.size() / u64::from(BLOCK),
                bsize: BLOCK,
                frsize: BLOCK,
                namelen: 255,
                files: 1,
                ..StatfsOut::default()
            }
            .as_bytes())),
            // these have no reply
            FUSE_FORGET | FUSE_BATCH_FORGET => {}
            // FLUSH, INTERRUPT and others: the kernel does not ask again
            _ => reply(Err(Errno::NOSYS)),
        }
    }

    fn attributes(&self) -> AttrOut {
        let size = self.disk.size();
        AttrOut {
            // the file never changes
            attr_valid: u64::from(u32::MAX),
            ino: FUSE_ROOT_ID,
            size,
            blocks: size.div_ceil(512),
            mode: MODE,
            nlink: 1,
            blksize: BLOCK,
            ..AttrOut::default()
        }
    }

    fn read(&self, unique: u64, body: &[u8]) {
        let request = ReadIn::read_from_prefix(body).ok();
        let Some((request, _)) = request.filter(|(request, _)| request.size <= MAX_READ) else {
            return reply(&self.device, unique, Err(Errno::INVAL));
        };
        let size = self.disk.size();
        let start = request.offset.min(size);
        let end = start.saturating_add(u64::from(request.size)).min(size);
        let range = DiskOffset(start)..DiskOffset(end);
        if self.disk.is_present(range.clone())
            && read_and_reply(&self.device, unique, &*self.disk, &range)
        {
            return;
        }
        let pending = Pending {
            device: self.device.clone(),
            unique,
            is_answered: false,
        };
        self.runtime
            .spawn(fetch_and_reply(self.disk.clone(), range, pending));
    }
}

/// Answers a read when its data has been fetched.
async fn fetch_and_reply(
    disk: Arc<dyn ServedDisk>,
    range: Range<DiskOffset>,
    mut pending: Pending,
) {
    for _ in 0..MAX_ATTEMPTS {
        if let Err(error) = disk.clone().make_present(range.clone()).await {
            tracing::debug!(target: "data", "FUSE read at {}: {}", range.start, error.report());
            return;
        }
        // fetched data is usually in the page cache, and no thread has to be woken
        if try_read_and_reply(&pending.device, pending.unique, &*disk, &range) {
            return pending.answered();
        }
        // a read of a local disk: not for the async workers
        let (disk, range) = (disk.clone(), range.clone());
        let answer = tokio::task::spawn_blocking(move || {
            if read_and_reply(&pending.device, pending.unique, &*disk, &range) {
                pending.answered();
                return None;
            }
            Some(pending)
        });
        match answer.await {
            Ok(Some(unanswered)) => pending = unanswered,
            Ok(None) | Err(_) => return,
        }
    }
    tracing::error!(
        "the data for a read at {} is evicted before it can be read",
        range.start
    );
}

/// A read that waits for a fetch. However its task ends, it is answered: the kernel would wait for ever.
struct Pending {
    device: Arc<OwnedFd>,
    unique: u64,
    is_answered: bool,
}

impl Pending {
    fn answered(mut self) {
        self.is_answered = true;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.is_answered {
            reply(&self.device, self.unique, Err(Errno::IO));
        }
    }
}

fn init_out(init: &InitIn) -> InitOut {
    InitOut {
        major: KERNEL_VERSION,
        minor: KERNEL_MINOR_VERSION,
        // no read-ahead: it is the layer's own affair
        max_readahead: 0,
        flags: init.flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES),
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..InitOut::default()
    }
}

/// Bytes of a read: at most MAX_READ.
fn length(range: &Range<DiskOffset>) -> usize {
    usize::try_from(range.end.get() - range.start.get()).unwrap_or(0)
}

/// Answers a read if that does not have to wait for the local disk; returns whether it has.
fn try_read_and_reply(
    device: &OwnedFd,
    unique: u64,
    disk: &dyn ServedDisk,
    range: &Range<DiskOffset>,
) -> bool {
    let mut buffer = Buffer::lend();
    let data = buffer.of_length(length(range));
    let is_read = matches!(disk.try_read_present(range.start, data), Ok(true));
    if is_read {
        reply(device, unique, Ok(data));
    }
    is_read
}

/// Answers a read. False if a part of the range is not present any more and has to be fetched again.
fn read_and_reply(
    device: &OwnedFd,
    unique: u64,
    disk: &dyn ServedDisk,
    range: &Range<DiskOffset>,
) -> bool {
    let mut buffer = Buffer::lend();
    let data = buffer.of_length(length(range));
    match disk.read_present(range.start, data) {
        Ok(()) => reply(device, unique, Ok(data)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return false,
        Err(error) => {
            tracing::error!("reading the disk at {}: {error}", range.start);
            reply(device, unique, Err(Errno::IO));
        }
    }
    true
}

/// A reply is one write, whole or not at all.
fn reply(device: &OwnedFd, unique: u64, result: Result<&[u8], Errno>) {
    let (error, data) = match result {
        Ok(data) => (0, data),
        Err(errno) => (-errno.raw_os_error(), &[][..]),
    };
    let header = OutHeader {
        // at most MAX_READ and a header
        len: u32::try_from(size_of::<OutHeader>() + data.len()).unwrap_or(u32::MAX),
        error,
        unique,
    };
    let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(data)];
    match rustix::io::retry_on_intr(|| rustix::io::writev(device, &parts)) {
        // ENOENT: the request was interrupted; ENODEV: all users are gone
        Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
        Err(errno) => tracing::error!("answering a FUSE request: {errno}"),
    }
}
