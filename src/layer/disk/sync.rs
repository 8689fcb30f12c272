//! The thread that syncs disks to the local file system, some time after spans have been written.

use std::{
    sync::{
        Weak,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// How long a span's bit may lag behind its data: what a kill may cost in fetches.
const LAG: Duration = Duration::from_secs(1);

/// A disk with data that is not on the local disk yet.
pub(crate) trait Synced: Send + Sync {
    /// Brings the data there; where that fails the log says so. Blocks.
    fn sync_or_warn(&self);
}

/// Where disks are sent that are to be synced soon.
pub(crate) type SyncSender = Sender<Weak<dyn Synced>>;

/// Starts the thread; it ends when the sender is dropped.
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
                // the store closes: do it at once
                Err(RecvTimeoutError::Disconnected) => break false,
            }
        };
        // a disk that is gone has synced itself
        for disk in disks.iter().filter_map(Weak::upgrade) {
            disk.sync_or_warn();
        }
        if !open {
            return;
        }
    }
}
