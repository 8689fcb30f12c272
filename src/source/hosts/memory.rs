//! The hosts that have failed a short time ago. They are asked after the others for [`REST`], by all sources of this process, so that a
//! mirror that does not answer costs its time limit once and not with each manifest. The spans of disks have a longer memory
//! (`layer/sources/health.rs`), which tries a host again with bytes that no reader waits for.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a host that has failed is asked last.
const REST: Duration = Duration::from_secs(30);
/// Hosts that are remembered.
const MAX_HOSTS: usize = 256;

/// By the root of the host's API.
static FAILED: Mutex<Option<HashMap<String, Instant>>> = Mutex::new(None);

fn failed_hosts() -> MutexGuard<'static, Option<HashMap<String, Instant>>> {
    FAILED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes that a host did not answer, or with other bytes than those of a digest. True if this was not known.
pub(in crate::source) fn failed(root: &str) -> bool {
    let now = Instant::now();
    let mut failed = failed_hosts();
    let failed = failed.get_or_insert_default();
    failed.retain(|_, until| *until > now);
    if failed.len() >= MAX_HOSTS && !failed.contains_key(root) {
        return false;
    }
    failed.insert(root.to_owned(), now + REST).is_none()
}

/// Forgets that a host has failed: it has answered.
pub(in crate::source) fn answered(root: &str) {
    if let Some(failed) = failed_hosts().as_mut() {
        failed.remove(root);
    }
}

/// Whether other hosts are asked first.
pub(in crate::source) fn is_last(root: &str) -> bool {
    let failed = failed_hosts();
    let until = failed.as_ref().and_then(|failed| failed.get(root));
    until.is_some_and(|until| *until > Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_failed_is_asked_last_until_it_answers() {
        let root = "https://memory.test/v2/";
        assert!(!is_last(root));
        assert!(failed(root) && !failed(root));
        assert!(is_last(root) && !is_last("https://memory.test:1/v2/"));
        answered(root);
        assert!(!is_last(root));
    }
}
