//! One layer's disk, open.

mod allocation;
mod damage;
mod durable;
mod open;
mod reads;
pub(crate) mod served;
mod status;
pub(crate) mod sync;

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{
    ahead::{fill_decision::Whole, queue::Upcoming, sequential::ReadAhead},
    build::import,
    locked::locked,
    read::{health::Health, in_flight::Flights, windows::Windows},
    repair::mend,
    services::Services,
    sources::places::Sources,
    stored::{
        folder::{self, Folder},
        present_spans::Bitmap,
        seal::{self, Damage},
        span_record::SpanCheck,
        span_table::{Spans, StoredSpan},
        state::State,
        stored_file::{Identity, StoredFile},
        uncached_file::UncachedFile,
    },
    types::{Counters, DiskKey, LayerBlob, Progress, StackingFacts},
    verify::{headers::Headers, lies::Refutation, progress::Proof, revoked::Disowned},
};
use crate::{
    error::Result,
    ext4::{self, DataRegion, RegionTable},
    oci::Digest,
    tar::Entry,
    units::{DiskOffset, LayerOffset, SpanId},
};

/// One layer's disk, open.
pub struct Disk {
    me: Weak<Disk>,
    services: Arc<Services>,
    folder: Folder,
    path: PathBuf,
    layer: LayerBlob,
    table: Digest,
    state: Mutex<State>,
    /// What stacking has to know, until it is asked for.
    facts: Mutex<Option<StackingFacts>>,
    /// `disk.ext4`.
    file: UncachedFile,
    regions: RegionTable,
    spans: Spans,
    ztoc: Option<StoredFile>,
    /// Of a gzip layer whose table is that of a compact index.
    windows: Option<Windows>,
    headers: Option<Headers>,
    proof: Proof,
    /// Spans that are not what the table says, as others have shown.
    disowned: Disowned,
    bitmap: Bitmap,
    flights: Arc<Flights>,
    sources: Sources,
    readahead: ReadAhead,
    upcoming: Upcoming,
    whole: Whole,
    health: Health,
    counters: Mutex<Counters>,
    /// Spans that are in memory only, as far as is known.
    unsynced: Mutex<Vec<(SpanId, SpanCheck)>>,
    /// The stored table itself is damaged: it has to come again.
    lacks_table: AtomicBool,
    /// Held while it is brought.
    bringing_table: tokio::sync::Mutex<()>,
    /// What was mended when it was opened.
    mended: Mutex<Vec<String>>,
    io_timeout_ms: AtomicU64,
}

impl Disk {
    /// The layer.
    pub fn layer(&self) -> &LayerBlob {
        &self.layer
    }

    /// The digest of the table that it was laid out from.
    pub fn table(&self) -> &Digest {
        &self.table
    }

    /// Tells it from all disks that are open at the same time, also from one with the same layer and table: its folder may have been
    /// removed while it was in use, and made anew.
    pub fn key(&self) -> DiskKey {
        std::ptr::from_ref(self).addr()
    }

    /// Whether its folder is still where it was opened.
    pub(super) fn has_its_folder(&self) -> bool {
        let there = fs::symlink_metadata(&self.path);
        let open = self.file.get().metadata();
        there.is_ok_and(|there| open.is_ok_and(|open| Identity::of(&there) == Identity::of(&open)))
    }

    /// Bytes of the ext4 image.
    pub fn size(&self) -> u64 {
        self.regions.size()
    }

    /// The part that has metadata and no file's data, but for the zeros at the end.
    pub fn metadata(&self) -> Range<DiskOffset> {
        let end = self.size().saturating_sub(ext4::TAIL_BYTES);
        let start = self.regions.data_end().get();
        let start = start.next_multiple_of(ext4::BLOCK_SIZE).min(end);
        DiskOffset(start)..DiskOffset(end)
    }

    /// `disk.ext4`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `disk.ext4`, open for reading and writing.
    pub fn file(&self) -> &File {
        self.file.get()
    }

    /// Whether every span is present and the layer has been checked as a whole: then it is an ordinary ext4 image, and no fetch or lie
    /// can show up any more.
    pub fn is_complete(&self) -> bool {
        self.is_full() && self.is_verified()
    }

    /// Whether every span is present.
    pub fn is_full(&self) -> bool {
        self.bitmap.is_full()
    }

    /// How far the disk is, now and when that changes.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.whole.progress()
    }

    /// Whether the layer, as the table lays it out, has been checked in full against its digest or diff ID: the disk may then serve any
    /// image that has the layer.
    pub fn is_verified(&self) -> bool {
        self.proof.is_verified()
    }

    /// Why the check of a disk with every span present came to no end, if so. The next attach tries again.
    pub fn check_error(&self) -> Option<String> {
        self.proof.check_error()
    }

    /// Spans present, and spans in all. A disk that was streamed has none.
    pub fn span_counts(&self) -> (u32, u32) {
        (self.bitmap.present(), self.bitmap.count())
    }

    /// The layer's bytes that a span has, on average.
    pub fn mean_span_bytes(&self) -> u64 {
        self.spans.uncompressed_size() / u64::from(self.spans.count()).max(1)
    }

    /// Counters since the disk was opened.
    pub fn counters(&self) -> Counters {
        *locked(&self.counters)
    }

    /// What stacking has to know.
    pub fn stacking(&self) -> Result<StackingFacts> {
        // asked once in an attach: they are not kept longer than until then
        locked(&self.facts)
            .take()
            .map_or_else(|| self.folder.stacking(), Ok)
    }

    /// How long [`Self::make_present`] goes on trying when the sources do not answer; `None`: for ever.
    pub fn set_io_timeout(&self, timeout: Option<Duration>) {
        let millis = timeout.map_or(u128::MAX, |timeout| timeout.as_millis());
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        self.io_timeout_ms.store(millis, Ordering::Relaxed);
    }
}

