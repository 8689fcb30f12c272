//! One entry out of its header block and of the special headers before it, in the order of precedence that Go has.

use super::{
    Entry, EntryKind, Error, Timestamp,
    header::{BadBlock, Header},
    number, pax,
    sparse::{self, BadMap, PaxSparse},
};
use crate::units::LayerOffset;

/// What special headers have said about the next entry.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) records: pax::Records,
    pub(super) long_name: Vec<u8>,
    pub(super) long_link: Vec<u8>,
    /// A global header has stood here.
    pub(super) global: bool,
}

/// Where a sparse file's data is, as far as it is known.
#[derive(Debug)]
pub(super) struct Sparse {
    /// The file's header.
    pub(super) header: LayerOffset,
    /// Bytes in the layer; with a map that stands before the data.
    pub(super) stored: u64,
    pub(super) pairs: sparse::Pairs,
}

/// How an entry's data stands behind its header.
#[derive(Debug)]
pub(super) enum Form {
    /// As it is in the file.
    Plain,
    /// Old GNU: the header block has the first part of the map and the real size; the entry's size is what is stored.
    Gnu,
    /// PAX 0.0 and 0.1.
    MapInRecords(Sparse),
    /// PAX 1.0.
    MapBeforeData(Sparse),
}

/// Applies what is pending to a header. `data` is where the data starts.
pub(super) fn merge(
    offset: LayerOffset,
    mut header: Header,
    pending: Pending,
    data: LayerOffset,
) -> Result<(Entry, Form), Error> {
    let mut mtime = Timestamp {
        seconds: header.mtime,
        nanoseconds: 0,
    };
    for (key, value) in pending
        .records
        .iter()
        .filter(|(_, value)| !value.is_empty())
    {
        apply(&mut header, &mut mtime, key, value)
            .map_err(|field| Error::Number { offset, field })?;
    }
    if !pending.long_name.is_empty() {
        header.name = pending.long_name;
    }
    if !pending.long_link.is_empty() {
        header.linkname = pending.long_link;
    }
    let kind = kind(&header).ok_or_else(|| Error::UnsupportedType {
        offset,
        name: String::from_utf8_lossy(&header.name).into_owned(),
        flag: header.typeflag,
    })?;
    // only regular files have data, whatever the header's size says
    let stored = match kind {
        EntryKind::Regular => unsigned("size", offset, header.size)?,
        _ => 0,
    };
    let pax_sparse = match header.typeflag {
        b'S' => PaxSparse::No,
        _ => sparse::from_records(&pending.records, &mut header.name, &mut header.size)
            .map_err(|bad| bad_map(offset, &header.name, bad))?,
    };
    let mut entry = Entry {
        name: header.name,
        kind,
        data_offset: data,
        size: stored,
        linkname: header.linkname,
        mode: header.mode,
        uid: truncated(header.uid),
        gid: truncated(header.gid),
        uname: header.uname.into(),
        gname: header.gname.into(),
        mtime: Some(mtime),
        devmajor: header.devmajor,
        devminor: header.devminor,
        pax: pending.records.into_iter().collect(),
        sparse: None,
    };
    let (pairs, form): (_, fn(Sparse) -> Form) = match pax_sparse {
        PaxSparse::No if header.typeflag == b'S' => return Ok((entry, Form::Gnu)),
        PaxSparse::No => return Ok((entry, Form::Plain)),
        PaxSparse::InRecords(pairs) => (pairs, Form::MapInRecords),
        PaxSparse::BeforeData => (sparse::Pairs::new(), Form::MapBeforeData),
    };
    if kind != EntryKind::Regular {
        return Err(bad_map(
            offset,
            &entry.name,
            BadMap("it is no regular file"),
        ));
    }
    entry.size = unsigned("GNU.sparse.realsize", offset, header.size)?;
    let sparse = Sparse {
        header: offset,
        stored,
        pairs,
    };
    Ok((entry, form(sparse)))
}

/// What a type flag stands for; `None` for what is no file.
fn kind(header: &Header) -> Option<EntryKind> {
    Some(match header.typeflag {
        // V7 has no flag for directories
        0 if header.name.ends_with(b"/") => EntryKind::Directory,
        // contiguous files are regular ones to all that is not a special device
        0 | b'0' | b'7' | b'S' => EntryKind::Regular,
        b'1' => EntryKind::Hardlink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::Char,
        b'4' => EntryKind::Block,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        _ => return None,
    })
}

/// One PAX record that is not empty; `Err` names the one that is no number.
fn apply(
    header: &mut Header,
    mtime: &mut Timestamp,
    key: &[u8],
    value: &[u8],
) -> Result<(), &'static str> {
    match key {
        b"path" => header.name = value.to_vec(),
        b"linkpath" => header.linkname = value.to_vec(),
        b"uname" => header.uname = value.to_vec(),
        b"gname" => header.gname = value.to_vec(),
        b"uid" => header.uid = number::decimal(value).ok_or("uid")?,
        b"gid" => header.gid = number::decimal(value).ok_or("gid")?,
        b"size" => header.size = number::decimal(value).ok_or("size")?,
        b"mtime" => *mtime = number::time(value).ok_or("mtime")?,
        b"atime" => drop(number::time(value).ok_or("atime")?),
        b"ctime" => drop(number::time(value).ok_or("ctime")?),
        _ => {}
    }
    Ok(())
}

/// The error of a block at `offset`.
pub(super) fn bad_block(offset: LayerOffset, bad: BadBlock) -> Error {
    match bad {
        BadBlock::Checksum => Error::Checksum { offset },
        BadBlock::Number(field) => Error::Number { offset, field },
    }
}

/// The error of a sparse file whose header is at `offset`.
pub(super) fn bad_map(offset: LayerOffset, name: &[u8], bad: BadMap) -> Error {
    Error::SparseMap {
        offset,
        name: String::from_utf8_lossy(name).into_owned(),
        reason: bad.0,
    }
}

/// A size that is not negative.
pub(super) fn unsigned(field: &'static str, offset: LayerOffset, size: i64) -> Result<u64, Error> {
    u64::try_from(size).map_err(|_| Error::Number { offset, field })
}

/// The low 32 bits, as AWS's tool keeps them.
fn truncated(id: i64) -> u32 {
    let [a, b, c, d, ..] = id.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
