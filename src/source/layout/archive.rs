//! The members of a layout in a tar file: their places, found once from the headers; nothing is extracted.

use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

use tar_core::{
    HEADER_SIZE,
    parse::{Limits, ParseEvent, Parser},
};

use crate::{
    error::{Error, Kind, Result, ResultExt},
    oci::{Digest, Packing},
};

/// Maximum number of members of an archive. A layout has about three per layer.
const MAX_MEMBERS: usize = 1 << 20;
/// Bytes of headers read at once: members of a layout are few and large.
const READ_BYTES: usize = 16 << 10;

/// The places of the members of a layout in the file, in bytes.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// `oci-layout`.
    pub(super) marker: Option<Range<u64>>,
    /// `index.json`.
    pub(super) index: Option<Range<u64>>,
    /// `blobs/sha256/<hex>`.
    pub(super) blobs: BTreeMap<Digest, Range<u64>>,
    /// Whether there is a `manifest.json`, as `docker save` writes it.
    pub(super) docker_save: bool,
}

/// The names of members that are used.
enum Name {
    Marker,
    Index,
    Blob(Digest),
    DockerSave,
}

impl Name {
    fn of(path: &[u8]) -> Option<Self> {
        let mut path = std::str::from_utf8(path).ok()?;
        while let Some(rest) = path.strip_prefix("./") {
            path = rest;
        }
        match path {
            "oci-layout" => Some(Self::Marker),
            "index.json" => Some(Self::Index),
            "manifest.json" => Some(Self::DockerSave),
            path => {
                let hex = path.strip_prefix("blobs/sha256/")?;
                Some(Self::Blob(format!("sha256:{hex}").parse().ok()?))
            }
        }
    }
}

impl Members {
    /// Reads the headers of the archive. Of two members with one name the later one is used, as when a tar is unpacked.
    pub(super) fn scan(file: &File, path: &Path) -> Result<Self> {
        let at = |offset: u64| format!("{} at byte {offset}", path.display());
        let corrupt =
            |offset: u64, what: &str| Error::new(Kind::Corrupt, format!("{}: {what}", at(offset)));
        let length = file.metadata().or_kind(Kind::Io, || at(0))?.len();

        let mut parser = Parser::new(Limits::default());
        parser.set_allow_empty_path(true);
        let mut members = Self::default();
        let mut offset = 0; // of buffer[0] in the file
        let mut buffer: Vec<u8> = Vec::new();
        read_some(file, 0, READ_BYTES, &mut buffer).or_kind(Kind::Io, || at(0))?;
        let packing = Packing::of_bytes(&buffer);
        if packing != Packing::Plain {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{} is compressed with {packing}: decompress it first, because blobs are read at any offset",
                    path.display()
                ),
            ));
        }
        for _ in 0..MAX_MEMBERS {
            let (consumed, content) = loop {
                match parser.parse(&buffer) {
                    Ok(ParseEvent::NeedData { min_bytes }) => {
                        // bounded: the parser refuses metadata over its limit before it asks for the bytes
                        let wanted = min_bytes.max(READ_BYTES);
                        let missing = wanted.saturating_sub(buffer.len());
                        let end = offset + buffer.len() as u64;
                        let read = read_some(file, end, missing, &mut buffer)
                            .or_kind(Kind::Io, || at(end))?;
                        if read == 0 && buffer.is_empty() {
                            return Ok(members); // no end blocks: many writers leave them out
                        }
                        if buffer.len() < min_bytes && read < missing {
                            return Err(corrupt(
                                length,
                                "the archive is truncated within a header",
                            ));
                        }
                    }
                    Ok(ParseEvent::Entry { consumed, entry }) => {
                        let size = if entry.is_hard_link() { 0 } else { entry.size };
                        members.note(&entry, offset + consumed as u64, size);
                        break (consumed, size);
                    }
                    Ok(ParseEvent::SparseEntry {
                        consumed, entry, ..
                    }) => {
                        break (consumed, entry.size);
                    }
                    Ok(ParseEvent::GlobalExtensions { consumed, .. }) => break (consumed, 0),
                    Ok(ParseEvent::End { .. }) => return Ok(members),
                    Err(error) => {
                        return Err(Error::with_source(
                            Kind::Corrupt,
                            format!("{}: not a tar archive", at(offset)),
                            error,
                        ));
                    }
                }
            };
            let start = offset + consumed as u64;
            let end = start
                .checked_add(content)
                .filter(|end| *end <= length)
                .ok_or_else(|| corrupt(start, "the archive is truncated within a member"))?;
            let next = end.next_multiple_of(HEADER_SIZE as u64); // cannot overflow: at most the file's length rounded up
            match usize::try_from(next - offset) {
                Ok(skip) if skip <= buffer.len() => drop(buffer.drain(..skip)),
                _ => buffer.clear(),
            }
            offset = next;
        }
        Err(corrupt(offset, "more than 1048576 members"))
    }

    fn note(&mut self, entry: &tar_core::parse::ParsedEntry<'_>, start: u64, size: u64) {
        let Some(name) = Name::of(&entry.path) else {
            return;
        };
        // two names for one blob: the result of tar on a directory with hard links
        let range = if entry.is_hard_link() {
            let target = entry.link_target.as_deref().and_then(Name::of);
            match target.and_then(|target| self.get(&target)) {
                Some(range) => range,
                None => return,
            }
        } else if entry.is_file() {
            start..start.saturating_add(size) // checked against the file's length by the caller before it is used
        } else {
            return;
        };
        match name {
            Name::Marker => self.marker = Some(range),
            Name::Index => self.index = Some(range),
            Name::Blob(digest) => drop(self.blobs.insert(digest, range)),
            Name::DockerSave => self.docker_save = true,
        }
    }

    fn get(&self, name: &Name) -> Option<Range<u64>> {
        match name {
            Name::Marker => self.marker.clone(),
            Name::Index => self.index.clone(),
            Name::Blob(digest) => self.blobs.get(digest).cloned(),
            Name::DockerSave => None,
        }
    }
}

/// Appends up to `count` bytes of the file from `offset`; fewer only at its end.
fn read_some(
    file: &File,
    offset: u64,
    count: usize,
    buffer: &mut Vec<u8>,
) -> std::io::Result<usize> {
    let old = buffer.len();
    buffer.resize(old + count, 0);
    let mut filled = 0;
    while filled < count {
        match file.read_at(&mut buffer[old + filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(old + filled);
    Ok(filled)
}
