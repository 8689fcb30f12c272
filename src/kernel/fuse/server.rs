//! The threads that take the requests of a FUSE file.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use rustix::{io::Errno, time::Timespec};

use super::{
    journal::{Landed, THREADS},
    pulse::Pulse,
    queue::Queue,
    requests::{Handled, Served},
    slots::Taken,
    step::Step,
};
use crate::{
    error::{Kind, Result, ResultExt},
    kernel::kept::{SERVES, ServerPulse},
};

/// A thread that waits makes a turn in this time.
const TURN: Duration = Duration::from_secs(1);
const TURN_AS_TIMESPEC: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
/// How long it is waited when a request cannot be read.
const READ_PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// The threads that answer for one file. Dropping it ends them, and the file system, unless its descriptors are open elsewhere too.
pub struct Server {
    served: Arc<Served>,
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Goes on with what the journal has, and with new requests.
    pub(super) fn start(served: Served) -> Result<Self> {
        let queue =
            Queue::of(&served.device).or_kind(Kind::Io, || "creating an epoll instance".into())?;
        let served = Arc::new(served);
        let mut server = Self {
            served: Arc::clone(&served),
            queue: Arc::new(queue),
            threads: Vec::with_capacity(THREADS),
        };
        // before the threads take other slots
        for (slot, noted) in served.journal.left() {
            served.fetch(slot, &noted);
        }
        for index in 0..THREADS {
            let worker = Worker {
                index,
                served: Arc::clone(&served),
                queue: Arc::clone(&server.queue),
            };
            let thread = std::thread::Builder::new()
                .name(format!("{SERVES}fuse"))
                .spawn(move || worker.run())
                .or_kind(Kind::Io, || "starting a thread".into())?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    /// Whether the last user of the file is gone.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// The descriptors that a successor needs, in any order. While another process has them open, this one can end at any moment, and
    /// readers of the file wait for the successor.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.served.device.as_fd(), self.served.journal.as_fd()]
    }

    /// Ends the threads for a planned hand-over. What is present and was taken is answered; the reads that wait for a fetch stay in the
    /// journal. The file system goes on for whoever has the descriptors.
    pub fn stop(self) {
        // reads whose data comes from now on are the successor's, and so are their slots
        self.served.slots.close();
    }

    /// What a watchdog sees of the threads.
    pub fn pulse(&self) -> Arc<dyn ServerPulse> {
        Arc::<Pulse>::clone(&self.served.pulse)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.queue.end_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Worker {
    index: usize,
    served: Arc<Served>,
    queue: Arc<Queue>,
}

impl Worker {
    fn run(self) {
        self.take_requests();
        self.served.pulse.ended(self.index);
    }

    fn take_requests(&self) {
        let (served, index) = (&self.served, self.index);
        served.journal.prepare(index);
        // what the process before this one has left there
        if let Some(landed) = served.journal.landed(index)
            && !self.take(&landed)
        {
            return;
        }
        loop {
            served.pulse.turn(index);
            match served.journal.receive(index, &served.device) {
                Ok(count) => {
                    served.step(Step::Received);
                    let landed = served.journal.landed(index);
                    let landed =
                        landed.filter(|landed| usize::try_from(landed.header.len) == Ok(count));
                    let Some(landed) = landed else {
                        tracing::error!("a malformed FUSE request of {count} bytes");
                        served.journal.clear(index);
                        continue;
                    };
                    if !self.take(&landed) {
                        return;
                    }
                }
                Err(error) => {
                    if !self.failed(Errno::from_io_error(&error)) {
                        return;
                    }
                }
            }
        }
    }

    /// Waits after a request could not be received. False when the thread is to end.
    fn failed(&self, errno: Option<Errno>) -> bool {
        if errno == Some(Errno::AGAIN) {
            return self.queue.wait(&TURN_AS_TIMESPEC);
        }
        // the start of a request may have been copied, and then the kernel has failed it
        self.served.journal.clear(self.index);
        match errno {
            // taken back before it was read
            Some(Errno::INTR | Errno::NOENT) => true,
            // the last user is gone, or the kernel has ended the file system before it
            Some(Errno::NODEV | Errno::CONNABORTED) => {
                self.queue.end_all();
                false
            }
            // a shortage of memory, for example; without this thread the readers of the file would wait for ever
            _ => {
                tracing::error!("reading a FUSE request: {errno:?}");
                self.queue.wait(&READ_PAUSE)
            }
        }
    }

    /// Answers the landed request, or puts it into a slot. False when the thread is to end; the request then stays where it is.
    fn take(&self, landed: &Landed) -> bool {
        let served = &self.served;
        if let Handled::Absent(noted) = served.handle(landed) {
            let Some(slot) = self.slot() else {
                return false;
            };
            served.journal.note(slot, &noted);
            served.step(Step::Noted);
            served.fetch(slot, &noted);
        }
        served.journal.clear(self.index);
        served.step(Step::Cleared);
        true
    }

    /// A free slot. The request in hand waits for it in its landing.
    fn slot(&self) -> Option<usize> {
        loop {
            match self.served.slots.take(TURN) {
                Taken::Slot(slot) => return Some(slot),
                Taken::NoneFree if !self.queue.has_ended() => {
                    self.served.pulse.turn(self.index);
                }
                Taken::NoneFree | Taken::Closed => return None,
            }
        }
    }
}
