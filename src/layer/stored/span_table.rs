//! The spans of a disk: their positions are in memory, the rest is in the file `spans.table`.
//!
//! A zTOC has the spans together with all file metadata; parsing it again at each start would cost time and memory by the number of files.
//! So import writes the spans as records of one size, and a span's digest and window are read when it is decoded. The files are not mapped:
//! a failed read is an error, but a fault on a truncated mapping is SIGBUS. The header and each record end with a CRC-32; a record also has
//! that of its window in the zTOC.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::{
    oci::Digest,
    units::{CompressedOffset, LayerOffset, SpanId},
    ztoc::{Compression, Span, SpanTable},
};

use super::{
    directory,
    seal::{CRC_BYTES, Damage, crc32},
    stored_file::StoredFile,
};

/// The longest span that is accepted, compressed or not: one fetch may hold it in memory. SOCI's default span is 4 MiB; the longest block
/// of a common deflate writer adds a few MiB.
pub(crate) const MAX_SPAN_BYTES: u64 = 128 << 20;

const MAGIC: &[u8; 8] = b"spans 3\n";
const HEADER_BYTES: usize = 20;
const RECORD_BYTES: usize = 88;
const NO_WINDOW: u64 = u64::MAX;

/// A span table of a zTOC that cannot be served.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("it has {0} spans, more than the limit")]
    TooMany(usize),
    #[error("span {span} starts at {start} of the layer, but the previous span ends at {expected}")]
    Gap {
        span: SpanId,
        start: LayerOffset,
        expected: LayerOffset,
    },
    #[error("span {span} ends before it starts")]
    Reversed { span: SpanId },
    #[error(
        "span {span} is at {start} to {end} of a blob of {blob} bytes, out of order or past its end"
    )]
    Misplaced {
        span: SpanId,
        start: CompressedOffset,
        end: CompressedOffset,
        blob: u64,
    },
    #[error("span {span} has {bytes} bytes; the limit is {MAX_SPAN_BYTES}")]
    TooLong { span: SpanId, bytes: u64 },
}

/// All data of a span.
pub(crate) struct StoredSpan {
    /// The span as its table has it.
    pub span: Span,
    /// CRC-32 of its window, if the zTOC has the window.
    pub window_crc: u32,
}

/// The position of a span. It has 24 bytes in memory.
struct SpanPosition {
    uncompressed_start: u64,
    compressed_start: u64,
    compressed_length: u32,
}

/// All spans of a disk.
pub(crate) struct Spans {
    compression: Compression,
    places: Box<[SpanPosition]>,
    uncompressed_size: u64,
    /// The disk of a streamed layer has none.
    file: Option<StoredFile>,
}

/// Checks a table's spans and encodes them for the file. `windows` are the bytes that have the spans' windows.
pub(crate) fn encode(table: &SpanTable, windows: &[u8]) -> Result<Vec<u8>, Error> {
    let count = u32::try_from(table.spans.len())
        .ok()
        .filter(|count| *count < u32::MAX)
        .ok_or(Error::TooMany(table.spans.len()))?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + table.spans.len() * RECORD_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&match table.compression {
        Compression::Gzip => [1, 0, 0, 0],
        Compression::Uncompressed => [2, 0, 0, 0],
    });
    bytes.extend_from_slice(&crc32(&bytes).to_le_bytes());
    let mut before: Option<&Span> = None;
    for (id, span) in (0..count).map(SpanId).zip(&table.spans) {
        check(id, span, before, table.compressed_size)?;
        let window = span.window.as_ref();
        let record = bytes.len();
        bytes.extend_from_slice(&span.compressed.start.get().to_le_bytes());
        bytes.extend_from_slice(&span.compressed.end.get().to_le_bytes());
        bytes.extend_from_slice(&span.uncompressed.start.get().to_le_bytes());
        bytes.extend_from_slice(&span.uncompressed.end.get().to_le_bytes());
        bytes.extend_from_slice(
            &window
                .map_or(NO_WINDOW, |window| window.start as u64)
                .to_le_bytes(),
        );
        // a window is 32 KiB inside the zTOC, so its length fits
        let length = window.map_or(0, |window| window.len());
        bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&[span.bits, span.end_bits, 0, 0]);
        bytes.extend_from_slice(span.digest.bytes());
        let window = window.and_then(|window| windows.get(window.clone()));
        bytes.extend_from_slice(&crc32(window.unwrap_or_default()).to_le_bytes());
        bytes.extend_from_slice(&crc32(&bytes[record..]).to_le_bytes());
        before = Some(span);
    }
    Ok(bytes)
}

