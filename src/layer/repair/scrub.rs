//! A disk's files, held against their checks, and mended: `socinbd check`.
//!
//! What follows from the table is made again from it and compared. Each span is read and has the check that was written with it, or is
//! fetched again; so is one without a check. A layer that was streamed has checks of its disk's pieces ([`super::pieces`]).

use std::sync::Arc;

use tokio::sync::watch;

use super::{
    lost_spans,
    mend::{self, Mended},
    metadata, pieces,
    report::ScrubReport,
};
use crate::{
    blocking::blocking,
    error::{Kind, Result, ResultExt as _},
    layer::{disk::Disk, verify::whole_layer},
};

impl Disk {
    /// Holds all that the disk's directory has against its checks, and mends what it can: see [`ScrubReport`]. Rotten spans are fetched again;
    /// those of a complete disk at once, into the disk itself, so that whatever is mounted of it stays. `read` is told the bytes read.
    pub async fn scrub(self: &Arc<Self>, read: watch::Sender<u64>) -> Result<ScrubReport> {
        self.services().enter();
        let mut report = ScrubReport::new(self.layer().digest, *self.table());
        report.mended = self.table_repair().take_mended();
        if self.layout().spans().count() == 0 {
            pieces::scrub(self, read, &mut report).await?;
            return Ok(report);
        }
        self.scrub_derived(&mut report).await?;
        self.scrub_spans(read, &mut report).await?;
        Ok(report)
    }

    /// What follows from the table.
    async fn scrub_derived(self: &Arc<Self>, report: &mut ScrubReport) -> Result<()> {
        let disk = Arc::clone(self);
        let stored = blocking(move || {
            mend::from_stored_table(&disk.services().new_directory(), disk.directory())
        });
        let mut mended = stored.await?;
        if let Mended::LacksTable(_) = &mended {
            mended = match self.fetch_table().await {
                Ok(again) => again,
                Err(error) => Mended::LacksTable(error.context(
                    "the stored table is damaged; it comes again when an image that has it is attached",
                )),
            };
        }
        match mended {
            Mended::Done(names) => {
                self.table_repair().has_table_again();
                report.mended.extend(names);
            }
            Mended::LacksTable(error) | Mended::Hopeless(error) => {
                report.wrong.push(error.report());
                // what can be seen without the table
                if let Some(expected) = self.record().lock_state().metadata_crc32
                    && metadata::checksum(self.file(), self.layout().regions()).ok()
                        != Some(expected)
                {
                    report
                        .wrong
                        .push("the file system's metadata are damaged".to_owned());
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
            let slack = lost_spans::mend_slack(disk.reader()).or_kind(Kind::Io, || {
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
            report.mended.push(format!(
                "{} was damaged behind {slack} files' ends; it is zero there again",
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
            report.mended.push(format!(
                "{}; it is fetched again when it is wanted",
                lost.describe(self)
            ));
            return Ok(());
        }
        self.verification()
            .layer_check()
            .want(lost.unchecked.iter().copied());
        let what = match lost.is_empty() {
            true => format!("{} spans had no check", lost.unchecked.len()),
            false => lost.describe(self),
        };
        match whole_layer::fetch_bare(self).await {
            Ok(()) => {
                let disk = Arc::clone(self);
                blocking(move || disk.sync()).await?;
                report.mended.push(format!("{what}; fetched again"));
            }
            Err(error) => report.wrong.push(format!("{what}: {}", error.report())),
        }
        Ok(())
    }
}
