//! From a zTOC's bytes to its entries and spans.

use bytes::Bytes;

use super::{
    Error, SpanTable, Ztoc,
    flatbuffer::{Table, Vector},
    slots,
    spans::Sizes,
    time,
    zinfo::{GzipInfo, TarInfo},
};
use crate::{
    oci::Digest,
    tar::{Entry, EntryKind, shared},
    units::LayerOffset,
};

/// The blocks of a tar.
const BLOCK: u64 = 512;

/// An entry's table of fourteen fields that AWS's tool writes is not shorter.
const TABLE_SIZE: usize = 64;

/// How much may be read out of the bytes. Offsets may all lead to the same place, so that a small file says a lot; one that AWS's tool
/// writes never shares anything, and says at most its own length.
struct Budget(usize);

impl Budget {
    fn spend(&mut self, bytes: usize) -> Result<(), Error> {
        self.0 = self.0.checked_sub(bytes).ok_or(Error::Amplified)?;
        Ok(())
    }

    fn copy(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        self.spend(bytes.len())?;
        Ok(bytes.to_vec())
    }
}

pub(super) fn parse(bytes: &[u8]) -> Result<Ztoc, Error> {
    let root = Table::root(bytes)?;
    let toc = root
        .table(slots::ztoc::TOC)?
        .ok_or(Error::Missing { what: "toc" })?;
    let info = root
        .table(slots::ztoc::COMPRESSION_INFO)?
        .ok_or(Error::Missing {
            what: "compression_info",
        })?;
    let sizes = Sizes {
        compressed: size(&root, slots::ztoc::COMPRESSED_ARCHIVE_SIZE, "compressed")?,
        uncompressed: size(
            &root,
            slots::ztoc::UNCOMPRESSED_ARCHIVE_SIZE,
            "uncompressed",
        )?,
    };
    // twice the length leaves room for tools that share equal strings
    let mut budget = Budget(bytes.len().saturating_mul(2));
    let (spans, checkpoints) = span_table(&info, sizes, &mut budget)?;
    let metadata = toc.vector(slots::toc::METADATA)?;
    let entries = entries(metadata, spans.covered(), &mut budget)?;
    let text = |slot| {
        root.bytes(slot)
            .map(|text| String::from_utf8_lossy(text).into_owned())
    };
    Ok(Ztoc {
        version: text(slots::ztoc::VERSION)?,
        build_tool: text(slots::ztoc::BUILD_TOOL_IDENTIFIER)?,
        entries,
        spans,
        checkpoints,
    })
}

fn size(root: &Table<'_>, slot: usize, which: &'static str) -> Result<u64, Error> {
    let value = root.i64(slot)?;
    u64::try_from(value).map_err(|_| Error::NegativeSize { which, value })
}

fn span_table(
    info: &Table<'_>,
    sizes: Sizes,
    budget: &mut Budget,
) -> Result<(SpanTable, std::ops::Range<usize>), Error> {
    use slots::compression_info as slot;
    let (at, blob) = info.bytes_at(slot::CHECKPOINTS)?;
    let max_span_id = info.i32(slot::MAX_SPAN_ID)?;
    let listed = info.vector(slot::SPAN_DIGESTS)?;
    let count = |checkpoints: u64| {
        let error = Error::SpanCount {
            max_span_id,
            checkpoints,
            digests: listed.len(),
        };
        let expected = i64::from(max_span_id).checked_add(1);
        let equal = u64::try_from(listed.len()) == Ok(checkpoints)
            && i64::try_from(checkpoints).ok() == expected;
        if equal { Ok(()) } else { Err(error) }
    };
    let algorithm = info.i8(slot::COMPRESSION_ALGORITHM, slot::GZIP)?;
    let spans = match algorithm {
        slot::GZIP => {
            let checkpoints = GzipInfo::parse(blob)?;
            count(u64::try_from(checkpoints.count).unwrap_or(u64::MAX))?;
            SpanTable::gzip(&checkpoints, sizes, &digests(listed, budget)?, at)?
        }
        slot::UNCOMPRESSED => {
            let tar = TarInfo::parse(blob)?;
            count(tar.spans())?;
            SpanTable::uncompressed(tar, sizes, &digests(listed, budget)?)?
        }
        algorithm => return Err(Error::Compression { algorithm }),
    };
    Ok((spans, at..at.saturating_add(blob.len())))
}

