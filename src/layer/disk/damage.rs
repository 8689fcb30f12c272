//! A disk's reaction to damage of its own files.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use super::Disk;
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
    layer::locked::locked,
    layer::repair::mend::{self, Mended},
    oci::Digest,
    units::{DiskOffset, SpanId},
};

impl Disk {
    /// Makes damaged files of the folder right, from the table that is stored with them. Whether that could be done.
    pub(in crate::layer) fn mend(&self) -> bool {
        if self.lacks_table() {
            return false;
        }
        let mended = mend::from_stored_table(&self.services.new_folder(), &self.folder);
        let path = self.folder.path().display();
        match mended {
            Ok(Mended::Done(_)) => return true,
            Ok(Mended::LacksTable(error)) => {
                self.lacks_table.store(true, Ordering::Release);
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

    /// Notes what was mended, until somebody asks.
    pub(in crate::layer) fn note_mended(&self, what: Vec<String>) {
        locked(&self.mended).extend(what);
    }

    /// What was mended since somebody asked.
    pub(in crate::layer) fn take_mended(&self) -> Vec<String> {
        std::mem::take(&mut locked(&self.mended))
    }

    /// Whether the stored table is damaged, and wanted from where it came from.
    pub(in crate::layer) fn lacks_table(&self) -> bool {
        self.lacks_table.load(Ordering::Acquire)
    }

    /// The table is right again.
    pub(in crate::layer) fn has_table_again(&self) {
        self.lacks_table.store(false, Ordering::Release);
    }

    /// What the local disk has of these spans is not what was written: they are fetched again. Those of `beside` lack only what is kept
    /// for the check of the layer; readers go on to see them.
    pub(in crate::layer) fn lose(&self, spans: &[SpanId], beside: &[SpanId]) -> io::Result<()> {
        self.proof.want(spans.iter().chain(beside).copied());
        if spans.is_empty() {
            return Ok(());
        }
        self.bitmap.disown(spans)?;
        self.whole.lost();
        Ok(())
    }

    /// Brings the table again, where it is damaged, and mends the folder with it.
    pub(in crate::layer) async fn bring_table(self: &Arc<Self>) -> Result<()> {
        let _bringing = self.bringing_table.lock().await;
        if !self.lacks_table() {
            return Ok(());
        }
        let hint =
            "the stored table is damaged; it comes again when an image that has it is attached";
        match self
            .fetch_table()
            .await
            .map_err(|error| error.context(hint))?
        {
            Mended::Done(_) => self.has_table_again(),
            Mended::LacksTable(error) | Mended::Hopeless(error) => return Err(error),
        }
        Ok(())
    }

    /// Mends the folder with a table that is fetched from where the layer is, or the compact index.
    pub(in crate::layer) async fn fetch_table(self: &Arc<Self>) -> Result<Mended> {
        let state = self.lock_state().clone();
        let size = state.table_size;
        let sources = self.windows().map_or(self.sources(), |it| it.sources());
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
                            &disk.services().new_folder(),
                            disk.folder(),
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

    /// The local disk does not give what it has: readers hear of it, and so does whoever looks.
    pub(in crate::layer) fn cannot_be_read(&self, offset: DiskOffset, error: &io::Error) {
        let context = format!(
            "{} cannot be read at {offset}: {error}",
            self.path().display()
        );
        let error = Arc::new(Error::new(Kind::Io, context));
        self.health.failed_locally(&error);
    }
}
