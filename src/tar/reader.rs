//! The push parser: takes the uncompressed stream in pieces of any length and says what they are.
//!
//! ```no_run
//! # fn f(pieces: Vec<Vec<u8>>) -> Result<(), socinbd::tar::Error> {
//! use socinbd::tar::{Event, Reader};
//! let mut reader = Reader::new();
//! for piece in &pieces {
//!     let mut rest = &piece[..];
//!     while let Some(event) = reader.next(&mut rest)? {
//!         match event {
//!             Event::Entry { index } => println!("{:?}", reader.entries()[index].name),
//!             Event::Data { index, file_offset, bytes } => println!("{index} {file_offset} {}", bytes.len()),
//!             Event::End => println!("the two zero blocks have passed"),
//!         }
//!     }
//! }
//! let archive = reader.finish()?;
//! # Ok(()) }
//! ```

use super::{
    Entry, EntryKind, Error, MAX_SPECIAL_SIZE, Timestamp,
    header::{self, BLOCK, BLOCK_SIZE, BadBlock, Header, RawBlock},
    number, pax,
    sparse::{self, BadMap, LeadingMap, PaxSparse},
};
use crate::{tar::MAX_TABLE_SIZE, units::LayerOffset};

/// What the stream's next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A new entry, all its headers merged: `Reader::entries()[index]`. Indexes count from zero without gaps. Its data follows.
    Entry {
        /// Index into [`Reader::entries`].
        index: usize,
    },
    /// Bytes of the latest entry's data. A sparse file's holes are left out; its data comes at its true offsets.
    Data {
        /// Index into [`Reader::entries`].
        index: usize,
        /// Where in the file.
        file_offset: u64,
        /// Never empty.
        bytes: &'a [u8],
    },
    /// The two zero blocks that end the archive. What follows is taken and ignored. Not seen when a stream ends without them.
    End,
}

/// Why no zTOC can describe a layer, though its files are all well.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoZtoc {
    /// A sparse file: a zTOC has one offset a file.
    Sparse {
        /// The first such entry.
        index: usize,
    },
    /// A PAX global header before a regular file: AWS's daemon looks for a file's own header where the entry before ends, and would
    /// find the global one.
    GlobalHeader {
        /// The file behind the header.
        index: usize,
    },
}

impl std::fmt::Display for NoZtoc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sparse { index } => write!(f, "entry {index} is a sparse file"),
            Self::GlobalHeader { index } => {
                write!(f, "a PAX global header stands before entry {index}")
            }
        }
    }
}

/// A tar stream that has ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// All entries, in order.
    pub entries: Vec<Entry>,
    /// Right after the two zero blocks, or the stream's end where they are missing: what SOCI writes as `uncompressed_archive_size`.
    pub end: LayerOffset,
    /// The length of the whole stream, with what follows the end.
    pub stream_size: u64,
    /// Why these entries cannot stand in a zTOC.
    pub no_ztoc: Option<NoZtoc>,
}

/// Takes a tar stream's bytes as they come. Holds the entries, and headers in part; never data.
#[derive(Debug)]
pub struct Reader {
    /// Bytes taken.
    position: LayerOffset,
    state: State,
    /// The block that is being gathered.
    block: Box<RawBlock>,
    /// How much of it there is.
    filled: usize,
    /// Headers that belong to the next entry.
    pending: Pending,
    entries: Vec<Entry>,
    /// What the entries take in memory.
    table_size: usize,
    end: Option<LayerOffset>,
    no_ztoc: Option<NoZtoc>,
}

/// What the next byte belongs to.
#[derive(Debug)]
enum State {
    Header,
    /// The block after a zero block.
    SecondZeroBlock,
    Special(Special),
    /// Old GNU: blocks that continue the map.
    SparseExtension(Box<SparseEntry>),
    /// PAX 1.0: blocks before the data.
    LeadingMap(Box<SparseEntry>, LeadingMap),
    Data(Data),
    Padding(u64),
    AfterEnd,
}

/// The data of a header that is about another header.
#[derive(Debug)]
struct Special {
    header: LayerOffset,
    typeflag: u8,
    size: usize,
    data: Vec<u8>,
}

