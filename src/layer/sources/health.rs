//! The health of a source: whether it answers, how fast, and when it is tried again after failures.
//!
//! After two failures in a row a source is *down*: other sources are asked before it. When its pause has passed, it is asked for a few
//! bytes that no reader waits for (`race`). Success makes it up again, failure doubles the pause. If all sources are down, they are still
//! asked.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    error::{Error, Kind},
    oci::Reference,
    source::Access,
};

/// Failures in a row after which a source is down.
const STRIKES: u32 = 2;

/// The pause before a source that is down is tried again: first value and maximum.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// A source that was up for this long starts with the first pause when it goes down again.
const STEADY: Duration = Duration::from_secs(60);

/// A source is late if its first byte takes this many times the average, ...
const LATE: u32 = 4;
/// ... within these bounds, ...
const LEAST_LATE: Duration = Duration::from_millis(250);
const MOST_LATE: Duration = Duration::from_secs(2);
/// ... and this long if its average is not known.
const LATE_AT_FIRST: Duration = Duration::from_secs(1);

/// Weight of the previous average when a new value is added with weight 1.
const WEIGHT: u32 = 7;

/// Whether one source answers.
#[derive(Default)]
pub(crate) struct SourceHealth(Mutex<SourceState>);

#[derive(Default)]
struct SourceState {
    strikes: u32,
    down: Option<Outage>,
    /// The last pause, and the time at which it ended with success.
    pause: Option<(Duration, Instant)>,
    first_byte: Option<Duration>,
}

/// A source that does not answer, for display.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceDown {
    /// Its reference.
    pub source: String,
    /// Seconds since it went down.
    pub seconds: u64,
    /// Its last error.
    pub error: String,
}

impl std::fmt::Display for SourceDown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the source {} is down since {} s, and other sources are asked before it: {}",
            self.source, self.seconds, self.error
        )
    }
}

/// The state of a source that is down.
struct Outage {
    since: Instant,
    /// The last failure.
    error: Arc<Error>,
    retry_at: Instant,
    pause: Duration,
    is_being_tried: bool,
}

/// The effect of a success or a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HealthChange {
    Nothing,
    WentDown,
    CameUp,
}

impl SourceHealth {
    /// The first byte of an answer has arrived after this time.
    pub(super) fn first_byte_after(&self, after: Duration) {
        let mut state = self.lock();
        let average = state.first_byte.unwrap_or(after);
        state.first_byte = Some((average * WEIGHT + after) / (WEIGHT + 1));
    }

    /// It has sent the requested bytes.
    pub(super) fn succeeded(&self) -> HealthChange {
        let mut state = self.lock();
        state.strikes = 0;
        let Some(down) = state.down.take() else {
            return HealthChange::Nothing;
        };
        state.pause = Some((down.pause, Instant::now()));
        HealthChange::CameUp
    }

    /// It has failed to send the requested bytes.
    pub(crate) fn failed(&self, error: &Arc<Error>) -> HealthChange {
        let now = Instant::now();
        let mut state = self.lock();
        state.strikes = state.strikes.saturating_add(1);
        if let Some(down) = &mut state.down {
            down.error = Arc::clone(error);
            // failures of requests from before the end of the pause are not counted
            if now >= down.retry_at {
                down.pause = (down.pause * 2).min(LAST_PAUSE);
                down.retry_at = now + down.pause;
                down.is_being_tried = false;
            }
            return HealthChange::Nothing;
        }
        if state.strikes < STRIKES {
            return HealthChange::Nothing;
        }
        let pause = match state.pause {
            Some((pause, up_since)) if now < up_since + STEADY => (pause * 2).min(LAST_PAUSE),
            _ => FIRST_PAUSE,
        };
        state.down = Some(Outage {
            since: now,
            error: Arc::clone(error),
            retry_at: now + pause,
            pause,
            is_being_tried: false,
        });
        HealthChange::WentDown
    }

    /// Whether other sources are asked before it.
    pub(super) fn is_down(&self) -> bool {
        self.lock().down.is_some()
    }

    /// When and why it went down, if it is down. `source` is the name for display.
    pub(crate) fn down(&self, source: &Reference) -> Option<SourceDown> {
        self.lock().down.as_ref().map(|down| SourceDown {
            source: source.to_string(),
            seconds: down.since.elapsed().as_secs(),
            error: down.error.report(),
        })
    }

    /// Whether it is down, and the caller has to try it now. True for one caller after each pause.
    pub(super) fn begin_trial(&self) -> bool {
        match &mut self.lock().down {
            Some(down) if !down.is_being_tried && Instant::now() >= down.retry_at => {
                down.is_being_tried = true;
                true
            }
            _ => false,
        }
    }

    /// The time without an answer after which another source is asked too.
    pub(super) fn late_after(&self) -> Duration {
        match self.lock().first_byte {
            Some(average) => (average * LATE).clamp(LEAST_LATE, MOST_LATE),
            None => LATE_AT_FIRST,
        }
    }

