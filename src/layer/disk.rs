//! One layer's disk, open: it connects its parts, which have modules of their own. Each method here needs several parts, or is public.

pub(in crate::layer) mod activity;
mod allocation;
mod damage;
mod durable;
pub(crate) mod evicted;
pub(in crate::layer) mod fetch_log;
pub(in crate::layer) mod files;
pub(in crate::layer) mod open;
mod reads;
pub(crate) mod served;
mod status;
pub(crate) mod sync;

use std::{
    fs::{self, File},
    ops::Range,
    path::Path,
    sync::{Arc, OnceLock, Weak},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use self::{
    activity::{DiskActivity, FirstRead},
    fetch_log::{Entries, FetchEntry, FetchLog, WaitEntry},
};
use super::{
    ahead::ahead_of_readers::Ahead,
    build::import,
    read::{health::DiskHealth, reader::SpanReader},
    repair::{from_table, table_repair::TableRepair},
    services::Services,
    sources::layer_sources::LayerSources,
    stored::{
        directory::DiskDirectory,
        disk_layout::DiskLayout,
        disk_record::DiskRecord,
        presence::{Added, Generation},
        seal::Damage,
        span_record::SpanCheck,
        stored_file::FileIdentity,
    },
    types::{DiskCounters, DiskKey, DiskProgress, LayerBlob, StackingFacts},
    verify::{contradictions::Refutation, verification::Verification},
};
use crate::{error::Result, oci::Digest, tar::Entry, units::DiskOffset, units::SpanId};

/// One layer's disk, open.
pub struct Disk {
    me: Weak<Disk>,
    services: Arc<Services>,
    /// Identity and state, and the directory.
    record: DiskRecord,
    /// The file and its spans.
    reader: SpanReader,
    /// Fetches ahead of readers.
    ahead: Ahead,
    /// The comparison of the table with the layer.
    verification: Verification,
    /// Damage of the stored table.
    table_repair: TableRepair,
    /// Where spans are fetched from.
    sources: LayerSources,
    health: DiskHealth,
    activity: DiskActivity,
    log: FetchLog,
    /// Bytes of the files of the directory whose sizes do not change; measured when the limits of the local disk need them.
    fixed_bytes: OnceLock<u64>,
}

/// Identity and size.
impl Disk {
    /// The layer.
    pub fn layer(&self) -> &LayerBlob {
        self.record.layer()
    }

    /// The digest of the table that the disk was laid out from.
    pub fn table(&self) -> &Digest {
        self.record.table()
    }

    /// Identifies the disk among all open disks, also among those with the same layer and table: a directory may have been removed while
    /// its disk was in use, and made again.
    pub fn key(&self) -> DiskKey {
        self.reader.key()
    }

    /// Whether the directory is the one that was opened, and was not removed or replaced.
    pub(super) fn has_its_directory(&self) -> bool {
        let in_place = fs::symlink_metadata(self.path());
        let open = self.file().metadata();
        in_place.is_ok_and(|in_place| {
            open.is_ok_and(|open| FileIdentity::of(&in_place) == FileIdentity::of(&open))
        })
    }

    /// Size of the ext4 image in bytes.
    pub fn size(&self) -> u64 {
        self.layout().size()
    }

    /// The range of the ext4 image with the metadata, without file data and without the zeros at the end.
    pub fn metadata(&self) -> Range<DiskOffset> {
        self.layout().metadata()
    }

    /// Mean length of a span, in bytes of the layer.
    pub fn mean_span_bytes(&self) -> u64 {
        self.layout().mean_span_bytes()
    }

    /// The path of `disk.ext4`.
    pub fn path(&self) -> &Path {
        self.record.disk_path()
    }

    /// `disk.ext4`, open for reading and writing.
    pub fn file(&self) -> &File {
        self.reader.file().get()
    }

    /// The paths of the layer that matter for stacking.
    pub fn stacking(&self) -> Result<StackingFacts> {
        match self.record.stacking() {
            Err(error) if Damage::is_in(&error) && self.repair() => self.record.stacking(),
            facts => facts,
        }
    }
}

/// Progress.
impl Disk {
    /// Whether every span is present and the whole layer was verified. Then the disk is an ordinary ext4 image: it needs no fetch, and no
    /// contradiction can be found any more.
    pub fn is_complete(&self) -> bool {
        self.is_full() && self.is_verified()
    }

    /// Whether every span is present.
    pub fn is_full(&self) -> bool {
        self.reader.is_full()
    }

    /// The progress of the disk, and its changes.
    pub fn progress(&self) -> watch::Receiver<DiskProgress> {
        self.ahead.fill().progress()
    }

    /// Whether the whole layer, as the table lays it out, was compared with its digest or diff ID. Then the disk may serve any image that
    /// has the layer.
    pub fn is_verified(&self) -> bool {
        self.verification.layer_check().is_verified()
    }

    /// Whether the table of the disk was shown to be false, or the image is false about the diff ID of the layer.
    pub fn is_table_false(&self) -> bool {
        self.record.refuted().is_some()
    }

    /// The error of the last check of the whole layer, if it could not be completed. The next attach repeats the check.
    pub fn check_error(&self) -> Option<String> {
        self.verification.layer_check().check_error()
    }

    /// The number of present spans, and of all spans. The disk of a streamed layer has no spans.
    pub fn span_counts(&self) -> (u32, u32) {
        let bitmap = self.reader.presence().bitmap();
        (bitmap.present(), bitmap.count())
    }

    /// Bytes of the blob whose spans are present. All of them if there are no spans, because the layer was streamed.
    pub fn present_blob_bytes(&self) -> u64 {
        let bitmap = self.reader.presence().bitmap();
        if bitmap.is_full() {
            return self.layer().size;
        }
        let present = (0..bitmap.count()).filter(|span| bitmap.get(SpanId(*span)));
        let lengths = present.map(|span| self.layout().compressed_span(span));
        lengths.sum::<u64>().min(self.layer().size)
    }

    /// Counters since the disk was opened.
    pub fn counters(&self) -> DiskCounters {
        self.activity.counters()
    }

    /// When the disk was opened, and its fetches and waits since then.
    pub fn fetch_log(&self) -> (Instant, Entries<FetchEntry>, Entries<WaitEntry>) {
        let (fetches, waits) = self.log.entries();
        (self.log.opened(), fetches, waits)
    }

    /// Counts the time until the first read of file data.
    pub fn await_first_read(&self, first_read: &Arc<FirstRead>) {
        self.activity.await_first_read(first_read);
    }

    /// Sets how long [`Self::make_present`] retries while the sources do not answer; `None`: without a limit.
    pub fn set_io_timeout(&self, timeout: Option<Duration>) {
        self.reader.set_io_timeout(timeout);
    }
}

/// The parts.
impl Disk {
    /// The services that all disks of a store share.
    pub(super) fn services(&self) -> &Arc<Services> {
        &self.services
    }

    pub(super) fn record(&self) -> &DiskRecord {
        &self.record
    }

    pub(super) fn directory(&self) -> &DiskDirectory {
        self.record.directory()
    }

    pub(super) fn reader(&self) -> &SpanReader {
        &self.reader
    }

    pub(super) fn layout(&self) -> &DiskLayout {
        self.reader.layout()
    }

    pub(super) fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    pub(super) fn verification(&self) -> &Verification {
        &self.verification
    }

    pub(super) fn table_repair(&self) -> &TableRepair {
        &self.table_repair
    }

    pub(super) fn sources(&self) -> &LayerSources {
        &self.sources
    }

    pub(super) fn health(&self) -> &DiskHealth {
        &self.health
    }

    /// The log of fetches and waits.
    pub(super) fn log(&self) -> &FetchLog {
        &self.log
    }

    /// What is read and fetched.
    pub(super) fn activity(&self) -> &DiskActivity {
        &self.activity
    }
}

/// Changes that concern several parts.
impl Disk {
    /// Reads the entries of the table from the local files. This parses the whole table.
    pub(super) fn read_entries(&self) -> Result<Vec<Entry>> {
        let state = self.record.lock_state().clone();
        let table = from_table::read_table(self.directory(), &state)?;
        let (entries, _) = import::parse(&table, state.compact.is_some())?;
        Ok(entries)
    }

    /// Makes a span present whose data was written to the file, in a write that began in `generation`: readers see it from now on. The result
    /// is false if a sync has failed since then. An error: the span was revoked meanwhile.
    pub(super) fn set_present(
        self: &Arc<Self>,
        span: SpanId,
        check: SpanCheck,
        generation: Generation,
    ) -> Result<bool, Refutation> {
        let make_readable = || {
            // first: a reader that sees the span finds the disk healthy
            self.health.fetched(span);
            self.reader.was_written(span);
            self.reader.presence().bitmap().set(span);
        };
        let is_allowed = || {
            let is_allowed = self.verification.revoked().unless(span, make_readable);
            if is_allowed {
                self.verification.layer_check().fetched(span);
            }
            is_allowed
        };
        let presence = self.reader.presence();
        match presence.add(span, check, generation, is_allowed) {
            Added::Present { is_first: true } => self.services.sync_later(self.as_synced()),
            Added::Present { is_first: false } => {}
            Added::Lost => return Ok(false),
            // a revoked span has a reason
            Added::Revoked => return Err(self.refutation(span).unwrap_or(Refutation::Window)),
        }
        if self.is_full() {
            // no span is evicted meanwhile
            let _holds = self.reader.uses().holds();
            if !self.is_full() {
                return Ok(true);
            }
            self.ahead.fill().filled();
            if self.is_verified() {
                // it was verified before, and its lost spans are present again
                self.ahead.fill().completed();
            }
        }
        self.check_when_due();
        Ok(true)
    }

    /// Revokes spans, also present ones: readers do not see them any more, also after a restart.
    pub(super) fn revoke(&self, spans: Range<u32>) -> std::io::Result<()> {
        let spans: Vec<SpanId> = spans.map(SpanId).collect();
        let stored = self.verification.revoked().insert(&spans);
        self.reader.drop_held(&spans);
        self.ahead.fill().lost();
        self.reader.presence().revoke(&spans).and(stored)
    }

    /// The evidence that a span contradicts the table, if it was revoked.
    pub(super) fn refutation(&self, span: SpanId) -> Option<Refutation> {
        self.verification.refutation(span, || self.record.refuted())
    }
}