/// What special headers have said about the next entry.
#[derive(Debug, Default)]
struct Pending {
    records: pax::Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
    /// A global header has stood here; outlives other special headers.
    global: bool,
}

/// A sparse file whose map is not yet whole.
#[derive(Debug)]
struct SparseEntry {
    header: LayerOffset,
    entry: Entry,
    /// Bytes in the layer, with a leading map.
    stored: u64,
    pairs: sparse::Pairs,
}

/// The data of the latest entry.
#[derive(Debug)]
struct Data {
    /// Where the next byte goes in the file.
    file_offset: u64,
    /// Bytes up to the end of the piece.
    remaining: u64,
    /// The piece after this one, of a sparse file.
    next_segment: usize,
    /// Bytes behind the last piece.
    padding: u64,
}

impl Default for Reader {
    fn default() -> Self {
        Self::starting_at(LayerOffset(0))
    }
}

impl Reader {
    /// A reader at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// A reader that starts in the middle of a layer, where a header is.
    pub fn starting_at(position: LayerOffset) -> Self {
        Self {
            position,
            state: State::Header,
            block: Box::new([0; BLOCK_SIZE]),
            filled: 0,
            pending: Pending::default(),
            entries: Vec::new(),
            table_size: 0,
            end: None,
            no_ztoc: None,
        }
    }

