//! Threads that verify, inflate and write spans. The async workers do not do this: a span takes 10 ms and more.

use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::sync::{Semaphore, oneshot};

use super::in_flight::FetchEffort;
use crate::gzip::inflate::SpanDecoder;

/// A job of a decoding thread; it is called with the decoder of that thread.
struct DecodeJob {
    effort: Arc<FetchEffort>,
    run: Box<dyn FnOnce(&mut SpanDecoder) + Send>,
}

/// Maximum number of jobs that wait for a thread. Further callers wait asynchronously.
const QUEUE_LENGTH: usize = 64;

/// A thread without jobs for this long frees the memory of its decoder.
const IDLE: Duration = Duration::from_secs(5);

/// A job did not end. This is a bug of this program: bytes from outside do not cause a panic.
#[derive(Debug, thiserror::Error)]
#[error("a decoding thread failed; this is a bug, please report it with the log of the daemon")]
pub(crate) struct DecoderFailed;

struct JobQueue {
    jobs: Mutex<QueueState>,
    changed: Condvar,
    room: Semaphore,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<DecodeJob>,
    closed: bool,
}

/// The pool. Its threads end when it is dropped.
pub(crate) struct Decoders(Arc<JobQueue>);

impl Decoders {
    /// Starts the threads.
    pub(crate) fn start(threads: usize) -> std::io::Result<Self> {
        let queue = Arc::new(JobQueue {
            jobs: Mutex::default(),
            changed: Condvar::new(),
            room: Semaphore::new(QUEUE_LENGTH),
        });
        let pool = Self(Arc::clone(&queue));
        for number in 0..threads.max(1) {
            let queue = Arc::clone(&queue);
            thread::Builder::new()
                .name(format!("decode-{number}"))
                .spawn(move || work(&queue))?;
        }
        Ok(pool)
    }

    /// Runs a job on one of the threads. Jobs of fetches that a reader waits for are run first.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        effort: &Arc<FetchEffort>,
        job: impl FnOnce(&mut SpanDecoder) -> T + Send + 'static,
    ) -> Result<T, DecoderFailed> {
        let (done, result) = oneshot::channel();
        let room = self.0.room.acquire().await.map_err(|_| DecoderFailed)?;
        room.forget(); // the thread that takes the job adds it again
        self.0.push(DecodeJob {
            effort: Arc::clone(effort),
            run: Box::new(move |decoder| {
                // if the caller does not wait any more, the work is still done
                let _ = done.send(job(decoder));
            }),
        });
        result.await.map_err(|_| DecoderFailed)
    }
}

impl Decoders {
    /// The number of jobs that wait for a thread.
    pub(crate) fn waiting(&self) -> usize {
        self.0.lock().jobs.len()
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

impl JobQueue {
    fn lock(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, job: DecodeJob) {
        self.lock().jobs.push_back(job);
        self.changed.notify_one();
    }

    /// The next job. An error: there was none for [`IDLE`] (`false`), or the pool is closed (`true`).
    fn pop(&self) -> Result<DecodeJob, bool> {
        let mut state = self.lock();
        loop {
            // at most QUEUE_LENGTH are examined
            let awaited = state.jobs.iter().position(|job| job.effort.is_awaited());
            if let Some(job) = state.jobs.remove(awaited.unwrap_or(0)) {
                self.room.add_permits(1);
                return Ok(job);
            }
            if state.closed {
                return Err(true);
            }
            let (next, wait) = self
                .changed
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if wait.timed_out() && state.jobs.is_empty() && !state.closed {
                return Err(false);
            }
        }
    }

    /// As [`Self::pop`], for a thread without memory to free. `None`: the pool is closed.
    fn pop_or_end(&self) -> Option<DecodeJob> {
        loop {
            match self.pop() {
                Ok(job) => return Some(job),
                Err(true) => return None,
                Err(false) => {}
            }
        }
    }
}

fn work(queue: &JobQueue) {
    while let Some(mut job) = queue.pop_or_end() {
        let mut decoder = SpanDecoder::default();
        let closed = loop {
            // a panic ends this job and replaces this decoder, but the thread continues
            let run = AssertUnwindSafe(|| (job.run)(&mut decoder));
            if std::panic::catch_unwind(run).is_err() {
                decoder = SpanDecoder::default();
            }
            match queue.pop() {
                Ok(next) => job = next,
                Err(closed) => break closed,
            }
        };
        if closed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::read::in_flight::Purpose;

    fn effort(purpose: Purpose) -> Arc<FetchEffort> {
        FetchEffort::new(purpose, None)
    }

    #[tokio::test]
    async fn jobs_run_on_the_threads_of_the_pool_and_return_their_results() {
        let pool = Decoders::start(2).unwrap();
        let effort = effort(Purpose::Reader);
        let jobs = (0..200).map(|number| {
            pool.run(&effort, move |_| {
                let name = thread::current().name().map(str::to_owned);
                (number, name.is_some_and(|name| name.starts_with("decode-")))
            })
        });
        let results = futures_util::future::join_all(jobs).await;
        for (number, result) in results.into_iter().enumerate() {
            assert_eq!(result.unwrap(), (number, true));
        }
    }

    #[tokio::test]
    async fn a_panic_fails_only_its_job() {
        let pool = Decoders::start(1).unwrap();
        let effort = effort(Purpose::Reader);
        let failed: Result<(), DecoderFailed> = pool.run(&effort, |_| panic!("a bug")).await;
        assert!(failed.is_err());
        assert_eq!(pool.run(&effort, |_| 7).await.unwrap(), 7);
    }

    #[test]
    fn jobs_that_a_reader_waits_for_run_first() {
        let queue = JobQueue {
            jobs: Mutex::default(),
            changed: Condvar::new(),
            room: Semaphore::new(0),
        };
        let (later, reader) = (effort(Purpose::Ahead), effort(Purpose::Reader));
        for effort in [&later, &reader, &later, &reader] {
            queue.push(DecodeJob {
                effort: Arc::clone(effort),
                run: Box::new(|_| ()),
            });
        }
        let order: Vec<bool> = (0..4)
            .map(|_| queue.pop_or_end().unwrap().effort.is_awaited())
            .collect();
        assert_eq!(order, [true, true, false, false]);
    }
}
