//! The section of entries: a column a field, so that like stands beside like and packs well.

use super::{
    Error,
    wire::{Cursor, put, put_bytes, put_signed},
};
use crate::{
    tar::{Entry, EntryKind, MAX_TABLE_SIZE, Timestamp, shared},
    units::LayerOffset,
    ztoc::storable,
};

/// Bytes of a tar's block: data starts and headers stand at multiples of it.
const TAR_BLOCK: u64 = 512;

/// On the byte of an entry's kind: it has a time.
const HAS_MTIME: u8 = 0x80;

const KINDS: [EntryKind; 7] = [
    EntryKind::Regular,
    EntryKind::Directory,
    EntryKind::Symlink,
    EntryKind::Hardlink,
    EntryKind::Char,
    EntryKind::Block,
    EntryKind::Fifo,
];

/// The columns, in the order in which they are stored.
#[derive(Default)]
struct Columns<C> {
    names: C,
    links: C,
    users: C,
    groups: C,
    kinds: C,
    modes: C,
    uids: C,
    gids: C,
    seconds: C,
    nanoseconds: C,
    majors: C,
    minors: C,
    sizes: C,
    headers: C,
    records: C,
}

impl<C> Columns<C> {
    fn as_array(&self) -> [&C; 15] {
        [
            &self.names,
            &self.links,
            &self.users,
            &self.groups,
            &self.kinds,
            &self.modes,
            &self.uids,
            &self.gids,
            &self.seconds,
            &self.nanoseconds,
            &self.majors,
            &self.minors,
            &self.sizes,
            &self.headers,
            &self.records,
        ]
    }
}

/// The section's bytes.
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut columns = Columns::<Vec<u8>>::default();
    let mut end = 0_u64;
    let mut before = 0_i64;
    for entry in entries {
        for (column, text) in [
            (&mut columns.names, &entry.name[..]),
            (&mut columns.links, &entry.linkname),
            (&mut columns.users, &entry.uname),
            (&mut columns.groups, &entry.gname),
        ] {
            column.extend_from_slice(text);
            column.push(0);
        }
        let mtime = storable(entry.mtime);
        let kind = KINDS.iter().position(|kind| *kind == entry.kind);
        let kind = u8::try_from(kind.unwrap_or(0)).unwrap_or(0); // all seven are in the list
        columns
            .kinds
            .push(kind | if mtime.is_some() { HAS_MTIME } else { 0 });
        put_signed(&mut columns.modes, entry.mode);
        put(&mut columns.uids, entry.uid.into());
        put(&mut columns.gids, entry.gid.into());
        if let Some(mtime) = mtime {
            put_signed(&mut columns.seconds, mtime.seconds.wrapping_sub(before));
            put(&mut columns.nanoseconds, mtime.nanoseconds.into());
            before = mtime.seconds;
        }
        put_signed(&mut columns.majors, entry.devmajor);
        put_signed(&mut columns.minors, entry.devminor);
        put(&mut columns.sizes, entry.size);
        let headers = entry.data_offset.get().saturating_sub(end);
        put(
            &mut columns.headers,
            headers.checked_div(TAR_BLOCK).unwrap_or(0),
        );
        end = data_end(entry.kind, entry.data_offset.get(), entry.size).unwrap_or(u64::MAX);
        put(
            &mut columns.records,
            u64::try_from(entry.pax.len()).unwrap_or(u64::MAX),
        );
        for (key, value) in &entry.pax {
            put_bytes(&mut columns.records, key);
            put_bytes(&mut columns.records, value);
        }
    }
    let mut section = Vec::new();
    for column in columns.as_array() {
        put_bytes(&mut section, column);
    }
    section
}

/// Where the next header stands after an entry.
fn data_end(kind: EntryKind, start: u64, size: u64) -> Option<u64> {
    let length = match kind {
        EntryKind::Regular => size,
        _ => 0,
    };
    start
        .checked_add(length)?
        .checked_next_multiple_of(TAR_BLOCK)
}