    fn lock(&self) -> MutexGuard<'_, SourceState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Identifies what sources share that are up or down together: the host, and the way to access it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct HostKey(String, Access);

impl HostKey {
    pub(crate) fn of(reference: &Reference, access: &Access) -> Self {
        let host = match reference {
            Reference::Registry { host, .. } => host.clone(),
            Reference::Layout { path, .. } | Reference::Archive { path, .. } => {
                format!("{}", path.display())
            }
        };
        Self(host, access.clone())
    }
}

/// The hosts of all sources of a store, as long as an open disk has a source there.
#[derive(Clone, Default)]
pub(crate) struct Hosts(Arc<Mutex<HashMap<HostKey, Weak<SourceHealth>>>>);

impl Hosts {
    /// The health of a host.
    pub(crate) fn get(&self, key: HostKey) -> Arc<SourceHealth> {
        let mut hosts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, health| health.strong_count() > 0);
        let entry = hosts.entry(key).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let health = Arc::default();
            *entry = Arc::downgrade(&health);
            health
        })
    }
}

/// Whether a failure is that of the host, and not an answer about this blob or these credentials.
pub(super) fn is_host_failure(kind: Kind) -> bool {
    matches!(kind, Kind::Unavailable | Kind::Io | Kind::Kernel)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    fn error() -> Arc<Error> {
        Arc::new(Error::new(Kind::Unavailable, "no answer"))
    }

    fn down() -> SourceHealth {
        let health = SourceHealth::default();
        assert_eq!(health.failed(&error()), HealthChange::Nothing);
        assert_eq!(health.failed(&error()), HealthChange::WentDown);
        health
    }

    /// Whether the trial is due now, for one caller only.
    fn is_due(health: &SourceHealth) -> bool {
        let is_due = health.begin_trial();
        assert!(!health.begin_trial(), "another caller tries it");
        is_due
    }

    #[tokio::test(start_paused = true)]
    async fn two_failures_in_a_row_make_a_source_down_and_a_success_resets_the_count() {
        let health = SourceHealth::default();
        for _ in 0..3 {
            assert_eq!(health.failed(&error()), HealthChange::Nothing);
            assert_eq!(health.succeeded(), HealthChange::Nothing);
        }
        assert!(!health.is_down() && !health.begin_trial());
        let health = down();
        assert!(health.is_down());
        assert_eq!(
            health.failed(&error()),
            HealthChange::Nothing,
            "already down"
        );
        assert_eq!(health.succeeded(), HealthChange::CameUp);
        assert!(!health.is_down());
        assert_eq!(
            health.failed(&error()),
            HealthChange::Nothing,
            "one failure is not enough"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_is_tried_after_each_pause_and_pauses_double() {
        let health = down();
        let mut pause = FIRST_PAUSE;
        for _ in 0..9 {
            advance(pause - MOMENT).await;
            // a failure from before the end of the pause does not count
            health.failed(&error());
            assert!(!is_due(&health), "before {pause:?} are over");
            advance(MOMENT).await;
            assert!(is_due(&health), "after {pause:?}");
            health.failed(&error());
            pause = (pause * 2).min(LAST_PAUSE);
        }
        assert_eq!(pause, LAST_PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_was_up_for_a_short_time_has_a_longer_pause() {
        for (up, pause) in [(STEADY - MOMENT, FIRST_PAUSE * 2), (STEADY, FIRST_PAUSE)] {
            let health = down();
            advance(FIRST_PAUSE).await;
            assert!(is_due(&health));
            assert_eq!(health.succeeded(), HealthChange::CameUp);
            advance(up).await;
            health.failed(&error());
            assert_eq!(health.failed(&error()), HealthChange::WentDown);
            advance(pause - MOMENT).await;
            assert!(!is_due(&health), "up for {up:?}");
            advance(MOMENT).await;
            assert!(is_due(&health), "up for {up:?}");
        }
    }

    #[test]
    fn repositories_of_a_host_are_up_or_down_together() {
        let (hosts, access) = (Hosts::default(), Access::default());
        let get = |reference: &str, access: &Access| {
            hosts.get(HostKey::of(&reference.parse().unwrap(), access))
        };
        let one = get("registry.example/a:1", &access);
        assert!(Arc::ptr_eq(&one, &get("registry.example/b/c:2", &access)));
        let other_way = Access {
            plain_http: true,
            ..Access::default()
        };
        for other in [
            get("registry.example:5000/a:1", &access),
            get("registry.example/a:1", &other_way),
            get("oci:/registry.example:1", &access),
        ] {
            assert!(!Arc::ptr_eq(&one, &other));
        }
    }

    #[test]
    fn late_is_a_multiple_of_the_average_within_bounds() {
        let health = SourceHealth::default();
        assert_eq!(health.late_after(), LATE_AT_FIRST);
        let millis = Duration::from_millis;
        health.first_byte_after(millis(100));
        assert_eq!(health.late_after(), millis(400));
        // a new value counts for an eighth
        health.first_byte_after(millis(900));
        assert_eq!(health.late_after(), millis(800));
        for (usual, late) in [(1, LEAST_LATE), (60_000, MOST_LATE)] {
            let health = SourceHealth::default();
            health.first_byte_after(millis(usual));
            assert_eq!(health.late_after(), late);
        }
    }
}