    /// The next event in `bytes`, which is moved past what was taken; `None` when all is taken and more is needed. After an error the
    /// reader is of no more use.
    pub fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Option<Event<'a>>, Error> {
        loop {
            match &mut self.state {
                State::Header => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if let Some(index) = self.header()? {
                        return Ok(Some(Event::Entry { index }));
                    }
                }
                State::SecondZeroBlock => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if !is_zero(&self.block) {
                        return Err(Error::SingleZeroBlock {
                            offset: self.block_start(),
                        });
                    }
                    self.end = Some(self.position);
                    self.state = State::AfterEnd;
                    return Ok(Some(Event::End));
                }
                State::Special(special) => {
                    let missing = special.size.saturating_sub(special.data.len());
                    let piece = take(bytes, &mut self.position, missing);
                    special.data.extend_from_slice(piece);
                    if special.data.len() < special.size {
                        return Ok(None);
                    }
                    self.special()?;
                }
                State::SparseExtension(_) => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if let Some(index) = self.sparse_extension()? {
                        return Ok(Some(Event::Entry { index }));
                    }
                }
                State::LeadingMap(..) => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if let Some(index) = self.leading_map()? {
                        return Ok(Some(Event::Entry { index }));
                    }
                }
                State::Data(data) if data.remaining == 0 => self.next_piece(),
                State::Data(data) => {
                    let most = usize::try_from(data.remaining).unwrap_or(usize::MAX);
                    let piece = take(bytes, &mut self.position, most);
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    let file_offset = data.file_offset;
                    data.file_offset = file_offset.saturating_add(length(piece));
                    data.remaining = data.remaining.saturating_sub(length(piece));
                    return Ok(Some(Event::Data {
                        index: self.entries.len().saturating_sub(1),
                        file_offset,
                        bytes: piece,
                    }));
                }
                State::Padding(0) => self.state = State::Header,
                State::Padding(missing) => {
                    let most = usize::try_from(*missing).unwrap_or(usize::MAX);
                    let piece = take(bytes, &mut self.position, most);
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    *missing = missing.saturating_sub(length(piece));
                }
                State::AfterEnd => {
                    take(bytes, &mut self.position, usize::MAX);
                    return Ok(None);
                }
            }
        }
    }

    /// The entries so far.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Where the next byte stands in the stream.
    pub fn position(&self) -> LayerOffset {
        self.position
    }

    /// The end of the stream: an error when it is in the middle of a header or of an entry's data. Missing end blocks and missing
    /// padding of the last entry are not (Go and GNU tar let them pass too).
    pub fn finish(mut self) -> Result<Archive, Error> {
        while matches!(&self.state, State::Data(data) if data.remaining == 0) {
            self.next_piece();
        }
        let inside = match &self.state {
            State::Header | State::SecondZeroBlock if self.filled == 0 => None,
            State::Header | State::SecondZeroBlock => Some("a header block"),
            State::Special(_) => Some("a PAX header or a long name"),
            State::SparseExtension(_) | State::LeadingMap(..) => Some("the map of a sparse file"),
            State::Data(_) => Some("the data of a file"),
            State::Padding(_) | State::AfterEnd => None,
        };
        match inside {
            Some(inside) => Err(Error::Truncated {
                offset: self.position,
                inside,
            }),
            None => Ok(Archive {
                entries: self.entries,
                end: self.end.unwrap_or(self.position),
                stream_size: self.position.get(),
                no_ztoc: self.no_ztoc,
            }),
        }
    }

    /// Gathers a block; whether it is whole.
    fn fill_block(&mut self, bytes: &mut &[u8]) -> bool {
        let rest = self.block.get_mut(self.filled..).unwrap_or_default();
        let piece = take(bytes, &mut self.position, rest.len());
        for (to, from) in rest.iter_mut().zip(piece) {
            *to = *from;
        }
        self.filled = self.filled.saturating_add(piece.len());
        let whole = self.filled == BLOCK_SIZE;
        if whole {
            self.filled = 0;
        }
        whole
    }

    /// Where the block that was just gathered starts.
    fn block_start(&self) -> LayerOffset {
        LayerOffset(self.position.get().saturating_sub(BLOCK))
    }

    /// A header block has come; the entry, when it is one.
    fn header(&mut self) -> Result<Option<usize>, Error> {
        if is_zero(&self.block) {
            self.state = State::SecondZeroBlock;
            return Ok(None);
        }
        let offset = self.block_start();
        let header = Header::parse(&self.block).map_err(|bad| bad_block(offset, bad))?;
        match header.typeflag {
            typeflag @ (b'x' | b'g' | b'L' | b'K') => {
                let size = unsigned("size", offset, header.size)?;
                self.state = State::Special(Special {
                    header: offset,
                    typeflag,
                    size: usize::try_from(size)
                        .ok()
                        .filter(|size| *size <= MAX_SPECIAL_SIZE)
                        .ok_or(Error::SpecialTooLong { offset, size })?,
                    data: Vec::new(),
                });
                Ok(None)
            }
            _ => self.merged(offset, header),
        }
    }

    /// A special header is whole: keeps what it says for the next entry.
    fn special(&mut self) -> Result<(), Error> {
        let State::Special(special) = std::mem::replace(&mut self.state, State::Header) else {
            return Ok(());
        };
        let records = |data: &[u8]| {
            pax::parse(data).map_err(|position| Error::PaxRecord {
                offset: special.header,
                position,
            })
        };
        match special.typeflag {
            // as Go has it: of two headers the second counts alone
            b'x' => self.pending.records = records(&special.data)?,
            b'g' => {
                // containers are unpacked by containerd and Docker, which leave a global header's records out; so it is here
                records(&special.data)?;
                self.pending = Pending {
                    global: true,
                    ..Pending::default()
                };
            }
            b'L' => self.pending.long_name = number::string(&special.data).to_vec(),
            _ => self.pending.long_link = number::string(&special.data).to_vec(),
        }
        self.state = State::Padding(padding_of(length(&special.data)));
        Ok(())
    }

    /// The header of an entry: applies the pending ones to it.
    fn merged(&mut self, offset: LayerOffset, mut header: Header) -> Result<Option<usize>, Error> {
        let pending = std::mem::take(&mut self.pending);
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
        let kind = match header.typeflag {
            0 if header.name.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' | b'S' => EntryKind::Regular,
            b'1' => EntryKind::Hardlink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            flag => {
                return Err(Error::UnsupportedType {
                    offset,
                    name: String::from_utf8_lossy(&header.name).into_owned(),
                    flag,
                });
            }
        };
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
        let index = self.entries.len();
        if pending.global && kind == EntryKind::Regular {
            self.no_ztoc.get_or_insert(NoZtoc::GlobalHeader { index });
        }
        let entry = Entry {
            name: header.name,
            kind,
            data_offset: self.position,
            size: stored,
            linkname: header.linkname,
            mode: header.mode,
            uid: truncated(header.uid),
            gid: truncated(header.gid),
            uname: header.uname,
            gname: header.gname,
            mtime: Some(mtime),
            devmajor: header.devmajor,
            devminor: header.devminor,
            pax: pending.records.into_iter().collect(),
            sparse: None,
        };
        if header.typeflag == b'S' {
            return self.gnu_sparse(offset, entry);
        }
        let pairs = match pax_sparse {
            PaxSparse::No => return self.push(entry, stored).map(Some),
            PaxSparse::InRecords(pairs) => Some(pairs),
            PaxSparse::BeforeData => None,
        };
        if kind != EntryKind::Regular {
            return Err(bad_map(
                offset,
                &entry.name,
                BadMap("it is no regular file"),
            ));
        }
        let entry = SparseEntry {
            header: offset,
            entry: Entry {
                size: unsigned("GNU.sparse.realsize", offset, header.size)?,
                ..entry
            },
            stored,
            pairs: pairs.clone().unwrap_or_default(),
        };
        if pairs.is_some() {
            return self.push_sparse(entry).map(Some);
        }
        self.state = State::LeadingMap(Box::new(entry), LeadingMap::default());
        Ok(None)
    }

    /// A header of type `S`; the block is still there.
    fn gnu_sparse(&mut self, offset: LayerOffset, entry: Entry) -> Result<Option<usize>, Error> {
        let Some(map) = header::gnu_sparse(&self.block) else {
            return Err(bad_map(
                offset,
                &entry.name,
                BadMap("its header is not GNU's"),
            ));
        };
        let (size, fields) = map.map_err(|bad| bad_block(offset, bad))?;
        let entry = SparseEntry {
            header: offset,
            stored: entry.size,
            entry: Entry {
                size: unsigned("realsize", offset, size)?,
                ..entry
            },
            pairs: fields
                .pairs()
                .collect::<Result<_, _>>()
                .map_err(|bad| bad_block(offset, bad))?,
        };
        if fields.continues {
            self.state = State::SparseExtension(Box::new(entry));
            return Ok(None);
        }
        self.push_sparse(entry).map(Some)
    }

    /// A block that continues an old GNU map.
    fn sparse_extension(&mut self) -> Result<Option<usize>, Error> {
        let State::SparseExtension(mut entry) = std::mem::replace(&mut self.state, State::Header)
        else {
            return Ok(None);
        };
        let offset = self.block_start();
        let fields = header::gnu_sparse_extension(&self.block);
        for pair in fields.pairs() {
            entry
                .pairs
                .push(pair.map_err(|bad| bad_block(offset, bad))?);
        }
        let map_end = self.position.get().saturating_sub(entry.header.get());
        if usize::try_from(map_end).map_or(true, |size| size > MAX_SPECIAL_SIZE) {
            let too_long = BadMap("its map is too long");
            return Err(bad_map(entry.header, &entry.entry.name, too_long));
        }
        if fields.continues {
            self.state = State::SparseExtension(entry);
            return Ok(None);
        }
        self.push_sparse(*entry).map(Some)
    }

    /// A block of a map that stands before the data.
    fn leading_map(&mut self) -> Result<Option<usize>, Error> {
        let State::LeadingMap(mut entry, mut map) =
            std::mem::replace(&mut self.state, State::Header)
        else {
            return Ok(None);
        };
        let bad = |bad| bad_map(entry.header, &entry.entry.name, bad);
        let pairs = map.push(&self.block).map_err(bad)?;
        // the map is part of what the header's size counts
        entry.stored = entry
            .stored
            .checked_sub(BLOCK)
            .ok_or(BadMap("its map is longer than its data"))
            .map_err(bad)?;
        let Some(pairs) = pairs else {
            self.state = State::LeadingMap(entry, map);
            return Ok(None);
        };
        entry.pairs = pairs;
        self.push_sparse(*entry).map(Some)
    }

    /// A sparse file's map is whole.
    fn push_sparse(&mut self, sparse: SparseEntry) -> Result<usize, Error> {
        let SparseEntry {
            header,
            mut entry,
            stored,
            pairs,
        } = sparse;
        let segments = sparse::segments(&pairs, entry.size, self.position, stored)
            .map_err(|bad| bad_map(header, &entry.name, bad))?;
        entry.data_offset = self.position;
        entry.sparse = Some(segments);
        // this reason goes before others: it is true of any reader
        if !matches!(self.no_ztoc, Some(NoZtoc::Sparse { .. })) {
            self.no_ztoc = Some(NoZtoc::Sparse {
                index: self.entries.len(),
            });
        }
        self.push(entry, stored)
    }

    /// An entry is whole; its data starts here.
    fn push(&mut self, entry: Entry, stored: u64) -> Result<usize, Error> {
        let index = self.entries.len();
        self.table_size = self.table_size.saturating_add(memory_of(&entry));
        if self.table_size > MAX_TABLE_SIZE {
            return Err(Error::TableTooLarge { index });
        }
        let is_sparse = entry.sparse.is_some();
        self.entries.push(entry);
        self.state = State::Data(Data {
            file_offset: 0,
            remaining: if is_sparse { 0 } else { stored },
            next_segment: 0,
            padding: padding_of(stored),
        });
        Ok(index)
    }

    /// The data of a piece is over: what comes next.
    fn next_piece(&mut self) {
        let State::Data(data) = &mut self.state else {
            return;
        };
        let segment = self
            .entries
            .last()
            .and_then(|entry| entry.sparse.as_ref())
            .and_then(|segments| segments.get(data.next_segment));
        match segment {
            Some(segment) => {
                data.file_offset = segment.file_offset;
                data.remaining = segment.length;
                data.next_segment = data.next_segment.saturating_add(1);
            }
            None => self.state = State::Padding(data.padding),
        }
    }
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

