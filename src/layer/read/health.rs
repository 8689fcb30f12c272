//! The reasons for which a disk is degraded.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    error::{Error, Kind},
    units::SpanId,
};

/// Spans with reasons of their own that are remembered.
const MAX_SPANS: usize = 64;

#[derive(Default)]
struct DegradedReasons {
    /// The sources do not answer, or the local disk does not take the data: any success ends it.
    outage: Option<Arc<Error>>,
    /// The local disk does not take what comes: ended when it does.
    unkept: Option<Arc<Error>>,
    /// The layer as a whole is not what it should be. That stays.
    whole: Option<Arc<Error>>,
    /// Spans whose bytes are wrong: ended for each when it comes right.
    spans: BTreeMap<SpanId, Arc<Error>>,
}

/// One reason that a disk is degraded for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DegradedReason {
    /// The span that is not what it should be; `None`: no span can be had at the moment, or all are wrong.
    pub span: Option<u32>,
    /// What is wrong.
    pub message: String,
}

/// The reasons that a disk is degraded for.
#[derive(Default)]
pub(crate) struct DiskHealth(Mutex<DegradedReasons>);

impl DiskHealth {
    /// These spans could not be fetched. True where that is new: it is to be said once, and not with each failure.
    pub(crate) fn failed(&self, spans: &[SpanId], error: &Arc<Error>) -> bool {
        let mut reasons = self.lock();
        if error.kind() != Kind::Corrupt {
            return reasons.outage.replace(Arc::clone(error)).is_none();
        }
        let mut is_new = false;
        for span in spans {
            if reasons.spans.len() < MAX_SPANS || reasons.spans.contains_key(span) {
                is_new |= reasons.spans.insert(*span, Arc::clone(error)).is_none();
            }
        }
        is_new
    }

    /// What is not about a span failed.
    pub(crate) fn failed_locally(&self, error: &Arc<Error>) {
        self.lock().outage = Some(Arc::clone(error));
    }

    /// What has come cannot be kept in the local disk; `None`: it is.
    pub(super) fn not_kept(&self, error: Option<&Arc<Error>>) {
        self.lock().unkept = error.cloned();
    }

    /// The layer as a whole is wrong.
    pub(crate) fn failed_as_a_whole(&self, error: &Arc<Error>) {
        self.lock().whole = Some(Arc::clone(error));
    }

    /// All that readers want is here: whether the sources answer is of no concern to them.
    pub(crate) fn needs_no_source(&self) {
        self.lock().outage = None;
    }

    /// A span has come.
    pub(crate) fn fetched(&self, span: SpanId) {
        let mut reasons = self.lock();
        reasons.outage = None;
        reasons.spans.remove(&span);
    }

    /// The first reason, if there is one.
    pub(crate) fn degraded(&self) -> Option<String> {
        let reasons = self.lock();
        let lies = reasons.whole.iter().chain(reasons.spans.values());
        let now = reasons.outage.iter().chain(&reasons.unkept);
        let first = now.chain(lies).next()?;
        Some(first.report())
    }

    /// All reasons: what fails now, what is wrong with the whole, and then the spans in their order.
    pub(crate) fn reasons(&self) -> Vec<DegradedReason> {
        let reasons = self.lock();
        let now = reasons.outage.iter().chain(&reasons.unkept);
        let all = now.chain(&reasons.whole);
        let spans = reasons.spans.iter();
        all.map(|error| (None, error))
            .chain(spans.map(|(span, error)| (Some(span.get()), error)))
            .map(|(span, error)| DegradedReason {
                span,
                message: error.report(),
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, DegradedReasons> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: Kind, text: &str) -> Arc<Error> {
        Arc::new(Error::new(kind, text))
    }

    #[test]
    fn an_outage_ends_with_any_span() {
        let health = DiskHealth::default();
        assert_eq!(health.degraded(), None);
        health.failed(&[SpanId(1)], &error(Kind::Unavailable, "away"));
        assert_eq!(health.degraded().as_deref(), Some("away"));
        health.fetched(SpanId(9));
        assert_eq!(health.degraded(), None);
    }

    #[test]
    fn a_wrong_span_stays_a_reason_until_it_is_right() {
        let health = DiskHealth::default();
        health.failed(&[SpanId(1)], &error(Kind::Corrupt, "wrong"));
        health.fetched(SpanId(2));
        assert_eq!(health.degraded().as_deref(), Some("wrong"));
        health.fetched(SpanId(1));
        assert_eq!(health.degraded(), None);
    }

    #[test]
    fn every_reason_is_told_with_its_span() {
        let health = DiskHealth::default();
        health.failed(
            &[SpanId(7), SpanId(3)],
            &error(Kind::Corrupt, "other bytes"),
        );
        health.failed(&[SpanId(9)], &error(Kind::Unavailable, "away"));
        let reasons = health.reasons();
        let told: Vec<_> = reasons
            .iter()
            .map(|reason| (reason.span, reason.message.as_str()))
            .collect();
        assert_eq!(
            told,
            [
                (None, "away"),
                (Some(3), "other bytes"),
                (Some(7), "other bytes")
            ]
        );
    }

    #[test]
    fn so_many_spans_have_a_reason_and_no_more() {
        let health = DiskHealth::default();
        let many = u32::try_from(MAX_SPANS).unwrap() * 2;
        for span in 0..many {
            health.failed(&[SpanId(span)], &error(Kind::Corrupt, "wrong"));
        }
        assert_eq!(health.reasons().len(), MAX_SPANS);
        // one that has a reason may get another
        health.failed(&[SpanId(3)], &error(Kind::Corrupt, "wrong again"));
        let reasons = health.reasons();
        assert_eq!(reasons.len(), MAX_SPANS);
        assert_eq!(reasons[3].message, "wrong again");
        // and where one has come right there is room for the next
        health.fetched(SpanId(0));
        health.failed(&[SpanId(many)], &error(Kind::Corrupt, "wrong"));
        let last = health.reasons().pop().unwrap();
        assert_eq!(last.span, Some(many));
    }

    #[test]
    fn a_layer_that_is_wrong_as_a_whole_stays_wrong() {
        let health = DiskHealth::default();
        health.failed_as_a_whole(&error(Kind::Corrupt, "another layer"));
        health.failed_locally(&error(Kind::Io, "full"));
        assert_eq!(health.degraded().as_deref(), Some("full"));
        assert_eq!(health.reasons().len(), 2);
        health.needs_no_source();
        health.fetched(SpanId(0));
        assert_eq!(health.degraded().as_deref(), Some("another layer"));
    }
}
