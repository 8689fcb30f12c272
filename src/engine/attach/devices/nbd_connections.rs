//! Makes the connections of nbd devices, and replaces connections that the kernel has dropped.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::Duration,
};

use super::{
    kept::StoredName, kernel_readahead, metadata_readahead::WatchedDisk, servers::Serving,
};
use crate::{
    error::{Kind, Result, ResultExt},
    kernel::{
        blockdev,
        kept::{SERVES, ServerPulse},
        nbd as kernel_nbd,
        nbd::{DeadLinks, LinkEvent, NbdDevice, NbdOptions},
    },
    layer::{Disk, ServedDisk},
    nbd::kept::KeptConnection,
};

/// Connections per device.
const CONNECTIONS: usize = 2;
/// Time after which the kernel drops a connection with an unanswered request, where nothing keeps the connections. The kernel sends requests
/// again only then, so this bounds the stall after a crash. A request whose fetch takes longer is sent again on the next connection, and joins
/// the same fetch.
const TIMEOUT: Duration = Duration::from_secs(10);
/// This time where connections are kept, and requests wait for the next daemon: longer than a fetch, and than the replacement of a daemon that
/// hangs.
const KEPT_TIMEOUT: Duration = Duration::from_secs(120);
/// Time that requests wait for a new connection when all connections are dead.
const DEAD: Duration = Duration::from_secs(60);

/// Interval in which the watching thread checks whether it is still needed.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);
/// Interval for retries of replacing a connection.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The nbd devices of an engine. One thread gives a device new connections when the kernel has dropped old ones.
pub(crate) struct NbdLinks {
    serving: Serving,
    by_index: Mutex<HashMap<u32, Weak<NbdLink>>>,
    /// Whether the watching thread runs.
    watching: Mutex<bool>,
}

/// A connected nbd device.
pub(crate) struct NbdLink {
    device: NbdDevice,
    options: NbdOptions,
    disk: Arc<Disk>,
    watched: Arc<WatchedDisk>,
    /// Maximum request size in KiB.
    largest_request_kb: u64,
    serving: Serving,
}

impl NbdLinks {
    /// No devices. Their connections are served by this.
    pub(super) fn new(serving: Serving) -> Self {
        Self {
            serving,
            by_index: Mutex::default(),
            watching: Mutex::default(),
        }
    }

    /// Makes a device for a disk. The kernel stores `identifier` as its backend identifier.
    pub(super) fn connect(
        links: &Arc<Self>,
        disk: &Arc<Disk>,
        watched: &Arc<WatchedDisk>,
        identifier: String,
    ) -> Result<Arc<NbdLink>> {
        links.watch()?;
        let new = NewConnections::make()?;
        let options = links.serving.options(identifier);
        let device = kernel_nbd::connect(disk.size(), &new.kernel_ends, &options)?;
        let largest = new.largest_request_kb();
        new.serve(&links.serving, &device.name(), watched)?;
        Ok(links.link(device, options, largest, disk, watched))
    }

    /// Gives new connections to a device whose daemon died. The kernel holds the requests of the device back until then, at most for the
    /// dead-connection time.
    pub(super) fn adopt(
        links: &Arc<Self>,
        index: u32,
        disk: &Arc<Disk>,
        watched: &Arc<WatchedDisk>,
        identifier: String,
    ) -> Result<Arc<NbdLink>> {
        links.watch()?;
        let device = NbdDevice::adopt(index)?;
        let mut resumed = Vec::new();
        for (name, descriptors) in links.serving.kept.connections_of(&device.name()) {
            match KeptConnection::from_descriptors(descriptors) {
                Ok(connection) => {
                    resumed.push(largest_request_kb(&connection));
                    links.serving.serve(connection, name, watched)?;
                }
                Err(error) => {
                    tracing::warn!(
                        device = index,
                        "a connection cannot be resumed: {}",
                        error.report()
                    );
                    name.remove();
                }
            }
        }
        let new = match resumed.len() < CONNECTIONS {
            true => Some(NewConnections::make()?),
            false => None,
        };
        let largest = new.iter().map(NewConnections::largest_request_kb);
        let largest = largest.chain(resumed);
        let largest = largest.min().unwrap_or(0); // there is one
        let options = links.serving.options(identifier);
        // first: the kernel may notice a dead connection only after it was offered new ones, and then tells the watching thread
        let link = links.link(device, options, largest, disk, watched);
        if let Some(new) = new {
            kernel_nbd::reconfigure(index, &new.kernel_ends, &link.options)?;
            new.serve(&link.serving, &link.device.name(), watched)?;
        }
        Ok(link)
    }

    /// The link of a connected device. From now on its dead connections are replaced.
    fn link(
        &self,
        device: NbdDevice,
        options: NbdOptions,
        largest_request_kb: u64,
        disk: &Arc<Disk>,
        watched: &Arc<WatchedDisk>,
    ) -> Arc<NbdLink> {
        let link = Arc::new(NbdLink {
            device,
            options,
            disk: Arc::clone(disk),
            watched: Arc::clone(watched),
            largest_request_kb,
            serving: self.serving.clone(),
        });
        self.add(&link);
        link
    }

    fn add(&self, link: &Arc<NbdLink>) {
        let mut by_index = self.links();
        by_index.retain(|_, link| link.strong_count() > 0);
        by_index.insert(link.device.index(), Arc::downgrade(link));
    }

