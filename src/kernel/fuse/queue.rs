//! The wait queue of all threads of a file: an epoll instance with the FUSE device in it. A request wakes one of them (`EPOLLET`), and
//! each takes requests until there are none. With poll(2), each request woke all threads, and they spun on the kernel's lock of its queue.

use std::{
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    io::Errno,
    time::Timespec,
};

/// The meaning of an event of a [`Queue`].
const REQUEST: u64 = 0;
const STOP: u64 = 1;

#[derive(Debug)]
pub(super) struct Queue {
    epoll: OwnedFd,
    device: Arc<OwnedFd>,
    has_ended: AtomicBool,
}

impl Queue {
    pub(super) fn of(device: &Arc<OwnedFd>) -> rustix::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let requests = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, device, EventData::new_u64(REQUEST), requests)?;
        Ok(Self {
            epoll,
            device: Arc::clone(device),
            has_ended: AtomicBool::new(false),
        })
    }

    /// Ends all threads: the device can always be written to, so from now on each of them finds an event that means this.
    pub(super) fn end_all(&self) {
        self.has_ended.store(true, Ordering::Release);
        // the descriptor is in the epoll instance, and its memory is allocated
        let _ = epoll::modify(
            &self.epoll,
            &*self.device,
            EventData::new_u64(STOP),
            EventFlags::OUT,
        );
    }

    /// Whether the threads are to end.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// Waits for a request, up to a maximum time. False when the threads are to end.
    pub(super) fn wait(&self, at_most: &Timespec) -> bool {
        let mut events = [MaybeUninit::uninit()];
        match epoll::wait(&self.epoll, &mut events, Some(at_most)) {
            Ok(([event], _)) => event.data.u64() != STOP,
            Ok(_) => true,
            Err(errno) => errno == Errno::INTR,
        }
    }
}