impl Disk {
    /// What it shares with the other disks below its root.
    pub(super) fn services(&self) -> &Arc<Services> {
        &self.services
    }

    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }

    pub(super) fn spans(&self) -> &Spans {
        &self.spans
    }

    pub(super) fn regions(&self) -> &RegionTable {
        &self.regions
    }

    pub(super) fn bitmap(&self) -> &Bitmap {
        &self.bitmap
    }

    pub(super) fn flights(&self) -> &Arc<Flights> {
        &self.flights
    }

    pub(super) fn readahead(&self) -> &ReadAhead {
        &self.readahead
    }

    pub(super) fn upcoming(&self) -> &Upcoming {
        &self.upcoming
    }

    /// What [`Self::set_io_timeout`] has set.
    pub(super) fn io_timeout(&self) -> Option<Duration> {
        match self.io_timeout_ms.load(Ordering::Relaxed) {
            u64::MAX => None,
            millis => Some(Duration::from_millis(millis)),
        }
    }

    pub(super) fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Whether it is fetched as a whole.
    pub(super) fn whole(&self) -> &Whole {
        &self.whole
    }

    /// Whether a span is present.
    pub(super) fn has(&self, span: SpanId) -> bool {
        self.bitmap.get(span)
    }

    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    pub(super) fn count_fetch(&self, count: impl FnOnce(&mut Counters)) {
        count(&mut locked(&self.counters));
    }

    /// A span's window, from the zTOC.
    pub(super) fn window(&self, stored: &StoredSpan) -> io::Result<Option<Vec<u8>>> {
        match &self.ztoc {
            Some(ztoc) => read_window(ztoc, stored),
            None => Ok(None),
        }
    }

    /// What the table says of the layer's entries; a disk that was streamed needs none.
    pub(super) fn headers(&self) -> Option<&Headers> {
        self.headers.as_ref()
    }

    /// What stands before the spans, where their table does not have it: a zTOC does, and a plain tar's spans need none.
    pub(super) fn windows(&self) -> Option<&Windows> {
        self.windows.as_ref()
    }

    /// The table's entries, from the local files. Reads and parses all of it.
    pub(super) fn read_entries(&self) -> Result<Vec<Entry>> {
        let state = self.lock_state().clone();
        let table = mend::read_table(&self.folder, &state)?;
        let (entries, _) = import::parse(&table, state.compact.is_some())?;
        Ok(entries)
    }

    /// A span's data is in the file: readers see it from now on. They do not when the span was refuted meanwhile.
    pub(super) fn set_present(
        self: &Arc<Self>,
        span: SpanId,
        check: SpanCheck,
    ) -> Result<(), Refutation> {
        let appear = || {
            // first: who sees the span finds the disk well
            self.health.fetched(span);
            self.bitmap.set(span);
        };
        {
            // held over both: who finds the span present and takes these has it among them
            let mut unsynced = locked(&self.unsynced);
            if !self.disowned.unless(span, appear) {
                return Err(self.refutation(span).unwrap_or(Refutation::Window)); // there is one
            }
            self.proof.came(span);
            unsynced.push((span, check));
            if unsynced.len() == 1 {
                self.services.sync_later(self.later());
            }
        }
        if self.bitmap.is_full() {
            self.whole.filled();
            if self.is_verified() {
                // it was, and what it had lost since has come again
                self.whole.completed();
            }
        }
        self.check_when_due();
        Ok(())
    }

    /// Spans are wrong, also where they were present. Readers do not see them any more, now or later.
    pub(super) fn take_back(&self, spans: Range<u32>) -> io::Result<()> {
        let spans: Vec<SpanId> = spans.map(SpanId).collect();
        let remembered = self.disowned.insert(&spans);
        self.drop_held(&spans);
        self.whole.lost();
        self.bitmap.disown(&spans).and(remembered)
    }

    /// Spans that are not what the table says, as others have shown.
    pub(super) fn disowned(&self) -> &Disowned {
        &self.disowned
    }

    /// What is known of the table's truth.
    pub(super) fn proof(&self) -> &Proof {
        &self.proof
    }

    pub(super) fn spans_of(
        &self,
        layer: &Range<LayerOffset>,
    ) -> impl Iterator<Item = SpanId> + use<> {
        self.spans.covering(layer.clone()).map(SpanId)
    }

    pub(super) fn lock_state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

/// A span's window, where its zTOC has one. An error that is [`Damage`]: the window does not have its check.
fn read_window(ztoc: &StoredFile, stored: &StoredSpan) -> io::Result<Option<Vec<u8>>> {
    let Some(range) = &stored.span.window else {
        return Ok(None);
    };
    // its length was 32 KiB when the table was written
    let mut window = vec![0; range.len().min(crate::gzip::WINDOW_SIZE)];
    ztoc.get()?
        .read_exact_at(&mut window, range.start as u64)
        .map_err(|error| match Damage::found(folder::ZTOC, &error) {
            Some(damage) => damage.into(),
            None => error,
        })?;
    match seal::crc32(&window) == stored.window_crc {
        true => Ok(Some(window)),
        false => Err(Damage::check(folder::ZTOC).into()),
    }
}

/// The two ends of a run of regions, which may be one.
pub(crate) fn first_and_last(
    mut regions: impl Iterator<Item = DataRegion>,
) -> Option<(DataRegion, DataRegion)> {
    let first = regions.next()?;
    let last = regions.last().unwrap_or_else(|| first.clone());
    Some((first, last))
}
