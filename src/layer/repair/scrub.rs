//! Compares the files of a disk with their checksums, and repairs them: `socinbd check`.
//!
//! The files that follow from the table are made again and compared. Each span is read and compared with its checksum; if they differ, or
//! it has none, the span is fetched again. The disk of a streamed layer has checksums of its pieces ([`super::pieces`]).

use std::sync::Arc;

use tokio::sync::watch;

use super::{
    from_table::{self, DirectoryRepair},
    lost_spans, metadata, pieces,
    report::ScrubReport,
};
use crate::{
    blocking::blocking,
    error::{Kind, Result, ResultExt as _},
    layer::{disk::Disk, verify::whole_layer},
};

impl Disk {
    /// Compares all of the disk's directory with its checksums, and repairs what it can: see [`ScrubReport`]. Damaged spans are fetched
    /// again; those of a complete disk at once, into the same file, so that its mounts stay. `read` gets the number of bytes read.
    pub async fn scrub(self: &Arc<Self>, read: watch::Sender<u64>) -> Result<ScrubReport> {
        self.services().enter();
        let _hold = self.hold_spans();
        let mut report = ScrubReport::new(self.layer().digest, *self.table());
        report.repaired = self.table_repair().take_repairs();
        if self.layout().spans().count() == 0 {
            pieces::scrub(self, read, &mut report).await?;
            return Ok(report);
        }
        self.scrub_derived(&mut report).await?;
        self.scrub_spans(read, &mut report).await?;
        Ok(report)
    }

    /// Checks the files that follow from the table.
    async fn scrub_derived(self: &Arc<Self>, report: &mut ScrubReport) -> Result<()> {
        let disk = Arc::clone(self);
        let stored = blocking(move || {
            from_table::from_stored_table(&disk.services().new_directory(), disk.directory())
        });
        let mut repair = stored.await?;
        if let DirectoryRepair::LacksTable(_) = &repair {
            repair = match self.fetch_table().await {
                Ok(again) => again,
                Err(error) => DirectoryRepair::LacksTable(error.context(
                    "the stored table is damaged and could not be fetched; attach an image with this layer again",
                )),
            };
        }
        match repair {
            DirectoryRepair::Done(names) => {
                self.table_repair().table_is_restored();
                report.repaired.extend(names);
            }
            DirectoryRepair::LacksTable(error) | DirectoryRepair::Impossible(error) => {
                report.wrong.push(error.report());
                // the metadata can be checked without the table
                if let Some(expected) = self.record().lock_state().metadata_crc32
                    && metadata::checksum(self.file(), self.layout().regions()).ok()
                        != Some(expected)
                {
                    report
                        .wrong
                        .push("the file system's metadata is damaged".to_owned());
                }
            }
        }
        Ok(())
    }

    async fn scrub_spans(
        self: &Arc<Self>,
        read: watch::Sender<u64>,
        report: &mut ScrubReport,
    ) -> Result<()> {
        let disk = Arc::clone(self);
        let found = blocking(move || {
            disk.sync()?;
            let slack = lost_spans::repair_slack(disk.reader()).or_kind(Kind::Io, || {
                format!("{} cannot be read", disk.path().display())
            })?;
            let rest = disk.verification().layer_check().rest();
            let lost = lost_spans::lost(&disk, rest.as_deref(), |bytes| {
                read.send_replace(bytes);
            })?;
            Ok((slack, lost))
        });
        let (slack, lost) = found.await?;
        if slack > 0 {
            report.repaired.push(format!(
                "{} was damaged after the ends of {slack} files; these bytes are zero again",
                self.path().display()
            ));
        }
        report.bytes = lost.bytes;
        let was_complete = self.is_complete();
        if lost.is_empty() && lost.unchecked.is_empty() {
            return Ok(());
        }
        let unwritten = || format!("{} cannot be written", self.path().display());
        self.lose(&lost.data, &lost.rest)
            .or_kind(Kind::Io, unwritten)?;
        if !was_complete {
            report.repaired.push(format!(
                "{}; the data is fetched again when it is read",
                lost.describe(self)
            ));
            return Ok(());
        }
        self.verification()
            .layer_check()
            .want(lost.unchecked.iter().copied());
        let what = match lost.is_empty() {
            true => format!("{} spans had no checksum", lost.unchecked.len()),
            false => lost.describe(self),
        };
        match whole_layer::fetch_bare(self).await {
            Ok(()) => {
                let disk = Arc::clone(self);
                blocking(move || disk.sync()).await?;
                report.repaired.push(format!("{what}; fetched again"));
            }
            Err(error) => report.wrong.push(format!("{what}: {}", error.report())),
        }
        Ok(())
    }
}
