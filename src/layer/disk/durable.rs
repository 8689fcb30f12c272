//! Makes spans durable: first their data, then their records, then the state of the directory.

use std::sync::{Arc, Weak};

use super::{Disk, sync::Synced};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{repair::metadata, stored::directory},
    units::SpanId,
};

impl Disk {
    /// Syncs the data of present spans, and then writes their records. Blocks.
    pub fn sync(&self) -> Result<()> {
        let mut state = self.record.lock_state();
        let presence = self.reader.presence();
        let spans = presence.take_unsynced();
        let rest = self.verification.layer_check().rest();
        let synced = self
            .file()
            .sync_data()
            .and_then(|()| rest.map_or(Ok(()), |rest| rest.sync()));
        if let Err(error) = synced {
            // the kernel may drop data that it could not write: these spans are fetched again
            for (span, _) in &spans {
                presence.bitmap().clear(*span);
            }
            self.ahead.fill().lost();
            let error = Error::with_source(
                Kind::Io,
                format!("cannot sync {}", self.path().display()),
                error,
            );
            self.health
                .failed_locally(&Arc::new(Error::new(error.kind(), error.report())));
            return Err(error);
        }
        if let Some(windows) = self.reader.compact_windows() {
            // before the records: a record may be written only after the windows that its span has stored
            windows.sync().or_kind(Kind::Io, || {
                let path = self.directory().path().join(directory::WINDOWS);
                format!("cannot sync {}", path.display())
            })?;
        }
        presence.bitmap().save(&spans).or_kind(Kind::Io, || {
            format!(
                "cannot write {}",
                self.directory().path().join(directory::SPANS).display()
            )
        })?;
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
        self.record.replace_state(&mut state, next)
    }

    /// The layer has passed the check as a whole.
    pub(in crate::layer) fn complete_check(&self) -> Result<()> {
        self.sync_records()?;
        self.record.change_state(|state| {
            state.verified = true;
            state.complete = self.is_full() && self.reader.presence().is_synced();
        })?;
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
    fn sync_or_warn(&self) {
        if let Err(error) = self.sync() {
            tracing::warn!(layer = %self.layer().digest, "the layer's disk could not be synced; check the free space and the kernel log: {}", error.report());
        }
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
