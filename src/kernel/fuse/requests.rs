//! The requests of a FUSE file, and their answers.

use std::{io, ops::Range, os::fd::OwnedFd, sync::Arc};

use rustix::io::Errno;
use tokio::runtime::Handle;
use zerocopy::{FromBytes, IntoBytes};

use super::{
    init::MAX_READ,
    journal::{Journal, Landed, Noted},
    protocol::{
        AttrOut, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FUSE_BATCH_FORGET, FUSE_DESTROY,
        FUSE_FORGET, FUSE_GETATTR, FUSE_OPEN, FUSE_READ, FUSE_RELEASE, FUSE_ROOT_ID, FUSE_STATFS,
        OpenOut, ReadIn, StatfsOut,
    },
    pulse::Pulse,
    reply::reply,
    slots::Slots,
    step::{AtStep, Step},
};
use crate::{
    buffer::Buffer,
    layer::{ReadAttempts, ServedDisk},
    units::DiskOffset,
};

const BLOCK: u32 = 4096;
/// A regular file that root can read.
pub(super) const MODE: u32 = 0o100_400;

/// What all requests of a file share.
pub(super) struct Served {
    pub(super) device: Arc<OwnedFd>,
    pub(super) journal: Journal,
    pub(super) disk: Arc<dyn ServedDisk>,
    pub(super) runtime: Handle,
    pub(super) slots: Slots,
    pub(super) pulse: Arc<Pulse>,
    pub(super) at_step: AtStep,
}

/// What has become of a request.
pub(super) enum Handled {
    Answered,
    /// It is a read whose data is absent.
    Absent(Noted),
}

impl Served {
    pub(super) fn new(
        device: OwnedFd,
        journal: Journal,
        disk: Arc<dyn ServedDisk>,
        runtime: &Handle,
        at_step: AtStep,
    ) -> Self {
        Self {
            device: Arc::new(device),
            slots: Slots::of(&journal),
            journal,
            disk,
            runtime: runtime.clone(),
            pulse: Arc::new(Pulse::new()),
            at_step,
        }
    }

    pub(super) fn step(&self, step: Step) {
        (self.at_step)(step);
    }

    fn reply(&self, unique: u64, result: Result<&[u8], Errno>) {
        reply(&self.device, unique, result);
    }

    /// Answers a request, except a read whose data is absent.
    pub(super) fn handle(&self, landed: &Landed) -> Handled {
        let header = &landed.header;
        let unique = header.unique;
        match header.opcode {
            FUSE_READ if header.nodeid == FUSE_ROOT_ID => return self.read(unique, landed.body()),
            FUSE_GETATTR if header.nodeid == FUSE_ROOT_ID => {
                self.reply(unique, Ok(self.attributes().as_bytes()));
            }
            FUSE_OPEN if header.nodeid == FUSE_ROOT_ID => self.reply(
                unique,
                Ok(OpenOut {
                    open_flags: FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE | FOPEN_NOFLUSH,
                    ..OpenOut::default()
                }
                .as_bytes()),
            ),
            FUSE_RELEASE | FUSE_DESTROY => self.reply(unique, Ok(&[])),
            FUSE_STATFS => self.reply(
                unique,
                Ok(StatfsOut {
                    blocks: self.disk.size() / u64::from(BLOCK),
                    bsize: BLOCK,
                    frsize: BLOCK,
                    namelen: 255,
                    files: 1,
                    ..StatfsOut::default()
                }
                .as_bytes()),
            ),
            // these have no reply
            FUSE_FORGET | FUSE_BATCH_FORGET => {}
            // FLUSH, INTERRUPT and others: the kernel does not ask again
            _ => self.reply(unique, Err(Errno::NOSYS)),
        }
        Handled::Answered
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

    fn read(&self, unique: u64, body: &[u8]) -> Handled {
        let request = ReadIn::read_from_prefix(body).ok();
        let Some((request, _)) = request.filter(|(request, _)| request.size <= MAX_READ) else {
            self.reply(unique, Err(Errno::INVAL));
            return Handled::Answered;
        };
        let noted = Noted {
            unique,
            offset: request.offset,
            size: request.size,
        };
        let range = self.range(&noted);
        if self.disk.is_present(range.clone()) && self.read_and_reply(unique, &range) {
            return Handled::Answered;
        }
        Handled::Absent(noted)
    }

    /// What of the disk a read is of.
    fn range(&self, noted: &Noted) -> Range<DiskOffset> {
        let size = self.disk.size();
        let start = noted.offset.min(size);
        let end = start.saturating_add(u64::from(noted.size)).min(size);
        DiskOffset(start)..DiskOffset(end)
    }

    /// Answers the read in a slot when its data has come.
    pub(super) fn fetch(self: &Arc<Self>, slot: usize, noted: &Noted) {
        let pending = Pending {
            served: Arc::clone(self),
            unique: noted.unique,
            slot,
            is_answered: false,
        };
        let task = fetch_and_reply(Arc::clone(self), self.range(noted), pending);
        self.runtime.spawn(task);
    }

    /// Answers a read if that does not have to wait for the local disk; returns whether it has.
    fn try_read_and_reply(&self, unique: u64, range: &Range<DiskOffset>) -> bool {
        let mut buffer = Buffer::lend();
        let data = buffer.of_length(length(range));
        let is_read = matches!(self.disk.try_read_present(range.start, data), Ok(true));
        if is_read {
            self.reply(unique, Ok(data));
        }
        is_read
    }

    /// Answers a read. False if a part of the range is not present any more and has to be fetched again.
    fn read_and_reply(&self, unique: u64, range: &Range<DiskOffset>) -> bool {
        let mut buffer = Buffer::lend();
        let data = buffer.of_length(length(range));
        match self.disk.read_present(range.start, data) {
            Ok(()) => self.reply(unique, Ok(data)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return false,
            Err(error) => {
                tracing::error!("reading the disk at {}: {error}", range.start);
                self.reply(unique, Err(Errno::IO));
            }
        }
        true
    }
}

/// Bytes of a read: at most MAX_READ.
fn length(range: &Range<DiskOffset>) -> usize {
    usize::try_from(range.end.get() - range.start.get()).unwrap_or(0)
}

/// Answers a read when its data has been fetched.
async fn fetch_and_reply(served: Arc<Served>, range: Range<DiskOffset>, mut pending: Pending) {
    let mut attempts = ReadAttempts::begin();
    while attempts.another() {
        let fetched = served.disk.clone().make_present(range.clone()).await;
        if let Err(error) = fetched {
            tracing::debug!(target: "data", "FUSE read at {}: {}", range.start, error.report());
            return;
        }
        served.step(Step::Fetched);
        // fetched data is usually in the page cache, and no thread has to be woken
        if served.try_read_and_reply(pending.unique, &range) {
            return pending.answered();
        }
        // a read of a local disk: not for the async workers
        let range = range.clone();
        let answer = tokio::task::spawn_blocking(move || {
            if pending.served.read_and_reply(pending.unique, &range) {
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

/// A read in a slot. However its task ends, it is answered: the kernel would wait for ever. Only what is for a successor is not.
struct Pending {
    served: Arc<Served>,
    unique: u64,
    slot: usize,
    is_answered: bool,
}

impl Pending {
    fn answered(mut self) {
        self.is_answered = true;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let served = &self.served;
        if !self.is_answered && !served.slots.is_closed() {
            served.reply(self.unique, Err(Errno::IO));
        }
        served.step(Step::Answered);
        served.slots.give_back(self.slot, &served.journal);
        served.step(Step::Freed);
    }
}
