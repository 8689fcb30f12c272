//! The header of a gzip member (RFC 1952, section 2.3), read as it comes.

#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        reason = "a test may fail"
    )
)]

use flate2::Crc;

/// What every member starts with: ID1, ID2 and CM (deflate is the only method there is).
pub const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

const FHCRC: u8 = 1 << 1;
const FEXTRA: u8 = 1 << 2;
const FNAME: u8 = 1 << 3;
const FCOMMENT: u8 = 1 << 4;
const RESERVED: u8 = 0b1110_0000;

/// What is wrong with a member's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It does not start with [`MAGIC`].
    #[error("no gzip member starts here")]
    Magic,
    /// RFC 1952: "must give an error indication if any reserved bit is non-zero".
    #[error("the gzip header sets reserved flags ({flags:#04x})")]
    ReservedFlags {
        /// The FLG byte.
        flags: u8,
    },
    /// The header's own checksum is wrong.
    #[error("the gzip header's checksum is {stored:#06x}, and its bytes give {computed:#06x}")]
    Checksum {
        /// As stored.
        stored: u16,
        /// As computed.
        computed: u16,
    },
}

/// Reads one header, however its bytes are cut. Keeps nothing of it: file names and comments may be of any length.
#[derive(Debug)]
pub struct HeaderReader {
    field: Field,
    flags: u8,
    crc: Crc,
}

/// The field that the next byte belongs to.
#[derive(Clone, Copy, Debug)]
enum Field {
    /// ID1 to OS, ten bytes; so many are read.
    Fixed(u8),
    /// XLEN, low byte first.
    ExtraLow,
    ExtraHigh(u8),
    /// So many bytes of the extra field are to come.
    Extra(u16),
    Name,
    Comment,
    /// CRC16, low byte first.
    CrcLow,
    CrcHigh(u8),
    Done,
}

impl Default for HeaderReader {
    fn default() -> Self {
        Self {
            field: Field::Fixed(0),
            flags: 0,
            crc: Crc::new(),
        }
    }
}

impl HeaderReader {
    /// Takes bytes up to the header's end and says how many it took; ask [`Self::is_done`] whether the end was among them.
    pub fn read(&mut self, input: &[u8]) -> Result<usize, Error> {
        let mut taken = 0;
        while let Some(rest) = input.get(taken..).filter(|rest| !rest.is_empty()) {
            if self.is_done() {
                break;
            }
            taken = taken.saturating_add(self.step(rest)?);
        }
        Ok(taken)
    }

    /// Whether the deflate stream comes next.
    pub fn is_done(&self) -> bool {
        matches!(self.field, Field::Done)
    }

    /// Takes at least one byte of `rest`, all of one field.
    fn step(&mut self, rest: &[u8]) -> Result<usize, Error> {
        let byte = rest.first().copied().unwrap_or_default(); // `read` gives at least one
        let taken = match self.field {
            Field::Extra(left) => rest.len().min(usize::from(left)),
            Field::Name | Field::Comment => rest
                .iter()
                .position(|&byte| byte == 0)
                .map_or(rest.len(), |end| end.saturating_add(1)),
            _ => 1,
        };
        let bytes = rest.get(..taken).unwrap_or(rest);
        // CRC16 covers all before it
        if !matches!(self.field, Field::CrcLow | Field::CrcHigh(_)) {
            self.crc.update(bytes);
        }
        self.field = match self.field {
            Field::Fixed(index) => {
                if MAGIC
                    .get(usize::from(index))
                    .is_some_and(|&magic| magic != byte)
                {
                    return Err(Error::Magic);
                }
                if index == 3 {
                    self.flags = byte;
                    if byte & RESERVED != 0 {
                        return Err(Error::ReservedFlags { flags: byte });
                    }
                }
                match index {
                    0..9 => Field::Fixed(index.saturating_add(1)),
                    _ => self.next_of(&[FEXTRA, FNAME, FCOMMENT, FHCRC]),
                }
            }
            Field::ExtraLow => Field::ExtraHigh(byte),
            Field::ExtraHigh(low) => match u16::from_le_bytes([low, byte]) {
                0 => self.next_of(&[FNAME, FCOMMENT, FHCRC]),
                length => Field::Extra(length),
            },
            Field::Extra(left) => match usize::from(left).saturating_sub(taken) {
                0 => self.next_of(&[FNAME, FCOMMENT, FHCRC]),
                left => Field::Extra(u16::try_from(left).unwrap_or(u16::MAX)), // no more than before
            },
            Field::Name if bytes.ends_with(&[0]) => self.next_of(&[FCOMMENT, FHCRC]),
            Field::Comment if bytes.ends_with(&[0]) => self.next_of(&[FHCRC]),
            Field::CrcLow => Field::CrcHigh(byte),
            Field::CrcHigh(low) => {
                let stored = u16::from_le_bytes([low, byte]);
                let [a, b, ..] = self.crc.sum().to_le_bytes();
                let computed = u16::from_le_bytes([a, b]);
                if stored != computed {
                    return Err(Error::Checksum { stored, computed });
                }
                Field::Done
            }
            same @ (Field::Name | Field::Comment | Field::Done) => same,
        };
        Ok(taken)
    }

