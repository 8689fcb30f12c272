//! Exports, and the names under which clients select them.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{counters::Counters, protocol::MAX_STRING};
use crate::{
    error::{Error, Kind, Result},
    layer::ServedDisk,
};

/// Maximum number of `NBD_CMD_CACHE` requests that run at the same time, over all connections. The command is a hint: further ones are
/// ignored.
const MAX_PREFETCHES: usize = 64;

/// One export with its names.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) export: Arc<dyn ServedDisk>,
}

/// The exports of a server, in the order of the layers of the image.
///
/// A client selects an export by its name (the digest of the layer), by its number in that order (`0`, `1`, ...), or, if there is only
/// one, by the empty name, which is the default of clients.
#[derive(Default)]
pub struct Exports {
    list: Vec<Named>,
    shared: Shared,
}

/// The shared state of the connections of a server.
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
    pub fn single(export: Arc<dyn ServedDisk>) -> Self {
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
        export: Arc<dyn ServedDisk>,
    ) -> Result<()> {
        let (name, description) = (name.into(), description.into());
        if [&name, &description]
            .iter()
            .any(|text| text.len() > MAX_STRING || text.contains('\0'))
        {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "export name or description {name:?} is not a valid NBD string: at most {MAX_STRING} bytes, no NUL"
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

    /// The sum of the counters of all connections so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }
}
