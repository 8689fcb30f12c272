//! Reading a table.

use std::io::Read as _;

use super::{
    Error, Table, entries, header::Header, spans, wire::Cursor, write::SECTION_ENTRIES,
    write::SECTION_SPANS,
};
use crate::oci::Digest;

/// Sections of this kind and above are passed by readers that do not know them.
const FIRST_OPTIONAL: u8 = 128;

pub(super) fn parse(bytes: &[u8]) -> Result<Table, Error> {
    let (header, stored) = Header::parse(bytes)?;
    let table_size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let blob_size = table_size.saturating_add(header.windows_size.get()); // `Header::parse` has added them
    let body = unpack(stored, header.body_size.get())?;
    let (mut span_section, mut entry_section) = (None, None);
    let mut sections = Cursor::new(&body, "sections");
    while sections.left() > 0 {
        let (kind, section) = (sections.byte()?, sections.bytes()?);
        let (place, what) = match kind {
            SECTION_SPANS => (&mut span_section, "spans"),
            SECTION_ENTRIES => (&mut entry_section, "entries"),
            FIRST_OPTIONAL.. => continue,
            kind => return Err(Error::Section { kind }),
        };
        if place.replace(section).is_some() {
            return Err(Error::SectionCount { what });
        }
    }
    let section = span_section.ok_or(Error::SectionCount { what: "spans" })?;
    let spans = spans::parse(section, &header, table_size)?;
    let section = entry_section.ok_or(Error::SectionCount { what: "entries" })?;
    let entries = entries::parse(section, header.entries.get(), spans.covered().get())?;
    Ok(Table {
        layer: Digest::new(header.layer),
        entries,
        spans,
        blob_size,
    })
}

