//! The fetches of one disk ahead of its readers: for sequential readers, and for the rest of the layer.

use std::ops::Range;

use super::{
    fill_decision::Fill,
    queue::FetchQueue,
    sequential::{self, SequentialReaders},
};
use crate::{
    layer::{read::reader::SpanReader, stored::disk_layout::DiskLayout},
    units::{DiskOffset, SpanId},
};

/// Maximum length of a GET that no reader waits for, in compressed bytes, unless a single span is longer. It is shorter than a GET that a
/// reader waits for, so that several run at the same time.
pub(crate) const MAX_AHEAD_BYTES: u64 = 2 << 20;

/// The fetches ahead of readers of one disk.
pub(crate) struct Ahead {
    readers: SequentialReaders,
    queue: FetchQueue,
    fill: Fill,
}

impl Ahead {
    pub(crate) fn new(fill: Fill) -> Self {
        Self {
            readers: SequentialReaders::default(),
            queue: FetchQueue::default(),
            fill,
        }
    }

    /// The decision to fetch the rest of the layer, and the progress of the disk.
    pub(crate) fn fill(&self) -> &Fill {
        &self.fill
    }

    /// The queue of spans to fetch for sequential readers.
    pub(crate) fn queue(&self) -> &FetchQueue {
        &self.queue
    }

    /// Whether an access to this range has reached spans that were fetched ahead. Then [`Self::access`] must be called.
    pub(crate) fn is_reached(&self, range: &Range<DiskOffset>) -> bool {
        self.readers.reaches(range)
    }

    /// Records an access to a range of the disk, and queues the spans that its reader will probably need next. `fetched` is the end of the
    /// fetch that the access has started.
    pub(crate) fn access(
        &self,
        reader: &SpanReader,
        range: &Range<DiskOffset>,
        fetched: Option<SpanId>,
    ) {
        let layout = reader.layout();
        let Some((layer, file)) = layout.layer_range(range) else {
            return;
        };
        let mut spans = layout.spans().covering(layer);
        spans.end = fetched.map_or(spans.end, |end| end.get().max(spans.end));
        let access = sequential::DiskAccess {
            spans,
            file: file.disk.start.get(),
            file_end: layout.spans().covering(file.layer).end,
        };
        let least = match reader.is_fine() {
            true => sequential::LEAST_PASSED,
            false => 0,
        };
        let length = |span| layout.compressed_span(span);
        let Some(ahead) = self
            .readers
            .access(&access, layout.spans().count(), least, length)
        else {
            return;
        };
        if let Some(disk) = layout.disk_range(&ahead.spans) {
            self.readers.mark(ahead.reader, &disk);
        }
        self.queue.push(ahead.spans);
    }

    /// The next queued spans for one GET, if the link has room for them.
    pub(crate) fn next_queued(&self, layout: &DiskLayout) -> Option<Range<u32>> {
        if self.queue.is_empty() {
            return None;
        }
        let enough = self.fill.in_flight_target().saturating_add(MAX_AHEAD_BYTES);
        let fits = |run: &Range<u32>| layout.compressed_length(run) <= MAX_AHEAD_BYTES;
        self.queue.next(enough, fits)
    }
}
