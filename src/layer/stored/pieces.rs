//! The checksums of the disk of a streamed layer, which has no spans: a CRC-32 of each 4 MiB, in the file `pieces`.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use super::{
    directory::{self, DiskDirectory},
    seal::{self, Damage},
};
use crate::{
    buffer::set_length,
    error::{Kind, Result, ResultExt as _},
};

/// Size of a piece.
pub(crate) const PIECE_BYTES: u64 = 4 << 20;

/// Writes the checksums of a complete disk.
pub(crate) fn write(directory: &DiskDirectory, disk: &File) -> Result<()> {
    let io = || {
        format!(
            "cannot read {}",
            directory.path().join(directory::DISK).display()
        )
    };
    let mut checks = Vec::new();
    let size = disk.metadata().or_kind(Kind::Io, io)?.len();
    let mut buffer = Vec::new();
    for number in 0..size.div_ceil(PIECE_BYTES) {
        read(disk, number, size, &mut buffer).or_kind(Kind::Io, io)?;
        checks.extend_from_slice(&seal::crc32(&buffer).to_le_bytes());
    }
    directory.write(directory::PIECES, &seal::seal(checks))
}

pub(crate) fn read(disk: &File, number: u64, size: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
    let start = number * PIECE_BYTES;
    set_length(buffer, (size - start).min(PIECE_BYTES) as usize);
    disk.read_exact_at(buffer, start)
}

/// The checksums. An error that is [`Damage`]: the file is damaged.
pub(crate) fn checks(directory: &DiskDirectory, size: u64) -> Result<Vec<u32>> {
    let bytes = directory.read(directory::PIECES)?;
    let checks = seal::unseal(&bytes).map(|bytes| bytes.as_chunks::<4>().0);
    checks
        .filter(|checks| checks.len() as u64 == size.div_ceil(PIECE_BYTES))
        .map(|checks| checks.iter().map(|crc| u32::from_le_bytes(*crc)).collect())
        .ok_or_else(|| Damage::check(directory::PIECES))
        .or_kind(Kind::Corrupt, || directory.path().display().to_string())
}
