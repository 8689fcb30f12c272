//! What an engine has in the daemon's descriptor store ([`crate::keeper`]): the locks of its directories, the connections of devices, and
//! devices that other programs mount.
//!
//! The descriptors of a connection have one name: `nbd3.<connection>` for one of the device `nbd3`, `fuse1.<connection>` for a FUSE file, where
//! the connection is 16 random digits, which the file's loop device has in its name. The name of a connection is removed when its server
//! ends, because the kernel has given the connection up by then.
//!
//! `device1.<mount>` is an open device that another program mounts. The kernel gives a device up with its last user, and its number to another
//! device; so the store has it open as long as its name may be in use.

use std::{
    collections::{BTreeMap, HashSet},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Mutex,
};

use rustix::net::Shutdown;

use crate::{
    engine::attach::names::random_digits,
    error::Result,
    keeper::{FdStore, Service},
    kernel::fuse,
    layer::DirectoryLock,
    nbd::kept::KeptConnection,
};

/// How the names of the descriptors of FUSE files begin. Another version of what they mean needs another name.
const FUSE: &str = "fuse1";
/// How the names of held devices begin.
const HELD: &str = "device1";
/// How the names begin.
const PREFIXES: [&str; 4] = ["lock-", FUSE, "nbd", HELD];

const UNKEPT: &str = "a descriptor does not survive this daemon";

/// The descriptors of one connection and their name.
type Connection = (StoredName, Vec<OwnedFd>);

/// The descriptor store of the daemon, and what the previous daemon left in it. The default keeps nothing.
#[derive(Debug, Default)]
pub struct KeptDescriptors {
    store: FdStore,
    inherited: Mutex<BTreeMap<String, Vec<OwnedFd>>>,
}

impl KeptDescriptors {
    /// Takes the descriptors that a daemon has inherited.
    pub fn of(service: &mut Service) -> Self {
        let mut inherited: BTreeMap<String, Vec<OwnedFd>> = BTreeMap::new();
        let taken = PREFIXES
            .into_iter()
            .flat_map(|prefix| service.take_inherited_with(prefix).collect::<Vec<_>>());
        for (name, descriptor) in taken {
            inherited.entry(name).or_default().push(descriptor);
        }
        Self {
            store: service.store().clone(),
            inherited: Mutex::new(inherited),
        }
    }

    /// Takes a lock, with the inherited one of this name if there is one, and keeps it for the next daemon: a daemon that is dead may still
    /// have it, while a thread of it waits for the next daemon.
    pub(in crate::engine::attach) fn lock(
        &self,
        name: &str,
        take: impl FnOnce(Option<OwnedFd>) -> Result<DirectoryLock>,
    ) -> Result<DirectoryLock> {
        let inherited = self.inherited().remove(name);
        let lock = take(inherited.and_then(|mut it| it.pop()))?;
        if !lock.is_inherited()
            && let Err(error) = self.store.put(name, &[lock.as_fd()])
        {
            tracing::warn!(name, "the descriptor store: {}", error.report());
        }
        Ok(lock)
    }

    /// Whether what is stored survives this daemon.
    pub(super) fn is_kept(&self) -> bool {
        self.store.is_kept()
    }

    /// Takes the inherited connections of a device (`nbd3`).
    pub(super) fn connections_of(&self, device: &str) -> Vec<Connection> {
        self.take(&format!("{device}."))
    }

    /// Takes the inherited descriptors of a FUSE file.
    pub(super) fn file(&self, digits: &str) -> Option<Connection> {
        self.take(&format!("{FUSE}.{digits}")).pop()
    }

    /// Keeps a device open until the result is dropped, also after the death of this daemon.
    pub(in crate::engine::attach) fn hold(&self, mount: &str, device: BorrowedFd<'_>) -> HeldName {
        HeldName(self.put(format!("{HELD}.{mount}"), &[device]))
    }

    /// Takes over a device that the daemon before has held.
    pub(in crate::engine::attach) fn held(&self, mount: &str) -> Option<HeldName> {
        let (name, _) = self.take(&format!("{HELD}.{mount}")).pop()?;
        Some(HeldName(name))
    }

    /// Takes the inherited connections whose names begin with this.
    fn take(&self, prefix: &str) -> Vec<Connection> {
        let mut inherited = self.inherited();
        let taken = inherited.extract_if(.., |name, _| name.starts_with(prefix));
        taken
            .map(|(name, descriptors)| {
                let name = StoredName(Some((self.store.clone(), name)));
                (name, descriptors)
            })
            .collect()
    }

    /// Ends the inherited connections that no device has taken. A thread of the dead daemon may wait for an answer on one of them, and closing
    /// the descriptors does not end its wait, because its process has them too. Returns the nbd devices, which are still to be disconnected.
    pub(crate) fn end_rest(&self) -> HashSet<PathBuf> {
        let device = |name: &String| {
            let (device, _) = name.split_once('.').filter(|_| name.starts_with("nbd"))?;
            Some(Path::new("/dev").join(device))
        };
        let lost = self.inherited().keys().filter_map(device).collect();
        for (name, descriptors) in self.take("nbd") {
            for descriptor in &descriptors {
                let _ = rustix::net::shutdown(descriptor, Shutdown::Both); // not every one is a socket
            }
            name.remove();
        }
        for (name, descriptors) in self.take(FUSE) {
            if let Err(error) = fuse::abort(descriptors) {
                tracing::warn!("a FUSE file of the dead daemon: {}", error.report());
            }
            name.remove();
        }
        for (name, _) in std::mem::take(&mut *self.inherited()) {
            remove(&self.store, &name);
        }
        lost
    }

    fn inherited(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<OwnedFd>>> {
        self.inherited
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Stores the descriptors of a new FUSE file.
    pub(super) fn store_file(&self, digits: &str, descriptors: &[BorrowedFd<'_>]) -> StoredName {
        self.put(format!("{FUSE}.{digits}"), descriptors)
    }

    /// Stores the descriptors of a connection of this device (`nbd3`) that is not served yet.
    pub(super) fn store_connection(&self, device: &str, connection: &KeptConnection) -> StoredName {
        match random_digits() {
            Ok(digits) => self.put(format!("{device}.{digits}"), &connection.descriptors()),
            Err(error) => {
                tracing::warn!(device, "{UNKEPT}: {}", error.report());
                StoredName(None)
            }
        }
    }

    fn put(&self, name: String, descriptors: &[BorrowedFd<'_>]) -> StoredName {
        match self.store.put(&name, descriptors) {
            Ok(()) => StoredName(Some((self.store.clone(), name))),
            Err(error) => {
                tracing::warn!(name, "{UNKEPT}: {}", error.report());
                StoredName(None)
            }
        }
    }
}

/// The name of one connection in the store; `None`: it could not be stored.
#[derive(Debug)]
pub(super) struct StoredName(Option<(FdStore, String)>);

impl StoredName {
    /// The connection has ended: its descriptors are removed from the store.
    pub(super) fn remove(&self) {
        if let Some((store, name)) = &self.0 {
            remove(store, name);
        }
    }
}

/// The name of a device or of a FUSE file in the store, until this is dropped.
pub(in crate::engine::attach) struct HeldName(pub(super) StoredName);

impl Drop for HeldName {
    fn drop(&mut self) {
        self.0.remove();
    }
}

fn remove(store: &FdStore, name: &str) {
    if let Err(error) = store.remove(name) {
        tracing::warn!(name, "the descriptor store: {}", error.report());
    }
}