    /// Starts the watching thread, unless it runs already. The thread ends when `self` is dropped.
    fn watch(self: &Arc<Self>) -> Result<()> {
        let mut is_watching = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_watching {
            return Ok(());
        }
        let mut dead = DeadLinks::watch()?;
        let links = Arc::downgrade(self);
        let watch = move || {
            let mut left = Vec::new();
            while let Some(links) = links.upgrade() {
                // retry connections that could not be replaced, e.g. without a free descriptor
                let interval = if left.is_empty() {
                    WATCH_INTERVAL
                } else {
                    RETRY_INTERVAL
                };
                let events = dead.next(Some(interval)).unwrap_or_else(|error| {
                    tracing::error!("watching the nbd connections: {}", error.report());
                    thread::sleep(RETRY_INTERVAL);
                    Vec::new()
                });
                left = links.mend(&events, &left);
            }
        };
        let started = thread::Builder::new().name("nbd-links".into()).spawn(watch);
        started.or_kind(Kind::Io, || "starting the thread that watches nbd".into())?;
        *is_watching = true;
        Ok(())
    }

    /// Replaces the dead connections of these events and of `left`, the devices that failed before. Returns the devices that failed now.
    fn mend(&self, events: &[LinkEvent], left: &[u32]) -> Vec<u32> {
        let mut dead = left.to_vec();
        let mut failed = Vec::new();
        for event in events {
            match event {
                LinkEvent::Dead(index) => dead.push(*index),
                LinkEvent::Lost => dead.extend(self.links().keys()),
            }
        }
        dead.sort_unstable();
        dead.dedup();
        for index in dead {
            let link = self.links().get(&index).and_then(Weak::upgrade);
            if let Some(link) = link {
                match link.reconnect() {
                    Ok(()) => {
                        tracing::info!(
                            device = index,
                            "replaced an nbd connection that the kernel had dropped"
                        );
                        link.check_read_ahead();
                    }
                    Err(error) => {
                        tracing::error!(
                            device = index,
                            "replacing an nbd connection: {}",
                            error.report()
                        );
                        failed.push(index);
                    }
                }
            }
        }
        failed
    }

    fn links(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Weak<NbdLink>>> {
        self.by_index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NbdLink {
    /// The nbd device.
    pub(crate) fn device(&self) -> &NbdDevice {
        &self.device
    }

    /// Maximum request size of the device in KiB.
    pub(super) fn largest_request_kb(&self) -> u64 {
        self.largest_request_kb
    }

    /// Offers the kernel the full number of connections. The kernel uses those it needs to replace dead ones; the others end at once.
    fn reconnect(&self) -> Result<()> {
        let new = NewConnections::make()?;
        kernel_nbd::reconfigure(self.device.index(), &new.kernel_ends, &self.options)?;
        new.serve(&self.serving, &self.device.name(), &self.watched)
    }

    /// Sets the read-ahead again if reconnecting has changed it.
    fn check_read_ahead(self: &Arc<Self>) {
        let wanted = kernel_readahead::of(&self.disk);
        if blockdev::read_ahead(&self.device.name()).is_ok_and(|found| found == wanted) {
            return;
        }
        let link = Arc::clone(self);
        let set = move || {
            let largest = Some(link.largest_request_kb);
            kernel_readahead::set(&link.device.name(), largest, wanted);
        };
        // On a thread of its own: the kernel first waits for the requests in flight, which may need another connection from the calling
        // thread.
        let started = thread::Builder::new()
            .name("nbd-read-ahead".into())
            .spawn(set);
        if let Err(error) = started {
            tracing::warn!(%error, "starting a thread that sets the read-ahead");
        }
    }
}

/// Connections that the kernel has to be given before they are served: only then the name of their device is known, by which they are stored.
struct NewConnections {
    kernel_ends: Vec<OwnedFd>,
    connections: Vec<KeptConnection>,
}

impl NewConnections {
    fn make() -> Result<Self> {
        let made: Result<Vec<_>> = (0..CONNECTIONS).map(|_| KeptConnection::new()).collect();
        let (connections, kernel_ends) = made?.into_iter().unzip();
        Ok(Self {
            kernel_ends,
            connections,
        })
    }

    /// Maximum request size in KiB.
    fn largest_request_kb(&self) -> u64 {
        let largest = self.connections.iter().map(largest_request_kb).min();
        largest.unwrap_or(0) // there is one
    }

    /// Stores the connections, which are those of this device now, and serves them. Those that the kernel has not taken end by themselves.
    fn serve(self, serving: &Serving, device: &str, disk: &Arc<WatchedDisk>) -> Result<()> {
        for connection in self.connections {
            let name = serving.kept.store_connection(device, &connection);
            serving.serve(connection, name, disk)?;
        }
        Ok(())
    }
}

impl Serving {
    fn options(&self, identifier: String) -> NbdOptions {
        NbdOptions {
            timeout: match self.kept.is_kept() {
                true => KEPT_TIMEOUT,
                false => TIMEOUT,
            },
            dead: DEAD,
            backend_id: identifier,
        }
    }

    /// Starts a thread that serves a connection. Its descriptors leave the store when it ends.
    fn serve(
        &self,
        mut connection: KeptConnection,
        name: StoredName,
        disk: &Arc<WatchedDisk>,
    ) -> Result<()> {
        let control: Arc<dyn ServerPulse> = connection.control();
        self.servers.add(&control);
        let disk: Arc<dyn ServedDisk> = Arc::<WatchedDisk>::clone(disk);
        let runtime = self.runtime.clone();
        let serve = move || {
            if let Err(error) = connection.serve(&disk, &runtime) {
                tracing::debug!(%error, "a connection to the kernel ended");
            }
            name.remove();
        };
        let name = format!("{SERVES}nbd");
        let started = thread::Builder::new().name(name).spawn(serve);
        started.or_kind(Kind::Io, || "starting a thread that serves a device".into())?;
        Ok(())
    }
}

fn largest_request_kb(connection: &KeptConnection) -> u64 {
    u64::from(connection.largest_read() / 1024)
}
