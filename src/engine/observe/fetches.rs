//! What was fetched for an attachment: which reads have waited for which fetches, and which files were never read.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    blocking::blocking,
    engine::attach::{engine::Engine, live::LiveAttachment, names::unknown},
    error::Result,
    kernel::memory,
    layer::{Disk, DiskCounters, FetchEntry, FetchReason, LayerFile, LayerFiles, WaitEntry},
    oci::{Digest, Reference},
    units::{DiskOffset, LayerOffset},
};

/// Names of files in an answer, for each fetch and for the largest files without present bytes of a layer.
const NAMED_FILES: usize = 4;
const UNREAD_FILES: usize = 50;

/// What was fetched for an attachment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct FetchReport {
    /// ID of the attachment.
    pub id: String,
    /// The image reference of the request.
    pub reference: Reference,
    /// The digest of the image's manifest.
    pub manifest: Digest,
    /// Milliseconds since the request of the attach, or since this daemon has taken the attachment over. All times are from there on.
    pub age_ms: u64,
    /// Milliseconds from there to the mount; 0 for an attachment that was taken over.
    pub mounted_ms: u64,
    /// Layers, topmost first.
    pub layers: Vec<LayerFetches>,
}

/// What was fetched of a layer.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LayerFetches {
    /// The layer's digest.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Number of spans; 0 for a layer that was downloaded whole.
    pub spans: u32,
    /// Runs of present spans: the first one, and the one after the last.
    pub present: Vec<(u32, u32)>,
    /// Counters since the daemon opened the disk, which other attachments may use too.
    pub counters: DiskCounters,
    /// Fetches since the attach, in the order of their ends.
    pub fetches: Vec<FileFetch>,
    /// Reads that have waited since the attach, in the order of their ends.
    pub waits: Vec<FileWait>,
    /// Fetches and waits that were dropped from the log: it keeps the first 768 and the last 256 of each.
    pub dropped: u64,
    /// Files of which no byte is present: no start on this machine has read them.
    pub unread: UnreadFiles,
    /// Why the files are not known; then paths are missing.
    pub unknown_files: Option<String>,
}

/// A fetch, with the files that it was for.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct FileFetch {
    /// Milliseconds from the attach to its beginning.
    pub at_ms: u64,
    /// Its duration in milliseconds.
    pub took_ms: f64,
    /// The first span, and the one after the last.
    pub spans: (u32, u32),
    /// Compressed bytes of the spans.
    pub bytes: u64,
    /// Why the spans were fetched.
    pub reason: FetchReason,
    /// All spans are present.
    pub is_ok: bool,
    /// The file whose read has caused the fetch; `None` for a fetch that no read has waited for, or if it is not known.
    pub cause: Option<String>,
    /// The first files with bytes in the spans.
    pub files: Vec<String>,
    /// The number of further files.
    pub more_files: u64,
}

/// A read that has waited.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct FileWait {
    /// Milliseconds from the attach to the read.
    pub at_ms: u64,
    /// How long it has waited, in milliseconds.
    pub took_ms: f64,
    /// The file; `None` if it is not known.
    pub path: Option<String>,
    /// Offset in the file, or on the disk if the file is not known.
    pub offset: u64,
    /// Bytes of the read.
    pub bytes: u64,
    /// The data is present.
    pub is_ok: bool,
}

/// Files of which no byte is present.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct UnreadFiles {
    /// Their number.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The number of all files with data.
    pub all_files: u64,
    /// The bytes of all files.
    pub all_bytes: u64,
    /// The largest of them.
    pub largest: Vec<UnreadFile>,
}

/// A file of which no byte is present.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct UnreadFile {
    /// The path in the layer.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}

impl Engine {
    /// What was fetched for the attachment with this ID. `NotFound` if no daemon serves it.
    pub async fn fetches(&self, id: &str) -> Result<FetchReport> {
        let live = self.live(id).ok_or_else(|| unknown(id))?;
        let report = blocking(move || Ok(live.fetches())).await;
        // the tables of the layers take a lot; not awaited: the client does not need it
        drop(tokio::task::spawn_blocking(memory::give_back));
        report
    }
}

impl LiveAttachment {
    /// Blocks on local files.
    fn fetches(&self) -> FetchReport {
        let layers = self.devices.iter();
        FetchReport {
            id: self.attachment.id.clone(),
            reference: self.attachment.reference.clone(),
            manifest: self.attachment.manifest,
            age_ms: millis(self.began.elapsed()),
            mounted_ms: millis(self.mounted_after),
            layers: layers
                .map(|device| LayerFetches::of(device.disk(), self.began))
                .collect(),
        }
    }
}

