//! A disk's directory whose files are not what was written to them: what follows from the table is made again from it, and the data that is there
//! stays. Whatever is damaged here says nothing about the table's truth.

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

/// What has come of mending a directory.
pub(crate) enum Mended {
    /// Its files are right; these were not.
    Done(Vec<String>),
    /// The table itself is damaged: it has to come from where it came from.
    LacksTable(Error),
    /// The directory has to go.
    Hopeless(Error),
}

/// Looks at a disk's metadata, before a kernel does.
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
    let what = "its file system's metadata do not have their check";
    match found == expected {
        true => Ok(()),
        false => Err(Damage::new(directory::DISK, what))
            .or_kind(Kind::Corrupt, || directory.path().display().to_string()),
    }
}

/// The table's bytes. An error that is [`Damage`]: they do not have its digest.
pub(crate) fn read_table(directory: &DiskDirectory, state: &DiskState) -> Result<Bytes> {
    let name = directory::table(state.compact.is_some());
    let bytes = directory.read(name)?;
    match Digest::of(&bytes) == state.table {
        true => Ok(bytes.into()),
        false => Err(Damage::check(name))
            .or_kind(Kind::Io, || "the stored table cannot be used".to_owned()),
    }
}

/// Mends a directory with the table that is stored in it.
pub(crate) fn from_stored_table(new: &Path, directory: &DiskDirectory) -> Result<Mended> {
    let state = match directory.state() {
        Ok(state) => state,
        Err(error) if error.kind() == Kind::Corrupt => return Ok(Mended::Hopeless(error)),
        Err(error) => return Err(error),
    };
    if state.spans == 0 {
        let error = Error::new(Kind::Corrupt, "its layer was streamed, and has no table");
        return Ok(Mended::Hopeless(error));
    }
    match read_table(directory, &state) {
        Ok(table) => from_table(new, directory, &state, &table),
        Err(error) if Damage::is_in(&error) => Ok(Mended::LacksTable(error)),
        Err(error) => Err(error),
    }
}

/// Mends a directory with its table, whose digest is right.
pub(crate) fn from_table(
    new: &Path,
    directory: &DiskDirectory,
    state: &DiskState,
    table: &Bytes,
) -> Result<Mended> {
    let hopeless = |what: &str| Ok(Mended::Hopeless(Error::new(Kind::Corrupt, what)));
    let is_compact = state.compact.is_some();
    let (entries, spans) = import::parse(table, is_compact)?;
    let draft = DiskDraft::new(new)?;
    let right = draft.directory();
    let parsed = (&entries[..], &spans);
    import::write_derived(right, &state.table, table, is_compact, parsed)?;

    let layout = right.read(directory::LAYOUT)?;
    let regions = RegionTable::decode(&layout)
        .or_kind(Kind::Io, || "the layout that was just made".to_owned())?;
    let is_other = |bytes: &[u8]| RegionTable::decode(bytes).is_ok_and(|it| it != regions);
    if regions.size() != state.disk_size
        || spans.spans.len() != state.spans as usize
        || directory
            .read(directory::LAYOUT)
            .is_ok_and(|bytes| is_other(&bytes))
    {
        return hopeless("it was laid out in another way than this program does it");
    }
    let disk = match directory.open(directory::DISK) {
        Ok(disk) => disk,
        Err(error) if Damage::is_in(&error) => return Ok(Mended::Hopeless(error)),
        Err(error) => return Err(error),
    };
    let io = || {
        format!(
            "cannot mend {}",
            directory.path().join(directory::DISK).display()
        )
    };
    if disk.metadata().or_kind(Kind::Io, io)?.len() != regions.size() {
        return hopeless("its disk has another length");
    }
    let right_disk = right.open(directory::DISK)?;
    let crc = metadata::checksum(&right_disk, &regions).or_kind(Kind::Io, io)?;
    if state.metadata_crc32.is_some_and(|expected| expected != crc) {
        return hopeless("its metadata were laid out in another way than this program does it");
    }
    let names = [
        directory::table(is_compact),
        directory::SPAN_TABLE,
        directory::HEADERS,
        directory::LAYOUT,
        directory::STACKING,
    ];
    let mut mended = Vec::new();
    for name in names {
        let bytes = right.read(name)?;
        if directory.read(name).ok().as_deref() != Some(&bytes[..]) {
            directory.mend(name, &bytes)?;
            let path = directory.path().join(name);
            mended.push(format!("{} was damaged; it is made again", path.display()));
        }
    }
    let blocks = metadata::restore(&disk, &right_disk, &regions).or_kind(Kind::Io, io)?;
    if blocks > 0 {
        mended.push(format!(
            "{} was damaged; {blocks} blocks of its file system's metadata are made again",
            directory.path().join(directory::DISK).display()
        ));
    }
    mended.iter().for_each(|what| tracing::warn!("{what}"));
    Ok(Mended::Done(mended))
}

/// The state of a directory of this version. One of the version before, which had no checks, is given what can be had: what follows from
/// its table is made again when it is opened (it is [`Damage`]); a complete disk is taken for what it was; of another, all spans have to
/// come again.
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
    directory.mend(directory::STACKING, &facts)?;
    directory.replace(directory::STATE, &state.encode())?;
    Ok(state)
}
