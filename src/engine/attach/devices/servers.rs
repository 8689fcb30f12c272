//! The threads that answer requests of the kernel, as a watchdog sees them.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::kept::KeptDescriptors;
use crate::{
    error::{Error, Kind, Result},
    kernel::kept::ServerPulse,
};

/// What serves the devices of an engine.
#[derive(Clone)]
pub(super) struct Serving {
    pub(super) kept: Arc<KeptDescriptors>,
    pub(super) servers: Arc<Servers>,
    pub(super) runtime: Handle,
}

impl Serving {
    pub(super) fn new(kept: Arc<KeptDescriptors>, runtime: Handle) -> Self {
        Self {
            kept,
            servers: Arc::default(),
            runtime,
        }
    }
}

/// The servers of all devices.
#[derive(Default)]
pub(crate) struct Servers(Mutex<Vec<WatchedServer>>);

struct WatchedServer {
    pulse: Weak<dyn ServerPulse>,
    /// The turns of its threads when they were looked at last.
    turns: Vec<Option<u64>>,
    /// When all of them were seen to have made turns since the look before.
    moved: Instant,
}

impl Servers {
    /// Watches a server as long as it exists.
    pub(super) fn add(&self, pulse: &Arc<dyn ServerPulse>) {
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        servers.retain(|server| server.pulse.strong_count() > 0);
        servers.push(WatchedServer {
            pulse: Arc::downgrade(pulse),
            turns: Vec::new(),
            moved: Instant::now(),
        });
    }

    /// An error if a thread has made no turn for this long. A thread makes one each second also without requests; a read that waits for a
    /// registry holds up none.
    pub(crate) fn check(&self, limit: Duration) -> Result<()> {
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for server in servers.iter_mut() {
            let Some(pulse) = server.pulse.upgrade() else {
                continue;
            };
            let turns = pulse.turns();
            let mut both = turns.iter().zip(&server.turns);
            let stands_still = both.any(|(now, before)| now.is_some() && now == before);
            server.turns = turns;
            if !stands_still {
                server.moved = Instant::now();
            } else if server.moved.elapsed() >= limit {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!(
                        "a thread that serves a device has stood still for {:.0?}",
                        server.moved.elapsed()
                    ),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;

    struct Two(AtomicU64, AtomicU64);

    impl ServerPulse for Two {
        fn turns(&self) -> Vec<Option<u64>> {
            let turns = [self.0.load(Relaxed), self.1.load(Relaxed)];
            turns.map(|turns| (turns < 100).then_some(turns)).into()
        }
    }

    #[test]
    fn one_thread_that_stands_still_is_enough() {
        let servers = Servers::default();
        let two = Arc::new(Two(1.into(), 1.into()));
        let pulse: Arc<dyn ServerPulse> = Arc::<Two>::clone(&two);
        servers.add(&pulse);
        let short = Duration::ZERO;
        servers.check(short).unwrap();
        two.0.store(2, Relaxed);
        let error = servers.check(short).unwrap_err().report();
        assert!(error.contains("has stood still"), "{error}");
        servers.check(Duration::from_secs(60)).unwrap();
        two.0.store(3, Relaxed);
        two.1.store(2, Relaxed);
        servers.check(short).unwrap();
        // one that has ended cannot
        two.0.store(100, Relaxed);
        two.1.store(3, Relaxed);
        servers.check(short).unwrap();
        two.1.store(4, Relaxed);
        servers.check(short).unwrap();
        drop((two, pulse));
        servers.check(short).unwrap();
    }
}
