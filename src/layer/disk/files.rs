//! The names of the files that the bytes of a disk belong to, from the stored table. They are read when a report asks for them: in memory
//! they would take more than the rest of the disk.

use std::ops::Range;

use super::Disk;
use crate::{
    error::Result,
    tar::EntryKind,
    units::{DiskOffset, LayerOffset, SpanId},
};

/// A regular file with data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerFile {
    /// The path in the layer. It may have any bytes but NUL; those that are not UTF-8 are replaced.
    pub path: String,
    /// Its bytes in the layer.
    pub bytes: Range<LayerOffset>,
}

/// The regular files of a layer that have data, in the order of the layer.
#[derive(Debug, Default)]
pub struct LayerFiles(Vec<LayerFile>);

impl LayerFiles {
    fn new(mut files: Vec<LayerFile>) -> Self {
        files.sort_by_key(|file| file.bytes.start);
        Self(files)
    }

    /// All files.
    pub fn all(&self) -> &[LayerFile] {
        &self.0
    }

    /// The files that have bytes in a range.
    pub fn within(&self, range: &Range<LayerOffset>) -> &[LayerFile] {
        let start = self.0.partition_point(|file| file.bytes.end <= range.start);
        let end = self.0.partition_point(|file| file.bytes.start < range.end);
        self.0.get(start..end).unwrap_or_default()
    }
}

impl Disk {
    /// The files of the layer. Parses the whole table; blocks on local files.
    pub fn files(&self) -> Result<LayerFiles> {
        if self.span_counts().1 == 0 {
            return Ok(LayerFiles::default()); // a streamed layer has no spans to report
        }
        let files = self.read_entries()?.into_iter().filter_map(|entry| {
            let is_file = entry.kind == EntryKind::Regular && entry.size > 0;
            let start = entry.data_offset;
            is_file.then(|| LayerFile {
                path: shown(&entry.name),
                bytes: start..LayerOffset(start.get().saturating_add(entry.size)),
            })
        });
        Ok(LayerFiles::new(files.collect()))
    }

    /// The bytes of the layer from the first to the last file data in a range of the disk; `None`: it has metadata only.
    pub fn layer_range(&self, disk: Range<DiskOffset>) -> Option<Range<LayerOffset>> {
        self.layout().layer_range(&disk).map(|(layer, _)| layer)
    }

    /// The bytes of the layer that adjacent spans decode to.
    pub fn bytes_of_spans(&self, spans: Range<u32>) -> Range<LayerOffset> {
        let table = self.layout().spans();
        let end = spans.end.min(table.count());
        if spans.start >= end {
            return LayerOffset(0)..LayerOffset(0);
        }
        table.uncompressed(SpanId(spans.start)).start..table.uncompressed(SpanId(end - 1)).end
    }

    /// Whether any byte of a range of the layer is present.
    pub fn has_some_of(&self, range: Range<LayerOffset>) -> bool {
        let mut spans = self.layout().spans().covering(range);
        spans.any(|span| self.reader.has(SpanId(span)))
    }

    /// The runs of adjacent present spans.
    pub fn present_runs(&self) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for span in 0..self.span_counts().1 {
            if !self.reader.has(SpanId(span)) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.1 == span => run.1 += 1,
                _ => runs.push((span, span + 1)),
            }
        }
        runs
    }
}

/// The path of an entry, as it is from the root of the layer.
fn shown(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    name.trim_start_matches("./")
        .trim_start_matches('/')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_from_the_root_of_the_layer() {
        for (name, path) in [
            (&b"./usr/bin/a"[..], "usr/bin/a"),
            (b"/etc/b", "etc/b"),
            (b".c", ".c"),
            (b"d\xff", "d\u{fffd}"),
        ] {
            assert_eq!(shown(name), path);
        }
    }

    #[test]
    fn the_files_of_a_range_are_those_with_bytes_in_it() {
        let file = |path: &str, start, end| LayerFile {
            path: path.to_owned(),
            bytes: LayerOffset(start)..LayerOffset(end),
        };
        let files = LayerFiles::new(vec![file("b", 20, 30), file("a", 5, 10), file("c", 30, 40)]);
        let within = |start, end| -> String {
            let found = files.within(&(LayerOffset(start)..LayerOffset(end)));
            found.iter().map(|file| file.path.as_str()).collect()
        };
        assert_eq!(within(0, 100), "abc");
        assert_eq!(within(0, 5), "");
        assert_eq!(within(9, 20), "a");
        assert_eq!(within(10, 20), "");
        assert_eq!(within(29, 31), "bc");
        assert_eq!(within(40, 41), "");
    }
}
