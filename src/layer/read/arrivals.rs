//! Cuts the bodies of responses into spans, as the bytes arrive.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::{Bytes, BytesMut};

use crate::{
    error::Error,
    layer::{
        ahead::bytes_in_flight::BytesInFlight,
        disk::Disk,
        services::FetchMemory,
        sources::{
            layer_sources::LayerSource,
            race::{self, Race},
        },
    },
    metrics::METRICS,
    units::SpanId,
};

/// The compressed bytes of a span.
pub(crate) struct Arrival {
    pub bytes: Bytes,
    /// The source that has sent all of these bytes; `None`: the span is empty.
    pub source: Option<Arc<LayerSource>>,
}

/// The bytes of adjacent spans as they arrive. Two spans overlap by one byte if the first ends inside a byte.
pub(crate) struct Arrivals<'a> {
    disk: &'a Arc<Disk>,
    in_flight_bytes: Option<&'a BytesInFlight>,
    race: Race,
    /// Bytes of the blob from `start` on.
    bytes: BytesMut,
    start: u64,
    /// The source that has sent the last of them.
    source: Option<Arc<LayerSource>>,
    /// Compressed bytes requested, and how many of them have arrived.
    requested: u64,
    received: u64,
    requested_at: Instant,
    /// When the first piece arrived, and its length.
    first: Option<(Instant, u64)>,
    _room: FetchMemory<'a>,
}

impl<'a> Arrivals<'a> {
    /// Waits for room in memory. The sources are asked when the first span is needed.
    pub(crate) async fn new(
        disk: &'a Arc<Disk>,
        in_flight_bytes: Option<&'a BytesInFlight>,
        sources: &[Arc<LayerSource>],
        run: Range<u32>,
    ) -> Self {
        let start = disk
            .layout()
            .spans()
            .compressed(SpanId(run.start))
            .start
            .get();
        let end = disk
            .layout()
            .spans()
            .compressed(SpanId(run.end - 1))
            .end
            .get(); // a run is not empty
        let host = sources.first().map_or("", |first| first.host_name());
        let room = disk.services().memory(host, end - start).await;
        let blob = disk.layer().digest;
        race::retry_down(disk.services(), sources, blob, &(start..end));
        Self {
            disk,
            in_flight_bytes,
            race: Race::new(sources.iter().cloned(), blob, end),
            bytes: BytesMut::new(),
            start,
            source: None,
            requested: end - start,
            received: 0,
            requested_at: Instant::now(),
            first: None,
            _room: room,
        }
    }

    /// Counts a piece; after the last one, also the time that all of them took.
    fn count_piece(&mut self, length: u64) {
        let fetches = self.race.take_requests();
        self.disk.activity().fetched(fetches, length);
        if let Some(in_flight_bytes) = self.in_flight_bytes {
            in_flight_bytes.received(length);
        }
        let now = Instant::now();
        self.received += length;
        let (first, first_piece) = *self.first.get_or_insert_with(|| {
            METRICS.fetch_first_byte.observe(now - self.requested_at);
            (now, length)
        });
        if self.received == self.requested {
            METRICS.fetch.observe(now - self.requested_at);
            self.disk.ahead().fill().measured(|cost| {
                cost.received(self.requested, first_piece, self.requested_at, first, now)
            });
        }
    }

    /// The bytes of the next span; spans are asked for in their order. The future may be dropped while it waits, and the call be repeated.
    /// `None`: no source has the bytes, and [`Self::failures`] has the reasons.
    pub(crate) async fn next(&mut self, span: u32) -> Option<Arrival> {
        let range = self.disk.layout().spans().compressed(SpanId(span));
        let (start, end) = (range.start.get(), range.end.get());
        while self.start + (self.bytes.len() as u64) < end {
            let piece = self.race.next(self.start).await?;
            self.count_piece(piece.bytes.len() as u64);
            // another source starts at the span's first byte: bytes of two sources are not mixed in one span
            self.bytes.truncate((piece.start - self.start) as usize);
            if self.bytes.is_empty() {
                self.bytes.reserve((end - self.start) as usize); // at most MAX_SPAN_BYTES
            }
            self.bytes.extend_from_slice(&piece.bytes);
            self.source = Some(piece.source);
        }
        let whole = self.bytes.split().freeze();
        // inside `whole`: spans follow each other in the blob
        let part = whole.slice((start - self.start) as usize..(end - self.start) as usize);
        let next = match span + 1 {
            next if next < self.disk.layout().spans().count() => self
                .disk
                .layout()
                .spans()
                .compressed(SpanId(next))
                .start
                .get(),
            _ => end,
        };
        let next = next.clamp(start, self.start + whole.len() as u64);
        self.bytes
            .extend_from_slice(&whole[(next - self.start) as usize..]);
        self.start = next;
        Some(Arrival {
            bytes: part,
            source: self.source.clone(),
        })
    }

    /// The errors of the sources that have failed.
    pub(super) fn failures(mut self) -> Vec<Error> {
        let fetches = self.race.take_requests();
        self.disk.activity().fetched(fetches, 0);
        self.race.failures()
    }
}
