//! What all disks below a root share: threads, memory limits, the link, and the lock of the root.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, Weak},
    thread,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
};

use super::{
    ahead::{background::Traffic, recording::Touches},
    disk::sync::{self, SyncSender, Synced},
    locked::locked,
    read::{decoders::Decoders, held_spans::SharedHeldSpans},
    sources::health::Hosts,
    stored::directory,
};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// Options of a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// How long a read retries while the sources do not answer, unless the disk has another limit; `None`: without a limit.
    pub io_timeout: Option<Duration>,
    /// Threads that verify and inflate.
    pub decoders: usize,
    /// Maximum number of compressed bytes in flight, of all disks.
    pub fetch_memory: u64,
    /// Never fetch the rest of a layer, also when most of it was read.
    pub never_whole: bool,
    /// Record which spans are read, for [`Store::touches`].
    pub record: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            io_timeout: Some(Duration::from_secs(60)),
            decoders: thread::available_parallelism().map_or(1, usize::from),
            fetch_memory: 128 << 20,
            never_whole: false,
            record: false,
        }
    }
}

/// Bytes per permit of the fetch memory.
const MEMORY_UNIT: u64 = 4096;

/// The services that all disks below a root share. They live as long as one of the disks, or their store.
pub(crate) struct Services {
    /// `<root>/layers`.
    layers: PathBuf,
    options: StoreOptions,
    decoders: Decoders,
    held_spans: SharedHeldSpans,
    memory: Semaphore,
    traffic: Traffic,
    hosts: Hosts,
    /// Permits to lay out a disk, one per processor: more would not be faster, and each layout needs hundreds of bytes of memory per entry.
    layouts: Semaphore,
    /// Permit of the check of a whole layer, which reads all of a disk: one at a time.
    checks: Semaphore,
    touches: Option<Touches>,
    runtime: OnceLock<Handle>,
    /// The thread ends when the sender is dropped.
    sync: Mutex<Option<SyncSender>>,
    sync_thread: Mutex<Option<thread::JoinHandle<()>>>,
    /// Locked while it is open, so it is the last field.
    _lock: File,
}

impl Services {
    /// Takes the lock of a root, `Busy` when another process has it, makes its directories (0700), and starts the threads.
    pub(super) fn start(root: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        let layers = root.join("layers");
        directory::make_private(&layers)?;
        let lock = lock(&layers)?;
        let new = layers.join("new");
        // left by a killed daemon
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).or_kind(Kind::Io, || format!("cannot remove {}", new.display()));
            }
            _ => {}
        }
        directory::make_private(&new)?;
        directory::make_private(&layers.join("sha256"))?;
        let threads = || "cannot start the threads of the store".to_owned();
        let decoders = Decoders::start(options.decoders).or_kind(Kind::Io, threads)?;
        let (sender, thread) = sync::start().or_kind(Kind::Io, threads)?;
        Ok(Arc::new(Self {
            layers,
            decoders,
            held_spans: SharedHeldSpans::default(),
            memory: Semaphore::new(permits(options.fetch_memory) as usize),
            traffic: Traffic::default(),
            hosts: Hosts::default(),
            layouts: Semaphore::new(thread::available_parallelism().map_or(1, usize::from)),
            checks: Semaphore::new(1),
            touches: options.record.then(Touches::default),
            runtime: OnceLock::new(),
            sync: Mutex::new(Some(sender)),
            sync_thread: Mutex::new(Some(thread)),
            options,
            _lock: lock,
        }))
    }

    /// `<root>/layers`.
    pub(super) fn layers(&self) -> &Path {
        &self.layers
    }
}

impl Services {
    /// A permit to lay out a disk.
    pub(crate) async fn layout_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.layouts.acquire().await.ok() // never closed
    }

    /// The directory of drafts.
    pub(crate) fn new_directory(&self) -> PathBuf {
        self.layers.join("new")
    }

    pub(crate) fn options(&self) -> &StoreOptions {
        &self.options
    }

    pub(crate) fn decoders(&self) -> &Decoders {
        &self.decoders
    }

    /// Spans that the local disk has rejected.
    pub(crate) fn held_spans(&self) -> &SharedHeldSpans {
        &self.held_spans
    }

    /// The health of the hosts of sources.
    pub(crate) fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Waits for memory for a fetch of this many bytes, which is released when the permit is dropped. A larger fetch takes all memory.
    pub(crate) async fn memory(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        let count = permits(bytes.min(self.options.fetch_memory));
        self.memory.acquire_many(count).await.ok() // never closed
    }

    /// Waits for the permit to check a whole layer.
    pub(crate) async fn check_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.checks.acquire().await.ok() // never closed
    }

    /// Stores the runtime that fetches run on, for threads outside of it.
    pub(crate) fn enter(&self) {
        if self.runtime.get().is_none() {
            // another thread has set the same runtime meanwhile
            let _ = self.runtime.set(Handle::current());
        }
    }

    /// Runs a task on the store's runtime, if there is one. Without a runtime no reader waits either.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = self.runtime.get() {
            runtime.spawn(task);
        }
    }

    /// Queues a disk for the next sync.
    pub(crate) fn sync_later(&self, disk: Weak<dyn Synced>) {
        if let Some(sender) = &*locked(&self.sync) {
            // the thread ends after the services
            let _ = sender.send(disk);
        }
    }

    /// The recording of reads, if it is on.
    pub(crate) fn recording(&self) -> Option<&Touches> {
        self.touches.as_ref()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        locked(&self.sync).take();
        let thread = locked(&self.sync_thread).take();
        // the thread itself may have dropped the last disk
        if let Some(thread) = thread.filter(|it| it.thread().id() != thread::current().id()) {
            // the thread does not panic
            let _ = thread.join();
        }
    }
}

/// Takes the lock of a root.
fn lock(layers: &Path) -> Result<File> {
    let path = layers.join("lock");
    let io = || format!("cannot lock {}", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .or_kind(Kind::Io, io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner); // only for the message
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{} is in use by process {}; give this daemon another root, or stop that one",
                    layers.display(),
                    owner.trim()
                ),
            ));
        }
        Err(TryLockError::Error(error)) => return Err(error).or_kind(Kind::Io, io),
    }
    // for the message of another process; the lock does not depend on it
    let _ = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(MEMORY_UNIT))
        .unwrap_or(u32::MAX)
        .min(Semaphore::MAX_PERMITS as u32)
}
