//! Sizes of files and directories on the local file system, by allocated blocks.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path};

/// Unit of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// Bytes that a file has on the file system; 0 if there is none.
pub(crate) fn allocated_file(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |metadata| allocated_by(&metadata))
}

/// Bytes that an open file has on the file system.
pub(crate) fn allocated_open(file: &fs::File) -> io::Result<u64> {
    file.metadata().map(|metadata| allocated_by(&metadata))
}

/// Bytes that the files of a directory have on the file system, with the directory itself. What cannot be read counts as nothing.
pub(crate) fn allocated(directory: &Path) -> u64 {
    allocated_but(directory, &[])
}

/// As [`allocated`], without the files of these names.
pub(crate) fn allocated_but(directory: &Path, names: &[&str]) -> u64 {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let files = files.filter(|entry| names.iter().all(|name| entry.file_name() != *name));
    let files = files.map(|entry| allocated_file(&entry.path()));
    files.sum::<u64>().saturating_add(allocated_file(directory))
}

/// Bytes that a file has on its file system.
pub(crate) fn allocated_by(metadata: &fs::Metadata) -> u64 {
    metadata.blocks().saturating_mul(STAT_BLOCK)
}
