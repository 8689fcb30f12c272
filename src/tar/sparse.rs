//! Maps of sparse files, in the four ways that GNU tar has written them.

use super::{MAX_SPECIAL_SIZE, Segment, header::RawBlock, number, pax};
use crate::units::LayerOffset;

/// Why a sparse file's map makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadMap(pub(super) &'static str);

/// Offsets and lengths in the file, not yet checked.
pub(super) type Pairs = Vec<(i64, i64)>;

/// How the PAX records of an entry describe it.
pub(super) enum PaxSparse {
    /// Not as sparse.
    No,
    /// The map is in the records (0.0 and 0.1).
    InRecords(Pairs),
    /// The map stands before the data (1.0).
    BeforeData,
}

/// Where PAX puts the map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    InRecords,
    BeforeData,
}

/// Whether records tell of a sparse file: not when their version is an unknown one.
pub(super) fn format<'a>(get: impl Fn(&str) -> &'a [u8]) -> Option<Format> {
    match (get("GNU.sparse.major"), get("GNU.sparse.minor")) {
        (b"1", b"0") => Some(Format::BeforeData),
        (b"0", b"0" | b"1") => Some(Format::InRecords),
        (b"", b"") if !get("GNU.sparse.map").is_empty() => Some(Format::InRecords),
        _ => None,
    }
}

/// What the records of an entry say about its sparseness. `name` and `size` are changed to the file's own.
pub(super) fn from_records(
    records: &pax::Records,
    name: &mut Vec<u8>,
    size: &mut i64,
) -> Result<PaxSparse, BadMap> {
    let get = |key: &str| {
        records
            .get(key.as_bytes())
            .map(Vec::as_slice)
            .unwrap_or_default()
    };
    let before_data = match format(get) {
        None => return Ok(PaxSparse::No),
        Some(format) => format == Format::BeforeData,
    };
    let map = get("GNU.sparse.map");
    if !get("GNU.sparse.name").is_empty() {
        *name = get("GNU.sparse.name").to_vec();
    }
    let real_size = [get("GNU.sparse.size"), get("GNU.sparse.realsize")]
        .into_iter()
        .find(|text| !text.is_empty());
    if let Some(text) = real_size {
        *size = number::decimal(text).ok_or(BadMap("its real size is no number"))?;
    }
    if before_data {
        return Ok(PaxSparse::BeforeData);
    }
    let count = number::decimal(get("GNU.sparse.numblocks"))
        .and_then(|count| usize::try_from(count).ok())
        .ok_or(BadMap("its number of pieces is no number"))?;
    let numbers = map
        .split(|byte| *byte == b',')
        .filter(|_| !map.is_empty())
        .map(|number| number::decimal(number).ok_or(NO_NUMBER))
        .collect::<Result<Vec<_>, _>>()?;
    if count.checked_mul(2) != Some(numbers.len()) {
        return Err(BadMap("its map has another number of pieces than it says"));
    }
    Ok(PaxSparse::InRecords(pairs(&numbers)))
}

/// The map of format 1.0 as its blocks come: decimal lines, the first their number of pieces.
#[derive(Debug, Default)]
pub(super) struct LeadingMap {
    text: Vec<u8>,
    lines: usize,
    wanted: Option<usize>,
}

impl LeadingMap {
    /// Takes a block; the map when it is whole.
    pub(super) fn push(&mut self, block: &RawBlock) -> Result<Option<Pairs>, BadMap> {
        if self.text.len() >= MAX_SPECIAL_SIZE {
            return Err(BadMap("its map is too long"));
        }
        self.text.extend_from_slice(block);
        let lines = block.iter().filter(|byte| **byte == b'\n').count();
        self.lines = self.lines.saturating_add(lines);
        if self.lines == 0 {
            return Ok(None);
        }
        let wanted = match self.wanted {
            Some(wanted) => wanted,
            None => {
                let first = self.text.split(|byte| *byte == b'\n').next();
                let wanted = number::decimal(first.unwrap_or_default())
                    .and_then(|count| usize::try_from(count).ok())
                    .and_then(|count| count.checked_mul(2)?.checked_add(1))
                    .ok_or(BadMap("its number of pieces is no number"))?;
                *self.wanted.insert(wanted)
            }
        };
        if self.lines < wanted {
            return Ok(None);
        }
        let numbers = self
            .text
            .split(|byte| *byte == b'\n')
            .take(wanted)
            .skip(1)
            .map(|line| number::decimal(line).ok_or(NO_NUMBER))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Some(pairs(&numbers)))
    }
}

const NO_NUMBER: BadMap = BadMap("its map holds what is no number");

fn pairs(numbers: &[i64]) -> Pairs {
    numbers
        .chunks_exact(2)
        .filter_map(|pair| Some((*pair.first()?, *pair.get(1)?)))
        .collect()
}

/// Checks a map and finds where its pieces stand in the layer: one behind the other, from `data` on, `stored` bytes in all.
pub(super) fn segments(
    pairs: &[(i64, i64)],
    size: u64,
    data: LayerOffset,
    stored: u64,
) -> Result<Vec<Segment>, BadMap> {
    let mut segments = Vec::with_capacity(pairs.len());
    let mut file_end = 0_u64;
    let mut stored_end = 0_u64;
    for (offset, length) in pairs {
        let (Ok(offset), Ok(length)) = (u64::try_from(*offset), u64::try_from(*length)) else {
            return Err(BadMap("its map has negative numbers"));
        };
        if offset < file_end {
            return Err(BadMap("the pieces of its map overlap or are out of order"));
        }
        file_end = offset
            .checked_add(length)
            .filter(|end| *end <= size)
            .ok_or(BadMap("its map goes beyond its size"))?;
        let layer_offset = data
            .checked_add(stored_end)
            .ok_or(BadMap("its map goes beyond the layer"))?;
        stored_end = stored_end
            .checked_add(length)
            .ok_or(BadMap("its map goes beyond the layer"))?;
        // GNU tar marks the end of a file that ends in a hole with an empty piece
        if length != 0 {
            segments.push(Segment {
                file_offset: offset,
                layer_offset,
                length,
            });
        }
    }
    if stored_end != stored {
        return Err(BadMap("its map tells of more or less data than there is"));
    }
    Ok(segments)
}
