//! What a daemon has from whoever runs it.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use super::{message::Name, notify::Notify, store::FdStore};
use crate::{error::Result, kernel::handover::Handed};

/// A daemon's relation to whoever runs it: systemd or a keeper.
#[derive(Debug)]
pub struct Service {
    notify: Arc<Notify>,
    store: FdStore,
    watchdog: Option<Duration>,
    inherited: Vec<(Name, OwnedFd)>,
    is_successor: bool,
}

impl Service {
    /// Takes what the environment says; `None` where nobody runs this process. To be called at the very start of a process: see
    /// [`Handed::take`].
    pub fn take() -> Result<Option<Self>> {
        let handed = Handed::take();
        let Some(address) = handed.notify_socket else {
            return Ok(None);
        };
        let notify = Arc::new(Notify::to(&address)?);
        let inherited = handed.descriptors.into_iter();
        // what has a bad name was put by nobody that is known here
        let inherited = inherited.filter_map(|(name, it)| Some((Name::new(&name).ok()?, it)));
        let inherited: Vec<_> = inherited.collect();
        let names = inherited.iter().map(|(name, _)| name.clone()).collect();
        Ok(Some(Self {
            store: FdStore::of(Arc::clone(&notify), names)?,
            notify,
            watchdog: handed.watchdog,
            is_successor: !inherited.is_empty(),
            inherited,
        }))
    }

    /// Notifications to whoever runs this daemon.
    pub fn notify(&self) -> &Arc<Notify> {
        &self.notify
    }

    /// The descriptor store.
    pub fn store(&self) -> &FdStore {
        &self.store
    }

    /// How often whoever runs this daemon has to be told that it works.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Whether a daemon before this one has left descriptors.
    pub fn is_successor(&self) -> bool {
        self.is_successor
    }

    /// The inherited descriptor of this name, once. It stays in the store.
    pub fn take_inherited(&mut self, name: &str) -> Option<OwnedFd> {
        let here = |(it, _): &(Name, OwnedFd)| it.as_str() == name;
        let index = self.inherited.iter().position(here)?;
        Some(self.inherited.swap_remove(index).1)
    }

    /// Takes the inherited descriptors whose names begin with this. They stay in the store.
    pub fn take_inherited_with(
        &mut self,
        prefix: &str,
    ) -> impl Iterator<Item = (String, OwnedFd)> + use<> {
        let taken: Vec<_> = self
            .inherited
            .extract_if(.., |(name, _)| name.as_str().starts_with(prefix))
            .map(|(name, descriptor)| (name.as_str().to_owned(), descriptor))
            .collect();
        taken.into_iter()
    }

    /// Closes the inherited descriptors that nobody has taken, and removes them from the store.
    pub fn close_rest(&mut self) {
        for (name, _) in self.inherited.drain(..) {
            tracing::warn!(name = name.as_str(), "an inherited descriptor is not known");
            if let Err(error) = self.store.remove(name.as_str()) {
                tracing::warn!("the descriptor store: {}", error.report());
            }
        }
    }
}
