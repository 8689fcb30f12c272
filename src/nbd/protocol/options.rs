//! The data of options, parsed before anything is done with it.

use zerocopy::{
    FromBytes,
    byteorder::big_endian::{U16, U32},
};

use super::MAX_STRING;

/// Why an option's data is refused (`NBD_REP_ERR_INVALID`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A length or count reaches past the end of the data.
    #[error("the option's data ends at byte {length}, within the field at byte {at}")]
    Truncated {
        /// Where the field starts.
        at: usize,
        /// Bytes of data.
        length: usize,
    },
    /// There is more data after the last field.
    #[error("{extra} bytes too many in the option's data")]
    Trailing {
        /// Number of bytes after the last field.
        extra: usize,
    },
    /// A string is longer than the protocol allows.
    #[error("a string of {length} bytes at byte {at}: at most {MAX_STRING} are allowed")]
    LongString {
        /// Where the string starts.
        at: usize,
        /// Its length.
        length: usize,
    },
    /// A string is not UTF-8 or has a NUL.
    #[error("the string at byte {at} is not UTF-8 without NUL")]
    NotText {
        /// Where the string starts.
        at: usize,
    },
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name.
    pub name: &'a str,
    /// The `NBD_INFO_*` asked for; unknown ones among them.
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Parses the option's data.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        let wanted = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { name, wanted })
    }

    /// Whether this information is asked for.
    pub fn wants(&self, info_type: u16) -> bool {
        self.wanted.contains(&info_type)
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// The export's name.
    pub name: &'a str,
    /// The queries; those of unknown namespaces among them.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaContextRequest<'a> {
    /// Parses the option's data.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(data);
        let name = fields.string()?;
        let count = fields.u32()?;
        // no capacity from the count, which the client chooses; each query takes at least four bytes of data
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.string()?);
        }
        fields.end()?;
        Ok(Self { name, queries })
    }
}

/// Data that is one string: `NBD_OPT_EXPORT_NAME`.
pub fn text(data: &[u8]) -> Result<&str, Malformed> {
    text_at(data, 0)
}

fn text_at(bytes: &[u8], at: usize) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING {
        let length = bytes.len();
        return Err(Malformed::LongString { at, length });
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Malformed::NotText { at }),
    }
}

/// Takes fields off the front of an option's data.
struct Fields<'a> {
    rest: &'a [u8],
    length: usize,
}

impl<'a> Fields<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self {
            rest: data,
            length: data.len(),
        }
    }

    fn at(&self) -> usize {
        self.length.saturating_sub(self.rest.len())
    }

    fn truncated(&self) -> Malformed {
        Malformed::Truncated {
            at: self.at(),
            length: self.length,
        }
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        let (value, rest) = U16::read_from_prefix(self.rest).map_err(|_| self.truncated())?;
        self.rest = rest;
        Ok(value.get())
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        let (value, rest) = U32::read_from_prefix(self.rest).map_err(|_| self.truncated())?;
        self.rest = rest;
        Ok(value.get())
    }

    /// A string with its length in 32 bits before it.
    fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()?;
        let at = self.at();
        let (bytes, rest) = usize::try_from(length)
            .ok()
            .and_then(|length| self.rest.split_at_checked(length))
            .ok_or_else(|| self.truncated())?;
        self.rest = rest;
        text_at(bytes, at)
    }

    fn end(&self) -> Result<(), Malformed> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(Malformed::Trailing { extra }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn info_request_has_name_and_types() {
        let data = [string("a").as_slice(), &[0, 2, 0, 3, 0xff, 0xff]].concat();
        let request = InfoRequest::parse(&data).unwrap();
        assert_eq!(request.name, "a");
        assert!(request.wants(super::super::NBD_INFO_BLOCK_SIZE));
        assert!(!request.wants(super::super::NBD_INFO_NAME));
    }

    #[test]
    fn every_cut_of_the_data_is_named() {
        let data = [string("name").as_slice(), &[0, 1, 0, 3]].concat();
        for cut in 0..data.len() {
            let error = InfoRequest::parse(&data[..cut]).unwrap_err();
            assert!(matches!(error, Malformed::Truncated { length, .. } if length == cut));
        }
        let data = [string("name").as_slice(), &[0, 0, 0, 1], &string("base:")].concat();
        for cut in 0..data.len() {
            let error = MetaContextRequest::parse(&data[..cut]).unwrap_err();
            assert!(matches!(error, Malformed::Truncated { length, .. } if length == cut));
        }
    }

    #[test]
    fn a_huge_count_takes_no_memory() {
        let data = [string("").as_slice(), &[0xff; 4]].concat();
        assert_eq!(
            MetaContextRequest::parse(&data),
            Err(Malformed::Truncated { at: 8, length: 8 })
        );
    }

    #[test]
    fn what_is_no_name_is_refused() {
        assert_eq!(text(b"a\0b"), Err(Malformed::NotText { at: 0 }));
        assert_eq!(text(b"\xff"), Err(Malformed::NotText { at: 0 }));
        assert_eq!(text(&[b'a'; MAX_STRING]).map(str::len), Ok(MAX_STRING));
        assert_eq!(
            text(&[b'a'; MAX_STRING + 1]),
            Err(Malformed::LongString {
                at: 0,
                length: 4097
            })
        );
        let data = [string("").as_slice(), &[0, 0, 0]].concat();
        assert_eq!(
            InfoRequest::parse(&data),
            Err(Malformed::Trailing { extra: 1 })
        );
    }
}
