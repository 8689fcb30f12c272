//! Makes a new disk from a zTOC or the table of a compact index: first all checks, then the directory.

use std::{fs::File, io, path::Path};

use bytes::Bytes;

use super::buffered_writer::BufferedWriter;
use crate::{
    compact::{self, Table, manifest::LayerIndex},
    error::{Error, Kind, Result, ResultExt as _},
    ext4::{Layout, Regions},
    layer::{
        sources::layer_sources::LayerSources,
        stored::{
            directory::{self, DiskDirectory, DiskDraft},
            seal, span_record, span_table,
            state::DiskState,
        },
        types::{LayerBlob, StackingFacts},
        verify::headers,
    },
    oci::Digest,
    source::Source,
    tar::{Entry, EntryKind},
    tree::{NodeKind, Tree},
    ztoc::{SpanTable, Ztoc},
};

/// The untrusted bytes that a disk is laid out from.
pub(crate) enum NewTable {
    /// A zTOC.
    Ztoc(Bytes),
    /// The table of a compact index, its description in the manifest, and the source of its windows.
    Compact(Bytes, LayerIndex, Source),
}

impl NewTable {
    pub(crate) fn bytes(&self) -> &Bytes {
        match self {
            Self::Ztoc(bytes) | Self::Compact(bytes, ..) => bytes,
        }
    }

    /// The kind of table, for errors.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Ztoc(_) => "zTOC",
            Self::Compact(..) => "compact table",
        }
    }

    /// Parses and checks the bytes.
    fn parse(&self, layer: &LayerBlob) -> Result<(Vec<Entry>, SpanTable)> {
        let not_this_layers = || "it is not about this layer".to_owned();
        match self {
            Self::Ztoc(bytes) => {
                let (entries, spans) = parse(bytes, false)?;
                let sizes = spans.check_blob_size(layer.size);
                sizes.or_kind(Kind::Corrupt, not_this_layers)?;
                Ok((entries, spans))
            }
            Self::Compact(bytes, index, _) => {
                let parsed = parse_compact(bytes)?;
                parsed
                    .check(&layer.digest, layer.size, index.size)
                    .or_kind(Kind::Corrupt, not_this_layers)?;
                Ok((parsed.entries, parsed.spans))
            }
        }
    }

    fn is_compact(&self) -> bool {
        matches!(self, Self::Compact(..))
    }
}

/// Parses a table.
pub(crate) fn parse(bytes: &[u8], is_compact: bool) -> Result<(Vec<Entry>, SpanTable)> {
    if is_compact {
        let parsed = parse_compact(bytes)?;
        return Ok((parsed.entries, parsed.spans));
    }
    let parsed = Ztoc::parse(bytes).or_kind(Kind::Corrupt, || "it is not valid".to_owned())?;
    Ok((parsed.entries, parsed.spans))
}

fn parse_compact(bytes: &[u8]) -> Result<Table> {
    Table::parse(bytes).map_err(|error| {
        let kind = match error {
            compact::Error::Version { .. } => Kind::Unsupported,
            _ => Kind::Corrupt,
        };
        Error::with_source(kind, "it is not valid", error)
    })
}

/// Makes the directory of a layer's disk from its table. Nothing is written before all has been checked.
pub(super) fn indexed(
    new: &Path,
    layer: &LayerBlob,
    table: &Digest,
    from: &NewTable,
    source: &Source,
) -> Result<DiskDraft> {
    let found = Digest::of(from.bytes());
    if found != *table {
        return Err(Error::new(
            Kind::Corrupt,
            format!("its bytes have digest {found}"),
        ));
    }
    let (entries, spans) = from.parse(layer)?;
    let draft = DiskDraft::new(new)?;
    let directory = draft.directory();
    let parsed = (&entries[..], &spans);
    let (regions, count) =
        write_derived(directory, table, from.bytes(), from.is_compact(), parsed)?;
    if let NewTable::Compact(_, _, windows) = from {
        directory.write(directory::WINDOWS, &[])?;
        directory.write(
            directory::WINDOW_SOURCES,
            &LayerSources::encode_one(windows),
        )?;
    }
    directory.write(directory::REST, &[])?;
    directory.write(
        directory::SPANS,
        &vec![0; span_record::file_size(count) as usize],
    )?;
    directory.write(directory::SOURCES, &LayerSources::encode_one(source))?;
    let mut state = DiskState::new(layer, *table, regions.size(), count);
    state.table_size = from.bytes().len() as u64;
    state.compact = match from {
        NewTable::Ztoc(_) => None,
        NewTable::Compact(_, index, _) => Some(index.blob),
    };
    directory.write(directory::STATE, &state.encode())?;
    Ok(draft)
}