fn digests(listed: Vector<'_>, budget: &mut Budget) -> Result<Vec<Digest>, Error> {
    listed
        .strings()
        .enumerate()
        .map(|(span, text)| {
            let text = text?;
            budget.spend(text.len())?;
            std::str::from_utf8(text)
                .ok()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| Error::Digest {
                    span,
                    text: String::from_utf8_lossy(text).into_owned(),
                })
        })
        .collect()
}

/// The entries in tar order, each checked against the one before it.
fn entries(
    listed: Vector<'_>,
    covered: LayerOffset,
    budget: &mut Budget,
) -> Result<Vec<Entry>, Error> {
    let most = listed.len().min(budget.0 / TABLE_SIZE);
    let (mut found, mut sizes) = (Vec::with_capacity(most), Vec::with_capacity(most));
    for (index, table) in listed.tables().enumerate() {
        sizes.push(entry(index, &table?, budget, &mut found)?);
    }
    // a tar's entries that share a name count in tar order, so that is what the table's must be brought into
    if !found.is_sorted_by_key(|entry: &Entry| entry.data_offset) {
        let mut pairs: Vec<_> = found.into_iter().zip(sizes).collect();
        pairs.sort_by_key(|(entry, _)| entry.data_offset);
        (found, sizes) = pairs.into_iter().unzip();
    }
    check_offsets(&found, &sizes, covered)?;
    Ok(found)
}

/// Puts an entry to those `found`, and gives its size as the table has it: AWS's tool also writes that of entries without data.
fn entry(
    index: usize,
    table: &Table<'_>,
    budget: &mut Budget,
    found: &mut Vec<Entry>,
) -> Result<u64, Error> {
    use slots::file as slot;
    budget.spend(TABLE_SIZE)?;
    let kind = kind(index, table.bytes(slot::TYPE)?)?;
    let mut text = |slot| budget.copy(table.bytes(slot)?);
    let (name, linkname) = (text(slot::NAME)?, text(slot::LINKNAME)?);
    let last = found.last();
    let mut owner = |slot, last: Option<&Bytes>| {
        let text = table.bytes(slot)?;
        budget.spend(text.len())?;
        Ok(shared(last, text))
    };
    let uname = owner(slot::UNAME, last.map(|last| &last.uname))?;
    let gname = owner(slot::GNAME, last.map(|last| &last.gname))?;
    if name.contains(&0) || linkname.contains(&0) {
        return Err(Error::NulInName { index });
    }
    let offset = table.i64(slot::UNCOMPRESSED_OFFSET)?;
    let size = table.i64(slot::UNCOMPRESSED_SIZE)?;
    let (Ok(data_offset), Ok(listed_size)) = (u64::try_from(offset), u64::try_from(size)) else {
        return Err(Error::EntryRange {
            index,
            offset,
            size,
        });
    };
    let is_regular = kind == EntryKind::Regular;
    found.push(Entry {
        name,
        kind,
        data_offset: LayerOffset(data_offset),
        size: if is_regular { listed_size } else { 0 },
        linkname,
        mode: table.i64(slot::MODE)?,
        uid: table.u32(slot::UID)?,
        gid: table.u32(slot::GID)?,
        uname,
        gname,
        mtime: time::parse(table.bytes(slot::MOD_TIME)?),
        devmajor: table.i64(slot::DEVMAJOR)?,
        devminor: table.i64(slot::DEVMINOR)?,
        pax: records(table.vector(slot::XATTRS)?, budget)?,
        sparse: None,
    });
    if is_regular && found.last().is_some_and(Entry::says_sparse) {
        return Err(Error::SparseEntry { index });
    }
    Ok(listed_size)
}

fn kind(index: usize, text: &[u8]) -> Result<EntryKind, Error> {
    Ok(match text {
        b"reg" => EntryKind::Regular,
        b"dir" => EntryKind::Directory,
        b"symlink" => EntryKind::Symlink,
        b"hardlink" => EntryKind::Hardlink,
        b"char" => EntryKind::Char,
        b"block" => EntryKind::Block,
        b"fifo" => EntryKind::Fifo,
        _ => {
            return Err(Error::EntryType {
                index,
                text: String::from_utf8_lossy(text).into_owned(),
            });
        }
    })
}

/// Keys and values.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

fn records(listed: Vector<'_>, budget: &mut Budget) -> Result<Records, Error> {
    /// Offset, table and two empty strings.
    const RECORD_SIZE: usize = 32;
    let mut records = Vec::new();
    for table in listed.tables() {
        let table = table?;
        budget.spend(RECORD_SIZE)?;
        records.push((
            budget.copy(table.bytes(slots::xattr::KEY)?)?,
            budget.copy(table.bytes(slots::xattr::VALUE)?)?,
        ));
    }
    // stable: of a key that comes twice, a look-up may give either
    records.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(records)
}

