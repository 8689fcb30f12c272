//! An export in memory whose fetches wait until a test lets them go, and a server on it.

use std::{
    io,
    ops::Range,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use socinbd::{
    error::{Error, Kind},
    layer::{Allocation, ServedDisk},
    nbd::{Address, Exports, Limits, Server},
    units::DiskOffset,
};
use tokio::{runtime::Runtime, sync::watch};

use crate::support::place_telling;

/// Bytes that are fetched, and are zero, as one.
pub(super) const BLOCK: u64 = 4096;

/// What a block of the export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    Present,
    /// Comes when the gate is open.
    Absent,
    Zero,
    /// Its fetch fails with this kind.
    Failing(Kind),
    /// Is present, and the local disk is slow.
    Slow,
    /// Is present, and the local disk fails.
    Broken,
    /// Is present, and goes so many times before it is read.
    Evicted(u32),
}

pub(super) struct Memory {
    data: Vec<u8>,
    blocks: Mutex<Vec<Block>>,
    /// Counted up with every fetch that is asked for.
    fetches: Mutex<u64>,
    asked: Condvar,
    gate: watch::Sender<bool>,
}

impl Memory {
    /// `blocks` blocks of bytes that tell their place, all present.
    pub(super) fn new(blocks: usize) -> Self {
        let mut data = vec![0; blocks * BLOCK as usize];
        place_telling(0, &mut data);
        Self {
            data,
            blocks: Mutex::new(vec![Block::Present; blocks]),
            fetches: Mutex::default(),
            asked: Condvar::new(),
            gate: watch::channel(false).0,
        }
    }

    pub(super) fn with(mut self, blocks: Range<usize>, block: Block) -> Self {
        if block == Block::Zero {
            self.data[blocks.start * BLOCK as usize..blocks.end * BLOCK as usize].fill(0);
        }
        self.blocks.lock().unwrap()[blocks].fill(block);
        self
    }

    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    pub(super) fn open_gate(&self) {
        self.gate.send_replace(true);
    }

    /// Waits until so many fetches were asked for in all.
    pub(super) fn wait_for_fetches(&self, count: u64) {
        let fetches = self.fetches.lock().unwrap();
        let (fetches, _) = self
            .asked
            .wait_timeout_while(fetches, Duration::from_secs(20), |fetches| *fetches < count)
            .unwrap();
        assert!(*fetches >= count, "{fetches} fetches and not {count}");
    }

    pub(super) fn fetches(&self) -> u64 {
        *self.fetches.lock().unwrap()
    }

    /// Fetches that are at work or wait at the gate.
    pub(super) fn waiting(&self) -> usize {
        self.gate.receiver_count()
    }

    fn touched(range: &Range<DiskOffset>) -> Range<usize> {
        let (start, end) = (range.start.get(), range.end.get());
        (start / BLOCK) as usize..end.div_ceil(BLOCK) as usize
    }
}

impl ServedDisk for Memory {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        self.blocks.lock().unwrap()[Self::touched(&range)]
            .iter()
            .all(|block| !matches!(block, Block::Absent | Block::Failing(_)))
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..DiskOffset(offset.get() + buffer.len() as u64);
        assert!(
            self.is_present(range.clone()),
            "{range:?} is read and not there"
        );
        if self.blocks.lock().unwrap()[Self::touched(&range)].contains(&Block::Broken) {
            return Err(io::Error::other("broken on purpose"));
        }
        for block in &mut self.blocks.lock().unwrap()[Self::touched(&range)] {
            if let Block::Evicted(left) = block {
                match left.checked_sub(1) {
                    Some(less) => *left = less,
                    None => *block = Block::Present,
                }
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        let start = offset.get() as usize;
        buffer.copy_from_slice(&self.data[start..start + buffer.len()]);
        Ok(())
    }

    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let range = offset..DiskOffset(offset.get() + buffer.len() as u64);
        if self.blocks.lock().unwrap()[Self::touched(&range)].contains(&Block::Slow) {
            return Ok(false);
        }
        self.read_present(offset, buffer).map(|()| true)
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        let mut gate = self.gate.subscribe();
        *self.fetches.lock().unwrap() += 1;
        self.asked.notify_all();
        Box::pin(async move {
            gate.wait_for(|open| *open).await.unwrap();
            for block in &mut self.blocks.lock().unwrap()[Self::touched(&range)] {
                match *block {
                    Block::Absent => *block = Block::Present,
                    Block::Failing(kind) => {
                        return Err(Arc::new(Error::new(kind, "failed on purpose")));
                    }
                    Block::Present
                    | Block::Slow
                    | Block::Zero
                    | Block::Broken
                    | Block::Evicted(_) => {}
                }
            }
            Ok(())
        })
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        let blocks = self.blocks.lock().unwrap();
        let mut extents: Vec<(u64, Allocation)> = Vec::new();
        let mut at = range.start.get();
        while at < range.end.get() {
            let end = range.end.get().min((at / BLOCK + 1) * BLOCK);
            let allocation = match blocks[(at / BLOCK) as usize] {
                Block::Present | Block::Slow | Block::Broken | Block::Evicted(_) => {
                    Allocation::Present
                }
                Block::Absent | Block::Failing(_) => Allocation::Absent,
                Block::Zero => Allocation::Zero,
            };
            match extents.last_mut() {
                Some((length, last)) if *last == allocation => *length += end - at,
                _ => extents.push((end - at, allocation)),
            }
            at = end;
        }
        extents
    }
}

/// A server on a Unix socket in a folder of its own.
pub(super) struct Served {
    pub(super) server: Server,
    pub(super) exports: Arc<Exports>,
    pub(super) socket: PathBuf,
    _folder: tempfile::TempDir,
    runtime: Runtime,
}

impl Served {
    /// One export, with the empty name.
    pub(super) fn one(export: &Arc<Memory>) -> Self {
        Self::new(
            Exports::single(Arc::clone(export) as Arc<dyn ServedDisk>),
            Limits::default(),
        )
    }

    pub(super) fn new(exports: Exports, limits: Limits) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        let exports = Arc::new(exports);
        let server = Server::listen_unix(
            &socket,
            Arc::clone(&exports),
            runtime.handle().clone(),
            limits,
        )
        .unwrap();
        Self {
            server,
            exports,
            socket,
            _folder: folder,
            runtime,
        }
    }

    pub(super) fn runtime(&self) -> tokio::runtime::Handle {
        self.runtime.handle().clone()
    }

    pub(super) fn uri(&self, export: &str) -> String {
        self.server.address().uri(export)
    }

    pub(super) fn connect(&self) -> UnixStream {
        assert_eq!(*self.server.address(), Address::Unix(self.socket.clone()));
        UnixStream::connect(&self.socket).unwrap()
    }

    /// Waits until so many connections are open.
    pub(super) fn wait_for_connections(&self, count: usize) {
        crate::support::wait("the number of connections", || {
            self.server.connections() == count
        });
    }
}
