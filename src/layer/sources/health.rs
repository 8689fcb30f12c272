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
    blocking::blocking,
    error::{Error, Kind, Result},
    oci::Reference,
    source::{
        Access, Limits, Source, WeakSource,
        hosts::{self, RegistryHost},
    },
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

/// How long the content of a `hosts.toml` is valid, and when it is forgotten unless a fetch asks for it.
const HOSTS_FILE_AGE: Duration = Duration::from_secs(5);
const FORGOTTEN: Duration = Duration::from_secs(3600);

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
#[derive(
    Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
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
    pub(crate) fn down(&self, source: &str) -> Option<SourceDown> {
        self.lock().down.as_ref().map(|down| SourceDown {
            source: source.to_owned(),
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
    /// `at`: the host that serves the registry of the reference, where a file names it.
    pub(crate) fn of(reference: &Reference, access: &Access, at: Option<&RegistryHost>) -> Self {
        let host = match (at, reference) {
            (Some(at), _) => at.root().to_owned(),
            (None, Reference::Registry { host, .. }) => host.clone(),
            (None, Reference::Layout { path, .. } | Reference::Archive { path, .. }) => {
                format!("{}", path.display())
            }
            // the address is that of the access
            (None, Reference::Containerd { .. }) => "containerd".to_owned(),
        };
        Self(host, access.clone())
    }

    /// The host, or the path of a layout.
    pub(super) fn name(&self) -> &str {
        &self.0
    }
}

/// What the sources of all disks of a store share: the health of their hosts, as long as an open disk has a source there, the opened sources,
/// and the time limits of requests.
#[derive(Clone, Default)]
pub(crate) struct Hosts(Arc<HostTable>);

/// Reference, access, and the root of the host where a file names it.
type OpenedKey = (Reference, Access, Option<String>);

#[derive(Default)]
struct HostTable {
    limits: Limits,
    health: Mutex<HashMap<HostKey, Weak<SourceHealth>>>,
    opened: Mutex<HashMap<OpenedKey, WeakSource>>,
    /// The hosts of registries, by registry and access.
    serving: Mutex<HashMap<RegistryKey, ServingHosts>>,
}

/// A registry and the access to it.
type RegistryKey = (String, Access);

/// The registry of a reference, if directories of hosts are to be looked into.
fn registry_of(reference: &Reference, access: &Access) -> Option<RegistryKey> {
    match reference {
        Reference::Registry { host, .. } if !access.hosts_dirs.is_empty() => {
            Some((host.clone(), access.clone()))
        }
        _ => None,
    }
}

/// The hosts that serve a registry, as its file said when it was read last.
struct ServingHosts {
    read: Instant,
    hosts: Option<Arc<[RegistryHost]>>,
}

impl Hosts {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Arc::new(HostTable {
            limits,
            health: Mutex::default(),
            opened: Mutex::default(),
            serving: Mutex::default(),
        }))
    }

    /// Opens a source, or returns the one that another disk has opened: the layers of an image share connections and tokens.
    pub(super) async fn open(
        &self,
        reference: &Reference,
        access: &Access,
        at: Option<&RegistryHost>,
    ) -> Result<Source> {
        let limits = self.0.limits;
        let source = match at {
            Some(host) => Source::open_at(reference, access, limits, host.clone())?,
            None => Source::open_with(reference, access, limits).await?,
        };
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|_, source| source.upgrade().is_some());
        let root = at.map(|host| host.root().to_owned());
        let entry = opened.entry((reference.clone(), access.clone(), root));
        let entry = entry.or_default();
        // not one whose certificates or headers have changed since
        let known = entry.upgrade();
        let known = known.filter(|known| at.is_none() || known.only_host() == at);
        Ok(known.unwrap_or_else(|| {
            *entry = source.downgrade();
            source
        }))
    }

    /// The hosts that serve a registry, as they were read last, where directories of hosts are to be looked into: `None` otherwise, and if
    /// the file is malformed. Blocks if they were not read yet.
    pub(super) fn serving(
        &self,
        reference: &Reference,
        access: &Access,
    ) -> Option<Arc<[RegistryHost]>> {
        let key = registry_of(reference, access)?;
        if let Some(known) = self.read_hosts().get(&key) {
            return known.hosts.clone();
        }
        self.read_again(key)
    }

    /// Reads the hosts of a registry again if that was some seconds ago. If the file is malformed now, what it said before is valid.
    pub(super) async fn renew(&self, reference: &Reference, access: &Access) {
        let Some(key) = registry_of(reference, access) else {
            return;
        };
        let now = Instant::now();
        if let Some(known) = self.read_hosts().get_mut(&key) {
            if now < known.read + HOSTS_FILE_AGE {
                return;
            }
            // others use what is known meanwhile
            known.read = now;
        }
        let hosts = self.clone();
        // fails only when the process ends
        let _ = blocking(move || Ok(hosts.read_again(key))).await;
    }

    /// Blocks.
    fn read_again(&self, key: RegistryKey) -> Option<Arc<[RegistryHost]>> {
        let (registry, access) = &key;
        let found = hosts::of_registry(registry, access);
        let now = Instant::now();
        let mut serving = self.read_hosts();
        let before = serving.remove(&key).and_then(|known| known.hosts);
        let hosts = match found {
            Ok(hosts) if before.as_deref().is_some_and(|before| before == hosts) => before,
            Ok(hosts) => Some(hosts.into()),
            Err(error) => {
                hosts::warn_once(&error.report());
                before
            }
        };
        serving.retain(|_, known| now < known.read + FORGOTTEN);
        let known = ServingHosts {
            read: now,
            hosts: hosts.clone(),
        };
        serving.insert(key, known);
        hosts
    }

    fn read_hosts(&self) -> MutexGuard<'_, HashMap<RegistryKey, ServingHosts>> {
        let serving = self.0.serving.lock();
        serving.unwrap_or_else(PoisonError::into_inner)
    }

    /// The health of a host.
    pub(crate) fn get(&self, key: HostKey) -> Arc<SourceHealth> {
        let mut hosts = self.0.health.lock().unwrap_or_else(PoisonError::into_inner);
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
            hosts.get(HostKey::of(&reference.parse().unwrap(), access, None))
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
