//! One pass over a layer's blob: digest, diff ID, checkpoints, tar table, span digests, and the files' data as it passes. Pure:
//! bytes are pushed in.

mod compact;
mod error;
mod spans;
mod unpack;

use crate::{
    gzip::scan,
    oci::{Digest, Packing, digest::Hasher},
    tar::{self, Entry},
    ztoc::{self, ZtocParts},
};

use compact::CompactSpans;
use spans::{MAX_ZTOC_SIZE, Spans};
use unpack::Unpacker;

pub use compact::CompactBlob;
pub use error::Error;

/// `version` of the zTOCs that are made: the only one there is.
const ZTOC_VERSION: &str = "0.9";

/// The span size that AWS's tool uses when none is asked for, in bytes.
pub const DEFAULT_SPAN_SIZE: u64 = 4 << 20;

/// `build_tool_identifier` of our zTOCs and indexes.
pub const BUILD_TOOL: &str = concat!("socinbd v", env!("CARGO_PKG_VERSION"));

/// Receives the content of a layer, in the order of its stream.
pub trait LayerSink {
    /// The error of the sink.
    type Error;

    /// The `index`-th entry, before its data.
    fn entry(&mut self, index: usize, entry: &Entry) -> Result<(), Self::Error>;

    /// A piece of the data of the `index`-th entry, at this offset in the file (a sparse file's holes are left out).
    fn data(&mut self, index: usize, file_offset: u64, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// A sink that wants nothing.
#[derive(Debug, Default)]
pub struct NoSink;

impl LayerSink for NoSink {
    type Error = std::convert::Infallible;

    fn entry(&mut self, _index: usize, _entry: &Entry) -> Result<(), Self::Error> {
        Ok(())
    }

    fn data(&mut self, _index: usize, _file_offset: u64, _bytes: &[u8]) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// How an index is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the layer between checkpoints, at least; 4 MiB by default. 0 asks for a checkpoint at every block of a gzip layer.
    pub span_size: u64,
    /// `build_tool_identifier` of the zTOC.
    pub build_tool: String,
    /// Whether to make a zTOC (a layer that is only streamed to its disk needs none).
    pub ztoc: bool,
    /// The minimum distance between the checkpoints of the compact index, in uncompressed bytes; `None` for no compact index.
    pub compact_span_size: Option<u64>,
    /// Whether to compute the diff ID. It shows whether the configuration of the image is right, and costs an eighth to a quarter more
    /// work.
    pub diff_id: bool,
    /// The digest of the blob, if the caller checks the same bytes against it: it is then not computed again.
    pub checked_digest: Option<Digest>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            span_size: DEFAULT_SPAN_SIZE,
            build_tool: BUILD_TOOL.to_owned(),
            ztoc: true,
            compact_span_size: None,
            diff_id: true,
            checked_digest: None,
        }
    }
}

/// A layer that has passed.
#[derive(Debug)]
pub struct Indexed {
    /// The compression of the blob, from its bytes.
    pub packing: Packing,
    /// SHA-256 of the blob; the given digest if the caller checks it.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// SHA-256 of the whole uncompressed stream, if requested.
    pub diff_id: Option<Digest>,
    /// Bytes of the uncompressed stream.
    pub uncompressed_size: u64,
    /// The entries in tar order.
    pub entries: Vec<Entry>,
    /// The bytes of the zTOC, or why this layer cannot have one (zstd, sparse files, ...). `None` if none was requested.
    pub ztoc: Option<Result<Vec<u8>, String>>,
    /// How many spans the zTOC has; 0 without one.
    pub spans: usize,
    /// The layer's part of a compact index, or why it cannot have one. `None` if none was requested.
    pub compact: Option<Result<CompactBlob, String>>,
}

/// Takes a blob's bytes as they come. Holds the entries and the zTOC's windows; the rest of its memory (1 MiB, with zstd the frame's
/// window and at most 128 MiB more) does not grow with the layer. After an error it is of no more use.
pub struct LayerIndexer<S> {
    declared: Packing,
    options: Options,
    /// The hash of the blob so far, unless the caller checks its digest.
    blob: Result<Hasher, Digest>,
    size: u64,
    /// The blob's first bytes, until there are enough to know how it is packed.
    head: Vec<u8>,
    /// An unsupported compression, according to these bytes; if the blob is not a tar either, this is the error.
    unreadable: Option<&'static str>,
    unpacker: Option<Unpacker>,
    spans: Spans,
    compact: Option<CompactSpans>,
    stream: Stream<S>,
}

