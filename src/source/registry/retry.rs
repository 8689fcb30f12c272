//! Retries: of which failures, when, and for how long.

use std::time::{Duration, Instant, SystemTime};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

use crate::{
    error::{Error, Result},
    metrics::{METRICS, RetryReason},
};

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A server that asks for more is taken to be down.
pub(super) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Why one try came to nothing.
pub(super) enum Failure {
    /// It may work later.
    Passing {
        error: Error,
        reason: RetryReason,
        /// The pause that the server asked for with `Retry-After`.
        after: Option<Duration>,
    },
    /// It will not.
    Final(Error),
}

impl Failure {
    pub(super) fn passing(reason: RetryReason, error: Error) -> Self {
        Self::Passing {
            error,
            reason,
            after: None,
        }
    }
}

/// The tries of one operation: exponential waits with jitter, until there was no progress for as long as the patience lasts.
pub(super) struct Tries {
    /// e.g. `reading manifest 1.27 of 127.0.0.1:5000/app`.
    what: String,
    patience: Duration,
    since: Instant,
    failed: u32,
    waits: ExponentialBackoff,
}

impl Tries {
    pub(super) fn new(what: impl Into<String>, patience: Duration) -> Self {
        Self {
            what: what.into(),
            patience,
            since: Instant::now(),
            failed: 0,
            waits: waits(),
        }
    }

    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// A reader waits from now on: the time before is not counted.
    pub(super) fn begin(&mut self) {
        if self.failed == 0 {
            self.since = Instant::now();
        }
    }

    /// Something came: the patience begins anew.
    pub(super) fn progress(&mut self) {
        self.since = Instant::now();
        if self.failed > 0 {
            self.failed = 0;
            self.waits = waits();
        }
    }

    /// Waits for the time of the next try, or gives up.
    pub(super) async fn after(&mut self, failure: Failure) -> Result<()> {
        let (error, reason, after) = match failure {
            Failure::Final(error) => return Err(error.context(self.what.clone())),
            Failure::Passing {
                error,
                reason,
                after,
            } => (error, reason, after),
        };
        self.failed += 1;
        // the iterator has no end: its longest wait comes again and again
        let mut wait = self.waits.next().unwrap_or(LONGEST_WAIT);
        if let Some(after) = after {
            wait = wait.max(after);
        }
        let elapsed = self.since.elapsed();
        if wait > LONGEST_RETRY_AFTER || elapsed + wait > self.patience {
            let asked = after
                .map(|after| format!(", with Retry-After of {} s", after.as_secs()))
                .unwrap_or_default();
            return Err(error.context(format!(
                "{}: gave up after {} tries in {:.1} s{asked}",
                self.what,
                self.failed,
                elapsed.as_secs_f64(),
            )));
        }
        METRICS.retries.count(reason as usize);
        tracing::debug!(
            what = self.what,
            tries = self.failed,
            wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            error = error.report(),
            "trying again"
        );
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

fn waits() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_factor(2.0)
        .with_min_delay(FIRST_WAIT)
        .with_max_delay(LONGEST_WAIT)
        .without_max_times()
        .with_jitter()
        .build()
}

/// `Retry-After` (RFC 9110, section 10.2.3): seconds or a date.
pub(super) fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // more than fits is as good as for ever
        return Some(Duration::from_secs(
            text.parse().unwrap_or(u64::from(u32::MAX)),
        ));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn retry_after_in_seconds_and_as_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let seconds = |text| parse_retry_after(text, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds(" 0 "), Some(0));
        assert_eq!(seconds("99999999999999999999"), Some(u64::from(u32::MAX)));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:27 GMT"), Some(0));
        for text in [
            "",
            "-1",
            "+1",
            "1.5",
            "soon",
            "Sun, 99 Nov 1994 08:49:37 GMT",
        ] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    fn unavailable() -> Error {
        Error::new(Kind::Unavailable, "503 from h")
    }

    #[tokio::test]
    async fn gives_up_when_the_patience_is_over_and_names_the_tries() {
        let mut tries = Tries::new("reading x", Duration::from_millis(500));
        let mut count = 0;
        let error = loop {
            count += 1;
            if let Err(error) = tries
                .after(Failure::passing(RetryReason::Status, unavailable()))
                .await
            {
                break error;
            }
        };
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(
            error.report().starts_with("reading x: gave up after "),
            "{error:?}"
        );
        assert!(error.report().ends_with(": 503 from h"), "{error:?}");
        assert!(count > 1, "{count} tries");
    }

    #[tokio::test]
    async fn a_wait_past_the_patience_is_not_begun() {
        let mut tries = Tries::new("reading x", Duration::from_secs(3));
        let failure = Failure::Passing {
            error: unavailable(),
            reason: RetryReason::Pause,
            after: Some(Duration::from_secs(3600)),
        };
        let error = tries.after(failure).await.expect_err("it gives up");
        assert!(
            error.report().contains("Retry-After of 3600 s"),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn what_is_final_is_not_tried_again() {
        let mut tries = Tries::new("reading x", Duration::from_secs(3));
        let error = tries
            .after(Failure::Final(Error::new(Kind::NotFound, "404")))
            .await
            .expect_err("final");
        assert_eq!(error.kind(), Kind::NotFound);
        assert_eq!(error.report(), "reading x: 404");
    }
}
