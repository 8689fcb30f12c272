//! Makes spans durable: their data first, then their records, then the state of the directory.

use std::sync::{Arc, Weak};

use super::{Disk, sync::Synced};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{repair::metadata, stored::directory},
    units::SpanId,
};

impl Disk {
    /// Brings what is present to the disk, and then its bits. Blocks.
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
            // what the kernel could not write it may drop: these spans have to come again
            for (span, _) in &spans {
                presence.bitmap().clear(*span);
            }
            self.ahead.fill().lost();
            let error = Error::with_source(
                Kind::Io,
                format!("cannot write {} to its disk", self.path().display()),
                error,
            );
            self.health
                .failed_locally(&Arc::new(Error::new(error.kind(), error.report())));
            return Err(error);
        }
        if let Some(windows) = self.reader.compact_windows() {
            // before the bits: what a span has shown about its neighbours is there when the span is
            windows.sync().or_kind(Kind::Io, || {
                let path = self.directory().path().join(directory::WINDOWS);
                format!("cannot write {} to its disk", path.display())
            })?;
        }
        presence.bitmap().save(&spans).or_kind(Kind::Io, || {
            format!(
                "cannot write {}",
                self.directory().path().join(directory::SPANS).display()
            )
        })?;
        for (span, _) in &spans {
            self.drop_behind(*span);
        }
        let complete = self.is_full() && presence.is_synced();
        if state.unsynced_since_boot.is_some() {
            self.directory().sync().or_kind(Kind::Io, || {
                format!("cannot sync {}", self.directory().path().display())
            })?;
        }
        let mut next = state.clone();
        next.complete |= complete && next.verified;
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

    /// The layer has been checked as a whole, and all is as it should be.
    pub(in crate::layer) fn prove(&self) -> Result<()> {
        self.sync_records()?;
        self.record.change_state(|state| {
            state.verified = true;
            state.complete = self.is_full() && self.reader.presence().is_synced();
        })?;
        self.verification.layer_check().verified();
        self.ahead.fill().completed();
        self.directory().remove_rest()
    }

    /// Brings the spans' records to the disk: a complete disk has them all.
    fn sync_records(&self) -> Result<()> {
        self.reader
            .presence()
            .bitmap()
            .sync()
            .or_kind(Kind::Io, || {
                let path = self.directory().path().join(directory::SPANS);
                format!("cannot write {} to its disk", path.display())
            })
    }

    /// Drops a span's data from the page cache; it is on the disk.
    fn drop_behind(&self, span: SpanId) {
        let spans = span.get()..span.get() + 1; // there are fewer than u32::MAX
        if let Some(range) = self.layout().disk_range(&spans) {
            let start = range.start.get();
            self.reader.file().forget(start, range.end.get() - start);
        }
    }
}

impl Disk {
    /// For [`Services::sync_later`].
    pub(in crate::layer) fn later(self: &Arc<Self>) -> Weak<dyn Synced> {
        let disk: Weak<Self> = Arc::downgrade(self);
        disk
    }
}

impl Synced for Disk {
    fn sync_or_warn(&self) {
        if let Err(error) = self.sync() {
            tracing::warn!(layer = %self.layer().digest, "the layer's disk could not be synced: {}", error.report());
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
