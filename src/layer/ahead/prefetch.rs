//! Spans that a start will want, fetched in their order before anybody asks for them.
//!
//! Several GETs are on their way at a time, and readers go before them (see [`super::background`]): a prefetch never takes the link from
//! a reader, and a reader that needs a span which is on its way waits for just that fetch.

use std::{ops::Range, sync::Arc};

use tokio::task::JoinSet;

use super::{fill, fill_decision::FETCH_BYTES};
use crate::{
    layer::{
        disk::Disk,
        read::{fetch, in_flight},
        store::Store,
    },
    units::SpanId,
};

/// Spans that are wanted within so many compressed bytes of each other are wanted at once: their order does not count, and those of them
/// that are adjacent are fetched in one GET. A sixth of a second at 100 Mbit/s.
const AT_ONCE: u64 = 2 << 20;

/// Adjacent spans of a disk.
#[derive(Clone)]
pub struct ListedSpans {
    /// The disk.
    pub disk: Arc<Disk>,
    /// The spans. Those past the disk's last do not count.
    pub spans: Range<SpanId>,
}

impl Store {
    /// Fetches spans in the background, the first ones first. What cannot be had is left: whoever needs it asks again. A disk that
    /// nobody else has any more is passed over.
    pub fn prefetch(self: &Arc<Self>, list: Vec<ListedSpans>) {
        self.services().enter();
        let list: Vec<_> = gathered(list)
            .into_iter()
            .map(|listed| (Arc::downgrade(&listed.disk), listed.spans))
            .collect();
        self.services().spawn(async move {
            let mut fetches = JoinSet::new();
            for (disk, spans) in list {
                let mut rest = spans.start.get()..spans.end.get();
                while !rest.is_empty() {
                    let Some((disk, turn)) = fill::background_turn(&disk).await else {
                        break;
                    };
                    let Some(run) = disk.reader().next_absent(rest.clone(), FETCH_BYTES) else {
                        break;
                    };
                    rest.start = run.end;
                    fetches.spawn(async move {
                        let deadline = in_flight::deadline(Some(fill::TIMEOUT));
                        for claim in disk.reader().claim_ahead(run, FETCH_BYTES, deadline) {
                            fetch::fetch(Arc::clone(&disk), claim, None).await;
                        }
                        drop(turn);
                    });
                    while fetches.try_join_next().is_some() {}
                }
            }
            while fetches.join_next().await.is_some() {}
        });
    }
}

/// The spans that there are, adjacent ones together, where their order allows it.
fn gathered(list: Vec<ListedSpans>) -> Vec<ListedSpans> {
    let mut all = Vec::new();
    let (mut near, mut bytes) = (Vec::new(), 0_u64);
    for mut listed in list {
        let count = SpanId(listed.disk.layout().spans().count());
        listed.spans.end = listed.spans.end.min(count);
        if listed.spans.is_empty() {
            continue;
        }
        let size = listed
            .disk
            .layout()
            .compressed_length(&(listed.spans.start.get()..listed.spans.end.get()));
        bytes = bytes.saturating_add(size);
        if bytes > AT_ONCE {
            all.append(&mut joined(std::mem::take(&mut near)));
            bytes = size;
        }
        near.push(listed);
    }
    all.append(&mut joined(near));
    all
}

/// Joins runs that are adjacent; each stands where the first of its runs stood.
fn joined(runs: Vec<ListedSpans>) -> Vec<ListedSpans> {
    let key = |listed: &ListedSpans| (Arc::as_ptr(&listed.disk).addr(), listed.spans.start);
    let mut runs: Vec<(usize, ListedSpans)> = runs.into_iter().enumerate().collect();
    runs.sort_by_key(|(_, listed)| key(listed));
    runs.dedup_by(|(next_place, next), (place, listed)| {
        let adjacent =
            Arc::ptr_eq(&listed.disk, &next.disk) && listed.spans.end == next.spans.start;
        if adjacent {
            listed.spans.end = next.spans.end;
            *place = (*place).min(*next_place);
        }
        adjacent
    });
    runs.sort_by_key(|(place, _)| *place);
    runs.into_iter().map(|(_, listed)| listed).collect()
}