/// Reads a file that [`encode`] made, with the length that its header states.
fn read_whole(file: &File) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let length = HEADER_BYTES as u64 + u64::from(u32_at(&header, 8)) * RECORD_BYTES as u64;
    if !is_whole(&header) || file.metadata()?.len() != length {
        return Err(Damage::check(directory::SPAN_TABLE).into());
    }
    let mut bytes = vec![0; length as usize]; // the length of the file
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// All users of the spans rely on this: they are adjacent, in the layer and in the blob, from the start of the layer.
fn check(id: SpanId, span: &Span, before: Option<&Span>, blob: u64) -> Result<(), Error> {
    let (start, end) = (span.uncompressed.start, span.uncompressed.end);
    let expected = before.map_or(LayerOffset(0), |before| before.uncompressed.end);
    if start != expected {
        return Err(Error::Gap {
            span: id,
            start,
            expected,
        });
    }
    if end < start || span.compressed.end < span.compressed.start {
        return Err(Error::Reversed { span: id });
    }
    let ordered = before.is_none_or(|before| {
        before.compressed.start <= span.compressed.start
            && before.compressed.end <= span.compressed.end
    });
    if !ordered || span.compressed.end.get() > blob {
        return Err(Error::Misplaced {
            span: id,
            start: span.compressed.start,
            end: span.compressed.end,
            blob,
        });
    }
    let bytes =
        (end.get() - start.get()).max(span.compressed.end.get() - span.compressed.start.get());
    if bytes > MAX_SPAN_BYTES {
        return Err(Error::TooLong { span: id, bytes });
    }
    Ok(())
}

impl Spans {
    /// Reads a file that [`encode`] made.
    pub(crate) fn open(file: StoredFile) -> Result<Self, crate::error::Error> {
        use crate::error::{Error as Wrapped, Kind, ResultExt as _};
        let unread = || "the stored span table cannot be read".to_owned();
        let damaged = || Damage::check(directory::SPAN_TABLE);
        let read = file.get().and_then(|file| read_whole(&file));
        let bytes = read.map_err(|error| match Damage::found(directory::SPAN_TABLE, &error) {
            Some(damage) => Wrapped::with_source(Kind::Corrupt, unread(), damage),
            None => Wrapped::with_source(Kind::Io, unread(), error),
        })?;
        let header = bytes.split_first_chunk::<HEADER_BYTES>();
        let header = header.filter(|(header, _)| is_whole(*header));
        let (header, records) = header.ok_or_else(damaged).or_kind(Kind::Corrupt, unread)?;
        let compression = match header[12] {
            1 => Some(Compression::Gzip),
            2 => Some(Compression::Uncompressed),
            _ => None,
        };
        let (Some(compression), true, true, (records, [])) = (
            compression,
            header.starts_with(MAGIC),
            records.len() as u64 == u64::from(u32_at(header, 8)) * RECORD_BYTES as u64,
            records.as_chunks::<RECORD_BYTES>(),
        ) else {
            return Err(damaged()).or_kind(Kind::Corrupt, unread);
        };
        if !records.iter().all(|record| is_whole(record)) {
            return Err(damaged()).or_kind(Kind::Corrupt, unread);
        }
        let records = records.iter().map(|record| decode(record).span);
        let mut uncompressed_size = 0;
        let places = records
            .map(|span| {
                uncompressed_size = span.uncompressed.end.get();
                SpanPosition {
                    uncompressed_start: span.uncompressed.start.get(),
                    compressed_start: span.compressed.start.get(),
                    compressed_length: u32::try_from(
                        span.compressed
                            .end
                            .get()
                            .saturating_sub(span.compressed.start.get()),
                    )
                    .unwrap_or(u32::MAX),
                }
            })
            .collect();
        Ok(Self {
            compression,
            places,
            uncompressed_size,
            file: Some(file),
        })
    }

    /// The spans of a streamed layer: none.
    pub(crate) fn none() -> Self {
        Self {
            compression: Compression::Uncompressed,
            places: Box::default(),
            uncompressed_size: 0,
            file: None,
        }
    }

    /// How the blob is compressed.
    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    /// Number of the spans.
    pub(crate) fn count(&self) -> u32 {
        self.places.len() as u32 // `encode` counted them in a u32
    }

    /// The end of the last span in the layer.
    pub(crate) fn end(&self) -> LayerOffset {
        LayerOffset(self.uncompressed_size)
    }

    /// Length of the layer that the spans have.
    pub(crate) fn uncompressed_size(&self) -> u64 {
        self.uncompressed_size
    }

