//! What is exported, and the names under which clients ask for it.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{counters::Counters, protocol::MAX_STRING};
use crate::{
    error::{Error, Kind, Result},
    layer::ServedDisk,
};

/// `NBD_CMD_CACHE` requests that may be at work at one time over all connections. It is a hint: what goes beyond is left undone.
const MAX_PREFETCHES: usize = 64;

/// One export with its names.
pub(super) struct Named {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) export: Arc<dyn ServedDisk>,
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
