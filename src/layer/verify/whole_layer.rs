//! The check of a whole layer when all its spans are present: whether the disk and `rest` ([`super::non_file_bytes`]) together are the
//! stream with the layer's diff ID, and whether its tar headers are those that the disk was laid out from.
//!
//! A span's digest comes from the table, the diff ID from the image. A disk is complete only after this check: an ordinary ext4 image,
//! which needs no daemon and may serve any image that has the layer. The check reads the local files once. It fetches only spans that have
//! no data of any file, because no reader has needed them.
//!
//! A difference may be damage of the local disk. So before the table counts as false, each span's bytes are compared with the checksums
//! that were written with them ([`crate::layer::repair::lost_spans`]). Damaged spans are fetched again, and the check is repeated.

use std::{
    io,
    ops::{ControlFlow, Range},
    sync::Arc,
    time::Duration,
};

use super::{
    contradictions::Refutation,
    non_file_bytes::{self, NonFileBytes, Packed},
    span,
    trailer::Tail,
};
use crate::{
    blocking::blocking,
    buffer::set_length,
    error::{Error, Kind, Result, ResultExt as _},
    layer::{
        ahead::fill_decision::FETCH_BYTES,
        disk::Disk,
        read::{
            fetch,
            in_flight::{self, Purpose},
            reader::SpanReader,
        },
        repair::lost_spans::{self, LostSpans},
        stored::seal::Damage,
    },
    metrics::{METRICS, Verified},
    oci::digest::Hasher,
    units::{LayerOffset, SpanId},
};

/// Time limit for fetching the spans that only the check needs.
const FETCH_TIMEOUT: Duration = Duration::from_secs(60);

/// References to a disk during its check: the task and the thread that reads.
const OWN_REFERENCES: usize = 2;

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// Maximum number of rounds of one check, if the local disk does not keep the written data.
const ROUNDS: usize = 3;

/// The result of a check.
pub(crate) enum LayerVerdict {
    /// The disk is the layer.
    Verified,
    /// The table contradicts the layer in these spans.
    Contradiction(Range<u32>, Refutation),
    /// The local disk has not kept the written data: the table was not checked.
    Damaged(LostSpans),
    /// No user has the disk open any more.
    Abandoned,
}

async fn run(disk: &Arc<Disk>) -> Result<()> {
    for _ in 0..ROUNDS {
        fetch_bare(disk).await?;
        let services = Arc::clone(disk.services());
        let _permit = services.check_permit().await;
        let disk = Arc::clone(disk);
        if blocking(move || check(&disk)).await? {
            return Ok(());
        }
    }
    Err(Error::new(
        Kind::Io,
        format!(
            "{} does not keep the data that is written to it; check the local disk and the kernel log",
            disk.path().display()
        ),
    ))
}

