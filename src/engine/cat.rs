//! Reads one file of an image without mounting it: fetches the tables of the layers from the topmost down to the layer with the file, and
//! the spans that hold the data of the file.

mod compact;
mod layer;
mod opened_file;
mod spans;

use bytes::Bytes;
use futures_util::stream::StreamExt as _;

use super::open::{
    compact_index::CompactIndex, disks::is_table_error, image::Image, search, soci_index::SociIndex,
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    layer::LayerBlob,
    oci::Digest,
    soci::files::clean,
    source::Source,
    tar::EntryKind,
    ztoc::Ztoc,
};

use layer::{LayerContents, components, shown, whole};
pub use opened_file::OpenedFile;

/// Maximum number of symbolic links in the resolution of a path, as in Linux.
const MAX_LINKS: usize = 40;

/// Finds and opens a file. `indexes` are the indexes of the image; the compact index is preferred. A layer without a table is read whole.
pub async fn open(image: &Image, indexes: &search::FoundIndexes, path: &str) -> Result<OpenedFile> {
    let mut layers = OpenLayers {
        image,
        index: indexes.index.as_ref(),
        compact: indexes.compact.as_ref(),
        open: Vec::new(),
    };
    let found = layers
        .resolve(path.as_bytes())
        .await
        .map_err(|error| error.context(format!("{path} in image {}", image.reference)))?;
    layers.read(found).await
}

/// Opens a file of one layer, given the layer's zTOC.
pub async fn open_in_layer(
    source: &Source,
    layer: Digest,
    ztoc: Bytes,
    path: &str,
) -> Result<OpenedFile> {
    let parsed =
        Ztoc::parse(&ztoc).or_kind(Kind::Corrupt, || format!("the zTOC of layer {layer}"))?;
    let table = LayerContents::of_ztoc(layer, parsed, ztoc);
    let name = clean(path.as_bytes());
    let Some(at) = table.names.get(&name).copied() else {
        return Err(match table.directories.contains(&name) {
            true => not_a_file(&name, "a directory"),
            false => Error::new(Kind::NotFound, format!("layer {layer} has no {path}")),
        });
    };
    let at = match table.entries[at].kind {
        EntryKind::Regular => at,
        EntryKind::Hardlink => table.target(at).ok_or_else(|| no_target(&name))?,
        EntryKind::Symlink => return Err(not_a_file(&name, "a symbolic link")),
        EntryKind::Directory => return Err(not_a_file(&name, "a directory")),
        EntryKind::Char | EntryKind::Block => return Err(not_a_file(&name, "a device")),
        EntryKind::Fifo => return Err(not_a_file(&name, "a named pipe")),
    };
    table.file(source, at, &name)
}

/// The layers of the image that were opened so far, topmost first.
struct OpenLayers<'a> {
    image: &'a Image,
    index: Option<&'a SociIndex>,
    compact: Option<&'a CompactIndex>,
    open: Vec<LayerContents>,
}

/// The result of looking up a name.
enum NameLookup {
    /// Number of the layer, counted from the topmost, and number of the entry.
    Entry(usize, usize),
    /// An implied directory.
    Directory,
    Nothing,
}

