//! How often the authorization of a request may be renewed.

/// With credentials that last for seconds, a slow request may come too late with those of several others.
const MAX_RENEWALS_BY_OTHERS: u32 = 4;
/// How often a request may be sent with other credentials: those of several pulls, and then those of the other places.
const MAX_CREDENTIALS: u32 = 8;

/// How often the authorization of a request was renewed.
#[derive(Default)]
pub(in crate::source::registry) struct Renewals {
    own: u32,
    /// By other requests, while this one was on its way with the one before.
    by_others: u32,
}

impl Renewals {
    /// `is_own`: this request has renewed it.
    pub(in crate::source::registry) fn add(&mut self, is_own: bool) {
        match is_own {
            true => self.own += 1,
            false => self.by_others += 1,
        }
    }

    /// Whether this request has renewed it.
    pub(in crate::source::registry) fn are_own(&self) -> bool {
        self.own > 0
    }

    /// Whether it may be renewed once more: what was refused twice is not asked for again.
    pub(in crate::source::registry) fn are_left(&self) -> bool {
        self.own == 0 && self.by_others < MAX_RENEWALS_BY_OTHERS
    }

    /// Whether it may be renewed with other credentials than those that were refused.
    pub(in crate::source::registry) fn may_use_others(&self) -> bool {
        self.own + self.by_others < MAX_CREDENTIALS
    }
}