    /// The first of these fields that the flags announce.
    fn next_of(&self, flags: &[u8]) -> Field {
        match flags.iter().find(|&&flag| self.flags & flag != 0) {
            Some(&FEXTRA) => Field::ExtraLow,
            Some(&FNAME) => Field::Name,
            Some(&FCOMMENT) => Field::Comment,
            Some(_) => Field::CrcLow,
            None => Field::Done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with these flags and every field they announce; `crc_error` is added to CRC16.
    fn header(flags: u8, crc_error: u16) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 255];
        if flags & FEXTRA != 0 {
            bytes.extend(300u16.to_le_bytes());
            bytes.extend([0; 300]);
        }
        if flags & FNAME != 0 {
            bytes.extend(b"name\0");
        }
        if flags & FCOMMENT != 0 {
            bytes.extend(b"\0"); // an empty comment
        }
        if flags & FHCRC != 0 {
            let mut crc = Crc::new();
            crc.update(&bytes);
            bytes.extend((crc.sum() as u16).wrapping_add(crc_error).to_le_bytes());
        }
        bytes
    }

    fn read_in_pieces(bytes: &[u8], piece: usize) -> Result<(usize, bool), Error> {
        let mut reader = HeaderReader::default();
        let mut total = 0;
        for part in bytes.chunks(piece) {
            total += reader.read(part)?;
        }
        Ok((total, reader.is_done()))
    }

    #[test]
    fn every_set_of_fields_ends_at_the_same_byte_however_it_is_cut() {
        for flags in 0..32 {
            let bytes = header(flags, 0);
            let mut followed = bytes.clone();
            followed.extend(b"deflate");
            for piece in [1, 2, 3, 7, 11, 4096] {
                assert_eq!(read_in_pieces(&followed, piece), Ok((bytes.len(), true)));
            }
            for end in 0..bytes.len() {
                assert_eq!(read_in_pieces(&bytes[..end], 4096), Ok((end, false)));
            }
        }
    }

    #[test]
    fn an_empty_extra_field_is_one() {
        let bytes = [0x1f, 0x8b, 8, FEXTRA, 0, 0, 0, 0, 0, 255, 0, 0];
        assert_eq!(read_in_pieces(&bytes, 1), Ok((12, true)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(read_in_pieces(b"PK", 2), Err(Error::Magic));
        assert_eq!(read_in_pieces(&[0x1f, 0x8b, 7], 1), Err(Error::Magic));
        assert_eq!(
            read_in_pieces(&header(0x20, 0), 64),
            Err(Error::ReservedFlags { flags: 0x20 })
        );
        assert!(matches!(
            read_in_pieces(&header(FHCRC | FNAME, 1), 64),
            Err(Error::Checksum { stored, computed }) if stored == computed.wrapping_add(1)
        ));
    }
}
