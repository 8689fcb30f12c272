//! The windows of a disk's spans, from the zTOC or from the compact index.

use std::{io, os::unix::fs::FileExt as _};

use super::windows::CompactWindows;
use crate::{
    gzip::WINDOW_SIZE,
    layer::stored::{
        folder,
        seal::{self, Damage},
        span_table::StoredSpan,
        stored_file::StoredFile,
    },
};

/// Where the windows of a disk's spans are.
pub(crate) enum WindowStore {
    /// A plain tar and a streamed layer have none.
    None,
    /// The zTOC has them all.
    Ztoc(StoredFile),
    /// The span before leaves them, or they are fetched from the blob of the compact index.
    Compact(CompactWindows),
}

impl WindowStore {
    /// Those of a compact index.
    pub(crate) fn compact(&self) -> Option<&CompactWindows> {
        match self {
            Self::Compact(windows) => Some(windows),
            _ => None,
        }
    }

    /// The window of a span that the zTOC has. An error that is [`Damage`]: the window does not have its checksum.
    pub(crate) fn of_ztoc(&self, stored: &StoredSpan) -> io::Result<Option<Vec<u8>>> {
        let (Self::Ztoc(ztoc), Some(range)) = (self, &stored.span.window) else {
            return Ok(None);
        };
        // its length was 32 KiB when the table was written
        let mut window = vec![0; range.len().min(WINDOW_SIZE)];
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
}
