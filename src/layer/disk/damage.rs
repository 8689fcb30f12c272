//! A disk's reaction to damage of its own files.

use std::{io, sync::Arc};

use super::Disk;
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
    layer::repair::mend::{self, Mended},
    oci::Digest,
    units::{DiskOffset, SpanId},
};

impl Disk {
    /// Makes damaged files of the directory right, from the table that is stored with them. Whether that could be done.
    pub(in crate::layer) fn repair(&self) -> bool {
        if self.table_repair.lacks_table() {
            return false;
        }
        let mended = mend::from_stored_table(&self.services.new_directory(), self.directory());
        let path = self.directory().path().display();
        match mended {
            Ok(Mended::Done(_)) => return true,
            Ok(Mended::LacksTable(error)) => {
                self.table_repair.table_is_damaged();
                tracing::warn!(
                    "{path} cannot be mended before its image is attached again: {}",
                    error.report()
                );
            }
            Ok(Mended::Hopeless(error)) | Err(error) => {
                tracing::warn!("{path} cannot be mended: {}", error.report());
            }
        }
        false
    }

    /// What the local disk has of these spans is not what was written: they are fetched again. Those of `beside` lack only what is kept
    /// for the check of the layer; readers go on to see them.
    pub(in crate::layer) fn lose(&self, spans: &[SpanId], beside: &[SpanId]) -> io::Result<()> {
        self.verification
            .layer_check()
            .want(spans.iter().chain(beside).copied());
        if spans.is_empty() {
            return Ok(());
        }
        self.reader.presence().bitmap().revoke(spans)?;
        self.ahead.fill().lost();
        Ok(())
    }

    /// Brings the table again, where it is damaged, and mends the directory with it.
    pub(in crate::layer) async fn bring_table(self: &Arc<Self>) -> Result<()> {
        let _fetching = self.table_repair.lock_fetch().await;
        if !self.table_repair.lacks_table() {
            return Ok(());
        }
        let hint =
            "the stored table is damaged; it comes again when an image that has it is attached";
        match self
            .fetch_table()
            .await
            .map_err(|error| error.context(hint))?
        {
            Mended::Done(_) => self.table_repair.has_table_again(),
            Mended::LacksTable(error) | Mended::Hopeless(error) => return Err(error),
        }
        Ok(())
    }

    /// Mends the directory with a table that is fetched from where the layer is, or the compact index.
    pub(in crate::layer) async fn fetch_table(self: &Arc<Self>) -> Result<Mended> {
        let state = self.record.lock_state().clone();
        let size = state.table_size;
        let windows = self.reader.compact_windows();
        let sources = windows.map_or(&self.sources, |windows| windows.sources());
        let mut last = Error::new(Kind::Unavailable, "no source is known");
        for place in sources.in_order() {
            let fetched = async {
                let source = place.open().await?;
                match &state.compact {
                    Some(blob) => source.range(blob, 0..size).await,
                    None => source.blob(&state.table, size, size).await,
                }
            };
            match fetched.await {
                Ok(bytes) if Digest::of(&bytes) == state.table => {
                    let (disk, state) = (Arc::clone(self), state.clone());
                    let mend = move || {
                        mend::from_table(
                            &disk.services().new_directory(),
                            disk.directory(),
                            &state,
                            &bytes,
                        )
                    };
                    return blocking(mend).await;
                }
                Ok(_) => last = Error::new(Kind::Corrupt, "a source has another table"),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Notes that the local disk could not be read: in the health of the disk. An error of kind `Interrupted` is not of the local disk.
    pub(in crate::layer) fn cannot_be_read(&self, offset: DiskOffset, error: &io::Error) {
        if error.kind() == io::ErrorKind::Interrupted {
            return;
        }
        let context = format!(
            "{} cannot be read at {offset}: {error}",
            self.path().display()
        );
        let error = Arc::new(Error::new(Kind::Io, context));
        self.health.failed_locally(&error);
    }
}
