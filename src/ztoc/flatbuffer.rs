//! Reading FlatBuffers of which nothing is known to be true: every access is checked against the end of the bytes.
//!
//! By hand, and not with generated code and its verifier, because that takes strings to be UTF-8 (a zTOC's names and xattr values are
//! any bytes), has a fixed limit on tables, and refuses what Go's reader accepts (a last string without its NUL, bytes behind the end).
//! The layout is that of <https://flatbuffers.dev/internals/>.

use super::Error;

/// A table and its vtable.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    bytes: &'a [u8],
    position: usize,
    vtable: usize,
    vtable_size: usize,
}

impl<'a> Table<'a> {
    /// The root table of a buffer without a size prefix.
    pub(super) fn root(bytes: &'a [u8]) -> Result<Self, Error> {
        Self::at(bytes, follow(bytes, 0)?)
    }

    fn at(bytes: &'a [u8], position: usize) -> Result<Self, Error> {
        let back = i32::from_le_bytes(array(bytes, position)?);
        let vtable = i64::try_from(position)
            .ok()
            .and_then(|position| position.checked_sub(i64::from(back)))
            .and_then(|vtable| usize::try_from(vtable).ok())
            .ok_or(Error::Structure { offset: position })?;
        let vtable_size = usize::from(u16::from_le_bytes(array(bytes, vtable)?));
        Ok(Self {
            bytes,
            position,
            vtable,
            vtable_size,
        })
    }

    /// Where a field is, if the table has it.
    fn field(&self, slot: usize) -> Result<Option<usize>, Error> {
        // two sizes come before the fields' offsets; slots are small constants
        let entry = slot.saturating_mul(2).saturating_add(4);
        if entry >= self.vtable_size {
            return Ok(None);
        }
        let entry = self.vtable.saturating_add(entry);
        match u16::from_le_bytes(array(self.bytes, entry)?) {
            0 => Ok(None),
            offset => Ok(Some(self.position.saturating_add(usize::from(offset)))),
        }
    }

    fn scalar<const N: usize>(&self, slot: usize) -> Result<Option<[u8; N]>, Error> {
        self.field(slot)?
            .map(|position| array(self.bytes, position))
            .transpose()
    }

    pub(super) fn i8(&self, slot: usize, default: i8) -> Result<i8, Error> {
        Ok(self.scalar(slot)?.map_or(default, i8::from_le_bytes))
    }

    pub(super) fn i32(&self, slot: usize) -> Result<i32, Error> {
        Ok(self.scalar(slot)?.map_or(0, i32::from_le_bytes))
    }

    pub(super) fn u32(&self, slot: usize) -> Result<u32, Error> {
        Ok(self.scalar(slot)?.map_or(0, u32::from_le_bytes))
    }

    pub(super) fn i64(&self, slot: usize) -> Result<i64, Error> {
        Ok(self.scalar(slot)?.map_or(0, i64::from_le_bytes))
    }

    pub(super) fn table(&self, slot: usize) -> Result<Option<Self>, Error> {
        self.field(slot)?
            .map(|position| Self::at(self.bytes, follow(self.bytes, position)?))
            .transpose()
    }

    /// A string or a vector of bytes; empty when there is none.
    pub(super) fn bytes(&self, slot: usize) -> Result<&'a [u8], Error> {
        self.bytes_at(slot).map(|(_, bytes)| bytes)
    }

    /// The same, and where it stands in the buffer.
    pub(super) fn bytes_at(&self, slot: usize) -> Result<(usize, &'a [u8]), Error> {
        match self.field(slot)? {
            None => Ok((0, &[])),
            Some(position) => bytes_at(self.bytes, position),
        }
    }

    /// A vector of tables or strings; empty when there is none.
    pub(super) fn vector(&self, slot: usize) -> Result<Vector<'a>, Error> {
        let (first, count) = match self.field(slot)? {
            None => (0, 0),
            Some(position) => vector_at(self.bytes, position, 4)?,
        };
        Ok(Vector {
            bytes: self.bytes,
            first,
            count,
        })
    }
}

/// A vector of offsets.
#[derive(Clone, Copy)]
pub(super) struct Vector<'a> {
    bytes: &'a [u8],
    first: usize,
    count: usize,
}

impl<'a> Vector<'a> {
    /// Elements; their offsets are known to be within the bytes.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    fn positions(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |at| self.first.saturating_add(at.saturating_mul(4)))
    }

    pub(super) fn tables(self) -> impl Iterator<Item = Result<Table<'a>, Error>> {
        self.positions()
            .map(move |position| Table::at(self.bytes, follow(self.bytes, position)?))
    }

    pub(super) fn strings(self) -> impl Iterator<Item = Result<&'a [u8], Error>> {
        self.positions()
            .map(move |position| bytes_at(self.bytes, position).map(|(_, bytes)| bytes))
    }
}

fn array<const N: usize>(bytes: &[u8], position: usize) -> Result<[u8; N], Error> {
    bytes
        .get(position..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .ok_or(Error::Structure { offset: position })
}

/// Where the offset at `position` leads.
fn follow(bytes: &[u8], position: usize) -> Result<usize, Error> {
    usize::try_from(u32::from_le_bytes(array(bytes, position)?))
        .ok()
        .and_then(|offset| position.checked_add(offset))
        .ok_or(Error::Structure { offset: position })
}

/// The first element and the count of the vector that the offset at `position` leads to; all elements are within the bytes.
fn vector_at(bytes: &[u8], position: usize, element: usize) -> Result<(usize, usize), Error> {
    let start = follow(bytes, position)?;
    let outside = Error::Structure { offset: start };
    let count = usize::try_from(u32::from_le_bytes(array(bytes, start)?)).ok();
    let first = start.checked_add(4);
    let (Some(count), Some(first)) = (count, first) else {
        return Err(outside);
    };
    let fits = count
        .checked_mul(element)
        .and_then(|size| first.checked_add(size))
        .is_some_and(|end| end <= bytes.len());
    if fits {
        Ok((first, count))
    } else {
        Err(outside)
    }
}

fn bytes_at(bytes: &[u8], position: usize) -> Result<(usize, &[u8]), Error> {
    let (first, count) = vector_at(bytes, position, 1)?;
    let found = bytes
        .get(first..)
        .and_then(|rest| rest.get(..count))
        .ok_or(Error::Structure { offset: first })?;
    Ok((first, found))
}