/// The tar's headers are not in the table, but where they start follows from the entry before. Data that starts before that is what
/// AWS's reader calls an invalid TOC entry; data without room for a header, or beyond the spans, is what it does not look for.
fn check_offsets(
    entries: &[Entry],
    listed_sizes: &[u64],
    covered: LayerOffset,
) -> Result<(), Error> {
    // the end of the data before, and the same by the size that the table lists, which may be of an entry that has no data
    let (mut end, mut listed_end) = (0_u64, 0_u64);
    for (index, (entry, listed_size)) in entries.iter().zip(listed_sizes).enumerate() {
        let data = entry.data_offset.get();
        let has_room = end.checked_add(BLOCK).is_some_and(|end| end <= data);
        if listed_end > data || !has_room {
            return Err(Error::EntryOverlap {
                index,
                header: listed_end,
                data,
            });
        }
        if !data.is_multiple_of(BLOCK) {
            return Err(Error::EntryUnaligned { index, data });
        }
        let data_end = data.checked_add(entry.size);
        let ends = data_end
            .filter(|end| *end <= covered.get())
            .and_then(|end| end.checked_next_multiple_of(BLOCK))
            .zip(
                data.checked_add(*listed_size)
                    .and_then(|end| end.checked_next_multiple_of(BLOCK)),
            );
        let Some(ends) = ends else {
            return Err(Error::EntryBeyondEnd {
                index,
                data,
                size: entry.size,
                covered: covered.get(),
            });
        };
        (end, listed_end) = ends;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use flatbuffers::FlatBufferBuilder;

    use super::*;
    use crate::units::CompressedOffset;
    use crate::ztoc::{CheckpointsBuilder, ZtocParts, write};

    /// A layer of so many empty files.
    fn ztoc_of(entries: u64) -> Vec<u8> {
        let entries: Vec<Entry> = (0..entries)
            .map(|index| Entry {
                name: format!("usr/lib/python3/dist-packages/package/module_{index}.py")
                    .into_bytes(),
                kind: EntryKind::Regular,
                data_offset: LayerOffset(index * 1024 + 512),
                size: 300,
                linkname: Vec::new(),
                mode: 0o644,
                uid: 0,
                gid: 0,
                uname: b"root".as_slice().into(),
                gname: b"root".as_slice().into(),
                mtime: Some(crate::tar::Timestamp::default()),
                devmajor: 0,
                devminor: 0,
                pax: vec![(b"mtime".to_vec(), b"0".to_vec())],
                sparse: None,
            })
            .collect();
        let size = u64::try_from(entries.len()).expect("small") * 1024 + 1024;
        let mut checkpoints = CheckpointsBuilder::new(4 << 20);
        checkpoints.push(CompressedOffset(10), LayerOffset(0), 0, &[]);
        write(&ZtocParts {
            version: "0.9",
            build_tool: "test",
            entries: &entries,
            compressed_size: size,
            uncompressed_size: size,
            compression: super::super::Compression::Gzip,
            digests: &[crate::oci::digest::Hasher::default().finish()],
            checkpoints: &checkpoints.finish(),
        })
    }

    #[test]
    fn what_is_written_never_reaches_the_budget() {
        for count in [0, 1, 100_000] {
            let bytes = ztoc_of(count);
            let ztoc = parse(&bytes).expect("it was just written");
            assert_eq!(u64::try_from(ztoc.entries.len()), Ok(count));
        }
    }

    /// The same layer's bytes with its digests, and as many entries of one table as said.
    fn repeating(count: usize, name: &str) -> Vec<u8> {
        let slot = super::super::write::voffset;
        let mut to = FlatBufferBuilder::new();
        let name = to.create_string(name);
        let kind = to.create_string("dir");
        let table = to.start_table();
        to.push_slot_always(slot(slots::file::NAME), name);
        to.push_slot_always(slot(slots::file::TYPE), kind);
        let entry = to.end_table(table);
        let listed = to.create_vector(&vec![entry; count]);
        let table = to.start_table();
        to.push_slot_always(slot(slots::toc::METADATA), listed);
        let toc = to.end_table(table);
        let mut checkpoints = CheckpointsBuilder::new(4 << 20);
        checkpoints.push(CompressedOffset(10), LayerOffset(0), 0, &[]);
        let checkpoints = to.create_vector(&checkpoints.finish());
        let digest = crate::oci::digest::Hasher::default().finish();
        let digest = to.create_string(&digest.to_string());
        let digests = to.create_vector(&[digest]);
        let table = to.start_table();
        to.push_slot_always(slot(slots::compression_info::SPAN_DIGESTS), digests);
        to.push_slot_always(slot(slots::compression_info::CHECKPOINTS), checkpoints);
        let info = to.end_table(table);
        let table = to.start_table();
        to.push_slot_always(slot(slots::ztoc::TOC), toc);
        to.push_slot_always(slot(slots::ztoc::COMPRESSED_ARCHIVE_SIZE), 1000_i64);
        to.push_slot_always(slot(slots::ztoc::UNCOMPRESSED_ARCHIVE_SIZE), 1000_i64);
        to.push_slot_always(slot(slots::ztoc::COMPRESSION_INFO), info);
        let root = to.end_table(table);
        to.finish_minimal(root);
        to.finished_data().to_vec()
    }

    #[test]
    fn a_file_says_at_most_twice_its_length() {
        // the digest's 71 bytes, and of each entry its table and its name
        let bytes = |count: usize, name: &str| 71 + count * (TABLE_SIZE + name.len());
        let name = "n".repeat(1000);
        let few = repeating(1, &name);
        assert!(bytes(1, &name) <= 2 * few.len());
        // it is another error, which comes later: its data starts where no header has room
        assert!(matches!(parse(&few), Err(Error::EntryOverlap { .. })));
        // the first count at which it is too much
        let is_too_much = |count: usize| bytes(count, &name) > 2 * repeating(count, &name).len();
        let most = (1..1000).find(|count| is_too_much(*count)).expect("soon");
        assert!(most > 2);
        assert_eq!(parse(&repeating(most, &name)), Err(Error::Amplified));
        let within = parse(&repeating(most - 1, &name));
        assert!(matches!(within, Err(Error::EntryOverlap { .. })));
    }

    #[test]
    fn every_part_of_an_entry_is_counted() {
        let bytes = ztoc_of(1);
        let root = Table::root(&bytes).expect("it was just written");
        let toc = root.table(slots::ztoc::TOC).unwrap().unwrap();
        let info = root.table(slots::ztoc::COMPRESSION_INFO).unwrap().unwrap();
        let name = "usr/lib/python3/dist-packages/package/module_0.py";
        let all = TABLE_SIZE + name.len() + "root".len() * 2 + 32 + "mtime".len() + "0".len();
        let read = |budget: usize| {
            let listed = toc.vector(slots::toc::METADATA).unwrap();
            let mut budget = Budget(budget);
            entries(listed, LayerOffset(2048), &mut budget).map(|_| budget.0)
        };
        assert_eq!(read(all), Ok(0));
        assert_eq!(read(all + 7), Ok(7));
        for less in 0..all {
            assert_eq!(read(less), Err(Error::Amplified), "{less} of {all}");
        }
        let digest = |budget: usize| {
            let listed = info.vector(slots::compression_info::SPAN_DIGESTS).unwrap();
            digests(listed, &mut Budget(budget)).map(|digests| digests.len())
        };
        assert_eq!(digest(71), Ok(1));
        assert_eq!(digest(70), Err(Error::Amplified));
    }

    #[test]
    fn a_file_that_says_more_than_its_length_is_refused() {
        let mut to = FlatBufferBuilder::new();
        let slot = super::super::write::voffset;
        let name = to.create_string(&"n".repeat(60_000));
        let kind = to.create_string("reg");
        let table = to.start_table();
        to.push_slot_always(slot(slots::file::NAME), name);
        to.push_slot_always(slot(slots::file::TYPE), kind);
        let entry = to.end_table(table);
        // each of these offsets leads to the same table
        let listed = to.create_vector(&vec![entry; 100_000]);
        let table = to.start_table();
        to.push_slot_always(slot(slots::toc::METADATA), listed);
        let toc = to.end_table(table);
        to.finish_minimal(toc);
        let bytes = to.finished_data();
        let listed = Table::root(bytes)
            .and_then(|toc| toc.vector(slots::toc::METADATA))
            .expect("it was just built");
        let mut budget = Budget(bytes.len() * 2);
        let refused = entries(listed, LayerOffset(u64::MAX), &mut budget);
        assert_eq!(refused, Err(Error::Amplified));
    }
}
