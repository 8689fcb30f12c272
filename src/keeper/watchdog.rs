//! The daemon's side of the watchdog: it says that it works when all that has to work has answered.

use std::{convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};

use super::notify::Notify;
use crate::{blocking::blocking, error::Result};

/// Something that has to answer as long as the daemon works.
pub struct Check {
    /// What it is, for the log.
    pub what: &'static str,
    /// Asks it.
    pub ask: Box<dyn Fn() -> Answer + Send + Sync>,
}

/// An answer, which comes or does not.
pub type Answer = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

impl Check {
    /// The threads that all work goes through: one of the workers, and one for work that may block.
    pub fn threads() -> Self {
        Self {
            what: "the worker threads",
            ask: Box::new(|| {
                let through_both = tokio::spawn(blocking(|| Ok(())));
                Box::pin(async move {
                    through_both
                        .await
                        .map_err(|error| crate::blocking::broken_off("a worker thread", error))?
                })
            }),
        }
    }
}

/// Tells whoever runs this daemon that it works, several times in each period in which that has to be told, as long as all answer. This
/// runs where the daemon's main loop runs, and stands still with it.
pub async fn watch(notify: Arc<Notify>, period: Duration, checks: Vec<Check>) -> Infallible {
    loop {
        sleep(period / 4).await;
        if all_answer(&checks, period / 4).await {
            let notify = Arc::clone(&notify);
            // its queue may be full
            let told = blocking(move || {
                notify.watchdog();
                Ok(())
            });
            drop(told.await); // an error: the runtime ends
        }
    }
}

/// Whether all answer, each within this time.
async fn all_answer(checks: &[Check], time: Duration) -> bool {
    for check in checks {
        match timeout(time, (check.ask)()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!("{} do not work: {}", check.what, error.report());
                return false;
            }
            Err(_) => {
                tracing::error!("{} have not answered in {time:?}", check.what);
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    fn check(answer: impl Fn() -> Answer + Send + Sync + 'static) -> Vec<Check> {
        vec![
            Check::threads(),
            Check {
                what: "it",
                ask: Box::new(answer),
            },
        ]
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_that_does_not_answer_is_enough() {
        let time = Duration::from_secs(60);
        assert!(all_answer(&check(|| Box::pin(async { Ok(()) })), time).await);
        let fails = check(|| Box::pin(async { Err(Error::new(Kind::Io, "damaged")) }));
        assert!(!all_answer(&fails, time).await);
        let hangs = check(|| Box::pin(std::future::pending()));
        assert!(!all_answer(&hangs, Duration::from_millis(50)).await);
    }

    #[test]
    fn threads_that_are_all_in_use_do_not_answer() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let checks = vec![Check::threads()];
            let time = Duration::from_millis(100);
            assert!(all_answer(&checks, Duration::from_secs(60)).await);
            let (release, wait) = std::sync::mpsc::channel::<()>();
            let in_use = blocking(move || {
                let _ = wait.recv();
                Ok(())
            });
            let in_use = tokio::spawn(in_use);
            while all_answer(&checks, time).await {}
            drop(release);
            in_use.await.unwrap().unwrap();
            assert!(all_answer(&checks, Duration::from_secs(60)).await);
        });
    }
}
