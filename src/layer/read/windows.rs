//! What stands before the spans of a disk that came from a compact index: the last 32 KiB before each.
//!
//! A span that follows one which was just decoded takes its window from there. Else the window is fetched, reduced to what the span
//! refers to; or it is what an earlier span left here. The file `windows` has a place for each span, nearly all of them empty:
//! - the *true* window of a span that is not present, written when the span before it was decoded;
//! - the *stated* window that a present span was decoded with, while the span before it is not present: when that comes, both are
//!   held against each other (`truth`).

use std::{
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use rustix::fs::FallocateFlags;

use crate::layer::sources::{
    health::Hosts,
    places::LayerSources,
    race::{self, Race},
};
use crate::{
    compact::window::{self, Window},
    error::{Error, Kind, Result},
    gzip::WINDOW_SIZE,
    layer::{
        services::Services,
        stored::{
            folder::{self, DiskFolder},
            seal,
            stored_file::StoredFile,
        },
    },
    oci::Digest,
    units::SpanId,
};

/// Bytes of a span's place in the file, in whole blocks.
const PLACE_SIZE: u64 = 40 << 10;

/// Kind, length and CRC-32, each four bytes little-endian. The CRC is of the span's number, the kind and the content.
const HEADER_SIZE: usize = 12;

const _: () = assert!(HEADER_SIZE as u64 + window::MAX_STORED_SIZE <= PLACE_SIZE);

const TRUE: u32 = 1;
const STATED: u32 = 2;

/// zstd's level for true windows: they are here for a while only.
const LEVEL: i32 = 1;

/// The windows of a disk.
pub(crate) struct CompactWindows {
    /// The compact index's blob that has them.
    blob: Digest,
    file: StoredFile,
    sources: LayerSources,
    /// Held while what a span has shown about its neighbours is noted.
    joints: Mutex<()>,
}

impl CompactWindows {
    pub(crate) fn open(folder: &DiskFolder, blob: Digest, hosts: &Hosts) -> Result<Self> {
        Ok(Self {
            blob,
            file: folder.stored(folder::WINDOWS, folder.open_or_create(folder::WINDOWS)?.0)?,
            sources: LayerSources::open(folder, folder::WINDOW_SOURCES, hosts),
            joints: Mutex::default(),
        })
    }

    /// Where the compact index can be had.
    pub(crate) fn sources(&self) -> &LayerSources {
        &self.sources
    }

    /// The window's notes about neighbours; whoever compares and writes them holds this.
    pub(super) fn joints(&self) -> Joints<'_> {
        Joints {
            windows: self,
            _lock: self.joints.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// The true window of a span, where the span before has left it.
    pub(crate) fn known(&self, span: SpanId) -> io::Result<Option<Bytes>> {
        let Some(packed) = self.read(span, TRUE)? else {
            return Ok(None);
        };
        // what does not unpack was not written by us: it is as if it were not there
        let window = zstd::bulk::decompress(&packed, WINDOW_SIZE).ok();
        Ok(window
            .filter(|window| window.len() == WINDOW_SIZE)
            .map(Bytes::from))
    }

    /// Fetches what the compact index stores at this place, from one source or another.
    pub(crate) async fn fetch(&self, services: &Services, range: Range<u64>) -> Result<Bytes> {
        let places = self.sources.in_order();
        race::try_again(services, &places, self.blob, &range);
        let bytes = Race::new(places, self.blob, range.end)
            .collect(range.start)
            .await;
        bytes.map_err(|mut failures| {
            let last = failures.pop(); // there is one
            let error = last.unwrap_or_else(|| Error::new(Kind::Unavailable, "no source is known"));
            error.context(format!(
                "a window of the compact index's blob {}",
                self.blob
            ))
        })
    }

    /// Brings the notes to the disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.get()?.sync_data()
    }

    fn place(span: SpanId) -> u64 {
        u64::from(span.get()) * PLACE_SIZE
    }

    /// What is noted of a span, if it is of this kind and whole.
    fn read(&self, span: SpanId, kind: u32) -> io::Result<Option<Vec<u8>>> {
        let mut header = [0; HEADER_SIZE];
        let file = self.file.get()?;
        match file.read_exact_at(&mut header, Self::place(span)) {
            // what is lost was not there: it is fetched again, or the whole layer's check has it
            Err(error) if seal::is_damage(&error) => return Ok(None),
            read => read?,
        }
        let ([found, length, crc], _) = header.as_chunks::<4>() else {
            return Ok(None); // three times four bytes
        };
        let length = u64::from(u32::from_le_bytes(*length));
        if u32::from_le_bytes(*found) != kind || length > PLACE_SIZE - HEADER_SIZE as u64 {
            return Ok(None);
        }
        let mut bytes = vec![0; length as usize]; // a few KiB
        let offset = Self::place(span) + HEADER_SIZE as u64;
        match file.read_exact_at(&mut bytes, offset) {
            Err(error) if seal::is_damage(&error) => return Ok(None),
            read => read?,
        }
        Ok((checksum(span, kind, &bytes) == u32::from_le_bytes(*crc)).then_some(bytes))
    }

    fn write(&self, span: SpanId, kind: u32, bytes: &[u8]) -> io::Result<()> {
        let mut note = Vec::with_capacity(HEADER_SIZE + bytes.len());
        note.extend_from_slice(&kind.to_le_bytes());
        note.extend_from_slice(&(bytes.len() as u32).to_le_bytes()); // at most MAX_STORED_SIZE
        note.extend_from_slice(&checksum(span, kind, bytes).to_le_bytes());
        note.extend_from_slice(bytes);
        self.file.get()?.write_all_at(&note, Self::place(span))
    }
}

/// See [`CompactWindows::joints`].
pub(crate) struct Joints<'a> {
    windows: &'a CompactWindows,
    _lock: MutexGuard<'a, ()>,
}

impl Joints<'_> {
    /// The true window of a span, where the span before has left it.
    pub(crate) fn known(&self, span: SpanId) -> io::Result<Option<Bytes>> {
        self.windows.known(span)
    }

    /// The window that a span was decoded with, which nothing has confirmed yet.
    pub(crate) fn stated(&self, span: SpanId) -> io::Result<Option<Window>> {
        let stored = self.windows.read(span, STATED)?;
        Ok(stored.and_then(|stored| Window::parse(&stored).ok()))
    }

    /// Leaves a span's true window for it.
    pub(super) fn leave_known(&self, span: SpanId, window: &[u8]) -> io::Result<()> {
        let packed = zstd::bulk::compress(window, LEVEL)?;
        self.windows.write(span, TRUE, &packed)
    }

    /// Notes the window that a span was decoded with.
    pub(super) fn leave_stated(&self, span: SpanId, stored: &[u8]) -> io::Result<()> {
        self.windows.write(span, STATED, stored)
    }

    /// Nobody needs what is noted of a span any more.
    pub(crate) fn forget(&self, span: SpanId) -> io::Result<()> {
        let start = CompactWindows::place(span);
        let mut kind = [0; 4];
        let file = self.windows.file.get()?;
        match file.read_exact_at(&mut kind, start) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        if kind == [0; 4] {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&*file, flags, start, PLACE_SIZE) {
            // the note is no more all the same
            Err(rustix::io::Errno::OPNOTSUPP) => file.write_all_at(&[0; 4], start),
            punched => Ok(punched?),
        }
    }
}

fn checksum(span: SpanId, kind: u32, bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(&span.get().to_le_bytes());
    crc.update(&kind.to_le_bytes());
    crc.update(bytes);
    crc.sum()
}
