//! What is exported: the view of a disk that the transmission needs, and the names under which clients ask for it.

use std::{io, ops::Range, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use super::{counters::Counters, protocol::MAX_STRING};
use crate::{
    error::{Error, Kind, Result},
    layer::{Allocation, Disk},
    units::DiskOffset,
};

/// `NBD_CMD_CACHE` requests that may be at work at one time over all connections. It is a hint: what goes beyond is left undone.
const MAX_PREFETCHES: usize = 64;

/// A disk as the transmission sees it.
pub trait Export: Send + Sync + 'static {
    /// Bytes of the disk; does not change.
    fn size(&self) -> u64;

    /// Whether a read of this range needs no fetch. Called for every request: cheap, and does not block.
    fn is_present(&self, range: Range<DiskOffset>) -> bool;

    /// Reads a range that is present. May block on the local disk, not on the network.
    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()>;

    /// As [`Export::read_present`] where that need not wait for the local disk; false where it must, and then nothing is read. An
    /// export may begin the reading with this, so that the waits of several overlap.
    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_present(offset, buffer).map(|()| true)
    }

    /// Makes a range present. Dropped when nobody waits any more.
    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>>;

    /// The extents of a range, in order, none empty, together as long as the range.
    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)>;
}

impl Export for Disk {
    fn size(&self) -> u64 {
        Disk::size(self)
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        Disk::is_present(self, range)
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        Disk::read_present(self, offset, buffer)
    }

    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        Disk::try_read_present(self, offset, buffer)
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async move { Disk::make_present(&self, range).await })
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        Disk::allocation(self, range)
    }
}

/// One export with its names.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) export: Arc<dyn Export>,
}

/// The exports of a server, in the order of the image's layers.
///
/// A client asks for one by its name (the layer's digest), by its number in that order (`0`, `1`, ...), or, where there is only one, by
/// the empty name that clients use when they were told none.
#[derive(Default)]
pub struct Exports {
    list: Vec<Named>,
    shared: Shared,
}

/// What the connections of a server have in common.
pub(super) struct Shared {
    pub(super) counters: Counters,
    pub(super) prefetches: Arc<Semaphore>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            counters: Counters::default(),
            prefetches: Arc::new(Semaphore::new(MAX_PREFETCHES)),
        }
    }
}

impl Exports {
    /// No exports.
    pub fn new() -> Self {
        Self::default()
    }

    /// The export of one disk under the empty name and `0`.
    pub fn single(export: Arc<dyn Export>) -> Self {
        let mut exports = Self::new();
        exports.list.push(Named {
            name: String::new(),
            description: String::new(),
            export,
        });
        exports
    }

    /// Adds an export. `description` is one line for people. An image may have a layer twice: the name then means the first, which
    /// is the same.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        description: impl Into<String>,
        export: Arc<dyn Export>,
    ) -> Result<()> {
        let (name, description) = (name.into(), description.into());
        if [&name, &description]
            .iter()
            .any(|text| text.len() > MAX_STRING || text.contains('\0'))
        {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "export name or description {name:?} is not a string of NBD: at most {MAX_STRING} bytes, no NUL"
                ),
            ));
        }
        self.list.push(Named {
            name,
            description,
            export,
        });
        Ok(())
    }

    /// The exports that are listed: each name once.
    pub(super) fn listed(&self) -> impl Iterator<Item = &Named> {
        self.list
            .iter()
            .enumerate()
            .filter(|(index, named)| {
                !self
                    .list
                    .iter()
                    .take(*index)
                    .any(|before| before.name == named.name)
            })
            .map(|(_, named)| named)
    }

    /// The place and the export that a client's name means.
    pub(super) fn find(&self, name: &str) -> Option<(usize, &Named)> {
        let index = match self.list.iter().position(|named| named.name == name) {
            Some(index) => index,
            None if name.is_empty() => (self.list.len() == 1).then_some(0)?,
            None => name.parse().ok()?,
        };
        self.list.get(index).map(|named| (index, named))
    }

    /// What all connections did so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }
}
