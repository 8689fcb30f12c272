//! Spans that a start will want, fetched in their order before anybody asks for them.
//!
//! Several GETs are on their way at a time, and readers go before them (see [`super::traffic`]): a prefetch never takes the link from
//! a reader, and a reader that needs a span which is on its way waits for just that fetch.

use std::{ops::Range, sync::Arc};

use tokio::task::JoinSet;

use super::{Disk, Store, fetch, flight, whole};
use crate::units::SpanId;

/// Adjacent spans of a disk.
#[derive(Clone)]
pub struct Listed {
    /// The disk.
    pub disk: Arc<Disk>,
    /// The spans. Those past the disk's last do not count.
    pub spans: Range<SpanId>,
}

impl Store {
    /// Fetches spans in the background, the first ones first. What cannot be had is left: whoever needs it asks again. A disk that
    /// nobody else has any more is passed over.
    pub fn prefetch(self: &Arc<Self>, list: Vec<Listed>) {
        self.enter();
        let list: Vec<_> = list
            .into_iter()
            .map(|listed| (Arc::downgrade(&listed.disk), listed.spans))
            .collect();
        let traffic = self.traffic().clone();
        self.spawn(async move {
            let mut fetches = JoinSet::new();
            for (disk, spans) in list {
                let mut rest = spans.start.get()..spans.end.get();
                while !rest.is_empty() {
                    let turn = traffic.turn().await;
                    let Some(disk) = disk.upgrade() else { break };
                    rest.end = rest.end.min(disk.spans().count());
                    let Some(run) = whole::next_run(&disk, rest.clone()) else {
                        break;
                    };
                    rest.start = run.end;
                    fetches.spawn(async move {
                        let deadline = flight::deadline(Some(whole::TIMEOUT));
                        for claim in disk.claim(run, whole::FETCH_BYTES, deadline) {
                            fetch::fetch(Arc::clone(&disk), claim).await;
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
