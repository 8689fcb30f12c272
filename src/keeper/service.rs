//! What a daemon has from whoever runs it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{message::Name, notify::Notify, store::FdStore};
use crate::{
    error::{Error, Kind, Result},
    kernel::handover::Handed,
};

/// A daemon's relation to whoever runs it: systemd or a keeper.
#[derive(Debug)]
pub struct Service {
    notify: Arc<Notify>,
    store: FdStore,
    watchdog: Option<Duration>,
    inherited: Vec<(Name, OwnedFd)>,
    /// Sockets of socket units, which the service manager passes to each daemon.
    activated: Vec<OwnedFd>,
    is_successor: bool,
    is_kept_by_keeper: bool,
}

/// Says which program follows this daemon.
#[derive(Clone, Debug)]
pub struct Succession {
    /// Of a keeper, which starts any program; a service manager starts the one of its unit.
    keeper: Option<Arc<Notify>>,
    /// The program of this process.
    own: PathBuf,
}

impl Succession {
    /// Whether this program can follow.
    pub fn check(&self, program: &Path) -> Result<()> {
        if self.keeper.is_some() || program == self.own {
            return Ok(());
        }
        Err(Error::new(
            Kind::Unsupported,
            format!(
                "the service manager starts {own}, not {}: install the new program as {own}, and try again",
                program.display(),
                own = self.own.display()
            ),
        ))
    }

    /// This program is to follow, as soon as this process ends.
    pub fn choose(&self, program: &Path) -> Result<()> {
        self.check(program)?;
        match &self.keeper {
            Some(keeper) => keeper.successor(program),
            None => Ok(()),
        }
    }
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
        // a socket has the name of its unit, and the store has no such names
        let (activated, inherited): (Vec<_>, Vec<_>) =
            inherited.partition(|(name, _)| name.as_str().ends_with(".socket"));
        let mut names = BTreeMap::new();
        for (name, _) in &inherited {
            *names.entry(name.clone()).or_default() += 1;
        }
        Ok(Some(Self {
            store: FdStore::of(Arc::clone(&notify), names)?,
            notify,
            watchdog: handed.watchdog,
            is_successor: !inherited.is_empty(),
            is_kept_by_keeper: handed.is_kept_by_keeper,
            inherited,
            activated: activated.into_iter().map(|(_, socket)| socket).collect(),
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

    /// Who follows this daemon, whose program has this path; `None` where nothing keeps its descriptors.
    pub fn succession(&self, own: PathBuf) -> Option<Succession> {
        let keeper = self.is_kept_by_keeper.then(|| Arc::clone(&self.notify));
        self.store.is_kept().then_some(Succession { keeper, own })
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

    /// The bytes that the daemon before has kept under this name, at most this many; `None` if it has kept none, or they cannot be read.
    pub fn take_inherited_bytes(&mut self, name: &str, limit: u64) -> Option<Vec<u8>> {
        let mut file = File::from(self.take_inherited(name)?);
        let mut bytes = Vec::new();
        file.rewind().ok()?;
        file.take(limit).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Takes the first socket of a socket unit that this is true for. The service manager keeps it and its file.
    pub fn take_activated(&mut self, is_it: impl Fn(BorrowedFd<'_>) -> bool) -> Option<OwnedFd> {
        let index = self.activated.iter().position(|it| is_it(it.as_fd()))?;
        Some(self.activated.swap_remove(index))
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
        if !self.activated.is_empty() {
            let count = self.activated.len();
            tracing::warn!(
                "{count} sockets of a socket unit are not the daemon's: ListenStream= must have its paths in the runtime directory"
            );
            self.activated.clear();
        }
        for (name, _) in self.inherited.drain(..) {
            tracing::warn!(name = name.as_str(), "an inherited descriptor is not known");
            if let Err(error) = self.store.remove(name.as_str()) {
                tracing::warn!("the descriptor store: {}", error.report());
            }
        }
    }
}
