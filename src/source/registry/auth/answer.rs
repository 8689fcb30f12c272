//! The numbers of answers that have credentials.

use std::sync::atomic::{AtomicU64, Ordering};

/// Identifies credentials among all answers of plugins and all credentials of pulls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AnswerNumber(u64);

impl AnswerNumber {
    /// A number that no other answer has.
    pub(super) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
