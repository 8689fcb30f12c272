//! Repairs the directory of a disk: the files that follow from the table are made again from it, and the data stays. Damage that is found
//! here does not mean that the table is false.

use std::{fs::File, path::Path};

use bytes::Bytes;

use super::metadata;
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    ext4::RegionTable,
    layer::{
        build::import,
        stored::{
            directory::{self, DiskDirectory, DiskDraft},
            seal::{self, Damage},
            state::{DiskState, WITHOUT_CHECKS},
        },
        types::StackingFacts,
    },
    oci::Digest,
};

/// The result of the repair of a directory.
pub(crate) enum DirectoryRepair {
    /// The files are right now; these repairs were made.
    Done(Vec<String>),
    /// The table itself is damaged, and has to be fetched again.
    LacksTable(Error),
    /// The directory has to be removed.
    Impossible(Error),
}

/// Checks the metadata of a disk, before a kernel reads it.
pub(crate) fn check_metadata(
    directory: &DiskDirectory,
    state: &DiskState,
    disk: &File,
    regions: &RegionTable,
) -> Result<()> {
    let Some(expected) = state.metadata_crc32 else {
        return Ok(());
    };
    let context = || {
        format!(
            "cannot read {}",
            directory.path().join(directory::DISK).display()
        )
    };
    let found = metadata::checksum(disk, regions).map_err(|error| {
        match Damage::found(directory::DISK, &error) {
            Some(damage) => Error::with_source(Kind::Corrupt, context(), damage),
            None => Error::with_source(Kind::Io, context(), error),
        }
    })?;
    let what = "its file system's metadata does not have its checksum";
    match found == expected {
        true => Ok(()),
        false => Err(Damage::new(directory::DISK, what))
            .or_kind(Kind::Corrupt, || directory.path().display().to_string()),
    }
}

/// The stored table. An error that is [`Damage`]: it does not have its digest.
pub(crate) fn read_table(directory: &DiskDirectory, state: &DiskState) -> Result<Bytes> {
    let name = directory::table(state.compact.is_some());
    let bytes = directory.read(name)?;
    match Digest::of(&bytes) == state.table {
        true => Ok(bytes.into()),
        false => Err(Damage::check(name))
            .or_kind(Kind::Io, || "the stored table cannot be used".to_owned()),
    }
}

/// Repairs a directory with its stored table.
pub(crate) fn from_stored_table(new: &Path, directory: &DiskDirectory) -> Result<DirectoryRepair> {
    let state = match directory.state() {
        Ok(state) => state,
        Err(error) if error.kind() == Kind::Corrupt => {
            return Ok(DirectoryRepair::Impossible(error));
        }
        Err(error) => return Err(error),
    };
    if state.spans == 0 {
        let error = Error::new(
            Kind::Corrupt,
            "its layer was streamed, so it has no table to repair it from",
        );
        return Ok(DirectoryRepair::Impossible(error));
    }
    match read_table(directory, &state) {
        Ok(table) => from_table(new, directory, &state, &table),
        Err(error) if Damage::is_in(&error) => Ok(DirectoryRepair::LacksTable(error)),
        Err(error) => Err(error),
    }
}

/// Repairs a directory with its table, whose digest was checked.
pub(crate) fn from_table(
    new: &Path,
    directory: &DiskDirectory,
    state: &DiskState,
    table: &Bytes,
) -> Result<DirectoryRepair> {
    let impossible = |what: &str| Ok(DirectoryRepair::Impossible(Error::new(Kind::Corrupt, what)));
    let is_compact = state.compact.is_some();
    let (entries, spans) = import::parse(table, is_compact)?;
    let draft = DiskDraft::new(new)?;
    let right = draft.directory();
    let parsed = (&entries[..], &spans);
    import::write_derived(right, &state.table, table, is_compact, parsed)?;

    let layout = right.read(directory::LAYOUT)?;
    let regions = RegionTable::decode(&layout)
        .or_kind(Kind::Io, || "cannot read the new layout".to_owned())?;
    let is_other = |bytes: &[u8]| RegionTable::decode(bytes).is_ok_and(|it| it != regions);
    if regions.size() != state.disk_size
        || spans.spans.len() != state.spans as usize
        || directory
            .read(directory::LAYOUT)
            .is_ok_and(|bytes| is_other(&bytes))
    {
        return impossible("this version of the program would lay it out differently");
    }
    let disk = match directory.open(directory::DISK) {
        Ok(disk) => disk,
        Err(error) if Damage::is_in(&error) => return Ok(DirectoryRepair::Impossible(error)),
        Err(error) => return Err(error),
    };
    let io = || {
        format!(
            "cannot repair {}",
            directory.path().join(directory::DISK).display()
        )
    };
    if disk.metadata().or_kind(Kind::Io, io)?.len() != regions.size() {
        return impossible("the length of its disk is not that of the layout");
    }
    let right_disk = right.open(directory::DISK)?;
    let crc = metadata::checksum(&right_disk, &regions).or_kind(Kind::Io, io)?;
    if state.metadata_crc32.is_some_and(|expected| expected != crc) {
        return impossible("this version of the program would lay out its metadata differently");
    }
    let names = [
        directory::table(is_compact),
        directory::SPAN_TABLE,
        directory::HEADERS,
        directory::LAYOUT,
        directory::STACKING,
    ];
    let mut repairs = Vec::new();
    for name in names {
        let bytes = right.read(name)?;
        if !directory.has_content(name, &bytes) {
            directory.rewrite(name, &bytes)?;
            let path = directory.path().join(name);
            repairs.push(format!(
                "{} was damaged, and was made again from the table",
                path.display()
            ));
        }
    }
    let blocks = metadata::restore(&disk, &right_disk, &regions).or_kind(Kind::Io, io)?;
    if blocks > 0 {
        repairs.push(format!(
            "{} was damaged; {blocks} blocks of its file system's metadata were made again",
            directory.path().join(directory::DISK).display()
        ));
    }
    repairs.iter().for_each(|what| tracing::warn!("{what}"));
    Ok(DirectoryRepair::Done(repairs))
}

/// The state of a directory of this version. A directory of version 1 has no checksums, and is converted: the files that follow from its
/// table count as damaged ([`Damage`]) and are made again when it is opened; a complete disk is used as it is; the spans of another disk
/// are all fetched again.
pub(crate) fn of_this_version(directory: &DiskDirectory, state: DiskState) -> Result<DiskState> {
    if state.version != WITHOUT_CHECKS {
        return Ok(state);
    }
    let damaged = |name| {
        Err(Damage::check(name)).or_kind(Kind::Corrupt, || directory.path().display().to_string())
    };
    let Ok(facts) = serde_json::from_slice::<StackingFacts>(&directory.read(directory::STACKING)?)
    else {
        return damaged(directory::STACKING);
    };
    let io = || {
        format!(
            "cannot read {}",
            directory.path().join(directory::DISK).display()
        )
    };
    let facts = seal::seal_json(&facts).or_kind(Kind::Io, io)?;
    let Ok(regions) = RegionTable::decode(&directory.read(directory::LAYOUT)?) else {
        return damaged(directory::LAYOUT);
    };
    let disk = directory.open(directory::DISK)?;
    let mut state = state.of_this_version();
    state.metadata_crc32 = Some(metadata::checksum(&disk, &regions).or_kind(Kind::Io, io)?);
    directory.rewrite(directory::STACKING, &facts)?;
    directory.replace(directory::STATE, &state.encode())?;
    Ok(state)
}