impl<S: LayerSink> LayerIndexer<S> {
    /// Starts a layer. The first bytes of the blob take precedence over `packing`, as in containerd's unpack; `packing` is named in
    /// errors.
    pub fn new(packing: Packing, options: Options, sink: S) -> Self {
        Self {
            declared: packing,
            blob: options
                .checked_digest
                .map_or_else(|| Ok(Hasher::default()), Err),
            size: 0,
            head: Vec::new(),
            unreadable: None,
            unpacker: None,
            spans: Spans::None,
            compact: None,
            stream: Stream {
                sink,
                diff_id: options.diff_id.then(Hasher::default),
                size: 0,
                tar: tar::Reader::new(),
                end: None,
            },
            options,
        }
    }

    /// Takes the next bytes of the blob.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error<S::Error>> {
        if let Ok(blob) = &mut self.blob {
            blob.update(bytes);
        }
        self.size += bytes.len() as u64;
        if self.unpacker.is_some() {
            return self.unpack(bytes);
        }
        let (head, rest) = bytes.split_at(bytes.len().min(unpack::MAGIC_SIZE - self.head.len()));
        self.head.extend_from_slice(head);
        if self.head.len() < unpack::MAGIC_SIZE {
            return Ok(());
        }
        self.begin()?;
        self.unpack(rest)
    }

    /// The end of the blob.
    pub fn finish(mut self) -> Result<(Indexed, S), Error<S::Error>> {
        if self.unpacker.is_none() {
            self.begin()?;
        }
        let packing = match self.unpacker.take() {
            Some(unpacker) => {
                let packing = unpacker.packing();
                unpacker.finish()?;
                packing
            }
            None => self.declared, // `begin` has set it
        };
        let digest = self.blob.map_or_else(|checked| checked, Hasher::finish);
        let unreadable = self
            .unreadable
            .filter(|_| self.stream.tar.entries().is_empty());
        let archive = self
            .stream
            .tar
            .finish()
            .map_err(|source| tar_error(self.declared, packing, unreadable, source))?;
        let mut spans = 0;
        let ztoc = self.options.ztoc.then(|| {
            if self.size == 0 {
                // AWS's tool makes one, without spans, and AWS's daemon refuses it
                return Err("it is empty".to_owned());
            }
            let (compression, checkpoints, digests) = match packing {
                Packing::Zstd => {
                    return Err("a zstd layer cannot be decoded from a checkpoint".to_owned());
                }
                Packing::Gzip | Packing::Plain => self.spans.finish(self.size)?,
            };
            if let Some(reason) = &archive.no_ztoc {
                return Err(reason.to_string());
            }
            let size = checkpoints.len() as u64 + table_size(&archive.entries);
            if size > MAX_ZTOC_SIZE {
                return Err(format!(
                    "its zTOC would have about {size} bytes, over the limit of {MAX_ZTOC_SIZE}; use a larger span size"
                ));
            }
            spans = digests.len();
            Ok(ztoc::write(&ZtocParts {
                version: ZTOC_VERSION,
                build_tool: &self.options.build_tool,
                entries: &archive.entries,
                compressed_size: self.size,
                uncompressed_size: archive.end.get(),
                compression,
                digests: &digests,
                checkpoints: &checkpoints,
            }))
        });
        let compact = self.options.compact_span_size.map(|_| {
            let spans = self.compact.take().ok_or_else(|| match packing {
                Packing::Zstd => "a zstd layer cannot be decoded from a checkpoint".to_owned(),
                Packing::Gzip | Packing::Plain => "it is empty".to_owned(),
            })?;
            if let Some(reason) = &archive.no_ztoc {
                return Err(reason.to_string());
            }
            spans.finish(digest, self.size, &archive.entries)
        });
        let indexed = Indexed {
            packing,
            digest,
            size: self.size,
            diff_id: self.stream.diff_id.map(Hasher::finish),
            uncompressed_size: self.stream.size,
            entries: archive.entries,
            ztoc,
            spans,
            compact,
        };
        Ok((indexed, self.stream.sink))
    }

    /// Now that the blob's first bytes are known (or that it has no more).
    fn begin(&mut self) -> Result<(), Error<S::Error>> {
        let packing = unpack::packing(&self.head);
        self.unreadable = unpack::unreadable(&self.head);
        if self.options.ztoc {
            self.spans = match packing {
                Packing::Gzip => Spans::checkpoints(self.options.span_size),
                Packing::Plain => Spans::fixed(self.options.span_size),
                Packing::Zstd => Spans::None,
            };
        }
        let compact_size = self.options.compact_span_size;
        self.compact = match packing {
            Packing::Gzip => compact_size.map(CompactSpans::checkpoints),
            Packing::Plain if self.size > 0 => compact_size.map(CompactSpans::fixed),
            Packing::Plain | Packing::Zstd => None,
        };
        let span_size = match self.spans {
            Spans::None => None,
            _ => Some(self.options.span_size),
        };
        self.unpacker = Some(Unpacker::new(packing, [span_size, compact_size])?);
        let head = std::mem::take(&mut self.head);
        self.unpack(&head)
    }

    fn unpack(&mut self, bytes: &[u8]) -> Result<(), Error<S::Error>> {
        let Some(unpacker) = &mut self.unpacker else {
            return Ok(()); // `begin` comes first
        };
        let packing = unpacker.packing();
        let mut rest = bytes;
        loop {
            let before = rest;
            let event = unpacker.next(&mut rest)?;
            let taken = &before[..before.len() - rest.len()];
            self.spans.take(taken);
            if let Some(compact) = &mut self.compact {
                compact.take(taken);
            }
            match event {
                Some(scan::Event::Data(data)) => {
                    let start = self.stream.size;
                    self.stream.write(data).map_err(|error| match error {
                        Error::Tar(source) => {
                            let is_none_read = self.stream.tar.entries().is_empty();
                            let unreadable = self.unreadable.filter(|_| is_none_read);
                            tar_error(self.declared, packing, unreadable, source)
                        }
                        error => error,
                    })?;
                    if let Some(compact) = &mut self.compact {
                        // data after the end of the tar is in no span
                        let end = self.stream.end.map_or(u64::MAX, |end| end.get());
                        let length = usize::try_from(end.saturating_sub(start))
                            .map_or(data.len(), |length| length.min(data.len()));
                        compact.data(&data[..length]);
                    }
                }
                // a span that starts after the end of the tar is of no use
                Some(scan::Event::Checkpoint(at))
                    if self.stream.end.is_some_and(|end| at.output > end) => {}
                Some(scan::Event::Checkpoint(at)) => {
                    let [ztoc, compact] = at.due;
                    if ztoc {
                        self.spans.start(&at);
                    }
                    if let (true, Some(spans)) = (compact, &mut self.compact) {
                        spans.start(&at);
                    }
                }
                None => return Ok(()),
            }
        }
    }
}

