//! Makes spans durable: first their data, then their records, then the state of the directory.

use std::{
    io,
    sync::{Arc, Weak},
};

use super::{Disk, sync::Synced};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{
        repair::metadata,
        stored::{directory, span_record::SpanCheck},
    },
    units::SpanId,
};

impl Disk {
    /// Syncs the data of present spans, and then writes their records. Blocks. A caller need not repeat it if it fails: the thread of
    /// [`super::sync`] does.
    pub fn sync(&self) -> Result<()> {
        let mut state = self.record.lock_state();
        let presence = self.reader.presence();
        let spans = presence.take_unsynced();
        if let Err(error) = self.sync_data() {
            presence.sync_failed(spans);
            return Err(self.data_is_lost(error));
        }
        if let Err(error) = self.write_records(&spans) {
            presence.put_back(spans);
            return Err(error);
        }
        for (span, _) in &spans {
            self.drop_from_page_cache(*span);
        }
        let all_synced = self.is_full() && presence.is_synced();
        if state.unsynced_since_boot.is_some() {
            self.directory().sync().or_kind(Kind::Io, || {
                format!("cannot sync {}", self.directory().path().display())
            })?;
        }
        let mut next = state.clone();
        next.complete |= all_synced && next.verified;
        if next.complete && !state.complete {
            self.sync_records()?;
        }
        next.unsynced_since_boot = None;
        if next.metadata_crc32.is_none() {
            let crc = metadata::checksum(self.file(), self.layout().regions());
            next.metadata_crc32 = Some(crc.or_kind(Kind::Io, || {
                format!("cannot read {}", self.path().display())
            })?);
        }
        if self.reader.sync_fails() {
            if spans.is_empty() {
                // nothing was written that could show whether the local disk keeps it now
                self.directory().replace(directory::STATE, &next.encode())?;
            }
            self.reader.set_sync_fails(false);
            self.health.sync_fails(None);
        }
        self.record.replace_state(&mut state, next)
    }

    /// Syncs the data of the written spans.
    fn sync_data(&self) -> io::Result<()> {
        self.file().sync_data()?;
        let rest = self.verification.layer_check().rest();
        rest.map_or(Ok(()), |rest| rest.sync())
    }

    /// The data of spans could not be synced, and the kernel may have dropped it: they are absent. Until a sync succeeds, they are fetched again
    /// only for readers.
    fn data_is_lost(&self, error: io::Error) -> Error {
        self.ahead.fill().lost();
        self.reader.set_sync_fails(true);
        let context = format!("cannot sync {}", self.path().display());
        let error = Error::with_source(Kind::Io, context, error);
        let reason = Error::new(error.kind(), error.report());
        self.health.sync_fails(Some(reason));
        error
    }

    /// Writes the records of spans whose data is synced.
    fn write_records(&self, spans: &[(SpanId, SpanCheck)]) -> Result<()> {
        let at = |name| self.directory().path().join(name);
        if let Some(windows) = self.reader.compact_windows() {
            // before the records: a record may be written only after the windows that its span has stored
            let path = at(directory::WINDOWS);
            let cannot_sync = || format!("cannot sync {}", path.display());
            windows.sync().or_kind(Kind::Io, cannot_sync)?;
        }
        let path = at(directory::SPANS);
        let cannot_write = || format!("cannot write {}", path.display());
        let bitmap = self.reader.presence().bitmap();
        bitmap.save(spans).or_kind(Kind::Io, cannot_write)
    }

    /// The layer has passed the check as a whole.
    pub(in crate::layer) fn complete_check(&self) -> Result<()> {
        // locked over both: a sync of spans writes their records meanwhile
        let mut state = self.record.lock_state();
        self.sync_records()?;
        let mut next = state.clone();
        next.verified = true;
        next.complete = self.is_full() && self.reader.presence().is_synced();
        self.record.replace_state(&mut state, next)?;
        drop(state);
        self.verification.layer_check().verified();
        self.ahead.fill().completed();
        self.directory().remove_rest()
    }

    /// Syncs the records of the spans: those of a complete disk must all be there.
    fn sync_records(&self) -> Result<()> {
        self.reader
            .presence()
            .bitmap()
            .sync()
            .or_kind(Kind::Io, || {
                let path = self.directory().path().join(directory::SPANS);
                format!("cannot sync {}", path.display())
            })
    }

    /// Drops a synced span from the page cache.
    fn drop_from_page_cache(&self, span: SpanId) {
        let spans = span.get()..span.get() + 1; // there are less than u32::MAX spans
        if let Some(range) = self.layout().disk_range(&spans) {
            let start = range.start.get();
            self.reader.file().forget(start, range.end.get() - start);
        }
    }
}

impl Disk {
    /// A weak reference to the disk, for [`Services::sync_later`].
    pub(in crate::layer) fn as_synced(self: &Arc<Self>) -> Weak<dyn Synced> {
        let disk: Weak<Self> = Arc::downgrade(self);
        disk
    }
}

impl Synced for Disk {
    fn sync_or_warn(&self) -> bool {
        let synced = self.sync();
        if let Err(error) = &synced {
            tracing::warn!(layer = %self.layer().digest, "the layer's disk could not be synced; check the free space and the kernel log: {}", error.report());
        }
        synced.is_ok()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let is_synced = self.reader.presence().is_synced();
        if !is_synced || self.record.lock_state().unsynced_since_boot.is_some() {
            self.sync_or_warn();
        }
    }
}