/// Parses the section. `covered` is where the last span ends.
pub(super) fn parse(section: &[u8], count: u32, covered: u64) -> Result<Vec<Entry>, Error> {
    let mut section = Cursor::new(section, "columns of entries");
    let mut column = |part| Ok(Cursor::new(section.bytes()?, part));
    let mut columns = Columns {
        names: column("names of entries")?,
        links: column("links of entries")?,
        users: column("owners of entries")?,
        groups: column("groups of entries")?,
        kinds: column("kinds of entries")?,
        modes: column("modes of entries")?,
        uids: column("owners' numbers of entries")?,
        gids: column("groups' numbers of entries")?,
        seconds: column("times of entries")?,
        nanoseconds: column("nanoseconds of entries")?,
        majors: column("major numbers of entries")?,
        minors: column("minor numbers of entries")?,
        sizes: column("sizes of entries")?,
        headers: column("headers of entries")?,
        records: column("PAX records of entries")?,
    };
    section.finish()?;
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if columns.kinds.left() != count {
        return Err(Error::Part {
            part: "kinds of entries",
        });
    }
    let mut entries = Vec::new();
    let mut memory = 0_usize;
    let mut end = 0_u64;
    let mut before = 0_i64;
    for index in 0..count {
        let entry = one(
            index,
            &mut columns,
            entries.last(),
            &mut end,
            &mut before,
            covered,
        )?;
        memory = memory.saturating_add(entry.memory());
        if memory > MAX_TABLE_SIZE {
            return Err(Error::TooLarge { index });
        }
        entries.push(entry);
    }
    for column in columns.as_array() {
        column.clone().finish()?;
    }
    Ok(entries)
}

/// The next entry, after the `last`. `end` is where its headers start at the earliest, `before` the seconds of the latest time; both are
/// moved on.
fn one(
    index: usize,
    columns: &mut Columns<Cursor<'_>>,
    last: Option<&Entry>,
    end: &mut u64,
    before: &mut i64,
    covered: u64,
) -> Result<Entry, Error> {
    let number = |field, value: u64| Error::EntryNumber {
        index,
        field,
        value,
    };
    let small = |field, value: u64| u32::try_from(value).map_err(|_| number(field, value));
    let code = columns.kinds.byte()?;
    let kind = *KINDS
        .get(usize::from(code & !HAS_MTIME))
        .ok_or(Error::EntryKind { index, kind: code })?;
    let mtime = match code & HAS_MTIME {
        0 => None,
        _ => {
            let seconds = before.wrapping_add(columns.seconds.signed()?);
            *before = seconds;
            let nanoseconds = columns.nanoseconds.number()?;
            let nanoseconds = u32::try_from(nanoseconds)
                .ok()
                .filter(|nanoseconds| *nanoseconds < 1_000_000_000)
                .ok_or_else(|| number("nanoseconds", nanoseconds))?;
            Some(Timestamp {
                seconds,
                nanoseconds,
            })
        }
    };
    // as in a zTOC: what could not stand there does not stand here
    if storable(mtime) != mtime {
        let seconds = mtime.map_or(0, |mtime| mtime.seconds);
        return Err(number("time", seconds.cast_unsigned()));
    }
    let size = columns.sizes.number()?;
    let headers = columns.headers.number()?;
    let data = headers
        .checked_mul(TAR_BLOCK)
        .filter(|length| *length > 0)
        .and_then(|length| end.checked_add(length))
        .ok_or_else(|| number("count of header blocks", headers))?;
    let length = if kind == EntryKind::Regular { size } else { 0 };
    let beyond = Error::EntryBeyondEnd {
        index,
        data,
        size,
        covered,
    };
    match data.checked_add(length) {
        // an entry without data may stand at the very end
        Some(data_end) if data_end <= covered => {}
        _ => return Err(beyond),
    }
    *end = data_end(kind, data, size).ok_or(beyond)?;
    let entry = Entry {
        name: columns.names.text()?.to_vec(),
        kind,
        data_offset: LayerOffset(data),
        size,
        linkname: columns.links.text()?.to_vec(),
        mode: columns.modes.signed()?,
        uid: small("owner", columns.uids.number()?)?,
        gid: small("group", columns.gids.number()?)?,
        uname: shared(last.map(|last| &last.uname), columns.users.text()?),
        gname: shared(last.map(|last| &last.gname), columns.groups.text()?),
        mtime,
        devmajor: columns.majors.signed()?,
        devminor: columns.minors.signed()?,
        pax: records(index, &mut columns.records)?,
        sparse: None,
    };
    if entry.says_sparse() {
        return Err(Error::SparseEntry { index });
    }
    Ok(entry)
}

/// PAX records: keys and values, as [`Entry::pax`] has them.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

fn records(index: usize, column: &mut Cursor<'_>) -> Result<Records, Error> {
    let count = column.number()?;
    // two bytes of lengths a record: a claim alone costs no memory
    if usize::try_from(count).map_or(true, |count| count > column.left()) {
        return Err(Error::Part {
            part: "PAX records of entries",
        });
    }
    let mut records = Records::new();
    for _ in 0..count {
        let (key, value) = (column.bytes()?.to_vec(), column.bytes()?.to_vec());
        // `Entry` promises an order
        if records.last().is_some_and(|(last, _)| *last >= key) {
            return Err(Error::EntryNumber {
                index,
                field: "order of PAX records",
                value: count,
            });
        }
        records.push((key, value));
    }
    Ok(records)
}
