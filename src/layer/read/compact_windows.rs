//! The windows of the spans of a disk that was laid out from a compact index.
//!
//! A span that is decoded right after the previous one takes its window from that output. Otherwise the window is fetched, reduced to the
//! bytes that the span refers to, or it is in the file `windows`. That sparse file has a slot for each span; nearly all slots are empty. A
//! slot has one of two kinds of windows:
//! - the *verified* window of a span that is not present, stored when the previous span was decoded;
//! - the *stated* window that a present span was decoded with, while the previous span is not present. When that span is decoded, both are
//!   compared (`place_span`); the check of the whole layer compares the rest.

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
    layer_sources::LayerSources,
    race::{self, Race},
};
use crate::{
    compact::window::{self, Window},
    error::{Error, Kind, Result},
    gzip::WINDOW_SIZE,
    layer::{
        services::Services,
        stored::{
            directory::{self, DiskDirectory},
            seal,
            stored_file::StoredFile,
        },
    },
    oci::Digest,
    units::SpanId,
};

/// Size of a span's slot in the file, in whole blocks.
const SLOT_SIZE: u64 = 40 << 10;

/// Kind, length and CRC-32, each four bytes little-endian. The CRC is that of the span's number, the kind and the content.
const HEADER_SIZE: usize = 12;

const _: () = assert!(HEADER_SIZE as u64 + window::MAX_STORED_SIZE <= SLOT_SIZE);

const VERIFIED: u32 = 1;
const STATED: u32 = 2;

/// zstd's level for verified windows: they are stored for a short time only.
const LEVEL: i32 = 1;

/// The windows of a disk that was laid out from a compact index.
pub(crate) struct CompactWindows {
    /// The compact index's blob that has the windows.
    blob: Digest,
    file: StoredFile,
    sources: LayerSources,
    /// Held while a span's window is compared with its slot, or written there.
    joints: Mutex<()>,
}

impl CompactWindows {
    pub(crate) fn open(directory: &DiskDirectory, blob: Digest, hosts: &Hosts) -> Result<Self> {
        Ok(Self {
            blob,
            file: directory.stored(
                directory::WINDOWS,
                directory.open_or_create(directory::WINDOWS)?.0,
            )?,
            sources: LayerSources::open(directory, directory::WINDOW_SOURCES, hosts),
            joints: Mutex::default(),
        })
    }

    /// The sources of the compact index.
    pub(crate) fn sources(&self) -> &LayerSources {
        &self.sources
    }

    /// The slots. The lock is held from a comparison to the write that follows from it.
    pub(super) fn joints(&self) -> Joints<'_> {
        Joints {
            windows: self,
            _lock: self.joints.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// The verified window of a span, if the previous span has stored it.
    pub(crate) fn verified(&self, span: SpanId) -> io::Result<Option<Bytes>> {
        let Some(packed) = self.read(span, VERIFIED)? else {
            return Ok(None);
        };
        // bytes that do not unpack are treated as an empty slot
        let window = zstd::bulk::decompress(&packed, WINDOW_SIZE).ok();
        Ok(window
            .filter(|window| window.len() == WINDOW_SIZE)
            .map(Bytes::from))
    }

    /// Fetches a stored window from one of the sources.
    pub(crate) async fn fetch(&self, services: &Services, range: Range<u64>) -> Result<Bytes> {
        let sources = self.sources.in_order().await;
        race::retry_down(services, &sources, self.blob, &range);
        let bytes = Race::new(sources, self.blob, range.end)
            .collect(range.start)
            .await;
        bytes.map_err(|mut failures| {
            let last = failures.pop(); // there is at least one
            let error = last.unwrap_or_else(|| Error::new(Kind::Unavailable, "no source is known"));
            error.context(format!(
                "cannot fetch a window of the compact index's blob {}",
                self.blob
            ))
        })
    }

    /// Syncs the slots to the local disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.get()?.sync_data()
    }

    fn slot(span: SpanId) -> u64 {
        u64::from(span.get()) * SLOT_SIZE
    }

    /// The content of a span's slot, if it has this kind and its checksum.
    fn read(&self, span: SpanId, kind: u32) -> io::Result<Option<Vec<u8>>> {
        let mut header = [0; HEADER_SIZE];
        let file = self.file.get()?;
        match file.read_exact_at(&mut header, Self::slot(span)) {
            // a slot that cannot be read is empty: the window is fetched again, or the check of the whole layer compares it
            Err(error) if seal::is_damage(&error) => return Ok(None),
            read => read?,
        }
        let ([found, length, crc], _) = header.as_chunks::<4>() else {
            return Ok(None); // the header is three times four bytes
        };
        let length = u64::from(u32::from_le_bytes(*length));
        if u32::from_le_bytes(*found) != kind || length > SLOT_SIZE - HEADER_SIZE as u64 {
            return Ok(None);
        }
        let mut bytes = vec![0; length as usize]; // a few KiB
        let offset = Self::slot(span) + HEADER_SIZE as u64;
        match file.read_exact_at(&mut bytes, offset) {
            Err(error) if seal::is_damage(&error) => return Ok(None),
            read => read?,
        }
        Ok((checksum(span, kind, &bytes) == u32::from_le_bytes(*crc)).then_some(bytes))
    }

    fn write(&self, span: SpanId, kind: u32, bytes: &[u8]) -> io::Result<()> {
        let mut slot = Vec::with_capacity(HEADER_SIZE + bytes.len());
        slot.extend_from_slice(&kind.to_le_bytes());
        slot.extend_from_slice(&(bytes.len() as u32).to_le_bytes()); // at most MAX_STORED_SIZE
        slot.extend_from_slice(&checksum(span, kind, bytes).to_le_bytes());
        slot.extend_from_slice(bytes);
        self.file.get()?.write_all_at(&slot, Self::slot(span))
    }
}

/// See [`CompactWindows::joints`].
pub(crate) struct Joints<'a> {
    windows: &'a CompactWindows,
    _lock: MutexGuard<'a, ()>,
}

impl Joints<'_> {
    /// The verified window of a span, if the previous span has stored it.
    pub(crate) fn verified(&self, span: SpanId) -> io::Result<Option<Bytes>> {
        self.windows.verified(span)
    }

    /// The stated window that a span was decoded with, while nothing has confirmed it.
    pub(crate) fn stated(&self, span: SpanId) -> io::Result<Option<Window>> {
        let stored = self.windows.read(span, STATED)?;
        Ok(stored.and_then(|stored| Window::parse(&stored).ok()))
    }

    /// Stores a span's verified window.
    pub(super) fn store_verified(&self, span: SpanId, window: &[u8]) -> io::Result<()> {
        let packed = zstd::bulk::compress(window, LEVEL)?;
        self.windows.write(span, VERIFIED, &packed)
    }

    /// Stores the stated window that a span was decoded with.
    pub(super) fn store_stated(&self, span: SpanId, stored: &[u8]) -> io::Result<()> {
        self.windows.write(span, STATED, stored)
    }

    /// Empties the slot of a span.
    pub(crate) fn remove(&self, span: SpanId) -> io::Result<()> {
        let start = CompactWindows::slot(span);
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
        match rustix::fs::fallocate(&*file, flags, start, SLOT_SIZE) {
            // zeros in the kind empty the slot too
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
