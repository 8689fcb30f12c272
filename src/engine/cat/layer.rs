//! The contents of one layer: its names, the names that it hides in lower layers, and the data of its files. The data is read from the
//! spans of the blob, or, for a layer without a table, from one pass over the whole blob.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::Arc,
};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};

use super::{
    compact::WindowBlob,
    opened_file::OpenedFile,
    spans::{SPANS_AHEAD, part},
};
use crate::{
    blocking::blocking,
    compact,
    error::{Error, Kind, Result, ResultExt as _},
    gzip::inflate::SpanDecoder,
    layer::LayerBlob,
    oci::Digest,
    soci::{
        build::{LayerIndexer, LayerSink, Options},
        files::clean,
    },
    source::Source,
    tar::{Entry, EntryKind},
    units::{LayerOffset, SpanId},
    ztoc::{Compression, SpanTable, Ztoc},
};

/// Maximum length of a chain of hard links.
const MAX_LINKS: usize = 40;
/// Maximum size of a piece that is read from a local file.
const PIECE: u64 = 1 << 20;

/// The contents of a layer.
pub(crate) struct LayerContents {
    layer: Digest,
    pub(super) entries: Vec<Entry>,
    /// Entries by clean name; of equal names the last.
    pub(super) names: HashMap<Vec<u8>, usize>,
    /// Implied directories.
    pub(super) directories: HashSet<Vec<u8>>,
    /// Clean names that whiteouts hide.
    whiteouts: HashSet<Vec<u8>>,
    /// Opaque directories.
    opaque: HashSet<Vec<u8>>,
    data: FileData,
}

/// Where the data of the files is.
enum FileData {
    /// In the spans of the blob, given by a zTOC.
    Spans { ztoc: Ztoc, bytes: Bytes },
    /// In the spans of the blob, given by a compact table.
    Compact {
        spans: SpanTable,
        windows: WindowBlob,
    },
    /// In a local file, with the start offset of each entry.
    Local { file: Arc<File>, starts: Vec<u64> },
}

impl LayerContents {
    pub(super) fn of_ztoc(layer: Digest, mut ztoc: Ztoc, bytes: Bytes) -> Self {
        let entries = std::mem::take(&mut ztoc.entries);
        Self::new(layer, entries, FileData::Spans { ztoc, bytes })
    }

    pub(super) fn of_compact(layer: Digest, table: compact::Table, windows: WindowBlob) -> Self {
        let spans = table.spans;
        Self::new(layer, table.entries, FileData::Compact { spans, windows })
    }

    fn new(layer: Digest, entries: Vec<Entry>, data: FileData) -> Self {
        let mut table = Self {
            layer,
            names: HashMap::new(),
            directories: HashSet::new(),
            whiteouts: HashSet::new(),
            opaque: HashSet::new(),
            entries,
            data,
        };
        for (number, entry) in table.entries.iter().enumerate() {
            let parts = entry_parts(&entry.name);
            let Some((leaf, parents)) = parts.split_last() else {
                continue; // the root
            };
            let parent = parents.join(&b'/');
            for depth in 1..=parents.len() {
                table.directories.insert(parents[..depth].join(&b'/'));
            }
            if leaf == b".wh..wh..opq" {
                table.opaque.insert(parent);
            } else if leaf.starts_with(b".wh..wh.") {
                // metadata of AUFS
            } else if let Some(hidden) = leaf.strip_prefix(b".wh.") {
                table.whiteouts.insert(joined(&parent, hidden));
            } else {
                table.names.insert(joined(&parent, leaf), number);
            }
        }
        table
    }

    /// Whether this layer, which does not have the name itself, hides it in lower layers.
    pub(super) fn hides(&self, name: &[u8]) -> bool {
        if self.whiteouts.contains(name) {
            return true;
        }
        let mut parent = name;
        loop {
            parent = match parent.iter().rposition(|byte| *byte == b'/') {
                Some(at) => &parent[..at],
                None => return self.opaque.contains(&b""[..]),
            };
            let is_file = self
                .names
                .get(parent)
                .is_some_and(|entry| self.entries[*entry].kind != EntryKind::Directory);
            if is_file || self.opaque.contains(parent) || self.whiteouts.contains(parent) {
                return true;
            }
        }
    }

    /// The entry with the data of a regular file or hard link.
    pub(super) fn target(&self, mut number: usize) -> Option<usize> {
        for _ in 0..MAX_LINKS {
            let entry = self.entries.get(number)?;
            match entry.kind {
                EntryKind::Regular => return Some(number),
                EntryKind::Hardlink => {
                    number = *self.names.get(&clean(&entry.linkname))?;
                }
                _ => return None,
            }
        }
        None
    }

    /// Opens a regular file.
    pub(super) fn file(self, source: &Source, number: usize, name: &[u8]) -> Result<OpenedFile> {
        let entry = &self.entries[number]; // the number was found in `names`
        let size = entry.size;
        let start = entry.data_offset;
        let end = start
            .checked_add(size)
            .ok_or_else(|| Error::new(Kind::Corrupt, format!("/{}: invalid size", shown(name))))?;
        let data = match self.data {
            FileData::Spans { ztoc, bytes } => {
                spans(source, self.layer, Arc::new(ztoc), bytes, start..end)
            }
            FileData::Compact { spans, windows } => {
                super::compact::data(source, self.layer, spans, windows, start..end)
            }
            FileData::Local { file, starts } => local(file, starts[number], size),
        };
        Ok(OpenedFile {
            path: format!("/{}", shown(name)),
            layer: self.layer,
            size,
            data,
        })
    }
}