    /// The spans that have this range of the layer. Empty for an empty range, and never with an empty span at either end.
    pub(crate) fn covering(&self, range: Range<LayerOffset>) -> Range<u32> {
        if range.start >= range.end {
            return 0..0;
        }
        let after = |offset: u64| {
            self.places
                .partition_point(|place| place.uncompressed_start <= offset) as u32
        };
        // the last span that starts at or before an offset has it: empty spans are before the one with the same start
        let first = after(range.start.get()).saturating_sub(1);
        first..after(range.end.get() - 1)
    }

    /// The range of the layer that this span decodes to.
    pub(crate) fn uncompressed(&self, span: SpanId) -> Range<LayerOffset> {
        let index = span.get() as usize;
        let end = self
            .places
            .get(index + 1)
            .map_or(self.uncompressed_size, |next| next.uncompressed_start);
        LayerOffset(self.places[index].uncompressed_start)..LayerOffset(end)
    }

    /// The range of the blob that this span decodes from.
    pub(crate) fn compressed(&self, span: SpanId) -> Range<CompressedOffset> {
        let place = &self.places[span.get() as usize];
        CompressedOffset(place.compressed_start)
            ..CompressedOffset(place.compressed_start + u64::from(place.compressed_length))
    }

    /// All data of a span, from the file.
    pub(crate) fn read(&self, span: SpanId) -> io::Result<StoredSpan> {
        let mut record = [0; RECORD_BYTES];
        let offset = HEADER_BYTES as u64 + u64::from(span.get()) * RECORD_BYTES as u64;
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?.get()?;
        file.read_exact_at(&mut record, offset).map_err(|error| {
            match Damage::found(directory::SPAN_TABLE, &error) {
                Some(damage) => damage.into(),
                None => error,
            }
        })?;
        match is_whole(&record) {
            true => Ok(decode(&record)),
            false => Err(Damage::check(directory::SPAN_TABLE).into()),
        }
    }
}

/// Whether the header or a record has its checksum.
fn is_whole(bytes: &[u8]) -> bool {
    let whole = bytes.split_last_chunk::<CRC_BYTES>();
    whole.is_some_and(|(body, crc)| crc32(body) == u32::from_le_bytes(*crc))
}

fn decode(record: &[u8; RECORD_BYTES]) -> StoredSpan {
    let mut digest = [0; 32];
    digest.copy_from_slice(&record[48..80]);
    let window = u64_at(record, 32);
    let span = Span {
        compressed: CompressedOffset(u64_at(record, 0))..CompressedOffset(u64_at(record, 8)),
        uncompressed: LayerOffset(u64_at(record, 16))..LayerOffset(u64_at(record, 24)),
        digest: Digest::new(digest),
        bits: record[44],
        end_bits: record[45],
        window: (window != NO_WINDOW).then(|| {
            let start = window as usize;
            start..start.saturating_add(u32_at(record, 40) as usize)
        }),
    };
    StoredSpan {
        span,
        window_crc: u32_at(record, 80),
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
#[expect(
    clippy::reversed_empty_ranges,
    reason = "reversed spans are what is refused"
)]
mod tests {

    use super::*;

    fn span(compressed: Range<u64>, uncompressed: Range<u64>) -> Span {
        Span {
            compressed: CompressedOffset(compressed.start)..CompressedOffset(compressed.end),
            uncompressed: LayerOffset(uncompressed.start)..LayerOffset(uncompressed.end),
            digest: Digest::of(&compressed.start.to_le_bytes()),
            bits: (compressed.start % 8) as u8,
            end_bits: (compressed.end % 8) as u8,
            window: (compressed.start > 100).then_some(1000..1000 + 32768),
        }
    }

    fn table(spans: Vec<Span>) -> SpanTable {
        SpanTable {
            compression: Compression::Gzip,
            compressed_size: 1000,
            uncompressed_size: 0,
            span_size: 100,
            spans,
        }
    }

    fn open(table: &SpanTable) -> Spans {
        let file = StoredFile::of_test(&encode(table, &[]).unwrap()).0;
        Spans::open(file).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let table = table(vec![
            span(10..201, 0..400),
            span(200..300, 400..400),
            span(300..1000, 400..5000),
        ]);
        let spans = open(&table);
        assert_eq!(spans.count(), 3);
        for (id, span) in (0..).map(SpanId).zip(&table.spans) {
            assert_eq!(&spans.read(id).unwrap().span, span);
            assert_eq!(spans.compressed(id), span.compressed);
            assert_eq!(spans.uncompressed(id), span.uncompressed);
        }
    }

