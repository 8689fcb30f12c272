//! Layers to zTOCs and back: what `soci::build` makes of a blob, and what `gzip::inflate` makes of its spans.

mod command;
mod damage;
mod layers;
pub mod random;
mod vectors;

use socinbd::{
    gzip::inflate::{self, SpanDecoder},
    oci::{Digest, Packing},
    soci::build::{Error, Indexed, LayerIndexer, LayerSink, NoSink, Options},
    tar::Entry,
    ztoc::{Compression, Span, Ztoc},
};

/// Takes all there is.
#[derive(Debug, Default)]
pub struct Collect {
    /// Name and data of each entry; holes are zeros.
    pub files: Vec<(Vec<u8>, Vec<u8>)>,
}

impl LayerSink for Collect {
    type Error = std::convert::Infallible;

    fn entry(&mut self, index: usize, entry: &Entry) -> Result<(), Self::Error> {
        assert_eq!(index, self.files.len(), "entries come in order");
        self.files.push((entry.name.clone(), Vec::new()));
        Ok(())
    }

    fn data(&mut self, index: usize, file_offset: u64, bytes: &[u8]) -> Result<(), Self::Error> {
        assert_eq!(index + 1, self.files.len(), "data follows its entry");
        let data = &mut self.files[index].1;
        assert!(data.len() as u64 <= file_offset, "data comes in order");
        data.resize(file_offset as usize, 0);
        data.extend(bytes);
        Ok(())
    }
}

/// Pushes a blob through the indexer in pieces.
pub fn index<S: LayerSink>(
    blob: &[u8],
    packing: Packing,
    options: Options,
    piece: usize,
    sink: S,
) -> Result<(Indexed, S), Error<S::Error>> {
    let mut indexer = LayerIndexer::new(packing, options, sink);
    for piece in blob.chunks(piece) {
        indexer.write(piece)?;
    }
    indexer.finish()
}

/// Options with this span size.
pub fn options(span_size: u64) -> Options {
    Options {
        span_size,
        ..Options::default()
    }
}

/// The zTOC of a blob that has one, parsed, and its bytes.
pub fn ztoc(blob: &[u8], span_size: u64) -> (Ztoc, Vec<u8>) {
    let (indexed, NoSink) =
        index(blob, Packing::Gzip, options(span_size), 65_536, NoSink).expect("the layer is well");
    let bytes = indexed
        .ztoc
        .expect("a zTOC is asked for")
        .expect("and possible");
    (Ztoc::parse(&bytes).expect("ours is well"), bytes)
}

/// The compressed bytes of a span; `None` when the table points out of the blob.
pub fn compressed<'a>(blob: &'a [u8], span: &Span) -> Option<&'a [u8]> {
    let range = &span.compressed;
    blob.get(range.start.get() as usize..range.end.get() as usize)
}

/// One span, as the layer module reads it.
pub fn decode<'a>(
    decoder: &'a mut SpanDecoder,
    table: &[u8],
    compression: Compression,
    span: &Span,
    compressed: &'a [u8],
) -> Result<&'a [u8], inflate::Error> {
    match compression {
        // the last one may have padding behind the tar's end
        Compression::Uncompressed => {
            let length = span.uncompressed.end.get() - span.uncompressed.start.get();
            Ok(&compressed[..length as usize])
        }
        Compression::Gzip => {
            let window = span.window.clone().map(|window| &table[window]);
            decoder.decode(span, compressed, window)
        }
    }
}

/// Decodes every span alone and compares it with the true stream. Returns how many there were.
pub fn assert_spans(name: &str, blob: &[u8], stream: &[u8], table: &[u8]) -> usize {
    let ztoc = Ztoc::parse(table).unwrap_or_else(|error| panic!("{name}: {error}"));
    let spans = &ztoc.spans.spans;
    let mut decoder = SpanDecoder::default();
    let mut next = 0;
    for (index, span) in spans.iter().enumerate() {
        let name = format!("{name}, span {index}");
        let (start, end) = (span.uncompressed.start.get(), span.uncompressed.end.get());
        assert_eq!(start, next, "{name} starts where the one before ends");
        assert!(start < end || index + 1 == spans.len(), "{name} is empty");
        next = end;
        let bytes = compressed(blob, span).unwrap_or_else(|| panic!("{name}: out of the blob"));
        assert_eq!(Digest::of(bytes), span.digest, "{name}");
        let decoded = decode(&mut decoder, table, ztoc.spans.compression, span, bytes)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            decoded == &stream[start as usize..end as usize],
            "{name} has other bytes"
        );
        assert!(
            !decoder.surplus() || index + 1 == spans.len(),
            "{name} has more bytes than the table says"
        );
    }
    // a plain tar's spans go on through the padding behind its end
    assert_eq!(next, ztoc.spans.covered().get());
    assert!(next >= ztoc.spans.uncompressed_size);
    spans.len()
}
