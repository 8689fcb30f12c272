//! Requests that wait for a fetch: from the thread of the connection to the async side, and back through a queue that the thread polls
//! together with its socket.

use std::{
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::event::{EventfdFlags, eventfd};
use tokio::{runtime::Handle, task::JoinSet};

use crate::error::{Error, Kind};

/// Requests of one connection that may wait at one time; the kernel's driver has 128 in flight.
const MAX_REQUESTS: usize = 128;

/// Bytes that the waiting requests of one connection may ask for together, unless it is one request alone.
const MAX_BYTES: u64 = 64 << 20;

/// The end of a wait.
pub(super) type Completion<T> = (T, Result<(), Arc<Error>>);

/// The waiting requests of one connection. Dropped, none is waited for any more.
pub(super) struct Pending<T> {
    tasks: JoinSet<()>,
    runtime: Handle,
    ready: Arc<Ready<T>>,
    requests: usize,
    bytes: u64,
}

impl<T: Send + 'static> Pending<T> {
    pub(super) fn new(runtime: &Handle) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            tasks: JoinSet::new(),
            runtime: runtime.clone(),
            ready: Arc::new(Ready {
                queue: Mutex::new(Vec::new()),
                wake,
            }),
            requests: 0,
            bytes: 0,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// Whether another request may wait.
    pub(super) fn has_room(&self) -> bool {
        self.requests < MAX_REQUESTS && self.bytes < MAX_BYTES
    }

    /// Lets a request for so many bytes wait for `fetch`.
    pub(super) fn push(
        &mut self,
        request: T,
        length: u32,
        fetch: impl Future<Output = Result<(), Arc<Error>>> + Send + 'static,
    ) {
        self.requests += 1;
        self.bytes += u64::from(length);
        let mut ticket = Ticket {
            request: Some((request, length)),
            result: None,
            ready: Arc::clone(&self.ready),
        };
        self.tasks.spawn_on(
            async move {
                let result = fetch.await;
                ticket.keep(result);
            },
            &self.runtime,
        );
    }

    /// Stops waiting: each request completes soon, with its result or with an error.
    pub(super) fn abort(&mut self) {
        self.tasks.abort_all();
    }

    /// Readable when there are completions.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ready.wake.as_fd()
    }

    /// Takes the completions that are there.
    pub(super) fn take_ready(&mut self) -> Vec<Completion<T>> {
        let completions = self.ready.take();
        while self.tasks.try_join_next().is_some() {}
        let ended = completions.into_iter().map(|(request, length, result)| {
            self.requests -= 1;
            self.bytes -= u64::from(length);
            (request, result)
        });
        ended.collect()
    }
}

/// A request, its bytes, and its result.
type Ended<T> = (T, u32, Result<(), Arc<Error>>);

/// Completions on their way to the connection's thread.
struct Ready<T> {
    queue: Mutex<Vec<Ended<T>>>,
    wake: OwnedFd,
}

impl<T> Ready<T> {
    fn put(&self, completion: Ended<T>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push(completion);
        if queue.len() == 1 {
            // cannot fail but where 2^64 - 1 wakes were left unread
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    fn take(&self) -> Vec<Ended<T>> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        // nothing to read where the queue was not empty before: both are under the lock
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        std::mem::take(&mut queue)
    }
}

/// A request's promise of a completion, kept also where its task is dropped by a runtime that ends or unwinds.
struct Ticket<T> {
    /// With its bytes; there until it is dropped.
    request: Option<(T, u32)>,
    result: Option<Result<(), Arc<Error>>>,
    ready: Arc<Ready<T>>,
}

impl<T> Ticket<T> {
    fn keep(&mut self, result: Result<(), Arc<Error>>) {
        self.result = Some(result);
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or_else(|| {
            let why = "the fetch was cancelled: the daemon is shutting down";
            Err(Arc::new(Error::new(Kind::Unavailable, why)))
        });
        if let Some((request, length)) = self.request.take() {
            self.ready.put((request, length, result));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(pending: &Pending<u64>) {
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            pending.wake_fd(),
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, None).unwrap();
    }

    #[test]
    fn every_request_completes_also_when_its_task_panics_or_its_runtime_ends() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let mut pending = Pending::new(runtime.handle()).unwrap();
        pending.push(1, 10, async { Ok(()) });
        pending.push(2, 10, async { panic!("on purpose") });
        pending.push(3, 10, std::future::pending());
        let mut done = Vec::new();
        while done.len() < 2 {
            wait(&pending);
            done.extend(pending.take_ready());
        }
        runtime.shutdown_background();
        while done.len() < 3 {
            wait(&pending);
            done.extend(pending.take_ready());
        }
        done.sort_by_key(|(request, _)| *request);
        let ok: Vec<_> = done.iter().map(|(_, result)| result.is_ok()).collect();
        assert_eq!(ok, [true, false, false]);
        assert!(pending.is_empty());
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn room_is_bounded_by_count_and_by_bytes() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut pending = Pending::new(runtime.handle()).unwrap();
        for cookie in 0..MAX_REQUESTS as u64 {
            assert!(pending.has_room());
            pending.push(cookie, 1, std::future::pending());
        }
        assert!(!pending.has_room());
        let mut pending = Pending::new(runtime.handle()).unwrap();
        pending.push(0, super::super::MAX_PAYLOAD, std::future::pending());
        assert!(pending.has_room());
        pending.push(1, super::super::MAX_PAYLOAD, std::future::pending());
        assert!(!pending.has_room());
    }
}
