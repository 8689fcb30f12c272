//! The descriptor store of a keeper.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use super::{
    limits::{MAX_DESCRIPTORS, MAX_NAME_BYTES},
    message::Name,
};
use crate::error::{Error, Kind, Result};

/// Descriptors and their names, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    kept: Vec<(Name, OwnedFd)>,
    /// Bytes of the names, with a separator each.
    name_bytes: usize,
}

impl Descriptors {
    /// Keeps descriptors, all or none.
    pub(super) fn put(&mut self, name: &Name, descriptors: Vec<OwnedFd>) -> Result<()> {
        let more = descriptors.len().saturating_mul(name.as_str().len() + 1);
        let name_bytes = self.name_bytes.saturating_add(more);
        if self.kept.len() + descriptors.len() > MAX_DESCRIPTORS || name_bytes > MAX_NAME_BYTES {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "the descriptor store is full: {} descriptors, their names have {} bytes",
                    self.kept.len(),
                    self.name_bytes
                ),
            ));
        }
        self.name_bytes = name_bytes;
        let named = descriptors.into_iter().map(|it| (name.clone(), it));
        self.kept.extend(named);
        Ok(())
    }

    /// Closes all descriptors of a name.
    pub(super) fn remove(&mut self, name: &Name) {
        self.kept.retain(|(kept, _)| kept != name);
        let bytes = self.kept.iter().map(|(name, _)| name.as_str().len() + 1);
        self.name_bytes = bytes.sum();
    }

    /// The names, as `LISTEN_FDNAMES` has them.
    pub(super) fn names(&self) -> String {
        let names: Vec<&str> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
        names.join(":")
    }

    /// The descriptors, in the order of their names.
    pub(super) fn all(&self) -> Vec<BorrowedFd<'_>> {
        self.kept.iter().map(|(_, it)| it.as_fd()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect()
    }

    #[test]
    fn names_keep_their_order_and_go_together() {
        let mut store = Descriptors::default();
        for (name, count) in [("b", 2), ("a", 1), ("b", 1)] {
            store
                .put(&Name::new(name).unwrap(), descriptors(count))
                .unwrap();
        }
        assert_eq!((store.names().as_str(), store.all().len()), ("b:b:a:b", 4));
        store.remove(&Name::new("b").unwrap());
        assert_eq!((store.names().as_str(), store.all().len()), ("a", 1));
        store.remove(&Name::new("a").unwrap());
        store.remove(&Name::new("none").unwrap());
        assert_eq!((store.names().as_str(), store.name_bytes), ("", 0));
    }

    #[test]
    fn a_full_store_keeps_what_it_has() {
        let mut store = Descriptors::default();
        let long = Name::new(&"x".repeat(255)).unwrap();
        let mut kept = 0;
        while store.put(&long, descriptors(16)).is_ok() {
            kept += 16;
        }
        assert_eq!(kept, MAX_NAME_BYTES / 256 / 16 * 16);
        assert_eq!(store.all().len(), kept);
        assert!(store.names().len() < MAX_NAME_BYTES);
        store.remove(&long);
        store.put(&long, descriptors(16)).unwrap();
    }
}