/// Checks a layer whose spans are all present. Returns false if some have to be fetched again.
fn check(disk: &Arc<Disk>) -> Result<bool> {
    let _hold = disk.hold_spans();
    if !disk.is_full() {
        return Ok(true); // spans were evicted: the check is due when they are present again
    }
    disk.sync()?;
    let Some(rest) = disk.verification().layer_check().rest() else {
        return Ok(true);
    };
    match examine(disk, &rest)? {
        LayerVerdict::Verified => disk.complete_check()?,
        LayerVerdict::Contradiction(spans, refutation) => disk.refute(spans, &refutation)?,
        LayerVerdict::Abandoned => {}
        LayerVerdict::Damaged(lost) => {
            tracing::warn!(
                layer = %disk.layer().digest,
                "{}; the spans are fetched again",
                lost.describe(disk)
            );
            let unwritten = || format!("{} cannot be written", disk.path().display());
            disk.lose(&lost.data, &lost.rest)
                .or_kind(Kind::Io, unwritten)?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fetches the spans that have no data of any file.
pub(crate) async fn fetch_bare(disk: &Arc<Disk>) -> Result<()> {
    let deadline = in_flight::deadline(Some(FETCH_TIMEOUT));
    let (waiters, claims) = disk.reader().in_flight().claim(
        disk.verification().layer_check().bare().into_iter(),
        |span| !disk.verification().layer_check().is_bare(span),
        |run| disk.layout().compressed_length(run) <= FETCH_BYTES,
        Purpose::Ahead,
        deadline,
    );
    for claim in claims {
        disk.services()
            .spawn(fetch::fetch(Arc::clone(disk), claim, None));
    }
    for waiter in waiters {
        let late = || {
            Arc::new(Error::new(
                Kind::Unavailable,
                "no source has answered in time",
            ))
        };
        waiter.wait(deadline, late).await.map_err(|error| {
            let context =
                "a span without file data could not be fetched for the check of the whole layer";
            Error::with_source(error.kind(), context, error)
        })?;
    }
    Ok(())
}

impl Disk {
    /// Starts the check of the layer if it is due. At most one check runs at a time.
    pub(crate) fn check_when_due(self: &Arc<Self>) {
        if !self.is_full() || self.is_verified() {
            return;
        }
        let disk = Arc::clone(self);
        self.services().spawn(async move {
            if !disk.verification().layer_check().begin_check() {
                return;
            }
            let result = run(&disk).await;
            if let Err(error) = &result {
                tracing::warn!(
                    layer = %disk.layer().digest,
                    "the layer could not be checked as a whole: {}",
                    error.report()
                );
                disk.health().no_source_needed();
            }
            disk.verification()
                .layer_check()
                .end_check(result.as_ref().err());
        });
    }

    /// Revokes spans that were shown to contradict the table. The disk is degraded because of them.
    pub(crate) fn refute(&self, spans: Range<u32>, refutation: &Refutation) -> Result<()> {
        // a window is found by a span, which is counted as one of the table
        if !matches!(refutation, Refutation::Window) {
            METRICS
                .verification_failures
                .count(Verified::Layer as usize);
        }
        self.verification()
            .layer_check()
            .refute(spans.clone(), refutation.clone());
        let reason = |span| span::revoked_reason(self, span, refutation.clone());
        let first = match refutation {
            Refutation::DiffId { .. } => {
                let error = reason(None);
                self.health().failed_as_a_whole(&error);
                METRICS.false_diff_ids.add(1);
                error
            }
            _ => {
                for span in spans.clone().map(SpanId) {
                    self.health().failed(&[span], &reason(Some(span)));
                }
                reason(Some(SpanId(spans.start)))
            }
        };
        tracing::warn!("{}", first.report());
        self.record().mark_table_false(&first);
        let revoked = self.revoke(spans).or_kind(Kind::Io, || {
            format!("{} cannot be written", self.path().display())
        });
        if matches!(refutation, Refutation::DiffId { .. }) {
            self.services().tell_false_layer(self.layer(), self.table());
        }
        revoked
    }
}

/// Checks the layer. Before the table counts as false, looks for damage of the local files.
fn examine(disk: &Arc<Disk>, rest: &NonFileBytes) -> Result<LayerVerdict> {
    let mut verdict = judge(disk, rest);
    if verdict.as_ref().is_err_and(Damage::is_in) && disk.repair() {
        verdict = judge(disk, rest);
    }
    if matches!(verdict, Err(_) | Ok(LayerVerdict::Contradiction(..))) {
        let lost = lost_spans::lost(disk, Some(rest), |_| ())?;
        if !lost.is_empty() {
            return Ok(LayerVerdict::Damaged(lost));
        }
    }
    verdict
}

fn judge(disk: &Arc<Disk>, rest: &NonFileBytes) -> Result<LayerVerdict> {
    let unread = || "the stored bytes of the layer cannot be read".to_owned();
    let tail = Tail::open(disk.directory(), disk.reader(), rest)?;
    let abandoned = || Arc::strong_count(disk) <= OWN_REFERENCES;
    let Some(found) = diff_id(disk.reader(), rest, &tail, abandoned).or_kind(Kind::Io, unread)?
    else {
        return Ok(LayerVerdict::Abandoned);
    };
    let expected = disk.layer().diff_id;
    if found != expected {
        let refutation = Refutation::DiffId { found, expected };
        return Ok(LayerVerdict::Contradiction(
            0..disk.layout().spans().count(),
            refutation,
        ));
    }
    let Some(headers) = disk.verification().headers() else {
        return Ok(LayerVerdict::Verified);
    };
    let mut packed = Packed::new(non_file_bytes::all(disk.layout().regions()));
    let read = |range: &Range<LayerOffset>| {
        let mut bytes = vec![0; (range.end.get() - range.start.get()) as usize];
        rest.read(packed.position(range.start), &mut bytes)?;
        Ok(bytes)
    };
    let beyond = |take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>| tail.each(take);
    let found = headers.check_whole(disk.layout().spans().end(), read, beyond, || {
        disk.read_entries()
    })?;
    Ok(match found {
        None => LayerVerdict::Verified,
        Some((range, mismatch)) => {
            let mut spans = disk.layout().spans().covering(range);
            if spans.is_empty() {
                // the difference is after the last span
                spans =
                    disk.layout().spans().count().saturating_sub(1)..disk.layout().spans().count();
            }
            LayerVerdict::Contradiction(spans, Refutation::Header(mismatch))
        }
    })
}

/// SHA-256 of the layer, from the disk and `rest`; `None`: the check was abandoned.
fn diff_id(
    reader: &SpanReader,
    rest: &NonFileBytes,
    tail: &Tail<'_>,
    abandoned: impl Fn() -> bool,
) -> io::Result<Option<crate::oci::Digest>> {
    let mut hasher = Hasher::default();
    let mut files =
        PieceReader::new(|offset, buffer: &mut [u8]| reader.file().read(offset, buffer));
    let mut others = PieceReader::new(|offset, buffer: &mut [u8]| rest.read(offset, buffer));
    let (files_end, others_end) = (reader.layout().size(), rest.length()?);
    let mut packed = Packed::new(non_file_bytes::all(reader.layout().regions()));
    let mut position = 0;
    for region in non_file_bytes::all(reader.layout().regions()) {
        if abandoned() {
            return Ok(None);
        }
        let next = packed.position(region.layer.start);
        others.each(position..next, others_end, |bytes| hasher.update(bytes))?;
        position = next;
        let bytes = region.disk.start.get()..region.disk.end.get();
        files.each(bytes, files_end, |bytes| hasher.update(bytes))?;
    }
    others.each(position..rest.end(), others_end, |bytes| {
        hasher.update(bytes)
    })?;
    let mut is_whole = true;
    tail.each(|bytes| {
        hasher.update(bytes);
        is_whole = !abandoned();
        match is_whole {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })?;
    Ok(is_whole.then(|| hasher.finish()))
}

/// Reads ascending ranges, [`PIECE`] bytes at a time, however short the ranges are.
struct PieceReader<R> {
    read: R,
    buffer: Vec<u8>,
    start: u64,
}

impl<R: FnMut(u64, &mut [u8]) -> io::Result<()>> PieceReader<R> {
    fn new(read: R) -> Self {
        Self {
            read,
            buffer: Vec::new(),
            start: 0,
        }
    }

    /// Passes the bytes of a range, in pieces. Bytes from `end` on are not read.
    fn each(&mut self, range: Range<u64>, end: u64, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        let mut position = range.start;
        while position < range.end {
            let have = self.start..self.start + self.buffer.len() as u64;
            if !have.contains(&position) {
                let length = end.saturating_sub(position).min(PIECE as u64) as usize;
                if length == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                set_length(&mut self.buffer, length);
                self.start = position;
                (self.read)(position, &mut self.buffer)?;
                continue;
            }
            let stop = range.end.min(have.end);
            take(&self.buffer[(position - have.start) as usize..(stop - have.start) as usize]);
            position = stop;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_reader_passes_each_range_and_reads_each_byte_once() {
        let file: Vec<u8> = (0..3_000_000_u32)
            .map(|number| (number % 251) as u8)
            .collect();
        let mut read = 0;
        let mut pieces = PieceReader::new(|offset, buffer: &mut [u8]| {
            let start = offset as usize;
            buffer.copy_from_slice(&file[start..start + buffer.len()]);
            read += buffer.len();
            Ok(())
        });
        let mut position = 0;
        for length in [0, 1, 5000, 1_000_000, 1_500_000, 17, 494_982] {
            let mut found = Vec::new();
            let range = position..position + length;
            let end = file.len() as u64;
            pieces
                .each(range.clone(), end, |bytes| found.extend_from_slice(bytes))
                .unwrap();
            assert!(found == file[range.start as usize..range.end as usize]);
            position = range.end;
        }
        assert_eq!((position, read), (3_000_000, 3_000_000));
    }
}
