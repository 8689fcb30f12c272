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
    Archive, Entry, EntryKind, Error, Event, MAX_SPECIAL_SIZE, MAX_TABLE_SIZE, NoZtoc,
    header::{self, BLOCK, BLOCK_SIZE, Header, RawBlock},
    merge::{self, Form, Pending, Sparse, bad_block, bad_map, unsigned},
    number, pax,
    sparse::{self, BadMap, LeadingMap},
};
use crate::units::LayerOffset;

/// Takes a tar stream's bytes as they come. Holds the entries, and headers in part; never data.
#[derive(Debug)]
pub struct Reader {
    /// Bytes taken.
    position: LayerOffset,
    state: ReaderState,
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
enum ReaderState {
    Header,
    /// The block after a zero block.
    SecondZeroBlock,
    Special(Special),
    /// Old GNU: blocks that continue the map.
    SparseExtension(Box<(Entry, Sparse)>),
    /// PAX 1.0: blocks before the data.
    LeadingMap(Box<(Entry, Sparse)>, LeadingMap),
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
            state: ReaderState::Header,
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
                ReaderState::Header => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if let Some(index) = self.header()? {
                        return Ok(Some(Event::Entry { index }));
                    }
                }
                ReaderState::SecondZeroBlock => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if !is_zero(&self.block) {
                        return Err(Error::SingleZeroBlock {
                            offset: self.block_start(),
                        });
                    }
                    self.end = Some(self.position);
                    self.state = ReaderState::AfterEnd;
                    return Ok(Some(Event::End));
                }
                ReaderState::Special(special) => {
                    let missing = special.size.saturating_sub(special.data.len());
                    let piece = take(bytes, &mut self.position, missing);
                    special.data.extend_from_slice(piece);
                    if special.data.len() < special.size {
                        return Ok(None);
                    }
                    self.special()?;
                }
                ReaderState::SparseExtension(_) => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if let Some(index) = self.sparse_extension()? {
                        return Ok(Some(Event::Entry { index }));
                    }
                }
                ReaderState::LeadingMap(..) => {
                    if !self.fill_block(bytes) {
                        return Ok(None);
                    }
                    if let Some(index) = self.leading_map()? {
                        return Ok(Some(Event::Entry { index }));
                    }
                }
                ReaderState::Data(data) if data.remaining == 0 => self.next_piece(),
                ReaderState::Data(data) => {
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
                ReaderState::Padding(0) => self.state = ReaderState::Header,
                ReaderState::Padding(missing) => {
                    let most = usize::try_from(*missing).unwrap_or(usize::MAX);
                    let piece = take(bytes, &mut self.position, most);
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    *missing = missing.saturating_sub(length(piece));
                }
                ReaderState::AfterEnd => {
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
        while matches!(&self.state, ReaderState::Data(data) if data.remaining == 0) {
            self.next_piece();
        }
        let inside = match &self.state {
            ReaderState::Header | ReaderState::SecondZeroBlock if self.filled == 0 => None,
            ReaderState::Header | ReaderState::SecondZeroBlock => Some("a header block"),
            ReaderState::Special(_) => Some("a PAX header or a long name"),
            ReaderState::SparseExtension(_) | ReaderState::LeadingMap(..) => {
                Some("the map of a sparse file")
            }
            ReaderState::Data(_) => Some("the data of a file"),
            ReaderState::Padding(_) | ReaderState::AfterEnd => None,
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
        if let Some(to) = rest.get_mut(..piece.len()) {
            to.copy_from_slice(piece);
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
            self.state = ReaderState::SecondZeroBlock;
            return Ok(None);
        }
        let offset = self.block_start();
        let header = Header::parse(&self.block).map_err(|bad| bad_block(offset, bad))?;
        match header.typeflag {
            typeflag @ (b'x' | b'g' | b'L' | b'K') => {
                let size = unsigned("size", offset, header.size)?;
                self.state = ReaderState::Special(Special {
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
        let ReaderState::Special(special) = std::mem::replace(&mut self.state, ReaderState::Header)
        else {
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
        self.state = ReaderState::Padding(padding_of(length(&special.data)));
        Ok(())
    }

    /// The header of an entry.
    fn merged(&mut self, offset: LayerOffset, header: Header) -> Result<Option<usize>, Error> {
        let pending = std::mem::take(&mut self.pending);
        let after_global = pending.global;
        let (entry, form) = merge::merge(offset, header, pending, self.position)?;
        if after_global && entry.kind == EntryKind::Regular {
            let index = self.entries.len();
            self.no_ztoc.get_or_insert(NoZtoc::GlobalHeader { index });
        }
        match form {
            Form::Plain => {
                let stored = entry.size;
                self.push(entry, stored).map(Some)
            }
            Form::Gnu => self.gnu_sparse(offset, entry),
            Form::MapInRecords(sparse) => self.push_sparse(entry, sparse).map(Some),
            Form::MapBeforeData(sparse) => {
                self.state =
                    ReaderState::LeadingMap(Box::new((entry, sparse)), LeadingMap::default());
                Ok(None)
            }
        }
    }

    /// A header of type `S`; the block is still there.
    fn gnu_sparse(
        &mut self,
        header: LayerOffset,
        mut entry: Entry,
    ) -> Result<Option<usize>, Error> {
        let not_gnu = BadMap("its header is not GNU's");
        let map =
            header::gnu_sparse(&self.block).ok_or_else(|| bad_map(header, &entry.name, not_gnu))?;
        let (size, fields) = map.map_err(|bad| bad_block(header, bad))?;
        let stored = std::mem::replace(&mut entry.size, unsigned("realsize", header, size)?);
        let sparse = Sparse {
            header,
            stored,
            pairs: fields
                .pairs()
                .collect::<Result<_, _>>()
                .map_err(|bad| bad_block(header, bad))?,
        };
        if fields.continues {
            self.state = ReaderState::SparseExtension(Box::new((entry, sparse)));
            return Ok(None);
        }
        self.push_sparse(entry, sparse).map(Some)
    }

    /// A block that continues an old GNU map.
    fn sparse_extension(&mut self) -> Result<Option<usize>, Error> {
        let ReaderState::SparseExtension(mut pending) =
            std::mem::replace(&mut self.state, ReaderState::Header)
        else {
            return Ok(None);
        };
        let (entry, sparse) = &mut *pending;
        let fields = header::gnu_sparse_extension(&self.block);
        for pair in fields.pairs() {
            let pair = pair.map_err(|bad| bad_block(self.block_start(), bad))?;
            sparse.pairs.push(pair);
        }
        let map_size = self.position.get().saturating_sub(sparse.header.get());
        if usize::try_from(map_size).map_or(true, |size| size > MAX_SPECIAL_SIZE) {
            let too_long = BadMap("its map is too long");
            return Err(bad_map(sparse.header, &entry.name, too_long));
        }
        if fields.continues {
            self.state = ReaderState::SparseExtension(pending);
            return Ok(None);
        }
        let (entry, sparse) = *pending;
        self.push_sparse(entry, sparse).map(Some)
    }

    /// A block of a map that stands before the data.
    fn leading_map(&mut self) -> Result<Option<usize>, Error> {
        let ReaderState::LeadingMap(mut pending, mut map) =
            std::mem::replace(&mut self.state, ReaderState::Header)
        else {
            return Ok(None);
        };
        let (entry, sparse) = &mut *pending;
        let bad = |bad| bad_map(sparse.header, &entry.name, bad);
        // the map is part of what the header's size counts
        sparse.stored = sparse
            .stored
            .checked_sub(BLOCK)
            .ok_or(BadMap("its map is longer than its data"))
            .map_err(bad)?;
        let Some(pairs) = map.push(&self.block).map_err(bad)? else {
            self.state = ReaderState::LeadingMap(pending, map);
            return Ok(None);
        };
        sparse.pairs = pairs;
        let (entry, sparse) = *pending;
        self.push_sparse(entry, sparse).map(Some)
    }

    /// A sparse file's map is whole.
    fn push_sparse(&mut self, mut entry: Entry, sparse: Sparse) -> Result<usize, Error> {
        let segments = sparse::segments(&sparse.pairs, entry.size, self.position, sparse.stored)
            .map_err(|bad| bad_map(sparse.header, &entry.name, bad))?;
        entry.data_offset = self.position;
        entry.sparse = Some(segments);
        // this reason goes before others: it is true of any reader
        if !matches!(self.no_ztoc, Some(NoZtoc::Sparse { .. })) {
            self.no_ztoc = Some(NoZtoc::Sparse {
                index: self.entries.len(),
            });
        }
        self.push(entry, sparse.stored)
    }

    /// An entry is whole; its data starts here.
    fn push(&mut self, entry: Entry, stored: u64) -> Result<usize, Error> {
        let index = self.entries.len();
        self.table_size = self.table_size.saturating_add(entry.memory());
        if self.table_size > MAX_TABLE_SIZE {
            return Err(Error::TableTooLarge { index });
        }
        let is_sparse = entry.sparse.is_some();
        self.entries.push(entry);
        self.state = ReaderState::Data(Data {
            file_offset: 0,
            remaining: if is_sparse { 0 } else { stored },
            next_segment: 0,
            padding: padding_of(stored),
        });
        Ok(index)
    }

    /// The data of a piece is over: what comes next.
    fn next_piece(&mut self) {
        let ReaderState::Data(data) = &mut self.state else {
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
            None => self.state = ReaderState::Padding(data.padding),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::Segment;

    /// A GNU header, with its checksum.
    fn gnu_header(fields: &[(usize, &[u8])]) -> RawBlock {
        let mut block = [0; BLOCK_SIZE];
        let common: [(usize, &[u8]); 3] = [(0, b"file"), (257, b"ustar  \0"), (148, b"        ")];
        for (at, bytes) in common.iter().chain(fields) {
            block[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    /// `struct sparse`.
    fn piece(offset: u64, length: u64) -> Vec<u8> {
        format!("{offset:011o}\0{length:011o}\0").into_bytes()
    }

    /// An old GNU sparse file of thirty pieces of 10 bytes, each at a multiple of 1000: four in the header, 21 and 5 in two more blocks.
    fn sparse_file() -> Vec<u8> {
        let pieces: Vec<Vec<u8>> = (0..30).map(|at| piece(at * 1000, 10)).collect();
        let first = pieces[..4].concat();
        let mut stream = gnu_header(&[
            (124, b"00000000454\0"), // 300 bytes stored
            (156, b"S"),
            (386, &first),
            (482, &[1]),
            (483, b"00000072460\0"), // 30000 bytes in all
        ])
        .to_vec();
        for (pieces, continues) in [(&pieces[4..25], 1), (&pieces[25..], 0)] {
            let mut block = pieces.concat();
            block.resize(504, 0);
            block.push(continues);
            block.resize(BLOCK_SIZE, 0);
            stream.extend(block);
        }
        stream.extend((0..30_u8).flat_map(|at| [at; 10]));
        stream.resize(2048, 0);
        stream.resize(2048 + 1024, 0);
        stream
    }

    #[test]
    fn a_gnu_map_goes_on_in_further_blocks() {
        let stream = sparse_file();
        let mut reader = Reader::new();
        let mut pieces = Vec::new();
        let mut rest = &stream[..];
        while let Some(event) = reader.next(&mut rest).expect("a sound archive") {
            if let Event::Data {
                file_offset, bytes, ..
            } = event
            {
                pieces.push((file_offset, bytes[0], bytes.len()));
            }
        }
        let archive = reader.finish().expect("a whole archive");
        let entry = &archive.entries[0];
        assert_eq!((entry.size, entry.data_offset), (30_000, LayerOffset(1536)));
        assert_eq!(archive.no_ztoc, Some(NoZtoc::Sparse { index: 0 }));
        let segments = entry.sparse.as_deref().expect("a sparse file");
        assert_eq!(segments.len(), 30);
        assert_eq!(
            segments[29],
            Segment {
                file_offset: 29_000,
                layer_offset: LayerOffset(1536 + 290),
                length: 10
            }
        );
        let expected: Vec<_> = (0..30_u8)
            .map(|at| (u64::from(at) * 1000, at, 10))
            .collect();
        assert_eq!(pieces, expected);
    }

    #[test]
    fn a_map_must_tell_of_the_data_that_is_there() {
        let mut stream = sparse_file();
        let header = gnu_header(&[
            (124, b"00000000455\0"),
            (156, b"S"),
            (386, &piece(0, 300)),
            (483, b"00000072460\0"),
        ]);
        stream[..BLOCK_SIZE].copy_from_slice(&header);
        let error = Reader::new()
            .next(&mut &stream[..])
            .expect_err("one byte too many");
        assert!(
            matches!(
                error,
                Error::SparseMap {
                    offset: LayerOffset(0),
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn offsets_count_from_where_a_reader_starts() {
        let stream = gnu_header(&[(124, b"00000000000\0"), (156, b"0")]);
        let mut reader = Reader::starting_at(LayerOffset(10_240));
        let event = reader.next(&mut &stream[..]);
        assert_eq!(event, Ok(Some(Event::Entry { index: 0 })));
        assert_eq!(reader.entries()[0].data_offset, LayerOffset(10_752));
    }
}
