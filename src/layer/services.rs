//! What all disks below a root share: threads, memory limits, the link, and the lock of the root.

use std::{
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
    lock::DirectoryLock,
    locked::locked,
    read::{decoders::Decoders, held_spans::SharedHeldSpans},
    sources::health::Hosts,
    space::{
        budget::{Budget, DiskLimits},
        evict::{self, Space},
    },
    stored::directory,
    types::LayerBlob,
};
use crate::{
    error::{Kind, Result, ResultExt as _},
    fair_share::{FairShare, Share},
    oci::Digest,
    regular_file,
    source::Limits,
};

/// Options of a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// How long a read retries while the sources do not answer, unless the disk has another limit; `None`: without a limit.
    pub io_timeout: Option<Duration>,
    /// Time limits of requests to the sources.
    pub limits: Limits,
    /// Threads that verify and inflate.
    pub decoders: usize,
    /// Maximum number of compressed bytes in flight, of all disks.
    pub fetch_memory: u64,
    /// Never fetch the rest of a layer, also when most of it was read.
    pub never_whole: bool,
    /// How long no reader waits before [`FillPolicy::Delayed`](super::FillPolicy::Delayed) fetches the rest of a layer.
    pub quiet_time: Duration,
    /// Record which spans are read, for [`Store::touches`].
    pub record: bool,
    /// What the disks may have of the local file system.
    pub disk_limits: DiskLimits,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            io_timeout: Some(Duration::from_secs(60)),
            limits: Limits::default(),
            decoders: thread::available_parallelism().map_or(1, usize::from),
            fetch_memory: 128 << 20,
            never_whole: false,
            quiet_time: Duration::from_secs(30),
            record: false,
            disk_limits: DiskLimits::default(),
        }
    }
}

/// What is called for a layer that does not have its diff ID, with its table.
type OnFalseLayer = Box<dyn Fn(&LayerBlob, &Digest) + Send + Sync>;

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
    /// The shares that the hosts of sources have of `memory`.
    memory_of_hosts: FairShare,
    traffic: Traffic,
    space: Arc<Space>,
    hosts: Hosts,
    /// Permits to lay out a disk, one per processor: more would not be faster, and each layout needs hundreds of bytes of memory per entry.
    layouts: Semaphore,
    /// Permit of the check of a whole layer, which reads all of a disk: one at a time.
    checks: Semaphore,
    touches: Option<Touches>,
    on_false_layer: OnceLock<OnFalseLayer>,
    runtime: OnceLock<Handle>,
    /// The thread ends when the sender is dropped.
    sync: Mutex<Option<SyncSender>>,
    sync_thread: Mutex<Option<thread::JoinHandle<()>>>,
    /// Locked while it is open, so it is the last field.
    _lock: DirectoryLock,
}

/// Memory for the compressed bytes of a fetch, until it is dropped.
pub(crate) struct FetchMemory<'a> {
    _memory: Option<SemaphorePermit<'a>>,
    _of_host: Share<'a>,
}

impl Services {
    /// Makes the directories of a locked root (0700), and starts the threads.
    pub(super) fn start(
        root: &Path,
        lock: DirectoryLock,
        options: StoreOptions,
    ) -> Result<Arc<Self>> {
        let layers = root.join("layers");
        let new = layers.join("new");
        // left by a killed daemon
        regular_file::remove(&new)
            .or_kind(Kind::Io, || format!("cannot remove {}", new.display()))?;
        directory::make_private(&new)?;
        directory::make_private(&layers.join("sha256"))?;
        let threads = || "cannot start the threads of the store".to_owned();
        let decoders = Decoders::start(options.decoders).or_kind(Kind::Io, threads)?;
        let (sender, thread) = sync::start().or_kind(Kind::Io, threads)?;
        let space = Space::new(Budget::new(layers.clone(), options.disk_limits));
        evict::watch(&space).or_kind(Kind::Io, threads)?;
        Ok(Arc::new(Self {
            layers,
            decoders,
            held_spans: SharedHeldSpans::default(),
            memory: Semaphore::new(permits(options.fetch_memory) as usize),
            memory_of_hosts: FairShare::new(options.fetch_memory, options.fetch_memory),
            traffic: Traffic::default(),
            space,
            hosts: Hosts::new(options.limits),
            layouts: Semaphore::new(thread::available_parallelism().map_or(1, usize::from)),
            checks: Semaphore::new(1),
            touches: options.record.then(Touches::default),
            on_false_layer: OnceLock::new(),
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

    /// The space of the disks on the local file system.
    pub(crate) fn space(&self) -> &Space {
        &self.space
    }

    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Waits for memory for a fetch of this many bytes from a host. A larger fetch takes all memory. What waits for a host that does not
    /// answer holds no memory that fetches from other hosts need.
    pub(crate) async fn memory(&self, host: &str, bytes: u64) -> FetchMemory<'_> {
        let of_host = self.memory_of_hosts.acquire(host, bytes).await;
        let count = permits(bytes.min(self.options.fetch_memory));
        FetchMemory {
            _memory: self.memory.acquire_many(count).await.ok(), // never closed
            _of_host: of_host,
        }
    }

    /// Compressed bytes in flight, rounded up to [`MEMORY_UNIT`].
    pub(crate) fn memory_in_use(&self) -> u64 {
        let all = u64::from(permits(self.options.fetch_memory));
        let free = self.memory.available_permits() as u64;
        all.saturating_sub(free) * MEMORY_UNIT
    }

    /// Waits for the permit to check a whole layer.
    pub(crate) async fn check_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.checks.acquire().await.ok() // never closed
    }

    /// Calls this when a layer was found not to have its diff ID. Only the first call counts.
    pub(super) fn set_on_false_layer(&self, tell: OnFalseLayer) {
        let _ = self.on_false_layer.set(tell);
    }

    /// A layer, with this table, does not have its diff ID.
    pub(crate) fn tell_false_layer(&self, layer: &LayerBlob, table: &Digest) {
        if let Some(tell) = self.on_false_layer.get() {
            tell(layer, table);
        }
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

fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(MEMORY_UNIT))
        .unwrap_or(u32::MAX)
        .min(Semaphore::MAX_PERMITS as u32)
}