    #[test]
    fn covering_takes_no_span_too_many() {
        let spans = open(&table(vec![
            span(10..20, 0..100),
            span(20..30, 100..100),
            span(30..40, 100..200),
            span(40..50, 200..300),
        ]));
        let covering =
            |range: Range<u64>| spans.covering(LayerOffset(range.start)..LayerOffset(range.end));
        assert_eq!(covering(0..100), 0..1);
        assert_eq!(covering(99..100), 0..1);
        assert_eq!(covering(100..101), 2..3);
        assert_eq!(covering(99..101), 0..3);
        assert_eq!(covering(100..200), 2..3);
        assert_eq!(covering(250..300), 3..4);
        assert_eq!(covering(50..50), 0..0);
    }

    #[test]
    fn hostile_tables_are_refused() {
        let error = |spans| encode(&table(spans), &[]).unwrap_err();
        assert!(matches!(
            error(vec![span(10..20, 5..100)]),
            Error::Gap { .. }
        ));
        assert!(matches!(
            error(vec![span(10..20, 0..100), span(20..30, 90..100)]),
            Error::Gap { .. }
        ));
        assert!(matches!(
            error(vec![span(30..20, 0..100)]),
            Error::Reversed { .. }
        ));
        assert!(matches!(
            error(vec![span(10..1001, 0..100)]),
            Error::Misplaced { .. }
        ));
        assert!(matches!(
            error(vec![span(10..20, 0..100), span(9..30, 100..200)]),
            Error::Misplaced { .. }
        ));
        assert!(matches!(
            error(vec![span(10..20, 0..MAX_SPAN_BYTES + 1)]),
            Error::TooLong { .. }
        ));
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let bytes = encode(
            &table(vec![span(10..20, 0..100), span(20..30, 100..200)]),
            &[],
        )
        .unwrap();
        let open = |bytes: &[u8]| Spans::open(StoredFile::of_test(bytes).0);
        assert!(open(&bytes).is_ok());
        for length in [0, 15, 19, 20, 107, 108, bytes.len() - 1] {
            assert!(Damage::is_in(&open(&bytes[..length]).err().unwrap()));
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            assert!(Damage::is_in(&open(&bytes).err().unwrap()), "{at}");
        }
    }

    #[test]
    fn ends_that_go_back_are_refused() {
        // in the blob: each starts after the previous one, and the second ends inside it
        let error = encode(
            &table(vec![span(10..30, 0..100), span(20..25, 100..200)]),
            &[],
        )
        .unwrap_err();
        assert!(
            matches!(
                error,
                Error::Misplaced {
                    span: SpanId(1),
                    ..
                }
            ),
            "{error}"
        );
        // in the layer
        let error = encode(
            &table(vec![span(10..20, 0..100), span(20..30, 100..99)]),
            &[],
        )
        .unwrap_err();
        assert_eq!(error, Error::Reversed { span: SpanId(1) });
        // empty spans may be at the same position
        encode(
            &table(vec![span(10..20, 0..100), span(20..20, 100..100)]),
            &[],
        )
        .unwrap();
        encode(
            &table(vec![span(10..20, 0..100), span(10..20, 100..200)]),
            &[],
        )
        .unwrap();
    }

    #[test]
    fn the_longest_span_is_taken_and_no_longer_one() {
        let longest = |compressed: u64, uncompressed: u64| {
            let mut table = table(vec![span(0..compressed, 0..uncompressed)]);
            table.compressed_size = u64::MAX;
            encode(&table, &[]).map(drop)
        };
        longest(MAX_SPAN_BYTES, MAX_SPAN_BYTES).unwrap();
        for (compressed, uncompressed) in [(MAX_SPAN_BYTES + 1, 1), (1, MAX_SPAN_BYTES + 1)] {
            let error = longest(compressed, uncompressed).unwrap_err();
            let bytes = MAX_SPAN_BYTES + 1;
            assert_eq!(
                error,
                Error::TooLong {
                    span: SpanId(0),
                    bytes
                }
            );
        }
    }

    #[test]
    fn a_record_that_changes_after_the_file_was_opened_is_damage() {
        let windows = [7; 1000 + 32768];
        let bytes = encode(&table(vec![span(110..120, 0..100)]), &windows).unwrap();
        let (stored, file) = StoredFile::of_test(&bytes);
        let spans = Spans::open(stored).unwrap();
        let stored = spans.read(SpanId(0)).unwrap();
        assert_eq!(stored.window_crc, crc32(&windows[1000..]));
        file.write_all_at(&[1], 60).unwrap();
        let error = spans.read(SpanId(0)).err().unwrap();
        assert!(error.get_ref().unwrap().is::<Damage>());
        file.set_len(50).unwrap();
        let error = spans.read(SpanId(0)).err().unwrap();
        assert!(error.get_ref().unwrap().is::<Damage>());
    }
}
