//! One layer's disk, open. It puts the parts together that have a module of their own; each method here needs several of them, or is public.

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
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use tokio::sync::watch;

use super::{
    ahead::ahead_of_readers::Ahead,
    build::import,
    locked::locked,
    read::{health::DiskHealth, reader::SpanReader},
    repair::{mend, table_repair::TableRepair},
    services::Services,
    sources::layer_sources::LayerSources,
    stored::{
        directory::DiskDirectory, disk_layout::DiskLayout, disk_record::DiskRecord,
        span_record::SpanCheck, stored_file::FileIdentity,
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
    /// What is fetched before it is read.
    ahead: Ahead,
    /// The comparison of the table with the layer.
    verification: Verification,
    /// Damage of the stored table.
    table_repair: TableRepair,
    /// Where spans are fetched from.
    sources: LayerSources,
    health: DiskHealth,
    counters: Mutex<DiskCounters>,
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

    /// Identifies the disk among all that are open at the same time, also among those with the same layer and table: the directory of one
    /// may have been removed while it was in use, and made anew.
    pub fn key(&self) -> DiskKey {
        self.reader.key()
    }

    /// Whether the directory is still where it was when the disk was opened.
    pub(super) fn has_its_directory(&self) -> bool {
        let there = fs::symlink_metadata(self.path());
        let open = self.file().metadata();
        there.is_ok_and(|there| {
            open.is_ok_and(|open| FileIdentity::of(&there) == FileIdentity::of(&open))
        })
    }

    /// Bytes of the ext4 image.
    pub fn size(&self) -> u64 {
        self.layout().size()
    }

    /// The part of the ext4 image that has metadata and no file data, without the zeros at the end.
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
        self.record.stacking()
    }
}

/// Progress.
impl Disk {
    /// Whether every span is present and the whole layer was verified: then the disk is an ordinary ext4 image, and no fetch or
    /// contradiction can show up any more.
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

    /// Whether the layer, as the table lays it out, was compared in full with its digest or diff ID: then the disk may serve any image that
    /// has the layer.
    pub fn is_verified(&self) -> bool {
        self.verification.layer_check().is_verified()
    }

    /// Why the last verification of the whole layer could not be finished, if so. The next attach tries again.
    pub fn check_error(&self) -> Option<String> {
        self.verification.layer_check().check_error()
    }

    /// The number of present spans, and of all spans. The disk of a streamed layer has no spans.
    pub fn span_counts(&self) -> (u32, u32) {
        let bitmap = self.reader.presence().bitmap();
        (bitmap.present(), bitmap.count())
    }

    /// Counters since the disk was opened.
    pub fn counters(&self) -> DiskCounters {
        *locked(&self.counters)
    }

    /// How long [`Self::make_present`] goes on trying when the sources do not answer; `None`: without a limit.
    pub fn set_io_timeout(&self, timeout: Option<Duration>) {
        self.reader.set_io_timeout(timeout);
    }
}

/// The parts.
impl Disk {
    /// What all disks below a root share.
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

    pub(super) fn count_fetch(&self, count: impl FnOnce(&mut DiskCounters)) {
        count(&mut locked(&self.counters));
    }
}

/// Changes that concern several parts.
impl Disk {
    /// The table's entries, from the local files. Reads and parses all of the table.
    pub(super) fn read_entries(&self) -> Result<Vec<Entry>> {
        let state = self.record.lock_state().clone();
        let table = mend::read_table(self.directory(), &state)?;
        let (entries, _) = import::parse(&table, state.compact.is_some())?;
        Ok(entries)
    }

    /// Makes a span present whose data was written to the file: readers see it from now on. They do not if the span was revoked meanwhile.
    pub(super) fn set_present(
        self: &Arc<Self>,
        span: SpanId,
        check: SpanCheck,
    ) -> Result<(), Refutation> {
        let appear = || {
            // first: a reader that sees the span finds the disk healthy
            self.health.fetched(span);
            self.reader.presence().bitmap().set(span);
        };
        let is_allowed = || {
            let is_allowed = self.verification.revoked().unless(span, appear);
            if is_allowed {
                self.verification.layer_check().came(span);
            }
            is_allowed
        };
        let Some(is_first) = self.reader.presence().add(span, check, is_allowed) else {
            return Err(self.refutation(span).unwrap_or(Refutation::Window)); // there is one
        };
        if is_first {
            self.services.sync_later(self.later());
        }
        if self.is_full() {
            self.ahead.fill().filled();
            if self.is_verified() {
                // it was, and what it had lost since has come again
                self.ahead.fill().completed();
            }
        }
        self.check_when_due();
        Ok(())
    }

    /// Revokes spans, also those that were present: readers do not see them any more, now or later.
    pub(super) fn take_back(&self, spans: Range<u32>) -> std::io::Result<()> {
        let spans: Vec<SpanId> = spans.map(SpanId).collect();
        let remembered = self.verification.revoked().insert(&spans);
        self.reader.drop_held(&spans);
        self.ahead.fill().lost();
        self.reader
            .presence()
            .bitmap()
            .revoke(&spans)
            .and(remembered)
    }

    /// The evidence that a span is not what the table says, if it was revoked.
    pub(super) fn refutation(&self, span: SpanId) -> Option<Refutation> {
        self.verification.refutation(span, || self.record.refuted())
    }
}
