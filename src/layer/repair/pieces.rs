//! Checks and repairs the disk of a streamed layer, piece by piece.

use std::{os::unix::fs::FileExt as _, sync::Arc};

use tokio::sync::watch;

use super::report::ScrubReport;
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt as _},
    layer::{
        build::streamed,
        disk::Disk,
        stored::{
            directory,
            pieces::{PIECE_BYTES, checks, read},
            seal::{self, Damage},
        },
    },
    source::Source,
};

/// Compares the disk with its checksums. If they differ, or there are none, streams the layer once more and writes the differences.
pub(crate) async fn scrub(
    disk: &Arc<Disk>,
    bytes: watch::Sender<u64>,
    report: &mut ScrubReport,
) -> Result<()> {
    let reading = Arc::clone(disk);
    let found = blocking(move || wrong_pieces(&reading, &bytes));
    report.bytes = disk.size();
    let what = match found.await {
        Ok(0) => return Ok(()),
        Ok(count) => format!(
            "the local disk has not kept {count} pieces of {}",
            disk.path().display()
        ),
        Err(error) if Damage::is_in(&error) => error.report(),
        Err(error) => return Err(error),
    };
    let mut last = Error::new(
        Kind::Unavailable,
        "no source of the layer is known; attach an image with this layer again",
    );
    for source in disk.sources().in_order().await {
        let again = async {
            let source = source.open().await?;
            restore(disk, &source).await
        };
        match again.await {
            Ok(()) => {
                report.repaired.push(format!("{what}; fetched again"));
                return Ok(());
            }
            Err(error) => last = error,
        }
    }
    report.wrong.push(format!("{what}: {}", last.report()));
    Ok(())
}

fn wrong_pieces(disk: &Disk, bytes: &watch::Sender<u64>) -> Result<usize> {
    let mut buffer = Vec::new();
    let mut wrong = 0;
    for (number, expected) in (0..).zip(checks(disk.directory(), disk.size())?) {
        match read(disk.file(), number, disk.size(), &mut buffer) {
            Err(error) if seal::is_damage(&error) => wrong += 1,
            read => {
                read.or_kind(Kind::Io, || {
                    format!("cannot read {}", disk.path().display())
                })?;
                wrong += usize::from(seal::crc32(&buffer) != expected);
            }
        }
        bytes.send_modify(|bytes| *bytes += buffer.len() as u64);
    }
    Ok(wrong)
}

/// Streams the layer once more, and writes its bytes to the disk in place where they differ.
async fn restore(disk: &Arc<Disk>, source: &Source) -> Result<()> {
    let (draft, table) = streamed::once_more(disk, source).await?;
    let disk = Arc::clone(disk);
    blocking(move || {
        let right = draft.directory().open(directory::DISK)?;
        let io = || format!("cannot repair {}", disk.path().display());
        if table != *disk.table() || right.metadata().or_kind(Kind::Io, io)?.len() != disk.size() {
            let other = "this version of the program would lay it out differently; detach its images, and remove its directory";
            return Err(Error::new(Kind::Unsupported, other));
        }
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        for number in 0..disk.size().div_ceil(PIECE_BYTES) {
            read(&right, number, disk.size(), &mut expected).or_kind(Kind::Io, io)?;
            let is_read = read(disk.file(), number, disk.size(), &mut found).is_ok();
            if !is_read || found != expected {
                let written = disk.file().write_all_at(&expected, number * PIECE_BYTES);
                written.or_kind(Kind::Io, io)?;
            }
        }
        disk.file().sync_data().or_kind(Kind::Io, io)?;
        for name in [directory::LAYOUT, directory::STACKING, directory::PIECES] {
            disk.directory().rewrite(name, &draft.directory().read(name)?)?;
        }
        Ok(())
    })
    .await
}
