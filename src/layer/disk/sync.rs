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

/// The longest pause between two attempts to sync a disk without new spans. The first pause is [`LAG`]; each attempt that fails doubles it.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A disk with data that may be in the page cache only.
pub(crate) trait Synced: Send + Sync {
    /// Syncs the data, or logs a warning and returns false. Blocks.
    fn sync_or_warn(&self) -> bool;
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

/// A disk that has to be synced.
struct WaitingDisk {
    disk: Weak<dyn Synced>,
    due: Instant,
    /// The pause if the sync fails.
    pause: Duration,
}

fn work(receiver: &Receiver<Weak<dyn Synced>>) {
    let mut waiting = Vec::new();
    loop {
        let received = match waiting.iter().map(|it: &WaitingDisk| it.due).min() {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => receiver.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match received {
            Ok(disk) => add(&mut waiting, disk, Instant::now() + LAG),
            Err(RecvTimeoutError::Timeout) => {
                let now = Instant::now();
                let due = waiting.extract_if(.., |it| it.due <= now);
                let due: Vec<_> = due.collect();
                waiting.extend(due.into_iter().filter_map(sync));
            }
            Err(RecvTimeoutError::Disconnected) => {
                // the store is closed: sync at once
                waiting.into_iter().for_each(|it| drop(sync(it)));
                return;
            }
        }
    }
}

/// Adds a disk with new spans.
fn add(waiting: &mut Vec<WaitingDisk>, disk: Weak<dyn Synced>, due: Instant) {
    match waiting.iter_mut().find(|it| it.disk.ptr_eq(&disk)) {
        Some(it) => it.due = it.due.min(due),
        None => waiting.push(WaitingDisk {
            disk,
            due,
            pause: LAG,
        }),
    }
}

/// Syncs a disk; one that was closed has synced itself. Returns it if that failed.
fn sync(waiting: WaitingDisk) -> Option<WaitingDisk> {
    let WaitingDisk { disk, pause, .. } = waiting;
    if disk.upgrade()?.sync_or_warn() {
        return None;
    }
    Some(WaitingDisk {
        disk,
        due: Instant::now() + pause,
        pause: (pause * 2).min(LONGEST_PAUSE),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    /// Fails this many times.
    struct Failing(AtomicU32);

    impl Synced for Failing {
        fn sync_or_warn(&self) -> bool {
            let left = self.0.load(Ordering::Relaxed);
            self.0.store(left.saturating_sub(1), Ordering::Relaxed);
            left == 0
        }
    }

    fn waiting(failures: u32) -> (Arc<Failing>, WaitingDisk) {
        let disk = Arc::new(Failing(failures.into()));
        let weak: Weak<Failing> = Arc::downgrade(&disk);
        let waiting = WaitingDisk {
            disk: weak,
            due: Instant::now(),
            pause: LAG,
        };
        (disk, waiting)
    }

    #[test]
    fn a_failed_sync_is_repeated_after_pauses_that_grow() {
        let (_disk, mut waiting) = waiting(8);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let before = Instant::now();
            waiting = sync(waiting).unwrap();
            pauses.push((waiting.due - before).as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        waiting = sync(waiting).unwrap();
        assert!(sync(waiting).is_none(), "it has succeeded");
    }

    #[test]
    fn a_new_span_is_synced_without_the_pause() {
        let (disk, failed) = waiting(1);
        let failed = sync(WaitingDisk {
            pause: LONGEST_PAUSE,
            ..failed
        });
        let mut all = vec![failed.unwrap()];
        let soon = Instant::now() + LAG;
        let weak: Weak<Failing> = Arc::downgrade(&disk);
        add(&mut all, weak, soon);
        assert_eq!((all.len(), all[0].due), (1, soon));
        let later = soon + LAG;
        let weak: Weak<Failing> = Arc::downgrade(&disk);
        add(&mut all, weak, later);
        assert_eq!((all.len(), all[0].due), (1, soon));
    }

    #[test]
    fn a_disk_that_was_closed_is_forgotten() {
        let (disk, waiting) = waiting(1);
        drop(disk);
        assert!(sync(waiting).is_none());
    }
}
