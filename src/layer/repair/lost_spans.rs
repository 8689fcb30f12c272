//! Compares the spans on the local disk with their checksums.

use std::{io, os::unix::fs::FileExt as _};

use crate::{
    buffer::set_length,
    error::{Kind, Result, ResultExt as _},
    ext4::BLOCK_SIZE,
    layer::{
        disk::Disk,
        read::reader::SpanReader,
        stored::{
            directory::{self, DiskDirectory},
            seal::{self, is_damage},
            span_record::SpanRecord,
        },
        verify::non_file_bytes::{self, NonFileBytes},
    },
    units::SpanId,
};

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;

/// Spans whose stored bytes differ from their checksums.
#[derive(Debug, Default)]
pub(crate) struct LostSpans {
    /// Spans whose data on the disk is damaged.
    pub data: Vec<SpanId>,
    /// Spans of which only the bytes in `rest` or `last` are damaged.
    pub rest: Vec<SpanId>,
    /// Spans without a checksum, which could not be compared.
    pub unchecked: Vec<SpanId>,
    /// Bytes that were read.
    pub bytes: u64,
}

impl LostSpans {
    pub(crate) fn is_empty(&self) -> bool {
        self.data.is_empty() && self.rest.is_empty()
    }

    /// A description of the lost spans for a person.
    pub(crate) fn describe(&self, disk: &Disk) -> String {
        let spans = |spans: &[SpanId]| match spans {
            [one] => format!("span {one}"),
            [first, ..] => format!("{} spans (from span {first} on)", spans.len()),
            [] => String::new(),
        };
        let at = |name| disk.path().with_file_name(name).display().to_string();
        let data = (!self.data.is_empty())
            .then(|| format!("{} of {}", spans(&self.data), at(directory::DISK)));
        let rest = (!self.rest.is_empty())
            .then(|| format!("{} of {}", spans(&self.rest), at(directory::REST)));
        let both: Vec<_> = data.into_iter().chain(rest).collect();
        format!("the local disk has not kept {}", both.join(" and "))
    }
}

/// Reads all present spans, and returns those that are lost. Without `rest` only their data is read. `read` gets the number of bytes so
/// far. Blocks.
pub(crate) fn lost(
    disk: &Disk,
    rest: Option<&NonFileBytes>,
    mut read: impl FnMut(u64),
) -> Result<LostSpans> {
    let (reader, layout) = (disk.reader(), disk.layout());
    let mut lost = LostSpans::default();
    for span in (0..layout.spans().count()).map(SpanId) {
        if !reader.has(span) {
            continue;
        }
        let unread = || format!("span {span} of {} cannot be read", disk.path().display());
        let mut record = record_of(reader, span).or_kind(Kind::Io, unread)?;
        if record == SpanRecord::Absent && !disk.verification().layer_check().is_bare(span) {
            // it may have become present since the last sync, which writes the records
            disk.sync()?;
            record = record_of(reader, span).or_kind(Kind::Io, unread)?;
        }
        let SpanRecord::Present(check) = record else {
            match (record, rest) {
                (SpanRecord::Absent, Some(_))
                    if !disk.verification().layer_check().is_bare(span) =>
                {
                    lost.data.push(span)
                }
                (SpanRecord::Absent, Some(_)) => {} // it has no file data, and is not present
                _ => lost.unchecked.push(span),
            }
            continue;
        };
        let bytes = layout.spans().uncompressed(span);
        lost.bytes += bytes.end.get() - bytes.start.get();
        read(lost.bytes);
        if !has_checksum(data_checksum(reader, span), check.data).or_kind(Kind::Io, unread)? {
            lost.data.push(span);
        } else if let Some(rest) = rest {
            let has_last = !check.has_last || last_is_whole(disk.directory());
            if !has_last
                || !has_checksum(rest.checksum(span), check.rest).or_kind(Kind::Io, unread)?
            {
                lost.rest.push(span);
            }
        }
    }
    Ok(lost)
}

/// The record of a span; a damaged one counts as absent.
fn record_of(reader: &SpanReader, span: SpanId) -> io::Result<SpanRecord> {
    match reader.presence().bitmap().record(span) {
        Err(error) if is_damage(&error) => Ok(SpanRecord::Absent),
        record => record,
    }
}

/// Whether bytes could be read and have their checksum.
fn has_checksum(found: io::Result<u32>, expected: u32) -> io::Result<bool> {
    match found {
        Err(error) if is_damage(&error) => Ok(false),
        found => Ok(found? == expected),
    }
}

fn last_is_whole(directory: &DiskDirectory) -> bool {
    let bytes = directory.read(directory::LAST);
    bytes.is_ok_and(|bytes| seal::unseal(&bytes).is_some())
}

/// The CRC-32 of a span's data on the disk, as `scatter` returns it.
pub(super) fn data_checksum(reader: &SpanReader, span: SpanId) -> io::Result<u32> {
    let layer = reader.layout().spans().uncompressed(span);
    let mut crc = flate2::Crc::new();
    let mut buffer = Vec::new();
    for region in reader.layout().regions().in_layer(&layer) {
        let Some(part) = region.clip_layer(&layer) else {
            continue;
        };
        let (mut position, end) = (part.disk.start.get(), part.disk.end.get());
        while position < end {
            set_length(&mut buffer, (end - position).min(PIECE) as usize);
            reader.file().read(position, &mut buffer)?;
            crc.update(&buffer);
            position += buffer.len() as u64;
        }
    }
    Ok(crc.sum())
}

/// Writes zeros between the ends of files and of their last blocks where other bytes are. Returns the number of changed blocks.
pub(super) fn repair_slack(reader: &SpanReader) -> io::Result<u64> {
    let mut repaired = 0;
    let mut regions = non_file_bytes::all(reader.layout().regions()).peekable();
    let mut buffer = Vec::new();
    while let Some(region) = regions.next() {
        let end = region.disk.end.get();
        // two regions of a sparse file may share a block
        let next = regions
            .peek()
            .map_or(u64::MAX, |next| next.disk.start.get());
        let length = end.next_multiple_of(BLOCK_SIZE).min(next) - end;
        buffer.resize(length as usize, 0); // less than a block
        let is_read = reader.file().read(end, &mut buffer);
        if length > 0 && (is_read.is_err() || buffer.iter().any(|byte| *byte != 0)) {
            buffer.fill(0);
            reader.file().get().write_all_at(&buffer, end)?;
            repaired += 1;
        }
    }
    Ok(repaired)
}