impl LayerFetches {
    fn of(disk: &Arc<Disk>, began: Instant) -> Self {
        let (opened, fetches, waits) = disk.fetch_log();
        let (files, unknown_files) = match disk.files() {
            Ok(files) => (files, None),
            Err(error) => (LayerFiles::default(), Some(error.report())),
        };
        let named = NamedLog {
            disk,
            files: &files,
            began,
            opened,
        };
        let since: Vec<(&WaitEntry, Range<LayerOffset>)> = waits
            .iter()
            .filter(|wait| named.at(wait.at_ms).is_some())
            .map(|wait| (wait, named.range(wait)))
            .collect();
        Self {
            digest: disk.layer().digest,
            size: disk.layer().size,
            spans: disk.span_counts().1,
            present: disk.present_runs(),
            counters: disk.counters(),
            fetches: fetches
                .iter()
                .filter_map(|fetch| named.fetch(fetch, &since))
                .collect(),
            waits: since
                .iter()
                .filter_map(|(wait, range)| named.wait(wait, range))
                .collect(),
            dropped: fetches.dropped() + waits.dropped(),
            unread: unread(disk, files.all()),
            unknown_files,
        }
    }
}

/// The log of a disk with what gives its entries names.
struct NamedLog<'a> {
    disk: &'a Disk,
    files: &'a LayerFiles,
    began: Instant,
    opened: Instant,
}

impl NamedLog<'_> {
    /// Milliseconds from the attach to a time of the log; `None` if the attach was later.
    fn at(&self, at_ms: u32) -> Option<u64> {
        let at = self.opened + Duration::from_millis(at_ms.into());
        // the log has whole milliseconds
        let at = at + Duration::from_millis(1);
        let since = at.checked_duration_since(self.began)?;
        Some(millis(since).saturating_sub(1))
    }

    /// The bytes of the layer that a read is of; empty for metadata.
    fn range(&self, wait: &WaitEntry) -> Range<LayerOffset> {
        let end = DiskOffset(wait.offset.get().saturating_add(wait.length.into()));
        let range = self.disk.layer_range(wait.offset..end);
        range.unwrap_or(LayerOffset(0)..LayerOffset(0))
    }

    fn wait(&self, wait: &WaitEntry, range: &Range<LayerOffset>) -> Option<FileWait> {
        let file = self.files.within(range).first();
        Some(FileWait {
            at_ms: self.at(wait.at_ms)?,
            took_ms: f64::from(wait.took_us) / 1000.0,
            path: file.map(|file| file.path.clone()),
            offset: file.map_or(wait.offset.get(), |file| {
                range.start.get().saturating_sub(file.bytes.start.get())
            }),
            bytes: wait.length.into(),
            is_ok: wait.is_ok,
        })
    }

    fn fetch(
        &self,
        fetch: &FetchEntry,
        waits: &[(&WaitEntry, Range<LayerOffset>)],
    ) -> Option<FileFetch> {
        let layer = self.disk.bytes_of_spans(fetch.spans.0..fetch.spans.1);
        let files = self.files.within(&layer);
        Some(FileFetch {
            at_ms: self.at(fetch.at_ms)?,
            took_ms: f64::from(fetch.took_us) / 1000.0,
            spans: fetch.spans,
            bytes: fetch.bytes.into(),
            reason: fetch.reason,
            is_ok: fetch.is_ok,
            cause: self.cause(fetch, &layer, waits),
            files: files
                .iter()
                .take(NAMED_FILES)
                .map(|file| file.path.clone())
                .collect(),
            more_files: files.len().saturating_sub(NAMED_FILES) as u64,
        })
    }

    /// The file of the read that has started a fetch: the last one before it that has waited for one of its spans.
    fn cause(
        &self,
        fetch: &FetchEntry,
        spans: &Range<LayerOffset>,
        waits: &[(&WaitEntry, Range<LayerOffset>)],
    ) -> Option<String> {
        if fetch.reason != FetchReason::Read {
            return None;
        }
        let before = waits.iter().filter(|(wait, read)| {
            wait.at_ms <= fetch.at_ms.saturating_add(1)
                && read.start < spans.end
                && spans.start < read.end
        });
        let (_, read) = before.max_by_key(|(wait, _)| wait.at_ms)?;
        // of a read of several files, the first one that is in the fetch
        let common = read.start.max(spans.start)..read.end.min(spans.end);
        Some(self.files.within(&common).first()?.path.clone())
    }
}

fn unread(disk: &Disk, files: &[LayerFile]) -> UnreadFiles {
    let bytes = |file: &LayerFile| file.bytes.end.get() - file.bytes.start.get();
    let mut absent: Vec<&LayerFile> = files
        .iter()
        .filter(|file| !disk.has_some_of(file.bytes.clone()))
        .collect();
    absent.sort_by_key(|file| std::cmp::Reverse(bytes(file)));
    UnreadFiles {
        files: absent.len() as u64,
        bytes: absent.iter().map(|file| bytes(file)).sum(),
        all_files: files.len() as u64,
        all_bytes: files.iter().map(bytes).sum(),
        largest: absent
            .iter()
            .take(UNREAD_FILES)
            .map(|file| UnreadFile {
                path: file.path.clone(),
                bytes: bytes(file),
            })
            .collect(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