impl OpenLayers<'_> {
    /// Resolves a path to a regular file: the numbers of layer and entry, and the name of the entry.
    async fn resolve(&mut self, path: &[u8]) -> Result<(usize, usize, Vec<u8>)> {
        let mut todo: Vec<Vec<u8>> = components(path);
        todo.reverse();
        let mut at: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(component) = todo.pop() {
            if component == b".." {
                at.pop();
                continue;
            }
            at.push(component);
            let name = at.join(&b'/');
            let (layer, number) = match self.find(&name).await? {
                NameLookup::Nothing => {
                    return Err(Error::new(
                        Kind::NotFound,
                        format!("there is no /{}", shown(&name)),
                    ));
                }
                NameLookup::Directory if todo.is_empty() => {
                    return Err(not_a_file(&name, "a directory"));
                }
                NameLookup::Directory => continue,
                NameLookup::Entry(layer, number) => (layer, number),
            };
            let table = &self.open[layer]; // `find` has opened it
            let entry = &table.entries[number];
            match entry.kind {
                EntryKind::Directory if !todo.is_empty() => {}
                EntryKind::Directory => return Err(not_a_file(&name, "a directory")),
                EntryKind::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Error::new(
                            Kind::InvalidArgument,
                            format!("/{}: too many symbolic links", shown(&name)),
                        ));
                    }
                    if entry.linkname.starts_with(b"/") {
                        at.clear();
                    } else {
                        at.pop();
                    }
                    todo.extend(components(&entry.linkname).into_iter().rev());
                }
                EntryKind::Regular | EntryKind::Hardlink if !todo.is_empty() => {
                    return Err(Error::new(
                        Kind::NotFound,
                        format!("/{} is not a directory", shown(&name)),
                    ));
                }
                EntryKind::Regular => return Ok((layer, number, name)),
                EntryKind::Hardlink => {
                    let number = table.target(number).ok_or_else(|| no_target(&name))?;
                    return Ok((layer, number, name));
                }
                EntryKind::Char | EntryKind::Block => return Err(not_a_file(&name, "a device")),
                EntryKind::Fifo => return Err(not_a_file(&name, "a named pipe")),
            }
        }
        Err(not_a_file(b"", "a directory"))
    }

    /// Looks up a name, from the topmost layer down.
    async fn find(&mut self, name: &[u8]) -> Result<NameLookup> {
        for number in 0..self.image.layers.len() {
            if number == self.open.len() {
                let table = self.table(number).await?;
                self.open.push(table);
            }
            let table = &self.open[number]; // just opened
            if let Some(entry) = table.names.get(name) {
                return Ok(NameLookup::Entry(number, *entry));
            }
            if table.directories.contains(name) {
                return Ok(NameLookup::Directory);
            }
            if table.hides(name) {
                break;
            }
        }
        Ok(NameLookup::Nothing)
    }

    /// Opens a layer, by its number counted from the topmost.
    async fn table(&self, number: usize) -> Result<LayerContents> {
        let layers = &self.image.layers;
        let layer = &layers[layers.len() - 1 - number]; // the callers stay below the number of layers
        let context = || format!("layer {}", layer.digest);
        if let Some(compact) = self.compact {
            match compact_table(compact, layer).await {
                Ok(Some(table)) => return Ok(table),
                Ok(None) => {}
                Err(error) if is_table_error(&error) => {
                    let error = error.report();
                    tracing::warn!(layer = %layer.digest, error, "the compact index cannot be used for a layer");
                }
                Err(error) => return Err(error.context(context())),
            }
        }
        if let Some(index) = self.index
            && index.ztoc(&layer.digest).is_some()
        {
            let bytes = index.fetch_ztoc(&layer.digest).await?;
            let ztoc = Ztoc::parse(&bytes)
                .and_then(|ztoc| ztoc.spans.check_blob_size(layer.size).map(|()| ztoc))
                .or_kind(Kind::Corrupt, || format!("zTOC of {}", context()))?;
            return Ok(LayerContents::of_ztoc(layer.digest, ztoc, bytes));
        }
        whole(&self.image.source, layer)
            .await
            .map_err(|error| self.image.explain(&layer.digest, error).context(context()))
    }

    async fn read(mut self, (layer, entry, name): (usize, usize, Vec<u8>)) -> Result<OpenedFile> {
        let table = self.open.swap_remove(layer);
        table.file(&self.image.source, entry, &name)
    }
}

/// A layer's contents according to the compact index, if the index has a table for it.
async fn compact_table(index: &CompactIndex, layer: &LayerBlob) -> Result<Option<LayerContents>> {
    let Some((part, _, table)) = index.table(layer).await? else {
        return Ok(None);
    };
    let windows = compact::WindowBlob {
        source: index.source.clone(),
        blob: part.blob,
    };
    Ok(Some(LayerContents::of_compact(
        layer.digest,
        table,
        windows,
    )))
}

/// Writes the data of a file to `out`.
pub async fn write(mut found: OpenedFile, out: &mut (dyn std::io::Write + Send)) -> Result<u64> {
    let mut written: u64 = 0;
    while let Some(piece) = found.data.next().await {
        let piece = piece?;
        out.write_all(&piece)
            .or_kind(Kind::Io, || format!("writing {}", found.path))?;
        written = written.saturating_add(piece.len() as u64);
    }
    out.flush()
        .or_kind(Kind::Io, || format!("writing {}", found.path))?;
    if written != found.size {
        return Err(Error::new(
            Kind::Corrupt,
            format!(
                "{}: read {written} bytes, expected {}",
                found.path, found.size
            ),
        ));
    }
    Ok(written)
}

fn not_a_file(name: &[u8], what: &str) -> Error {
    Error::new(
        Kind::InvalidArgument,
        format!("/{} is {what}, not a file", shown(name)),
    )
}

fn no_target(name: &[u8]) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "/{} is a hard link, but its layer has no file that is the target",
            shown(name)
        ),
    )
}
