//! Verifies, inflates and checks the compressed bytes of a span, and writes its data to the disk.

use std::{io, sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    before::{SpanJoint, SpanWindow},
    held_spans::HeldSpan,
    in_flight::FetchEffort,
    reader::SpanReader,
    scatter::scatter,
    windows::CompactWindows,
};
use crate::{
    error::{Error, Kind},
    gzip::{inflate::SpanDecoder, references::references},
    layer::{
        disk::Disk,
        stored::{seal::Damage, span_record::SpanCheck},
        verify::{
            lies::{Refutation, TableLie},
            span::DecodedSpan,
            trailer,
        },
    },
    oci::Digest,
    units::SpanId,
    ztoc::Span,
};

/// Why a span whose compressed bytes have come is not present.
pub(crate) enum SpanRefused {
    /// The bytes are not the span's, or the table that says so has to come again: another source, or another try, may have them.
    Mismatch(Error),
    /// They are, and no try will help: the table lies, or what is stored of it cannot be read.
    Lasting(Error),
}

/// Has a span placed by one of the decoding threads. Gives the window of the span after it, as [`place`].
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

/// Verifies, inflates and scatters one span, and sets its bit. On a decoding thread. Where the local disk does not take it
/// readers get it from memory ([`super::held_spans`]). A damaged file of the disk's folder is mended on the way, where that can be done.
///
/// `joint` says what stands before the span where its table does not have it; then the window of the next span is given too, if all of
/// it is known.
fn place(
    disk: &Arc<Disk>,
    span: SpanId,
    compressed: &[u8],
    joint: Option<&SpanJoint>,
    decoder: &mut SpanDecoder,
) -> Result<Option<Bytes>, SpanRefused> {
    let mut place = || place_once(disk, span, compressed, joint, decoder);
    match place() {
        Err(SpanRefused::Lasting(error)) if Damage::is_in(&error) => match disk.mend() {
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
    let unkept = |error: io::Error| {
        Error::with_source(
            Kind::Io,
            format!("{} cannot be kept in {}", name(), disk.path().display()),
            error,
        )
    };
    let local = |error| SpanRefused::Lasting(unkept(error));
    let stored = disk.layout().spans().read(span).map_err(local)?;
    let record = &stored.span;
    if joint.is_none() {
        check_digest("bytes have", compressed, record)?;
    }
    let refused = |lie: TableLie| {
        let context = format!(
            "{} has the digest that its table {} states, and is not what the table says",
            name(),
            disk.table()
        );
        let error = Error::with_source(Kind::Corrupt, context, lie);
        disk.record().convict(&error);
        SpanRefused::Lasting(error)
    };
    if let Some(refutation) = disk.refutation(span) {
        return Err(refused(TableLie::Refuted(refutation)));
    }
    let from_table = disk.reader().windows().of_ztoc(&stored).map_err(local)?;
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
            // the digest is of the output: until it has been seen, the bytes themselves are in doubt
            let decoded = decoded.map_err(|lie| {
                let context = format!("{} does not decode", name());
                SpanRefused::Mismatch(Error::with_source(Kind::Corrupt, context, lie))
            })?;
            check_digest("output has", decoded.bytes, record)?;
            decoded
        }
    };
    if let Some(SpanWindow::Stated(window, _)) = joint.map(|joint| &joint.before) {
        let length = decoded.bytes.len() as u64;
        // what is not known to refer to less refers to all
        let is_covered = references(compressed, record.bits, length)
            .map_or_else(|_| window.is_whole(), |used| window.used().contains(&used));
        if !is_covered {
            return Err(refused(TableLie::Reference));
        }
    }
    let mut lie = decoded.check(disk, span).map_err(SpanRefused::Lasting)?;
    let after = joint.and_then(|joint| joint.before.after(decoded.bytes));
    let mut kept = Ok(());
    if let (None, Some(joint), Some(windows)) = (&lie, joint, disk.reader().compact_windows()) {
        match join(disk.reader(), windows, span, joint, after.as_deref()) {
            Ok(found) => lie = found,
            Err(error) => kept = Err(unkept(error)),
        }
    }
    if let Some(lie) = lie {
        if let TableLie::Window { next } = lie {
            disk.refute(next.get()..next.get() + 1, &Refutation::Window)
                .map_err(SpanRefused::Lasting)?;
        }
        return Err(refused(lie));
    }
    let start = record.uncompressed.start;
    let write = || {
        let regions = || disk.layout().regions().in_layer(&record.uncompressed);
        let mut check = SpanCheck {
            data: scatter(disk.file(), regions(), start, decoded.bytes).map_err(unkept)?,
            ..SpanCheck::default()
        };
        let Some(rest) = disk.verification().layer_check().rest() else {
            return Ok(check);
        };
        let mut tail = decoded.tail;
        if trailer::is_long(tail) {
            trailer::keep_last(disk.folder(), window, compressed)?;
            tail = &[];
            check.has_last = true;
        }
        let written = rest.write(span, start, decoded.bytes, regions(), tail);
        check.rest = written.map_err(unkept)?;
        Ok(check)
    };
    let seen = match kept.and_then(|()| write()) {
        Ok(check) => disk.set_present(span, check),
        Err(error) if Damage::is_in(&error) => return Err(SpanRefused::Lasting(error)),
        Err(error) => {
            let held = HeldSpan {
                compressed: Bytes::copy_from_slice(compressed),
                joint: joint.map(SpanJoint::alone),
                start,
                decoded: Bytes::copy_from_slice(decoded.bytes),
            };
            disk.hold(span, held, error)
        }
    };
    seen.map_err(|refutation| refused(TableLie::Refuted(refutation)))?;
    Ok(after)
}

fn check_digest(what: &str, bytes: &[u8], record: &Span) -> Result<(), SpanRefused> {
    let found = Digest::of(bytes);
    if found == record.digest {
        return Ok(());
    }
    Err(SpanRefused::Mismatch(Error::new(
        Kind::Corrupt,
        format!("its {what} digest {found}, and not {}", record.digest),
    )))
}

/// Holds a span and its neighbours against each other where one was decoded with a window that the compact index states, and leaves what
/// they will need for it. `after` is the true window of the next span.
fn join(
    reader: &SpanReader,
    windows: &CompactWindows,
    span: SpanId,
    joint: &SpanJoint,
    after: Option<&[u8]>,
) -> io::Result<Option<TableLie>> {
    let joints = windows.joints();
    match &joint.before {
        SpanWindow::True(_) => joints.forget(span)?,
        SpanWindow::Stated(window, stored) => match joints.known(span)? {
            // the span before has come meanwhile
            Some(known) if !window.agrees_with(&known) => {
                return Ok(Some(TableLie::Refuted(Refutation::Window)));
            }
            Some(_) => joints.forget(span)?,
            None if stored.is_empty() => {}
            None => joints.leave_stated(span, stored)?,
        },
    }
    let next = SpanId(span.get() + 1); // there are fewer than u32::MAX
    let Some(after) = after.filter(|_| next.get() < reader.layout().spans().count()) else {
        return Ok(None);
    };
    match joints.stated(next)? {
        Some(stated) if !stated.agrees_with(after) => return Ok(Some(TableLie::Window { next })),
        Some(_) => joints.forget(next)?,
        None if joint.is_followed || reader.has(next) => {}
        None => joints.leave_known(next, after)?,
    }
    Ok(None)
}
