//! Verifies, inflates and checks the compressed bytes of a span, and writes its data to the disk.

use std::{io, sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    compact_windows::CompactWindows,
    held_spans::HeldSpan,
    in_flight::FetchEffort,
    reader::SpanReader,
    scatter::scatter,
    span_window::{SpanJoint, SpanWindow},
};
use crate::{
    error::{Error, Kind},
    gzip::{inflate::SpanDecoder, references::references},
    layer::{
        disk::Disk,
        stored::{seal::Damage, span_record::SpanCheck},
        verify::{
            contradictions::{Refutation, TableContradiction},
            span::DecodedSpan,
            trailer,
        },
    },
    metrics::{METRICS, Verified},
    oci::Digest,
    units::SpanId,
    ztoc::Span,
};

/// Bytes that a span takes on the local file system besides its own: blocks that it shares with its neighbours, and its bytes in `rest`.
const OTHER_BYTES: u64 = 16 << 10;

/// Why a span is not present although its compressed bytes have arrived.
pub(crate) enum SpanRefused {
    /// The bytes are not those of the span, or the stored table is damaged and must be fetched again: another source or attempt may help.
    Mismatch(Error),
    /// No source or attempt can help: the bytes are right and contradict the table, or the stored files of the disk cannot be read.
    Lasting(Error),
}

/// Places a span on one of the decoding threads. Returns the window of the next span, as [`place`].
pub(super) async fn decode(
    disk: &Arc<Disk>,
    effort: &Arc<FetchEffort>,
    span: SpanId,
    bytes: Bytes,
    joint: Option<SpanJoint>,
) -> (SpanId, Result<Option<Bytes>, SpanRefused>) {
    let worker = Arc::clone(disk);
    let result = disk
        .services()
        .decoders()
        .run(effort, move |decoder| {
            let began = Instant::now();
            let placed = place(&worker, span, &bytes, joint.as_ref(), decoder);
            let took = began.elapsed();
            worker
                .ahead()
                .fill()
                .measured(|cost| cost.decoded(bytes.len() as u64, took));
            placed
        })
        .await;
    let failed = |failed| {
        let context = format!("span {span} of layer {}", disk.layer().digest);
        Err(SpanRefused::Lasting(Error::with_source(
            Kind::Io,
            context,
            failed,
        )))
    };
    (span, result.unwrap_or_else(failed))
}

/// Verifies, inflates and scatters one span, and sets its bit, on a decoding thread. If the local disk does not accept the span, readers
/// get it from memory ([`super::held_spans`]). If a stored file of the disk is damaged and can be repaired, that is done first.
///
/// `joint` has the window before the span if the table does not have it. Then the window of the next span is returned too, if all of it is
/// known.
fn place(
    disk: &Arc<Disk>,
    span: SpanId,
    compressed: &[u8],
    joint: Option<&SpanJoint>,
    decoder: &mut SpanDecoder,
) -> Result<Option<Bytes>, SpanRefused> {
    let mut place = || place_once(disk, span, compressed, joint, decoder);
    match place() {
        Err(SpanRefused::Lasting(error)) if Damage::is_in(&error) => match disk.repair() {
            true => place(),
            false if disk.table_repair().lacks_table() => Err(SpanRefused::Mismatch(error)),
            false => Err(SpanRefused::Lasting(error)),
        },
        placed => placed,
    }
}

