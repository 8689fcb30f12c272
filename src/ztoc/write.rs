//! A zTOC's bytes, the same as AWS's tool writes: the order in which the parts are built is part of the format here.

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, TableFinishedWIPOffset, WIPOffset};

use super::{Compression, slots, time};
use crate::{
    oci::Digest,
    tar::{Entry, EntryKind},
};

/// What a zTOC is made of.
#[derive(Clone, Copy, Debug)]
pub struct ZtocParts<'a> {
    /// `version`; `0.9`.
    pub version: &'a str,
    /// `build_tool_identifier`.
    pub build_tool: &'a str,
    /// The entries, in tar order. None may be sparse.
    pub entries: &'a [Entry],
    /// The blob's size.
    pub compressed_size: u64,
    /// The tar's end: `tar::Archive::end`.
    pub uncompressed_size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// The SHA-256 of each span's compressed bytes: from `in - (bits != 0)` of a checkpoint to `in` of the next, the last to the
    /// blob's end.
    pub digests: &'a [Digest],
    /// `CheckpointsBuilder::finish` or `TarInfo::to_bytes`.
    pub checkpoints: &'a [u8],
}

type Offset = WIPOffset<TableFinishedWIPOffset>;

/// Serialises. Times are written in UTC; one whose year has not four digits, or none, is written as an empty string.
///
/// A zTOC holds numbers as `i64` and spans as `i32`; larger ones (no blob has them) are cut to the largest.
pub fn write(parts: &ZtocParts<'_>) -> Vec<u8> {
    let mut to = FlatBufferBuilder::with_capacity(parts.checkpoints.len().saturating_add(4096));
    let version = to.create_string(parts.version);
    let build_tool = to.create_string(parts.build_tool);
    let mut entries: Vec<Offset> = parts
        .entries
        .iter()
        .rev()
        .map(|entry| file_metadata(&mut to, entry))
        .collect();
    entries.reverse();
    let metadata = to.create_vector(&entries);
    let table = to.start_table();
    to.push_slot_always(voffset(slots::toc::METADATA), metadata);
    let toc = to.end_table(table);
    let compression = compression_info(&mut to, parts);
    let table = to.start_table();
    to.push_slot_always(voffset(slots::ztoc::VERSION), version);
    to.push_slot_always(voffset(slots::ztoc::BUILD_TOOL_IDENTIFIER), build_tool);
    to.push_slot_always(voffset(slots::ztoc::TOC), toc);
    let (compressed, uncompressed) = (
        signed(parts.compressed_size),
        signed(parts.uncompressed_size),
    );
    to.push_slot(voffset(slots::ztoc::COMPRESSED_ARCHIVE_SIZE), compressed, 0);
    to.push_slot(
        voffset(slots::ztoc::UNCOMPRESSED_ARCHIVE_SIZE),
        uncompressed,
        0,
    );
    to.push_slot_always(voffset(slots::ztoc::COMPRESSION_INFO), compression);
    let root = to.end_table(table);
    to.finish_minimal(root);
    to.finished_data().to_vec()
}

fn file_metadata(to: &mut FlatBufferBuilder<'_>, entry: &Entry) -> Offset {
    use slots::file as slot;
    let name = to.create_byte_string(&entry.name);
    let kind = to.create_string(type_name(entry.kind));
    let linkname = to.create_byte_string(&entry.linkname);
    let uname = to.create_byte_string(&entry.uname);
    let gname = to.create_byte_string(&entry.gname);
    let mtime = to.create_string(&entry.mtime.map(time::format).unwrap_or_default());
    let records: Vec<Offset> = entry
        .pax
        .iter()
        .map(|(key, value)| {
            let key = to.create_byte_string(key);
            let value = to.create_byte_string(value);
            let table = to.start_table();
            to.push_slot_always(voffset(slots::xattr::KEY), key);
            to.push_slot_always(voffset(slots::xattr::VALUE), value);
            to.end_table(table)
        })
        .collect();
    let records: WIPOffset<flatbuffers::Vector<'_, ForwardsUOffset<_>>> =
        to.create_vector(&records);
    let table = to.start_table();
    to.push_slot_always(voffset(slot::NAME), name);
    to.push_slot_always(voffset(slot::TYPE), kind);
    let offset = signed(entry.data_offset.get());
    to.push_slot(voffset(slot::UNCOMPRESSED_OFFSET), offset, 0);
    to.push_slot(voffset(slot::UNCOMPRESSED_SIZE), signed(entry.size), 0);
    to.push_slot_always(voffset(slot::LINKNAME), linkname);
    to.push_slot(voffset(slot::MODE), entry.mode, 0);
    to.push_slot(voffset(slot::UID), entry.uid, 0);
    to.push_slot(voffset(slot::GID), entry.gid, 0);
    to.push_slot_always(voffset(slot::UNAME), uname);
    to.push_slot_always(voffset(slot::GNAME), gname);
    to.push_slot_always(voffset(slot::MOD_TIME), mtime);
    to.push_slot(voffset(slot::DEVMAJOR), entry.devmajor, 0);
    to.push_slot(voffset(slot::DEVMINOR), entry.devminor, 0);
    to.push_slot_always(voffset(slot::XATTRS), records);
    to.end_table(table)
}

fn compression_info(to: &mut FlatBufferBuilder<'_>, parts: &ZtocParts<'_>) -> Offset {
    use slots::compression_info as slot;
    let checkpoints = to.create_vector(parts.checkpoints);
    let digests: Vec<_> = parts
        .digests
        .iter()
        .map(|digest| to.create_string(&digest.to_string()))
        .collect();
    let digests = to.create_vector(&digests);
    let spans = i32::try_from(parts.digests.len()).unwrap_or(i32::MAX);
    let algorithm = match parts.compression {
        Compression::Gzip => slot::GZIP,
        Compression::Uncompressed => slot::UNCOMPRESSED,
    };
    let table = to.start_table();
    to.push_slot(voffset(slot::MAX_SPAN_ID), spans.saturating_sub(1), 0);
    to.push_slot_always(voffset(slot::SPAN_DIGESTS), digests);
    to.push_slot_always(voffset(slot::CHECKPOINTS), checkpoints);
    to.push_slot(voffset(slot::COMPRESSION_ALGORITHM), algorithm, slot::GZIP);
    to.end_table(table)
}

/// The `type` string of an entry.
fn type_name(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::Regular => "reg",
        EntryKind::Directory => "dir",
        EntryKind::Symlink => "symlink",
        EntryKind::Hardlink => "hardlink",
        EntryKind::Char => "char",
        EntryKind::Block => "block",
        EntryKind::Fifo => "fifo",
    }
}

/// The place of a slot in a vtable, behind its two sizes.
pub(super) fn voffset(slot: usize) -> flatbuffers::VOffsetT {
    // slots are small constants
    u16::try_from(slot)
        .unwrap_or_default()
        .saturating_mul(2)
        .saturating_add(4)
}

pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
