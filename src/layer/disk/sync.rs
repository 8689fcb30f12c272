//! The thread that syncs disks to the local file system a short time after spans were written.

use std::{
    sync::{
        Weak,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Maximum time between the write of a span and its sync: after a kill, the spans of this time are fetched again.
const LAG: Duration = Duration::from_secs(1);

/// A disk with data that may be in the page cache only.
pub(crate) trait Synced: Send + Sync {
    /// Syncs the data, or logs a warning. Blocks.
    fn sync_or_warn(&self);
}

/// Sends disks that have to be synced to the thread.
pub(crate) type SyncSender = Sender<Weak<dyn Synced>>;

/// Starts the thread. It ends when the sender is dropped.
pub(crate) fn start() -> std::io::Result<(SyncSender, thread::JoinHandle<()>)> {
    let (sender, receiver) = channel();
    let thread = thread::Builder::new()
        .name("sync".to_owned())
        .spawn(move || work(&receiver))?;
    Ok((sender, thread))
}

fn work(receiver: &Receiver<Weak<dyn Synced>>) {
    while let Ok(first) = receiver.recv() {
        let mut disks = vec![first];
        let until = Instant::now() + LAG;
        let open = loop {
            match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(disk) => disks.push(disk),
                Err(RecvTimeoutError::Timeout) => break true,
                // the store is closed: sync at once
                Err(RecvTimeoutError::Disconnected) => break false,
            }
        };
        // a disk that was closed has synced itself
        for disk in disks.iter().filter_map(Weak::upgrade) {
            disk.sync_or_warn();
        }
        if !open {
            return;
        }
    }
}