/// The data of a range of a layer, from verified spans. A few spans are fetched ahead.
fn spans(
    source: &Source,
    layer: Digest,
    ztoc: Arc<Ztoc>,
    bytes: Bytes,
    range: Range<LayerOffset>,
) -> BoxStream<'static, Result<Bytes>> {
    let wanted = ztoc.spans.covering(range.clone());
    let source = source.clone();
    let numbers = (wanted.start.get()..wanted.end.get()).map(SpanId);
    stream::iter(numbers)
        .map(move |span| {
            let (source, ztoc, bytes) = (source.clone(), Arc::clone(&ztoc), bytes.clone());
            let range = range.clone();
            async move {
                one_span(&source, layer, &ztoc, &bytes, span, range)
                    .await
                    .map_err(|error| error.context(format!("layer {layer}, span {span}")))
            }
        })
        .buffered(SPANS_AHEAD)
        .boxed()
}

async fn one_span(
    source: &Source,
    layer: Digest,
    ztoc: &Ztoc,
    bytes: &Bytes,
    span: SpanId,
    wanted: Range<LayerOffset>,
) -> Result<Bytes> {
    let corrupt = |what: String| Error::new(Kind::Corrupt, what);
    let index = usize::try_from(span.get()).unwrap_or(usize::MAX);
    let Some(span) = ztoc.spans.spans.get(index).cloned() else {
        return Err(corrupt("there is no such span".to_owned()));
    };
    let compressed = span.compressed.start.get()..span.compressed.end.get();
    let fetched = source.verified_range(&layer, compressed, &span.digest);
    let fetched = fetched.await.map_err(|error| match error.kind() {
        Kind::Corrupt => error.context("its bytes are not those of the zTOC"),
        _ => error,
    })?;
    let place = span.uncompressed.clone();
    let decoded = match ztoc.spans.compression {
        Compression::Uncompressed => fetched,
        Compression::Gzip => {
            let bytes = bytes.clone();
            let work = move || {
                let window = span.window.clone().and_then(|window| bytes.get(window));
                let mut decoder = SpanDecoder::default();
                decoder
                    .decode(&span, &fetched, window)
                    .map(Bytes::copy_from_slice)
                    .or_kind(Kind::Corrupt, || "cannot decode the span".into())
            };
            blocking(work).await?
        }
    };
    part(&decoded, &place, &wanted)
}

/// The data of a range of a local file.
fn local(file: Arc<File>, start: u64, size: u64) -> BoxStream<'static, Result<Bytes>> {
    stream::try_unfold(0, move |done: u64| {
        let file = Arc::clone(&file);
        async move {
            let length = size.saturating_sub(done).min(PIECE);
            if length == 0 {
                return Ok(None);
            }
            // at most 1 MiB
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_exact_at(&mut piece, start.saturating_add(done))
                .or_kind(Kind::Io, || "reading a temporary file".into())?;
            Ok(Some((Bytes::from(piece), done.saturating_add(length))))
        }
    })
    .boxed()
}

/// Reads a layer without a table from start to end. The data of its files goes to a temporary file.
pub(super) async fn whole(source: &Source, layer: &LayerBlob) -> Result<LayerContents> {
    source
        .with_right_bytes(|source| read_whole(source, layer))
        .await
}

async fn read_whole(source: Source, layer: &LayerBlob) -> Result<LayerContents> {
    let file = tempfile::tempfile().or_kind(Kind::Io, || "creating a temporary file".into())?;
    let sink = DataSpill {
        file: Arc::new(file),
        starts: Vec::new(),
        end: 0,
    };
    let options = Options {
        ztoc: false,
        ..Options::default()
    };
    let mut indexer = LayerIndexer::new(layer.packing, options, sink);
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(4);
    let thread = tokio::task::spawn_blocking(move || {
        while let Some(piece) = receiver.blocking_recv() {
            indexer.write(&piece)?;
        }
        indexer.finish()
    });
    let mut pieces = source.stream(&layer.digest, layer.size).await?;
    while let Some(piece) = pieces.next().await {
        if sender.send(piece?).await.is_err() {
            break; // the indexer has failed and returns its error
        }
    }
    drop(sender);
    let (indexed, sink) = thread
        .await
        .or_kind(Kind::Io, || "a worker thread".into())?
        .map_err(|error| Error::with_source(error.kind(), "cannot decode the layer", error))?;
    if indexed.digest != layer.digest {
        return Err(Error::new(
            Kind::Corrupt,
            format!("its content has the digest {}", indexed.digest),
        ));
    }
    let data = FileData::Local {
        file: sink.file,
        starts: sink.starts,
    };
    Ok(LayerContents::new(layer.digest, indexed.entries, data))
}

/// Writes the data of a layer's files to a sparse file, each at its own offset.
struct DataSpill {
    file: Arc<File>,
    starts: Vec<u64>,
    end: u64,
}

impl LayerSink for DataSpill {
    type Error = std::io::Error;

    fn entry(&mut self, _index: usize, entry: &Entry) -> std::io::Result<()> {
        self.starts.push(self.end);
        self.end = self
            .end
            .checked_add(entry.size)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or(std::io::ErrorKind::FileTooLarge)?;
        self.file.set_len(self.end)
    }

    fn data(&mut self, index: usize, file_offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let start = self.starts.get(index).copied().unwrap_or(self.end);
        self.file
            .write_all_at(bytes, start.saturating_add(file_offset))
    }
}

/// The components of a path, without `.` and empty ones.
pub(super) fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

/// The components of an entry's name, with `..` resolved; `..` at the root stays at the root.
fn entry_parts(name: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    for part in components(name) {
        match &part[..] {
            b".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts
}

fn joined(parent: &[u8], leaf: &[u8]) -> Vec<u8> {
    match parent {
        b"" => leaf.to_vec(),
        parent => [parent, leaf].join(&b'/'),
    }
}

pub(super) fn shown(name: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(name)
}
