//! The descriptors of device connections in the daemon's descriptor store ([`crate::keeper`]).
//!
//! The store has a name per descriptor: `nbd3.<connection>.<number>`, where the connection is 16 random digits. The names of a connection are
//! removed when its server ends, because the kernel has given the connection up by then.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex},
};

use crate::{
    engine::attach::names::random_digits,
    error::{Kind, Result, ResultExt as _},
    keeper::{FdStore, Service},
    nbd::kept::KeptConnection,
};

/// The descriptor store of the daemon, and what the previous daemon left in it. The default keeps nothing.
#[derive(Debug, Default)]
pub struct KeptDescriptors {
    store: FdStore,
    inherited: Mutex<BTreeMap<String, OwnedFd>>,
}

impl KeptDescriptors {
    /// Takes the descriptors of devices that a daemon has inherited.
    pub fn take(service: &mut Service) -> Self {
        Self {
            store: service.store().clone(),
            inherited: Mutex::new(service.take_inherited_with("nbd").collect()),
        }
    }

    /// Takes the inherited connections of a device (`nbd3`), with their names in the store.
    pub(super) fn connections_of(&self, device: &str) -> Vec<(StoredNames, Vec<OwnedFd>)> {
        let prefix = format!("{device}.");
        let mut connections: BTreeMap<String, (Vec<String>, Vec<OwnedFd>)> = BTreeMap::new();
        let mut inherited = self.inherited();
        for (name, descriptor) in inherited.extract_if(.., |name, _| name.starts_with(&prefix)) {
            let connection = name
                .rsplit_once('.')
                .map_or("", |(connection, _)| connection);
            let connection = connections.entry(connection.to_owned()).or_default();
            connection.0.push(name);
            connection.1.push(descriptor);
        }
        let stored = |names| StoredNames::new(self.store.clone(), names);
        connections
            .into_values()
            .map(|(names, descriptors)| (stored(names), descriptors))
            .collect()
    }

    /// Removes the inherited descriptors that no device has taken.
    pub(crate) fn remove_rest(&self) {
        for (name, _) in std::mem::take(&mut *self.inherited()) {
            remove(&self.store, &name);
        }
    }

    fn inherited(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.inherited
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Copies of the descriptors of a new connection, for the store. The device's name is known only later.
    pub(super) fn prepare(&self, connection: &KeptConnection) -> Result<NewConnection> {
        let names = StoredNames::new(self.store.clone(), Vec::new());
        let copies = match self.store.is_kept() {
            true => connection
                .descriptors()
                .iter()
                .map(|descriptor| descriptor.try_clone_to_owned())
                .collect::<std::io::Result<_>>(),
            false => Ok(Vec::new()),
        };
        let copies = copies.or_kind(Kind::Io, || {
            "copying the descriptors of an nbd connection".to_owned()
        })?;
        Ok(NewConnection { names, copies })
    }
}

/// A connection that is not in the store yet.
pub(super) struct NewConnection {
    pub(super) names: StoredNames,
    copies: Vec<OwnedFd>,
}

impl NewConnection {
    /// Stores the descriptors under the name of their device, unless the connection has ended meanwhile.
    pub(super) fn store(self, device: &str) {
        if self.copies.is_empty() {
            return;
        }
        let stored =
            random_digits().and_then(|digits| self.names.add(device, &digits, &self.copies));
        if let Err(error) = stored {
            tracing::warn!(
                device,
                "a connection does not survive this daemon: {}",
                error.report()
            );
            self.names.remove();
        }
    }
}

/// The names of one connection in the store.
#[derive(Clone, Debug)]
pub(super) struct StoredNames {
    store: FdStore,
    /// `None`: the connection has ended.
    names: Arc<Mutex<Option<Vec<String>>>>,
}

impl StoredNames {
    fn new(store: FdStore, names: Vec<String>) -> Self {
        Self {
            store,
            names: Arc::new(Mutex::new(Some(names))),
        }
    }

    fn add(&self, device: &str, connection: &str, descriptors: &[OwnedFd]) -> Result<()> {
        let mut names = self.names();
        let Some(names) = &mut *names else {
            return Ok(());
        };
        for (number, descriptor) in descriptors.iter().enumerate() {
            let name = format!("{device}.{connection}.{number}");
            self.store.put(&name, descriptor.as_fd())?;
            names.push(name);
        }
        Ok(())
    }

    /// The connection has ended: its descriptors are removed from the store, also those that would be stored later.
    pub(super) fn remove(&self) {
        for name in self.names().take().into_iter().flatten() {
            remove(&self.store, &name);
        }
    }

    fn names(&self) -> std::sync::MutexGuard<'_, Option<Vec<String>>> {
        self.names
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn remove(store: &FdStore, name: &str) {
    if let Err(error) = store.remove(name) {
        tracing::warn!(name, "the descriptor store: {}", error.report());
    }
}