/// Writes the table and the files that follow from it: the disk with its metadata, the layout, the facts for stacking, the spans, the
/// headers. Returns the regions and the number of spans. Nothing is written before all has been checked.
pub(crate) fn write_derived(
    directory: &DiskDirectory,
    table: &Digest,
    bytes: &[u8],
    is_compact: bool,
    (entries, span_table): (&[Entry], &SpanTable),
) -> Result<(Regions, u32)> {
    let windows = match is_compact {
        true => &[], // the windows are in another blob
        false => bytes,
    };
    let stored_spans = span_table::encode(span_table, windows)
        .or_kind(Kind::Corrupt, || "its spans cannot be served".to_owned())?;
    let tree =
        Tree::build(entries).or_kind(Kind::Unsupported, || "its files make no tree".to_owned())?;
    let mut layout = Layout::new(&tree, entries, table.bytes())
        .or_kind(Kind::Unsupported, || "its files do not fit ext4".to_owned())?;
    let regions = used_regions(&mut layout, &tree, entries)?;
    check_coverage(&regions, span_table)?;

    let disk = directory.create(directory::DISK)?;
    write_metadata(disk, &layout).or_kind(Kind::Io, || cannot_write(directory, directory::DISK))?;
    directory.write(directory::table(is_compact), bytes)?;
    directory.write(directory::SPAN_TABLE, &stored_spans)?;
    directory.write(directory::HEADERS, &headers::encode(entries))?;
    write_common(directory, &regions, &stacking_facts(tree))?;
    Ok((regions, span_table.spans.len() as u32)) // `span_table::encode` has checked the number
}

/// The facts of a tree that matter for stacking.
pub(super) fn stacking_facts(tree: Tree<'_>) -> StackingFacts {
    StackingFacts {
        opaque_root: tree.opaque.iter().any(Vec::is_empty),
        implied: tree.implied,
        whiteouts: tree.whiteouts,
    }
}

/// The region table of a layout, without the data of entries that later ones replace: their blocks are free, and stay empty.
pub(super) fn used_regions(
    layout: &mut Layout<'_>,
    tree: &Tree<'_>,
    entries: &[Entry],
) -> Result<Regions> {
    let mut used = vec![false; entries.len()];
    for node in &tree.nodes {
        if let NodeKind::File { entry, .. } = node.kind {
            used[entry] = true;
        }
    }
    // the start of each entry's data, ascending like the regions, and whether it belongs to a file
    let mut starts = entries
        .iter()
        .zip(used)
        .filter(|(entry, _)| entry.kind == EntryKind::Regular && entry.size > 0)
        .map(|(entry, used)| (entry.data_offset, used));
    let mut next = starts.next();
    let mut is_used = false;
    let mut data = std::mem::take(&mut layout.regions);
    data.retain(|region| {
        while let Some((_, used)) = next.filter(|(start, _)| *start <= region.layer.start) {
            is_used = used;
            next = starts.next();
        }
        is_used
    });
    Regions::new(layout.size, data).or_kind(Kind::Corrupt, || "its files' data overlap".to_owned())
}

/// Writes a disk's metadata, and sets the size of the disk.
pub(super) fn write_metadata(disk: File, layout: &Layout<'_>) -> io::Result<()> {
    disk.set_len(layout.size)?;
    let mut gather = BufferedWriter::new(disk);
    layout.write_metadata(|offset, bytes| gather.write_at(offset, bytes))?;
    gather.finish().map(drop)
}

/// Writes the files that every disk has.
pub(super) fn write_common(
    directory: &DiskDirectory,
    regions: &Regions,
    facts: &StackingFacts,
) -> Result<()> {
    directory.write(directory::LAYOUT, &regions.encode())?;
    let facts = seal::seal_json(facts)
        .or_kind(Kind::Io, || cannot_write(directory, directory::STACKING))?;
    directory.write(directory::STACKING, &facts)
}

pub(super) fn cannot_write(directory: &DiskDirectory, name: &str) -> String {
    format!("cannot write {}", directory.path().join(name).display())
}

/// Checks that the spans have all data: a read of other data would wait without an end.
fn check_coverage(regions: &Regions, spans: &SpanTable) -> Result<()> {
    let end = spans.spans.last().map(|span| span.uncompressed.end);
    let beyond = regions
        .data()
        .last()
        .filter(|region| end.is_none_or(|end| region.layer.end > end));
    match beyond {
        None => Ok(()),
        Some(region) => Err(Error::new(
            Kind::Corrupt,
            format!(
                "a file's data at {} to {} of the layer lies past the last span, which ends at {}",
                region.layer.start,
                region.layer.end,
                end.map_or(0, |end| end.get())
            ),
        )),
    }
}
