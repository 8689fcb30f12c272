//! Where the windows of a disk's spans are stored: in the zTOC or with the compact index.

use std::{io, os::unix::fs::FileExt as _};

use super::compact_windows::CompactWindows;
use crate::{
    gzip::WINDOW_SIZE,
    layer::stored::{
        directory,
        seal::{self, Damage},
        span_table::StoredSpan,
        stored_file::StoredFile,
    },
};

/// Where the windows of a disk's spans are stored.
pub(crate) enum WindowStore {
    /// The spans of a plain tar and of a streamed layer have no windows.
    None,
    /// The zTOC has all windows.
    Ztoc(StoredFile),
    /// The previous span's output has a window, or it is fetched from the blob of the compact index.
    Compact(CompactWindows),
}

impl WindowStore {
    /// The windows of a compact index.
    pub(crate) fn compact(&self) -> Option<&CompactWindows> {
        match self {
            Self::Compact(windows) => Some(windows),
            _ => None,
        }
    }

    /// The window of a span, from the zTOC. An error that is [`Damage`]: the window does not have its checksum.
    pub(crate) fn of_ztoc(&self, stored: &StoredSpan) -> io::Result<Option<Vec<u8>>> {
        let (Self::Ztoc(ztoc), Some(range)) = (self, &stored.span.window) else {
            return Ok(None);
        };
        // its length was checked when the table was written: 32 KiB
        let mut window = vec![0; range.len().min(WINDOW_SIZE)];
        ztoc.get()?
            .read_exact_at(&mut window, range.start as u64)
            .map_err(|error| match Damage::found(directory::ZTOC, &error) {
                Some(damage) => damage.into(),
                None => error,
            })?;
        match seal::crc32(&window) == stored.window_crc {
            true => Ok(Some(window)),
            false => Err(Damage::check(directory::ZTOC).into()),
        }
    }
}
