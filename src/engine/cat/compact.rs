//! Reads the data of a file with a compact table: each span is decoded with the window that the previous span leaves; only the first window
//! is fetched.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};

use super::spans::{SPANS_AHEAD, part};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt as _},
    gzip::inflate::SpanDecoder,
    layer::SpanWindow,
    oci::Digest,
    source::Source,
    units::LayerOffset,
    ztoc::{Compression, SpanTable},
};

/// Maximum number of compressed bytes per GET, unless a single span is larger.
const GET_BYTES: u64 = 1 << 20;

/// The blob with the windows of a layer's spans.
pub(crate) struct WindowBlob {
    pub(super) source: Source,
    /// Digest of the layer's blob in the compact index.
    pub(super) blob: Digest,
}

/// The data of a range of a layer. A few GETs run ahead; the spans are decoded and verified one after another.
pub(super) fn data(
    source: &Source,
    layer: Digest,
    table: SpanTable,
    windows: WindowBlob,
    range: Range<LayerOffset>,
) -> BoxStream<'static, Result<Bytes>> {
    let table = Arc::new(table);
    let wanted = table.covering(range.clone());
    let (source, of_state) = (source.clone(), source.clone());
    let (fetched, spans) = (Arc::clone(&table), Arc::clone(&table));
    let arriving = stream::iter(gets(&table, wanted.start.get()..wanted.end.get()))
        .map(move |run| {
            let (source, table) = (source.clone(), Arc::clone(&fetched));
            async move {
                let (start, end) = place(&table, &run);
                let bytes = source.range(&layer, start..end).await?;
                Ok::<_, Error>((run, bytes))
            }
        })
        .buffered(SPANS_AHEAD)
        .map(move |fetched| match fetched {
            Ok((run, bytes)) => Vec::from_iter(
                run.clone()
                    .map(|number| span_of(&spans, &run, number, &bytes)),
            ),
            Err(error) => vec![Err(error)],
        })
        .flat_map(stream::iter)
        .boxed();
    let state = SpanDecoding {
        source: of_state,
        layer,
        table,
        windows,
        range,
        arriving,
        before: None,
        decoder: SpanDecoder::default(),
    };
    stream::try_unfold(state, |mut state| async move {
        let piece = state.next().await?;
        Ok(piece.map(|piece| (piece, state)))
    })
    .boxed()
}

/// Groups adjacent spans into GETs of limited size.
fn gets(table: &SpanTable, spans: Range<u32>) -> Vec<Range<u32>> {
    let mut gets: Vec<Range<u32>> = Vec::new();
    for number in spans {
        if let Some(last) = gets.last_mut() {
            let (start, end) = place(table, &(last.start..number + 1));
            if end - start <= GET_BYTES {
                last.end = number + 1;
                continue;
            }
        }
        gets.push(number..number + 1);
    }
    gets
}

/// The byte range of adjacent spans in the blob.
fn place(table: &SpanTable, run: &Range<u32>) -> (u64, u64) {
    let spans = table.spans.get(run.start as usize..run.end as usize);
    let (first, last) = spans
        .and_then(|spans| spans.first().zip(spans.last()))
        .map_or((0, 0), |(first, last)| {
            (first.compressed.start.get(), last.compressed.end.get())
        });
    (first, last.max(first))
}

/// The bytes of one span, cut from the bytes of a GET.
fn span_of(
    table: &SpanTable,
    run: &Range<u32>,
    number: u32,
    bytes: &Bytes,
) -> Result<(u32, Bytes)> {
    let (from, _) = place(table, run);
    let (start, end) = place(table, &(number..number + 1));
    let within = |at: u64| usize::try_from(at.checked_sub(from)?).ok();
    match within(start).zip(within(end)) {
        Some((start, end)) if end <= bytes.len() => Ok((number, bytes.slice(start..end))),
        _ => Err(Error::new(
            Kind::Corrupt,
            format!("span {number} is outside the bytes that were fetched for it"),
        )),
    }
}

struct SpanDecoding {
    source: Source,
    layer: Digest,
    table: Arc<SpanTable>,
    windows: WindowBlob,
    range: Range<LayerOffset>,
    arriving: BoxStream<'static, Result<(u32, Bytes)>>,
    /// The window for the next span, if the previous span was decoded.
    before: Option<SpanWindow>,
    decoder: SpanDecoder,
}

impl SpanDecoding {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let Some(arrived) = self.arriving.next().await else {
            return Ok(None);
        };
        let layer = self.layer;
        let (number, bytes) = arrived.map_err(|error| error.context(format!("layer {layer}")))?;
        let mut piece = self.decode(number, bytes, None).await;
        if let Err(error) = &piece
            && error.kind() == Kind::Corrupt
        {
            piece = match self.again(number).await {
                Some(piece) => Ok(piece),
                None => piece,
            };
        }
        piece
            .map(Some)
            .map_err(|error| error.context(format!("layer {layer}, span {number}")))
    }

    /// Fetches a span once more, from each host alone. `None`: no host has the right bytes.
    async fn again(&mut self, number: u32) -> Option<Bytes> {
        let (start, end) = place(&self.table, &(number..number + 1));
        let of_windows = self.windows.source.at_each_host();
        for (at, host) in self.source.at_each_host().into_iter().enumerate() {
            let bytes = host.range(&self.layer, start..end).await;
            if let Ok(bytes) = bytes
                && let Ok(piece) = self.decode(number, bytes, of_windows.get(at)).await
            {
                return Some(piece);
            }
        }
        None
    }

    /// Decodes and verifies a span. `from`: where its window is fetched, if that is not where all windows are.
    async fn decode(&mut self, number: u32, bytes: Bytes, from: Option<&Source>) -> Result<Bytes> {
        let Some(span) = self.table.spans.get(number as usize).cloned() else {
            return Err(Error::new(Kind::Corrupt, "there is no such span"));
        };
        let mut after = None;
        let decoded = match self.table.compression {
            Compression::Uncompressed => bytes,
            Compression::Gzip => {
                let before = match self.before.clone() {
                    Some(before) => before,
                    None => {
                        let source = from.unwrap_or(&self.windows.source);
                        let blob = &self.windows.blob;
                        window(source, blob, number, span.window.clone()).await?
                    }
                };
                let mut decoder = std::mem::take(&mut self.decoder);
                let record = span.clone();
                let work = move || {
                    let decoded = decoder
                        .decode(&record, &bytes, Some(before.bytes()))
                        .map(Bytes::copy_from_slice);
                    Ok((decoded, decoder, before))
                };
                let (decoded, decoder, before) = blocking(work).await?;
                self.decoder = decoder;
                let decoded = decoded.or_kind(Kind::Corrupt, || "cannot decode the span".into())?;
                after = before.after(&decoded).map(SpanWindow::Verified);
                decoded
            }
        };
        let found = Digest::of(&decoded);
        if found != span.digest {
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "its content has the digest {found}, but the table says {}",
                    span.digest
                ),
            ));
        }
        self.before = after;
        part(&decoded, &span.uncompressed, &self.range)
    }
}

/// The window of a span from the compact index.
async fn window(
    source: &Source,
    blob: &Digest,
    number: u32,
    stored: Option<Range<usize>>,
) -> Result<SpanWindow> {
    match stored {
        _ if number == 0 => Ok(SpanWindow::start()),
        None => Ok(SpanWindow::unknown()),
        Some(range) => {
            let range = range.start as u64..range.end as u64;
            SpanWindow::stated(source.range(blob, range).await?)
        }
    }
}