/// The uncompressed side: the diff ID, the tar, and the receiver of its data.
struct Stream<S> {
    sink: S,
    diff_id: Option<Hasher>,
    size: u64,
    tar: tar::Reader,
    /// The position right after the end blocks of the tar, once they have passed.
    end: Option<crate::units::LayerOffset>,
}

impl<S: LayerSink> Stream<S> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error<S::Error>> {
        if let Some(diff_id) = &mut self.diff_id {
            diff_id.update(bytes);
        }
        self.size += bytes.len() as u64;
        let mut rest = bytes;
        while let Some(event) = self.tar.next(&mut rest).map_err(Error::Tar)? {
            match event {
                tar::Event::Entry { index } => {
                    if let Some(entry) = self.tar.entries().get(index) {
                        self.sink.entry(index, entry).map_err(Error::Sink)?;
                    }
                }
                tar::Event::Data {
                    index,
                    file_offset,
                    bytes,
                } => self
                    .sink
                    .data(index, file_offset, bytes)
                    .map_err(Error::Sink)?,
                tar::Event::End => self.end = Some(self.tar.position()),
            }
        }
        Ok(())
    }
}

/// If the blob does not have the announced compression, a tar error most likely has that cause.
fn tar_error<E>(
    declared: Packing,
    found: Packing,
    unreadable: Option<&'static str>,
    source: tar::Error,
) -> Error<E> {
    if let Some(compression) = unreadable {
        return Error::Compression(compression);
    }
    match found {
        Packing::Plain if declared != Packing::Plain => Error::Unpacked { declared, source },
        _ => Error::Tar(source),
    }
}

/// About the bytes that these entries have in a zTOC; never too few.
fn table_size(entries: &[Entry]) -> u64 {
    /// Table, vtable and the lengths and ends of eight strings.
    const ENTRY: usize = 256;
    const RECORD: usize = 64;
    entries
        .iter()
        .map(|entry| {
            let strings: [&[u8]; 4] = [&entry.name, &entry.linkname, &entry.uname, &entry.gname];
            let strings: usize = strings.iter().map(|string| string.len()).sum();
            let records: usize = entry
                .pax
                .iter()
                .map(|(key, value)| RECORD + key.len() + value.len())
                .sum();
            (ENTRY + strings + records) as u64
        })
        .sum()
}
