//! Repairs damage of the files of an open disk.

use std::{io, sync::Arc};

use super::Disk;
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
    layer::repair::from_table::{self, DirectoryRepair},
    metrics::METRICS,
    oci::Digest,
    units::{DiskOffset, SpanId},
};

impl Disk {
    /// Repairs damaged files of the directory from the stored table. Returns whether that succeeded.
    pub(in crate::layer) fn repair(&self) -> bool {
        if self.table_repair.lacks_table() {
            return false;
        }
        let repair =
            from_table::from_stored_table(&self.services.new_directory(), self.directory());
        let path = self.directory().path().display();
        match repair {
            Ok(DirectoryRepair::Done(_)) => return true,
            Ok(DirectoryRepair::LacksTable(error)) => {
                self.table_repair.table_is_damaged();
                tracing::warn!(
                    "{path} cannot be repaired without its table; attach an image with this layer again: {}",
                    error.report()
                );
            }
            Ok(DirectoryRepair::Impossible(error)) | Err(error) => {
                tracing::warn!(
                    "{path} cannot be repaired; detach its images, and attach them again: {}",
                    error.report()
                );
            }
        }
        false
    }

    /// The local disk has lost the data of these spans: they are fetched again. The spans of `rest` have lost only their bytes in `rest` or
    /// `last`, which the check of the layer needs; they stay readable.
    pub(in crate::layer) fn lose(&self, spans: &[SpanId], rest: &[SpanId]) -> io::Result<()> {
        self.verification
            .layer_check()
            .want(spans.iter().chain(rest).copied());
        if spans.is_empty() {
            return Ok(());
        }
        self.reader.presence().revoke(spans)?;
        self.ahead.fill().lost();
        Ok(())
    }

    /// Fetches the stored table again if it is damaged, and repairs the directory with it.
    pub(in crate::layer) async fn ensure_table(self: &Arc<Self>) -> Result<()> {
        let _fetching = self.table_repair.lock_fetch().await;
        if !self.table_repair.lacks_table() {
            return Ok(());
        }
        let hint = "the stored table is damaged and could not be fetched; attach an image with this layer again";
        match self
            .fetch_table()
            .await
            .map_err(|error| error.context(hint))?
        {
            DirectoryRepair::Done(_) => self.table_repair.table_is_restored(),
            DirectoryRepair::LacksTable(error) | DirectoryRepair::Impossible(error) => {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Repairs the directory with the table, fetched from a source of the layer or of the compact index.
    pub(in crate::layer) async fn fetch_table(self: &Arc<Self>) -> Result<DirectoryRepair> {
        let state = self.record.lock_state().clone();
        let size = state.table_size;
        let windows = self.reader.compact_windows();
        let sources = windows.map_or(&self.sources, |windows| windows.sources());
        let mut last = Error::new(Kind::Unavailable, "no source of the table is known");
        for source in sources.in_order().await {
            let fetched = async {
                let source = source.open().await?;
                match &state.compact {
                    Some(blob) => source.range(blob, 0..size).await,
                    None => source.blob(&state.table, size, size).await,
                }
            };
            match fetched.await {
                Ok(bytes) if Digest::of(&bytes) == state.table => {
                    let (disk, state) = (Arc::clone(self), state.clone());
                    let repair = move || {
                        from_table::from_table(
                            &disk.services().new_directory(),
                            disk.directory(),
                            &state,
                            &bytes,
                        )
                    };
                    return blocking(repair).await;
                }
                Ok(_) => last = Error::new(Kind::Corrupt, "a source has another table"),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Records in the health of the disk that the local disk could not be read. An error of kind `Interrupted` is not one of the local
    /// disk.
    pub(in crate::layer) fn report_read_error(&self, offset: DiskOffset, error: &io::Error) {
        if error.kind() == io::ErrorKind::Interrupted {
            return;
        }
        let context = format!(
            "{} cannot be read at {offset}: {error}",
            self.path().display()
        );
        let error = Arc::new(Error::new(Kind::Io, context));
        METRICS.read_errors.count();
        self.health.failed_locally(&error);
    }
}
