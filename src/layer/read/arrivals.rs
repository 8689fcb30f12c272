//! Cuts the bodies of responses into spans, as they arrive.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::SemaphorePermit;

use crate::{
    error::Error,
    layer::{
        ahead::on_the_way::OnTheWay,
        disk::Disk,
        sources::{
            places::LayerSource,
            race::{self, Race},
        },
    },
    units::SpanId,
};

/// The compressed bytes of a span.
pub(crate) struct Arrival {
    pub bytes: Bytes,
    /// Who has sent them: all of them, where there are any.
    pub place: Option<Arc<LayerSource>>,
}

/// The bytes of adjacent spans as they come. The spans overlap where one ends inside a byte.
pub(crate) struct Arrivals<'a> {
    disk: &'a Arc<Disk>,
    on_the_way: Option<&'a OnTheWay>,
    race: Race,
    /// Bytes of the blob from `start` on.
    bytes: BytesMut,
    start: u64,
    /// Who has sent the last of them.
    place: Option<Arc<LayerSource>>,
    /// Bytes asked for, and those of them that have come.
    asked: u64,
    came: u64,
    asked_at: Instant,
    /// When the first piece came, and its bytes.
    first: Option<(Instant, u64)>,
    _room: Option<SemaphorePermit<'a>>,
}

impl<'a> Arrivals<'a> {
    /// Waits for room in memory. The places are asked when the first span is.
    pub(crate) async fn new(
        disk: &'a Arc<Disk>,
        on_the_way: Option<&'a OnTheWay>,
        places: &[Arc<LayerSource>],
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
        let room = disk.services().memory(end - start).await;
        let blob = disk.layer().digest;
        race::try_again(disk.services(), places, blob, &(start..end));
        Self {
            disk,
            on_the_way,
            race: Race::new(places.iter().cloned(), blob, end),
            bytes: BytesMut::new(),
            start,
            place: None,
            asked: end - start,
            came: 0,
            asked_at: Instant::now(),
            first: None,
            _room: room,
        }
    }

    /// Takes note of a piece; once all have come, of how long they took.
    fn note(&mut self, length: u64) {
        let fetches = self.race.take_asked();
        self.disk.count_fetch(|counters| {
            counters.fetches += fetches;
            counters.fetched_bytes += length;
        });
        if let Some(on_the_way) = self.on_the_way {
            on_the_way.came(length);
        }
        let now = Instant::now();
        self.came += length;
        let (first, first_piece) = *self.first.get_or_insert((now, length));
        if self.came == self.asked {
            self.disk
                .ahead()
                .fill()
                .measured(|cost| cost.came(self.asked, first_piece, self.asked_at, first, now));
        }
    }

    /// The bytes of a span; each is asked for in its turn. May be dropped while it waits, and called again. `None`: no source has them,
    /// and [`Self::failures`] say why.
    pub(crate) async fn next(&mut self, span: u32) -> Option<Arrival> {
        let range = self.disk.layout().spans().compressed(SpanId(span));
        let (start, end) = (range.start.get(), range.end.get());
        while self.start + (self.bytes.len() as u64) < end {
            let piece = self.race.next(self.start).await?;
            self.note(piece.bytes.len() as u64);
            // another source begins the span anew: what one sends of a span is not mixed with what another does
            self.bytes.truncate((piece.start - self.start) as usize);
            if self.bytes.is_empty() {
                self.bytes.reserve((end - self.start) as usize); // at most MAX_SPAN_BYTES
            }
            self.bytes.extend_from_slice(&piece.bytes);
            self.place = Some(piece.place);
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
            place: self.place.clone(),
        })
    }

    /// What the sources have said that have failed.
    pub(super) fn failures(mut self) -> Vec<Error> {
        let fetches = self.race.take_asked();
        self.disk
            .count_fetch(|counters| counters.fetches += fetches);
        self.race.failures()
    }
}
