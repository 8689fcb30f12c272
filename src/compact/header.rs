//! The fixed part in front of a table; all numbers little-endian.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::{Error, MAX_BODY_SIZE, MAX_TABLE_SIZE};
use crate::ztoc::Compression;

/// The first bytes of a table.
pub(super) const MAGIC: [u8; 8] = *b"\xb1SOCICX\n";

/// The version that is written, and the only one that is read. A change that this version's readers would misread has another number.
pub(super) const VERSION: u32 = 1;

/// Bytes of the header.
pub const HEADER_SIZE: usize = 96;

/// The header as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    /// 1: gzip, 2: a plain tar.
    pub(super) compression: u8,
    /// Zero.
    pub(super) reserved: [u8; 3],
    /// SHA-256 of the layer's blob.
    pub(super) layer: [u8; 32],
    /// Bytes of the layer's blob.
    pub(super) layer_size: U64,
    /// The span size that was asked for.
    pub(super) span_size: U64,
    /// Bytes of the body, as it is stored behind the header.
    pub(super) stored_size: U64,
    /// Bytes of the body, unpacked.
    pub(super) body_size: U64,
    /// Bytes of all windows, behind the body.
    pub(super) windows_size: U64,
    pub(super) spans: U32,
    pub(super) entries: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

impl Header {
    /// Reads the header of a table, and gives what is behind it. Checks all that can be checked here, before anything is unpacked.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), Error> {
        let found = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let Ok((header, stored)) = Self::read_from_prefix(bytes) else {
            return Err(Error::Length {
                stated: u64::try_from(HEADER_SIZE).unwrap_or(u64::MAX),
                found,
            });
        };
        if header.magic != MAGIC {
            return Err(Error::Magic);
        }
        if header.version.get() != VERSION {
            return Err(Error::Version {
                version: header.version.get(),
            });
        }
        let impossible = |field, value| Err(Error::Header { field, value });
        if header.reserved != [0; 3] {
            let [a, b, c] = header.reserved;
            return impossible("reserved bytes", u32::from_le_bytes([a, b, c, 0]).into());
        }
        if header.body_size.get() > MAX_BODY_SIZE {
            return impossible("size of its body", header.body_size.get());
        }
        if found > MAX_TABLE_SIZE {
            return impossible("size", found);
        }
        let stated = u64::try_from(HEADER_SIZE)
            .unwrap_or(u64::MAX)
            .saturating_add(header.stored_size.get());
        if stated != found {
            return Err(Error::Length { stated, found });
        }
        if stated.checked_add(header.windows_size.get()).is_none() {
            return impossible("size of all windows", header.windows_size.get());
        }
        Ok((header, stored))
    }

    pub(super) fn compression(&self) -> Result<Compression, Error> {
        match self.compression {
            1 => Ok(Compression::Gzip),
            2 => Ok(Compression::Uncompressed),
            other => Err(Error::Header {
                field: "compression",
                value: other.into(),
            }),
        }
    }
}

/// As it is stored.
pub(super) fn compression_code(compression: Compression) -> u8 {
    match compression {
        Compression::Gzip => 1,
        Compression::Uncompressed => 2,
    }
}
