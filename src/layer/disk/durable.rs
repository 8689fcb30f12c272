//! Makes spans durable: their data first, then their records, then the state of the directory.

use std::sync::{Arc, Weak};

use super::{Disk, first_and_last, sync::Synced};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::{
        locked::locked,
        repair::metadata,
        stored::{folder, state::State},
    },
    units::SpanId,
};

impl Disk {
    /// Brings what is present to the disk, and then its bits. Blocks.
    pub fn sync(&self) -> Result<()> {
        let mut state = self.lock_state();
        let spans = std::mem::take(&mut *locked(&self.unsynced));
        let rest = self.proof.rest();
        let synced = self
            .file
            .get()
            .sync_data()
            .and_then(|()| rest.map_or(Ok(()), |rest| rest.sync()));
        if let Err(error) = synced {
            // what the kernel could not write it may drop: these spans have to come again
            for (span, _) in &spans {
                self.bitmap.clear(*span);
            }
            self.whole.lost();
            let error = Error::with_source(
                Kind::Io,
                format!("cannot write {} to its disk", self.path.display()),
                error,
            );
            self.health
                .failed_locally(&Arc::new(Error::new(error.kind(), error.report())));
            return Err(error);
        }
        if let Some(windows) = &self.windows {
            // before the bits: what a span has shown about its neighbours is there when the span is
            windows.sync().or_kind(Kind::Io, || {
                let path = self.folder.path().join(folder::WINDOWS);
                format!("cannot write {} to its disk", path.display())
            })?;
        }
        self.bitmap.save(&spans).or_kind(Kind::Io, || {
            format!(
                "cannot write {}",
                self.folder.path().join(folder::SPANS).display()
            )
        })?;
        for (span, _) in &spans {
            self.drop_behind(*span);
        }
        let complete = self.bitmap.is_full() && locked(&self.unsynced).is_empty();
        if state.unsynced_since_boot.is_some() {
            self.folder.sync().or_kind(Kind::Io, || {
                format!("cannot sync {}", self.folder.path().display())
            })?;
        }
        let mut next = state.clone();
        next.complete |= complete && next.verified;
        if next.complete && !state.complete {
            self.sync_records()?;
        }
        next.unsynced_since_boot = None;
        if next.metadata_crc32.is_none() {
            let crc = metadata::checksum(self.file.get(), &self.regions);
            next.metadata_crc32 =
                Some(crc.or_kind(Kind::Io, || format!("cannot read {}", self.path.display()))?);
        }
        if next != *state {
            self.folder.replace(folder::STATE, &next.encode())?;
            *state = next;
        }
        Ok(())
    }

    /// Changes the state, in memory and in the folder.
    pub(in crate::layer) fn change_state(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.lock_state();
        let mut next = state.clone();
        change(&mut next);
        if next != *state {
            self.folder.replace(folder::STATE, &next.encode())?;
            *state = next;
        }
        Ok(())
    }

    /// The layer has been checked as a whole, and all is as it should be.
    pub(in crate::layer) fn prove(&self) -> Result<()> {
        self.sync_records()?;
        self.change_state(|state| {
            state.verified = true;
            state.complete = self.bitmap.is_full() && locked(&self.unsynced).is_empty();
        })?;
        self.proof.verified();
        self.whole.completed();
        self.folder.remove_rest()
    }

    /// Brings the spans' records to the disk: a complete disk has them all.
    fn sync_records(&self) -> Result<()> {
        self.bitmap.sync().or_kind(Kind::Io, || {
            let path = self.folder.path().join(folder::SPANS);
            format!("cannot write {} to its disk", path.display())
        })
    }

    /// Drops a span's data from the page cache; it is on the disk.
    fn drop_behind(&self, span: SpanId) {
        let layer = self.spans.uncompressed(span);
        let regions = self.regions.in_layer(&layer);
        if let Some((first, last)) = first_and_last(regions) {
            let start = first.disk.start.get();
            self.file.forget(start, last.disk.end.get() - start);
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
            tracing::warn!(layer = %self.layer.digest, "the layer's disk could not be synced: {}", error.report());
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.drop_all_held();
        let synced =
            locked(&self.unsynced).is_empty() && self.lock_state().unsynced_since_boot.is_none();
        if !synced {
            self.sync_or_warn();
        }
    }
}