fn place_once(
    disk: &Arc<Disk>,
    span: SpanId,
    compressed: &[u8],
    joint: Option<&SpanJoint>,
    decoder: &mut SpanDecoder,
) -> Result<Option<Bytes>, SpanRefused> {
    let name = || format!("span {span} of layer {}", disk.layer().digest);
    let local_error = |error: io::Error| {
        Error::with_source(
            Kind::Io,
            format!("{} cannot be written to {}", name(), disk.path().display()),
            error,
        )
    };
    let lasting = |error| SpanRefused::Lasting(local_error(error));
    let stored = disk.layout().spans().read(span).map_err(lasting)?;
    let record = &stored.span;
    if joint.is_none() {
        check_digest("bytes have", compressed, record)?;
    }
    let refused = |contradiction: TableContradiction| {
        METRICS
            .verification_failures
            .count(Verified::Table as usize);
        let context = format!(
            "{} has the digest that its table {} states, but contradicts the table; the next attach does not use this table",
            name(),
            disk.table()
        );
        let error = Error::with_source(Kind::Corrupt, context, contradiction);
        disk.record().mark_table_false(&error);
        SpanRefused::Lasting(error)
    };
    if let Some(refutation) = disk.refutation(span) {
        return Err(refused(TableContradiction::Refuted(refutation)));
    }
    let from_table = disk.reader().windows().of_ztoc(&stored).map_err(lasting)?;
    let window = joint.map(|joint| joint.before.bytes());
    let window = window.or(from_table.as_deref());
    let decoded = DecodedSpan::new(
        disk.layout().spans(),
        span,
        record,
        compressed,
        window,
        decoder,
    );
    let decoded = match joint {
        None => decoded.map_err(refused)?,
        Some(_) => {
            // the digest is that of the output: before it is checked, the compressed bytes may be wrong
            let decoded = decoded.map_err(|error| {
                METRICS.verification_failures.count(Verified::Span as usize);
                let context = format!("{} does not decode", name());
                SpanRefused::Mismatch(Error::with_source(Kind::Corrupt, context, error))
            })?;
            check_digest("output has", decoded.bytes, record)?;
            decoded
        }
    };
    if let Some(SpanWindow::Stated(window, _)) = joint.map(|joint| &joint.before) {
        let length = decoded.bytes.len() as u64;
        // if the references cannot be determined, the span may refer to all 32 KiB
        let is_covered = references(compressed, record.bits, length)
            .map_or_else(|_| window.is_whole(), |used| window.used().contains(&used));
        if !is_covered {
            return Err(refused(TableContradiction::Reference));
        }
    }
    let mut contradiction = decoded.check(disk, span).map_err(SpanRefused::Lasting)?;
    let after = joint.and_then(|joint| joint.before.after(decoded.bytes));
    let mut stored_joint = Ok(());
    if let (None, Some(joint), Some(windows)) =
        (&contradiction, joint, disk.reader().compact_windows())
    {
        match join(disk.reader(), windows, span, joint, after.as_deref()) {
            Ok(found) => contradiction = found,
            Err(error) => stored_joint = Err(local_error(error)),
        }
    }
    if let Some(contradiction) = contradiction {
        if let TableContradiction::Window { next } = contradiction {
            disk.refute(next.get()..next.get() + 1, &Refutation::Window)
                .map_err(SpanRefused::Lasting)?;
        }
        return Err(refused(contradiction));
    }
    let start = record.uncompressed.start;
    let length = record.uncompressed.end.get() - start.get();
    let reserved = disk.services().space().reserve(length + OTHER_BYTES);
    let write = || {
        let regions = || disk.layout().regions().in_layer(&record.uncompressed);
        let mut check = SpanCheck {
            data: scatter(disk.file(), regions(), start, decoded.bytes).map_err(local_error)?,
            ..SpanCheck::default()
        };
        let Some(rest) = disk.verification().layer_check().rest() else {
            return Ok(check);
        };
        let mut tail = decoded.tail;
        if trailer::is_long(tail) {
            trailer::keep_last(disk.directory(), window, compressed)?;
            tail = &[];
            check.has_last = true;
        }
        let written = rest.write(span, start, decoded.bytes, regions(), tail);
        check.rest = written.map_err(local_error)?;
        Ok(check)
    };
    let generation = disk.reader().presence().generation();
    let hold = |error| {
        let held = HeldSpan {
            compressed: Bytes::copy_from_slice(compressed),
            joint: joint.map(SpanJoint::alone),
            start,
            decoded: Bytes::copy_from_slice(decoded.bytes),
        };
        disk.hold(span, held, error)
    };
    let reserved = reserved.map_err(local_error);
    let written = stored_joint
        .and(reserved)
        .and_then(|reservation| Ok((write()?, reservation)));
    let written = written.map(|(check, reservation)| {
        disk.measure();
        drop(reservation);
        check
    });
    let result = match written {
        Ok(check) => match disk.set_present(span, check, generation) {
            Ok(true) => Ok(()),
            Ok(false) => hold(local_error(io::Error::other("a sync has failed meanwhile"))),
            Err(refutation) => Err(refutation),
        },
        Err(error) if Damage::is_in(&error) => return Err(SpanRefused::Lasting(error)),
        Err(error) => hold(error),
    };
    result.map_err(|refutation| refused(TableContradiction::Refuted(refutation)))?;
    Ok(after)
}

fn check_digest(what: &str, bytes: &[u8], record: &Span) -> Result<(), SpanRefused> {
    let found = Digest::of(bytes);
    if found == record.digest {
        return Ok(());
    }
    METRICS.verification_failures.count(Verified::Span as usize);
    Err(SpanRefused::Mismatch(Error::new(
        Kind::Corrupt,
        format!(
            "its {what} digest {found}, but its table states {}",
            record.digest
        ),
    )))
}

/// If a span was decoded with a window that the compact index states, compares that window with the output of the previous span, or stores
/// what the neighbours need for this comparison. `after` is the verified window of the next span.
fn join(
    reader: &SpanReader,
    windows: &CompactWindows,
    span: SpanId,
    joint: &SpanJoint,
    after: Option<&[u8]>,
) -> io::Result<Option<TableContradiction>> {
    let joints = windows.joints();
    match &joint.before {
        SpanWindow::Verified(_) => joints.remove(span)?,
        SpanWindow::Stated(window, stored) => match joints.verified(span)? {
            // the previous span has become present meanwhile
            Some(verified) if !window.agrees_with(&verified) => {
                return Ok(Some(TableContradiction::Refuted(Refutation::Window)));
            }
            Some(_) => joints.remove(span)?,
            None if stored.is_empty() => {}
            None => joints.store_stated(span, stored)?,
        },
    }
    let next = SpanId(span.get() + 1); // there are fewer than u32::MAX
    let Some(after) = after.filter(|_| next.get() < reader.layout().spans().count()) else {
        return Ok(None);
    };
    match joints.stated(next)? {
        Some(stated) if !stated.agrees_with(after) => {
            return Ok(Some(TableContradiction::Window { next }));
        }
        Some(_) => joints.remove(next)?,
        None if joint.is_followed || reader.has(next) => {}
        None => joints.store_verified(next, after)?,
    }
    Ok(None)
}