/// The body: one zstd frame. Its memory grows with what comes out, and ends where the header says.
fn unpack(stored: &[u8], size: u64) -> Result<Vec<u8>, Error> {
    let wrong = Error::Body { stated: size };
    let decoder = zstd::stream::read::Decoder::with_buffer(stored).map_err(|_| wrong.clone())?;
    let mut body = Vec::new();
    // one byte more, to see whether there is one
    let read = decoder
        .single_frame()
        .take(size.saturating_add(1))
        .read_to_end(&mut body);
    match read {
        Ok(length) if u64::try_from(length) == Ok(size) => Ok(body),
        _ => Err(wrong),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        compact::{
            HEADER_SIZE, MAX_BODY_SIZE, NewSpan, NewTable,
            wire::{put, put_bytes},
            write,
        },
        tar::{Entry, EntryKind, Timestamp},
        units::{CompressedOffset, LayerOffset},
        ztoc::Compression,
    };

    fn entry(name: &str, kind: EntryKind, data: u64, size: u64) -> Entry {
        Entry {
            name: name.as_bytes().to_vec(),
            kind,
            data_offset: LayerOffset(data),
            size,
            linkname: b"x/y".to_vec(),
            mode: 0o100_644,
            uid: u32::MAX,
            gid: 7,
            uname: b"root".as_slice().into(),
            gname: Bytes::new(),
            mtime: Some(Timestamp {
                seconds: -5,
                nanoseconds: 999_999_999,
            }),
            devmajor: -1,
            devminor: i64::MAX,
            pax: vec![
                (b"SCHILY.xattr.user.a".to_vec(), b"\0\x01".to_vec()),
                (b"path".to_vec(), name.as_bytes().to_vec()),
            ],
            sparse: None,
        }
    }

    fn entries() -> Vec<Entry> {
        let mut device = entry("d", EntryKind::Char, 2048, 7);
        device.mtime = None;
        vec![
            entry("a", EntryKind::Directory, 512, 0),
            entry("b", EntryKind::Regular, 1024, 100),
            device,
            entry("e", EntryKind::Regular, 4096, 1000),
            entry("f", EntryKind::Fifo, 5632, 0),
        ]
    }

    fn spans() -> Vec<NewSpan> {
        [(20, 0, 3000, 0), (700, 3, 2000, 500), (1200, 7, 3000, 0)]
            .map(|(start, bits, length, window_size)| NewSpan {
                compressed_start: CompressedOffset(start),
                bits,
                length,
                digest: Digest::of(&[bits]),
                window_size,
            })
            .to_vec()
    }

    fn table(compression: Compression, spans: &[NewSpan], entries: &[Entry]) -> Vec<u8> {
        write(&NewTable {
            layer: Digest::of(b"layer"),
            layer_size: 9000,
            compression,
            span_size: 2048,
            spans,
            entries,
        })
        .unwrap()
    }

    fn gzip_error(change: impl FnOnce(&mut Vec<NewSpan>)) -> Error {
        let mut spans = spans();
        change(&mut spans);
        Table::parse(&table(Compression::Gzip, &spans, &entries())).unwrap_err()
    }

    fn entry_error(change: impl FnOnce(&mut Vec<Entry>)) -> Error {
        let mut entries = entries();
        change(&mut entries);
        Table::parse(&table(Compression::Gzip, &spans(), &entries)).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let bytes = table(Compression::Gzip, &spans(), &entries());
        let table = Table::parse(&bytes).unwrap();
        assert_eq!(table.layer, Digest::of(b"layer"));
        assert_eq!(table.entries, entries());
        assert_eq!(table.blob_size, bytes.len() as u64 + 500);
        assert_eq!(table.spans.compressed_size, 9000);
        assert_eq!(table.spans.span_size, 2048);
        assert_eq!(table.spans.covered(), LayerOffset(8000));
        let found: Vec<_> = table
            .spans
            .spans
            .iter()
            .map(|span| {
                let (from, to) = (span.compressed.clone(), span.uncompressed.clone());
                assert_eq!(span.digest, Digest::of(&[span.bits]));
                (
                    from.start.get()..from.end.get(),
                    to.start.get()..to.end.get(),
                    span.window.clone().map(|window| window.len()),
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                // the byte that the next one shares belongs to both
                (20..701, 0..3000, None),
                (700..1201, 3000..5000, Some(500)),
                (1200..9000, 5000..8000, None),
            ]
        );
        let window = table.spans.spans[1].window.clone().unwrap();
        assert_eq!(window.start, bytes.len());
    }

    #[test]
    fn a_plain_tar_has_spans_without_windows() {
        let mut spans = spans();
        spans[1].window_size = 0;
        let bytes = table(Compression::Uncompressed, &spans, &entries());
        let table = Table::parse(&bytes).unwrap();
        assert_eq!(table.blob_size, bytes.len() as u64);
        for span in &table.spans.spans {
            assert_eq!(span.compressed.start.get(), span.uncompressed.start.get());
            assert_eq!(span.compressed.end.get(), span.uncompressed.end.get());
            assert_eq!((span.bits, &span.window), (0, &None));
        }
    }

    #[test]
    fn a_layer_without_entries_is_one() {
        let bytes = table(Compression::Gzip, &spans()[..1], &[]);
        assert_eq!(Table::parse(&bytes).unwrap().entries, []);
        let none = table(Compression::Gzip, &[], &[]);
        assert_eq!(Table::parse(&none).unwrap().spans.spans, []);
    }

    #[test]
    fn spans_that_cannot_be_have_names() {
        assert_eq!(
            gzip_error(|spans| spans[1].length = 0),
            Error::EmptySpan { span: 1 }
        );
        assert_eq!(
            gzip_error(|spans| spans[0].bits = 1),
            Error::SpanBits { span: 0, bits: 1 }
        );
        assert_eq!(
            gzip_error(|spans| spans[2].bits = 8),
            Error::SpanBits { span: 2, bits: 8 }
        );
        assert_eq!(
            gzip_error(|spans| spans[0].compressed_start = CompressedOffset(9)),
            Error::SpanPlace {
                span: 0,
                start: 9,
                end: 9,
                blob: 9000
            }
        );
        assert_eq!(
            gzip_error(|spans| spans[2].compressed_start = CompressedOffset(9000)),
            Error::SpanPlace {
                span: 1,
                start: 700,
                end: 9001,
                blob: 9000
            }
        );
        assert_eq!(
            gzip_error(|spans| spans[1].length = 502 * 1032 + 1033),
            Error::SpanTooLong {
                span: 1,
                compressed: 501,
                uncompressed: 502 * 1032 + 1033
            }
        );
        assert_eq!(
            gzip_error(|spans| spans[1].window_size = 65_537),
            Error::WindowLength {
                span: 1,
                length: 65_537
            }
        );
        assert_eq!(
            gzip_error(|spans| spans[0].window_size = 1),
            Error::WindowLength { span: 0, length: 1 }
        );
        let beyond = |spans: &mut Vec<NewSpan>| spans[2].length = 9001;
        let mut spans = spans();
        beyond(&mut spans);
        assert!(matches!(
            Table::parse(&table(Compression::Uncompressed, &spans, &entries())),
            Err(Error::SpanPlace { span: 2, .. })
        ));
    }

    #[test]
    fn entries_that_cannot_be_have_names() {
        let number = |field| move |error: Error| matches!(error, Error::EntryNumber { field: found, .. } if found == field);
        // no room for a header before its data
        assert!(number("count of header blocks")(entry_error(|entries| {
            entries[1].data_offset = LayerOffset(512);
        })));
        assert!(number("order of PAX records")(entry_error(|entries| {
            entries[0].pax.swap(0, 1)
        })));
        assert_eq!(
            entry_error(|entries| entries[3].size = 4000),
            Error::EntryBeyondEnd {
                index: 3,
                data: 4096,
                size: 4000,
                covered: 8000
            }
        );
        assert!(matches!(
            entry_error(|entries| entries[3].size = u64::MAX),
            Error::EntryBeyondEnd { index: 3, .. }
        ));
        assert!(matches!(
            entry_error(|entries| entries[4].data_offset = LayerOffset(8192)),
            Error::EntryBeyondEnd { index: 4, .. }
        ));
        assert_eq!(
            entry_error(|entries| entries[1].pax = vec![
                (b"GNU.sparse.major".to_vec(), b"1".to_vec()),
                (b"GNU.sparse.minor".to_vec(), b"0".to_vec())
            ]),
            Error::SparseEntry { index: 1 }
        );
        // a NUL in a name is the end of it: the column is then too long
        assert_eq!(
            entry_error(|entries| entries[1].name = b"a\0b".to_vec()),
            Error::Part {
                part: "names of entries"
            }
        );
    }

    /// A table with this body, and a header that says what is true.
    fn with_body(body: &[u8]) -> Vec<u8> {
        let stored = zstd::bulk::compress(body, 1).unwrap();
        let mut bytes = table(Compression::Gzip, &[], &[])[..HEADER_SIZE].to_vec();
        bytes[64..72].copy_from_slice(&(stored.len() as u64).to_le_bytes());
        bytes[72..80].copy_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend(stored);
        bytes
    }

    #[test]
    fn sections_are_known_or_optional() {
        let section = |kind: u8, content: &[u8]| {
            let mut bytes = vec![kind];
            put_bytes(&mut bytes, content);
            bytes
        };
        let empty = |columns: usize| vec![0; columns];
        let (spans, entries) = (
            section(1, &[&[1, 10][..], &empty(3)].concat()),
            section(2, &empty(15)),
        );
        let parse = |sections: &[&[u8]]| Table::parse(&with_body(&sections.concat()));
        assert!(parse(&[&spans, &entries]).is_ok());
        assert!(parse(&[&entries, &section(200, b"later"), &spans]).is_ok());
        assert_eq!(
            parse(&[&spans, &entries, &section(3, b"later")]),
            Err(Error::Section { kind: 3 })
        );
        assert_eq!(
            parse(&[&spans, &spans, &entries]),
            Err(Error::SectionCount { what: "spans" })
        );
        assert_eq!(
            parse(&[&spans]),
            Err(Error::SectionCount { what: "entries" })
        );
        assert_eq!(parse(&[&[1, 5]]), Err(Error::Part { part: "sections" }));
        // a claim of 2^40 PAX records
        let mut records = Vec::new();
        put(&mut records, 1 << 40);
        assert!(
            super::entries::parse(&entries_with_records(&records), 1, u64::MAX).is_err_and(
                |error| error
                    == Error::Part {
                        part: "PAX records of entries"
                    }
            )
        );
    }

    /// One entry, whose column of records is this.
    fn entries_with_records(records: &[u8]) -> Vec<u8> {
        let mut section = Vec::new();
        for column in 0..15 {
            match column {
                8 | 9 => put_bytes(&mut section, &[]), // no time
                13 => put_bytes(&mut section, &[1]),
                14 => put_bytes(&mut section, records),
                _ => put_bytes(&mut section, &[0]),
            }
        }
        section
    }

    #[test]
    fn headers_that_lie_have_names() {
        let good = table(Compression::Gzip, &spans(), &entries());
        let with = |at: usize, bytes: &[u8]| {
            let mut wrong = good.clone();
            wrong[at..at + bytes.len()].copy_from_slice(bytes);
            Table::parse(&wrong).unwrap_err()
        };
        let header = |error: Error, expected: &str| {
            assert!(
                matches!(error, Error::Header { field, .. } if field == expected),
                "{error}"
            );
        };
        assert_eq!(with(0, b"x"), Error::Magic);
        assert_eq!(with(8, &[2]), Error::Version { version: 2 });
        header(with(12, &[3]), "compression");
        header(with(13, &[1]), "reserved bytes");
        assert!(matches!(with(48, &[0; 8]), Error::SpanPlace { .. })); // a blob of no bytes
        assert!(matches!(with(64, &[0; 8]), Error::Length { .. }));
        assert!(matches!(with(64, &[0xff; 8]), Error::Length { .. }));
        assert!(matches!(with(72, &[0]), Error::Body { .. }));
        header(with(72, &[0xff; 8]), "size of its body");
        assert!(matches!(
            with(72, &(MAX_BODY_SIZE - 1).to_le_bytes()),
            Error::Body { .. }
        ));
        header(with(80, &[0]), "size of all windows");
        header(with(80, &[0xff; 8]), "size of all windows");
        assert_eq!(
            with(88, &[4]),
            Error::Part {
                part: "digests of spans"
            }
        );
        assert_eq!(
            with(92, &[0xff; 4]),
            Error::Part {
                part: "kinds of entries"
            }
        );
        for length in [0, 1, HEADER_SIZE - 1, HEADER_SIZE, good.len() - 1] {
            assert!(matches!(
                Table::parse(&good[..length]),
                Err(Error::Length { .. })
            ));
        }
    }

    #[test]
    fn any_damage_is_an_error_or_a_table() {
        let mut body = Vec::new();
        let good = table(Compression::Gzip, &spans(), &entries());
        std::io::Read::read_to_end(
            &mut zstd::stream::read::Decoder::with_buffer(&good[HEADER_SIZE..]).unwrap(),
            &mut body,
        )
        .unwrap();
        let mut errors = 0;
        for at in 0..body.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff, body[at].wrapping_add(1)] {
                let mut wrong = body.clone();
                wrong[at] = value;
                let mut bytes = with_body(&wrong);
                bytes[80..96].copy_from_slice(&good[80..96]);
                bytes[16..64].copy_from_slice(&good[16..64]);
                errors += u32::from(Table::parse(&bytes).is_err());
            }
        }
        assert!(errors > 500, "damage is noticed: {errors}");
    }
}
