//! Numbers and strings as a table stores them.

use super::Error;

/// Appends a number: seven bits a byte, the lowest first, the high bit on all bytes but the last (LEB128).
pub(super) fn put(to: &mut Vec<u8>, mut number: u64) {
    loop {
        let [low, ..] = number.to_le_bytes();
        number >>= 7;
        if number == 0 {
            return to.push(low & 0x7f);
        }
        to.push(low | 0x80);
    }
}

/// Appends a number with a sign: 0, -1, 1, -2, ... as 0, 1, 2, 3, ...
pub(super) fn put_signed(to: &mut Vec<u8>, number: i64) {
    put(
        to,
        (number.cast_unsigned() << 1) ^ (number >> 63).cast_unsigned(),
    );
}

/// Appends bytes with their length before them.
pub(super) fn put_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    put(to, bytes.len().try_into().unwrap_or(u64::MAX));
    to.extend_from_slice(bytes);
}

/// Reads what the functions above have written; never past its end.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    /// What is being read, for errors.
    part: &'static str,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], part: &'static str) -> Self {
        Self { bytes, part }
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.bytes
    }

    /// An error unless all is read.
    pub(super) fn finish(self) -> Result<(), Error> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(self.short())
        }
    }

    pub(super) fn byte(&mut self) -> Result<u8, Error> {
        let (first, rest) = self.bytes.split_first().ok_or_else(|| self.short())?;
        self.bytes = rest;
        Ok(*first)
    }

    pub(super) fn take(&mut self, length: u64) -> Result<&'a [u8], Error> {
        let length = usize::try_from(length).map_err(|_| self.short())?;
        let (taken, rest) = self
            .bytes
            .split_at_checked(length)
            .ok_or_else(|| self.short())?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(super) fn number(&mut self) -> Result<u64, Error> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            // what is shifted out is an error: only the tenth byte can
            if shift == 63 && bits > 1 {
                return Err(self.short());
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(self.short())
    }

    pub(super) fn signed(&mut self) -> Result<i64, Error> {
        let number = self.number()?;
        Ok((number >> 1).cast_signed() ^ (number & 1).cast_signed().wrapping_neg())
    }

    /// Bytes with their length before them.
    pub(super) fn bytes(&mut self) -> Result<&'a [u8], Error> {
        let length = self.number()?;
        self.take(length)
    }

    /// Bytes up to a NUL, without it.
    pub(super) fn text(&mut self) -> Result<&'a [u8], Error> {
        let end = self.bytes.iter().position(|byte| *byte == 0);
        let (text, rest) = end
            .and_then(|end| self.bytes.split_at_checked(end))
            .ok_or_else(|| self.short())?;
        self.bytes = rest.get(1..).unwrap_or_default(); // the NUL
        Ok(text)
    }

    fn short(&self) -> Error {
        Error::Part { part: self.part }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        let numbers = [0, 1, 127, 128, 16_383, 16_384, u64::MAX >> 1, u64::MAX];
        let signed = [0, -1, 1, 63, -64, 64, i64::MAX, i64::MIN];
        let mut bytes = Vec::new();
        numbers.iter().for_each(|number| put(&mut bytes, *number));
        signed
            .iter()
            .for_each(|number| put_signed(&mut bytes, *number));
        put_bytes(&mut bytes, b"x");
        bytes.extend(b"text\0");
        let mut cursor = Cursor::new(&bytes, "bytes");
        for number in numbers {
            assert_eq!(cursor.number(), Ok(number));
        }
        for number in signed {
            assert_eq!(cursor.signed(), Ok(number));
        }
        assert_eq!(cursor.bytes(), Ok(&b"x"[..]));
        assert_eq!(cursor.text(), Ok(&b"text"[..]));
        assert_eq!(cursor.finish(), Ok(()));
    }

    #[test]
    fn a_number_has_64_bits() {
        for (tenth, expected) in [
            (0, Some(u64::MAX >> 1)),
            (1, Some(u64::MAX)),
            (2, None),
            (3, None),
            (0x7f, None),
            (0x80, None),
            (0x81, None),
        ] {
            let bytes = [&[0xff; 9][..], &[tenth, 0]].concat();
            let read = Cursor::new(&bytes, "bytes").number();
            assert_eq!(read.ok(), expected, "{tenth:#x}");
        }
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let short = Err(Error::Part { part: "bytes" });
        for bytes in [&[][..], &[0x80], &[0xff; 10], &[0xff; 11], &[0x80; 9]] {
            assert_eq!(Cursor::new(bytes, "bytes").number(), short);
        }
        assert!(Cursor::new(b"ab", "bytes").text().is_err());
        assert!(Cursor::new(&[5, 1, 2], "bytes").bytes().is_err());
        assert!(Cursor::new(&[1], "bytes").take(u64::MAX).is_err());
        assert!(Cursor::new(&[1], "bytes").finish().is_err());
    }
}