fn bad_block(offset: LayerOffset, bad: BadBlock) -> Error {
    match bad {
        BadBlock::Checksum => Error::Checksum { offset },
        BadBlock::Number(field) => Error::Number { offset, field },
    }
}

fn bad_map(offset: LayerOffset, name: &[u8], bad: BadMap) -> Error {
    Error::SparseMap {
        offset,
        name: String::from_utf8_lossy(name).into_owned(),
        reason: bad.0,
    }
}

/// A size that is not negative.
fn unsigned(field: &'static str, offset: LayerOffset, size: i64) -> Result<u64, Error> {
    u64::try_from(size).map_err(|_| Error::Number { offset, field })
}

/// The low 32 bits, as AWS's tool keeps them.
fn truncated(id: i64) -> u32 {
    let [a, b, c, d, ..] = id.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Bytes up to the next whole block.
fn padding_of(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK
}

fn is_zero(block: &RawBlock) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// The length of a slice as an offset's kind of number.
fn length(bytes: &[u8]) -> u64 {
    // no slice is longer than 2^63
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Takes up to `most` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], position: &mut LayerOffset, most: usize) -> &'a [u8] {
    let (piece, rest) = bytes
        .split_at_checked(most.min(bytes.len()))
        .unwrap_or_default();
    *bytes = rest;
    *position = LayerOffset(position.get().saturating_add(length(piece)));
    piece
}

/// About what an entry takes in memory.
fn memory_of(entry: &Entry) -> usize {
    /// What an allocation costs besides its bytes.
    const OVERHEAD: usize = 16;
    let strings = [&entry.name, &entry.linkname, &entry.uname, &entry.gname];
    let records = entry.pax.iter().flat_map(|(key, value)| [key, value]);
    let bytes = strings
        .into_iter()
        .chain(records)
        .map(|text| text.capacity().saturating_add(OVERHEAD));
    let records = size_of::<(Vec<u8>, Vec<u8>)>().saturating_mul(entry.pax.capacity());
    let segments = entry.sparse.as_ref().map_or(0, Vec::capacity);
    let lists = records.saturating_add(size_of::<super::Segment>().saturating_mul(segments));
    bytes
        .fold(lists, usize::saturating_add)
        .saturating_add(size_of::<Entry>())
}
