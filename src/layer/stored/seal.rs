//! The checksums of the files of a disk's directory, and the error of a file that is damaged.
//!
//! A file that is read as a whole ends with a CRC-32 of all its other bytes; a file that is read in parts has a CRC-32 in each part. So
//! bytes that have changed on the local disk are detected, and do not count as a contradiction of the table.

use std::io;

use rustix::io::Errno;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::Error;

/// Size of a CRC-32.
pub(crate) const CRC_BYTES: usize = 4;

/// The bytes before and after the CRC-32 of a JSON document, which is its last field.
const FIELD: &[u8] = b",\n  \"crc32\": \"";
const END: &[u8] = b"\"\n}";

/// The CRC-32 of bytes.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// A local file does not have the bytes that were written to it: they differ, it is truncated or missing, or the medium cannot read it.
#[derive(Debug, thiserror::Error)]
#[error("the local file {name} is damaged: {what}")]
pub(crate) struct Damage {
    name: &'static str,
    what: String,
}

impl Damage {
    pub(crate) fn new(name: &'static str, what: impl Into<String>) -> Self {
        Self {
            name,
            what: what.into(),
        }
    }

    /// The checksum is wrong.
    pub(crate) fn check(name: &'static str) -> Self {
        Self::new(name, "its checksum is wrong")
    }

    /// The damage that an error of opening or reading a file means, if it means damage.
    pub(crate) fn found(name: &'static str, error: &io::Error) -> Option<Self> {
        is_damage(error).then(|| Self::new(name, error.to_string()))
    }

    /// Whether an error has damage as its cause.
    pub(crate) fn is_in(error: &Error) -> bool {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = next {
            let inner = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref);
            if error.is::<Self>() || inner.is_some_and(|inner| inner.is::<Self>()) {
                return true;
            }
            next = error.source();
        }
        false
    }
}

impl From<Damage> for io::Error {
    fn from(damage: Damage) -> Self {
        Self::new(io::ErrorKind::InvalidData, damage)
    }
}

/// Whether an error of a local file means that its bytes are lost. Other errors (no memory, no descriptor) are temporary.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    let lost = [
        // the medium
        Errno::IO,
        Errno::UCLEAN,
        Errno::BADMSG,
        Errno::NODATA,
        Errno::ILSEQ,
        // something else in the place of a file or directory
        Errno::NOTDIR,
        Errno::ISDIR,
        Errno::LOOP,
        Errno::NXIO,
        Errno::ACCESS,
    ];
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData
    ) || Errno::from_io_error(error).is_some_and(|errno| lost.contains(&errno))
}

/// Appends the checksum.
pub(crate) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// The bytes before their checksum; `None`: it is wrong.
pub(crate) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (body, crc) = bytes.split_last_chunk::<CRC_BYTES>()?;
    (crc32(body) == u32::from_le_bytes(*crc)).then_some(body)
}

/// A JSON object with its checksum as the last field.
pub(crate) fn seal_json(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    // an object with fields ends with these bytes
    bytes.truncate(bytes.len().saturating_sub(b"\n}".len()));
    let crc = crc32(&bytes);
    bytes.extend_from_slice(FIELD);
    bytes.extend_from_slice(format!("{crc:08x}").as_bytes());
    bytes.extend_from_slice(END);
    Ok(bytes)
}

/// Whether bytes end with the checksum of a JSON object, right or wrong.
pub(crate) fn has_json_seal(bytes: &[u8]) -> bool {
    split_json(bytes).is_some()
}

/// The value that [`seal_json`] was given; `None`: the checksum is wrong.
pub(crate) fn unseal_json<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (body, crc) = split_json(bytes)?;
    let expected = format!("{:08x}", crc32(body));
    (crc == expected.as_bytes())
        .then(|| serde_json::from_slice(bytes).ok())
        .flatten()
}

fn split_json(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (body, crc) = bytes
        .strip_suffix(END)?
        .split_last_chunk::<{ 2 * CRC_BYTES }>()?;
    Some((body.strip_suffix(FIELD)?, crc))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Document {
        text: String,
        numbers: Vec<u8>,
    }

    proptest! {
        #[test]
        fn what_was_sealed_comes_back_and_nothing_else(
            text in ".{0,40}",
            numbers in prop::collection::vec(any::<u8>(), 0..40),
            at in any::<prop::sample::Index>(),
            flip in 1_u8..,
        ) {
            let sealed = seal(numbers.clone());
            prop_assert_eq!(unseal(&sealed), Some(&numbers[..]));
            let document = Document { text, numbers };
            let json = seal_json(&document).unwrap();
            prop_assert_eq!(unseal_json::<Document>(&json), Some(document));
            prop_assert!(serde_json::from_slice::<Document>(&json).is_ok(), "it stays JSON");
            for bytes in [sealed, json] {
                let at = at.index(bytes.len());
                let mut flipped = bytes.clone();
                flipped[at] ^= flip;
                let longer = [&bytes[..], &[flip]].concat();
                for damaged in [&flipped[..], &bytes[..at], &longer] {
                    prop_assert_eq!(unseal(damaged), None);
                    prop_assert_eq!(unseal_json::<Document>(damaged), None);
                }
            }
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (unseal(&bytes), has_json_seal(&bytes), unseal_json::<Document>(&bytes));
        }
    }

    #[test]
    fn what_passes_is_no_damage() {
        let error = |errno: Errno| io::Error::from(errno);
        assert!(is_damage(&error(Errno::IO)) && is_damage(&error(Errno::NOENT)));
        assert!(!is_damage(&error(Errno::MFILE)) && !is_damage(&error(Errno::NOMEM)));
        // without permission to read it, or with something else in its place
        assert!(is_damage(&error(Errno::ACCESS)) && is_damage(&error(Errno::NOTDIR)));
        let wrapped = Error::with_source(
            crate::error::Kind::Io,
            "reading",
            io::Error::from(Damage::check("rest")),
        );
        assert!(Damage::is_in(&wrapped.context("more")));
        let other = Error::with_source(crate::error::Kind::Io, "reading", error(Errno::IO));
        assert!(!Damage::is_in(&other));
    }
}
