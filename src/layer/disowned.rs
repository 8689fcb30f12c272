//! Spans that were taken back: a later look has shown that they are not what the table says. The folder remembers them, in the file
//! `disowned`, which is made with the first: alone such a span shows nothing, and would be served again.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    bitmap::{self, Bitmap},
    folder::{self, Folder},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    units::SpanId,
};

/// The spans of a disk that were taken back.
pub(super) struct Disowned {
    folder: Folder,
    /// Spans of the disk.
    count: u32,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    spans: BTreeSet<SpanId>,
    file: Option<Bitmap>,
}

impl Disowned {
    /// Those that the folder remembers.
    pub(super) fn open(folder: &Folder, count: u32) -> Result<Self> {
        let path = folder.path().join(folder::DISOWNED);
        let mut known = Known::default();
        if path.exists() {
            let bits = Bitmap::open(folder.open(folder::DISOWNED)?, count)
                .or_kind(Kind::Io, || format!("cannot read {}", path.display()))?
                .ok_or_else(|| {
                    Error::new(Kind::Corrupt, format!("{} is damaged", path.display()))
                })?;
            known.spans = (0..count)
                .map(SpanId)
                .filter(|span| bits.get(*span))
                .collect();
            known.file = Some(bits);
        }
        Ok(Self {
            folder: folder.clone(),
            count,
            known: Mutex::new(known),
        })
    }

    /// Whether this span was taken back.
    pub(super) fn contains(&self, span: SpanId) -> bool {
        self.lock().spans.contains(&span)
    }

    /// All of them, ascending.
    pub(super) fn spans(&self) -> Vec<SpanId> {
        self.lock().spans.iter().copied().collect()
    }

    /// Does something with a span unless it was taken back, and none takes it back meanwhile. Whether it was done.
    pub(super) fn unless(&self, span: SpanId, work: impl FnOnce()) -> bool {
        let known = self.lock();
        let free = !known.spans.contains(&span);
        if free {
            work();
        }
        free
    }

    /// Takes spans back, for as long as there is the folder. On an error for as long as the disk is open.
    pub(super) fn insert(&self, spans: &[SpanId]) -> io::Result<()> {
        let mut known = self.lock();
        known.spans.extend(spans);
        let file = match known.file.take() {
            Some(file) => file,
            None => self.create()?,
        };
        let file = known.file.insert(file);
        spans.iter().for_each(|span| file.set(*span));
        file.save(spans)?;
        file.sync()
    }

    /// The file, empty and on the disk. One that a daemon left half made is made anew.
    fn create(&self) -> io::Result<Bitmap> {
        let zeros = vec![0; usize::try_from(bitmap::file_size(self.count)).unwrap_or(usize::MAX)];
        let made = || -> Result<Option<Bitmap>> {
            self.folder.replace(folder::DISOWNED, &zeros)?;
            let file: File = self.folder.open(folder::DISOWNED)?;
            Bitmap::open(file, self.count).or_kind(Kind::Io, || "reading it again".to_owned())
        };
        made()
            .map_err(|error| io::Error::other(error.report()))?
            .ok_or_else(|| io::Error::other("it was changed by somebody else"))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
