//! The present spans of an open disk, and which of them may be in the page cache only.
//!
//! When a sync fails, the kernel reports that once and may drop the data that it could not write. So all data that was written before counts
//! as lost: that of spans that are not synced, and that of spans that are being written and are not present yet. A write has the
//! [`Generation`] in which it began, and each failed sync begins another one.

use std::{collections::BTreeSet, io, sync::Mutex};

use super::{present_spans::Bitmap, span_record::SpanCheck};
use crate::{layer::locked::locked, units::SpanId};

/// The present spans of one disk.
pub(crate) struct Presence {
    bitmap: Bitmap,
    unsynced: Mutex<Unsynced>,
}

/// The number of syncs that have failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Generation(u64);

#[derive(Default)]
struct Unsynced {
    generation: Generation,
    /// Spans whose data and record may be in the page cache only.
    spans: Vec<(SpanId, SpanCheck)>,
    /// A sync will take them.
    is_queued: bool,
}

/// The result of [`Presence::add`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// The span is present. `is_first`: the caller has to queue a sync.
    Present { is_first: bool },
    /// The span was revoked.
    Revoked,
    /// A sync has failed since the write began.
    Lost,
}

impl Presence {
    pub(crate) fn new(bitmap: Bitmap) -> Self {
        Self {
            bitmap,
            unsynced: Mutex::default(),
        }
    }

    /// One bit per span.
    pub(crate) fn bitmap(&self) -> &Bitmap {
        &self.bitmap
    }

    /// The generation of a write that begins now.
    pub(crate) fn generation(&self) -> Generation {
        locked(&self.unsynced).generation
    }

    /// Adds a span whose data was written to the file, in a write that began in `generation`, if `make_readable` returns true.
    pub(crate) fn add(
        &self,
        span: SpanId,
        check: SpanCheck,
        generation: Generation,
        make_readable: impl FnOnce() -> bool,
    ) -> Added {
        // locked over all: a sync that sees that the span is present also finds it here
        let mut unsynced = locked(&self.unsynced);
        if generation != unsynced.generation {
            return Added::Lost;
        }
        if !make_readable() {
            return Added::Revoked;
        }
        unsynced.spans.push((span, check));
        let is_first = !std::mem::replace(&mut unsynced.is_queued, true);
        Added::Present { is_first }
    }

    /// Takes the spans that have to be synced.
    pub(crate) fn take_unsynced(&self) -> Vec<(SpanId, SpanCheck)> {
        let mut unsynced = locked(&self.unsynced);
        unsynced.is_queued = false;
        std::mem::take(&mut unsynced.spans)
    }

    /// Makes spans absent that may be written again, in memory and in the file. A sync that has not begun yet must not find them as written
    /// before: it would record them as present when they are written again while it syncs the data.
    pub(crate) fn revoke(&self, spans: &[SpanId]) -> io::Result<()> {
        // while they are present nobody writes them
        let revoked: BTreeSet<_> = spans.iter().collect();
        let mut unsynced = locked(&self.unsynced);
        unsynced.spans.retain(|(span, _)| !revoked.contains(span));
        drop(unsynced);
        self.bitmap.revoke(spans)
    }

    /// Puts spans back whose data is synced, but not their records.
    pub(crate) fn put_back(&self, mut spans: Vec<(SpanId, SpanCheck)>) {
        let mut unsynced = locked(&self.unsynced);
        // in this order: a span that was written again meanwhile has another record
        spans.append(&mut unsynced.spans);
        unsynced.spans = spans;
    }

    /// The sync of `spans` has failed. Makes them absent, and all that were added meanwhile.
    pub(crate) fn sync_failed(&self, mut spans: Vec<(SpanId, SpanCheck)>) {
        let mut unsynced = locked(&self.unsynced);
        unsynced.generation.0 += 1;
        spans.append(&mut unsynced.spans);
        let spans: Vec<_> = spans.into_iter().map(|(span, _)| span).collect();
        // in memory they are absent even if their records cannot be written
        let _ = self.bitmap.revoke(&spans);
    }

    /// Whether every present span has been synced.
    pub(crate) fn is_synced(&self) -> bool {
        locked(&self.unsynced).spans.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::stored::{span_record::SpanRecord, stored_file::StoredFile};

    const CHECK: SpanCheck = SpanCheck {
        data: 1,
        rest: 2,
        has_last: false,
    };

    fn presence() -> Presence {
        let (file, _) = StoredFile::of_test(&[]);
        Presence::new(Bitmap::open(file, 4, SpanRecord::Absent).unwrap().0)
    }

    fn add(presence: &Presence, span: u32, generation: Generation) -> Added {
        presence.add(SpanId(span), CHECK, generation, || {
            presence.bitmap().set(SpanId(span));
            true
        })
    }

    #[test]
    fn one_sync_is_queued_for_all_spans_until_it_takes_them() {
        let presence = presence();
        let now = presence.generation();
        assert_eq!(add(&presence, 0, now), Added::Present { is_first: true });
        assert_eq!(add(&presence, 1, now), Added::Present { is_first: false });
        assert!(!presence.is_synced());
        let taken = presence.take_unsynced();
        assert_eq!(taken.len(), 2);
        assert!(presence.is_synced());
        // spans that were put back are not a reason to sync soon, a new one is
        presence.put_back(taken);
        assert!(!presence.is_synced());
        assert_eq!(add(&presence, 2, now), Added::Present { is_first: true });
        let taken = presence.take_unsynced();
        let order: Vec<_> = taken.iter().map(|(span, _)| span.get()).collect();
        assert_eq!(order, [0, 1, 2]);
        let refused = presence.add(SpanId(3), CHECK, now, || false);
        assert_eq!(refused, Added::Revoked);
        assert!(presence.is_synced());
    }

    #[test]
    fn a_span_that_is_revoked_before_its_sync_is_synced_only_if_it_is_written_again() {
        let presence = presence();
        let now = presence.generation();
        add(&presence, 0, now);
        add(&presence, 1, now);
        presence.revoke(&[SpanId(0)]).unwrap();
        // its sync has begun; its data is written again after that
        let taken = presence.take_unsynced();
        add(&presence, 0, now);
        assert_eq!(taken, [(SpanId(1), CHECK)]);
        assert_eq!(presence.take_unsynced(), [(SpanId(0), CHECK)]);
    }

    #[test]
    fn a_failed_sync_loses_all_that_was_written_before() {
        let presence = presence();
        let before = presence.generation();
        add(&presence, 0, before);
        let taken = presence.take_unsynced();
        // added during the sync; and a write that began before it
        add(&presence, 1, before);
        presence.sync_failed(taken);
        assert_eq!(add(&presence, 2, before), Added::Lost);
        assert!(presence.is_synced());
        assert_eq!(presence.bitmap().present(), 0);
        let now = presence.generation();
        // the sync that was queued for span 1 takes it
        assert_eq!(add(&presence, 2, now), Added::Present { is_first: false });
        assert_eq!(presence.bitmap().present(), 1);
    }
}
