//! Fetches listed spans in their order before they are read.
//!
//! Several GETs are in flight at a time. Fetches that readers wait for have precedence (see [`super::background`]): a prefetch does not
//! take the link from a reader, and a reader of a span in flight waits for that fetch only.

use std::{ops::Range, sync::Arc, time::Duration};

use tokio::task::JoinSet;

use super::{background::GivesWay, fill, fill_decision::FETCH_BYTES};
use crate::{
    layer::{
        disk::Disk,
        read::{fetch, in_flight},
        store::Store,
    },
    units::SpanId,
};

/// Listed spans within this many compressed bytes of each other count as needed at the same time: their order does not matter, and adjacent
/// ones are fetched in one GET. It is a sixth of a second at 100 Mbit/s.
const NEAR_BYTES: u64 = 2 << 20;

/// Adjacent spans of a disk.
#[derive(Clone)]
pub struct ListedSpans {
    /// The disk.
    pub disk: Arc<Disk>,
    /// The spans. Numbers after the disk's last span are ignored.
    pub spans: Range<SpanId>,
}

impl Store {
    /// Fetches spans in the background, in their order. A span that cannot be fetched is skipped: it is fetched when it is read. A disk
    /// without another user is skipped.
    pub fn prefetch(self: &Arc<Self>, list: Vec<ListedSpans>) {
        self.fetch_listed(list, None);
    }

    /// Fetches all of a disk in the background, after readers and all other background fetches: for `patience` it gives way to them.
    pub fn fetch_after_others(self: &Arc<Self>, disk: &Arc<Disk>, patience: Duration) {
        let all = ListedSpans {
            disk: Arc::clone(disk),
            spans: SpanId(0)..SpanId(u32::MAX),
        };
        let gives_way = self.services().traffic().give_way(patience);
        self.fetch_listed(vec![all], Some(gives_way));
    }

    fn fetch_listed(self: &Arc<Self>, list: Vec<ListedSpans>, gives_way: Option<GivesWay>) {
        self.services().enter();
        let list: Vec<_> = joined_in_order(list)
            .into_iter()
            .map(|listed| (Arc::downgrade(&listed.disk), listed.spans))
            .collect();
        self.services().spawn(async move {
            let mut fetches = JoinSet::new();
            for (disk, spans) in list {
                let mut rest = spans.start.get()..spans.end.get();
                while !rest.is_empty() {
                    let Some((disk, permit)) = fill::background_permit(&disk, gives_way).await
                    else {
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
                        drop(permit);
                    });
                    while fetches.try_join_next().is_some() {}
                }
            }
            while fetches.join_next().await.is_some() {}
        });
    }
}

/// The existing spans of the list; adjacent ones are joined if their order allows it.
fn joined_in_order(list: Vec<ListedSpans>) -> Vec<ListedSpans> {
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
        if bytes > NEAR_BYTES {
            all.append(&mut joined(std::mem::take(&mut near)));
            bytes = size;
        }
        near.push(listed);
    }
    all.append(&mut joined(near));
    all
}

/// Joins adjacent runs; each joined run has the position of the first of its runs.
fn joined(runs: Vec<ListedSpans>) -> Vec<ListedSpans> {
    let key = |listed: &ListedSpans| (Arc::as_ptr(&listed.disk).addr(), listed.spans.start);
    let mut runs: Vec<(usize, ListedSpans)> = runs.into_iter().enumerate().collect();
    runs.sort_by_key(|(_, listed)| key(listed));
    runs.dedup_by(|(next_position, next), (position, listed)| {
        let adjacent =
            Arc::ptr_eq(&listed.disk, &next.disk) && listed.spans.end == next.spans.start;
        if adjacent {
            listed.spans.end = next.spans.end;
            *position = (*position).min(*next_position);
        }
        adjacent
    });
    runs.sort_by_key(|(position, _)| *position);
    runs.into_iter().map(|(_, listed)| listed).collect()
}
