//! The blocks of metadata that have no fixed place: directories, long symlinks, xattrs, extent trees. They follow the file data.

use super::BLOCK_SIZE;

/// Blocks given one after the other, and their bytes.
///
/// Bytes are held without the zeros at the end of each piece: most directories are small, and a tree of 100,000 files can have
/// 10,000 of them.
#[derive(Debug)]
pub(super) struct Area {
    /// The block after the last.
    end: u32,
    /// The first block of each piece, and where its bytes end.
    pieces: Vec<(u32, usize)>,
    /// The bytes of all pieces.
    bytes: Vec<u8>,
}

impl Area {
    /// An area that starts at this block.
    pub(super) fn new(start: u32) -> Self {
        Self {
            end: start,
            pieces: vec![],
            bytes: vec![],
        }
    }

    /// Takes as many blocks as `bytes` need, the rest of the last one zero, and returns the number of the first.
    ///
    /// Numbers stay at the end of their range rather than overflow: the disk's size is then over its limit, and is refused.
    pub(super) fn push(&mut self, bytes: &[u8]) -> u32 {
        let block = self.end;
        let count = u32::try_from(bytes.len().div_ceil(BLOCK_SIZE as usize)).unwrap_or(u32::MAX);
        self.end = self.end.saturating_add(count);
        let length = bytes.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1);
        self.bytes.extend_from_slice(&bytes[..length]);
        self.pieces.push((block, self.bytes.len()));
        block
    }

    /// The number of the block after the last.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    /// Writes over bytes of a piece, whose first block this is; they must not be beyond its last byte that is not zero.
    pub(super) fn patch(&mut self, block: u32, at: usize, bytes: &[u8]) {
        let found = self.pieces.binary_search_by_key(&block, |piece| piece.0);
        if let Ok(index) = found {
            let start = index.checked_sub(1).map_or(0, |last| self.pieces[last].1);
            let piece = &mut self.bytes[start..self.pieces[index].1];
            if let Some(place) = piece.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
    }

    /// Each piece with its first block, in order.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let mut start = 0;
        self.pieces.iter().map(move |&(block, end)| {
            let piece = &self.bytes[start..end];
            start = end;
            (block, piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_without_their_zeros() {
        let mut area = Area::new(100);
        assert_eq!(area.push(&[1; 10]), 100);
        assert_eq!(area.push(&[vec![2; 10], vec![0; 5000]].concat()), 101);
        assert_eq!(area.push(&[3; 4096]), 103);
        area.patch(101, 2, &[9, 9]);
        assert_eq!(area.end(), 104);
        let expected = [
            (100, &[1; 10][..]),
            (101, &[2, 2, 9, 9, 2, 2, 2, 2, 2, 2]),
            (103, &[3; 4096]),
        ];
        assert!(area.pieces().eq(expected));
    }
}
