//! The results of one layer: its zTOC, and its part of a compact index.

use bytes::Bytes;

use super::{
    options::CreateOptions,
    report::{CompactTableReport, LayerOutcome},
};
use crate::{
    compact::{Table, manifest::LayerIndex},
    error::{Error, Kind, Result, ResultExt as _},
    layer::LayerBlob,
    oci::Digest,
    soci::{
        build::CompactBlob,
        index::{DISABLE_XATTRS, Descriptor},
    },
    source::Source,
    ztoc::Ztoc,
};

/// The result of a layer.
pub(crate) struct LayerResult {
    /// The zTOC, or the reason why there is none.
    pub(crate) ztoc: std::result::Result<LayerTable, String>,
    /// The part of the compact index, if one is wanted, or the reason why there is none.
    pub(crate) compact: Option<std::result::Result<CompactPart, String>>,
    /// The diff ID, if the whole layer was read.
    pub(crate) diff_id: Option<Digest>,
    /// Warning about a layer that is missing at the source.
    pub(crate) absent: Option<String>,
}

impl LayerResult {
    /// No tables, for a reason.
    pub(super) fn nothing(reason: String) -> Self {
        Self {
            ztoc: Err(reason),
            compact: None,
            diff_id: None,
            absent: None,
        }
    }
}

/// A layer's zTOC.
#[derive(Clone)]
pub(crate) struct LayerTable {
    pub(crate) digest: Digest,
    pub(crate) bytes: Bytes,
    /// Whether it is from an existing index.
    pub(super) reused: bool,
    /// The prefetch list for this table in the image's existing index.
    pub(crate) prefetch: Option<Bytes>,
}

impl LayerResult {
    /// Warning if the layer's diff ID is not the one of the image configuration.
    pub(super) fn other_diff_id(&self, layer: &LayerBlob) -> Option<String> {
        let other = self.diff_id.filter(|diff_id| *diff_id != layer.diff_id)?;
        Some(format!(
            "layer {} has diff ID {other}, but the image configuration says {}: container engines that unpack the layer refuse the \
             image, and reads of the attached image fail once the layer has been read in full; build the image again",
            layer.digest, layer.diff_id
        ))
    }

    pub(super) fn outcome(&self) -> LayerOutcome {
        match &self.ztoc {
            Ok(table) => LayerOutcome::Indexed {
                ztoc: table.digest,
                ztoc_size: table.bytes.len() as u64,
                reused: table.reused,
            },
            Err(reason) => LayerOutcome::Skipped {
                skipped: reason.clone(),
            },
        }
    }

    pub(super) fn compact_report(&self) -> Option<CompactTableReport> {
        let part = self.compact.as_ref()?.as_ref().ok()?;
        Some(CompactTableReport {
            table: part.index.table,
            table_size: part.index.table_size,
            blob_size: part.index.size,
            spans: part.spans,
            reused: matches!(part.blob, PartBlob::At(_)),
        })
    }
}

impl LayerTable {
    /// The descriptor for an index. With `disable_xattrs` the table is parsed to look for xattrs.
    pub(crate) fn descriptor(
        &self,
        layer: &Digest,
        media_type: &str,
        options: &CreateOptions,
    ) -> Result<Descriptor> {
        let mut descriptor = Descriptor::of_ztoc(
            &self.digest,
            self.bytes.len() as u64,
            layer,
            media_type,
            options.span_size,
        );
        if options.disable_xattrs && !has_xattrs(&self.parse(layer)?) {
            descriptor
                .annotations
                .insert(DISABLE_XATTRS.to_owned(), "true".to_owned());
        }
        Ok(descriptor)
    }

    /// Parses the zTOC.
    pub(crate) fn parse(&self, layer: &Digest) -> Result<Ztoc> {
        Ztoc::parse(&self.bytes).map_err(|error| {
            Error::with_source(
                Kind::Corrupt,
                format!("the zTOC {} of layer {layer}", self.digest),
                error,
            )
        })
    }
}

/// Whether an entry of the layer has an xattr, or will get one as an opaque directory.
fn has_xattrs(table: &Ztoc) -> bool {
    table.entries.iter().any(|entry| {
        let is_xattr = |(key, _): &(Vec<u8>, Vec<u8>)| key.starts_with(b"SCHILY.xattr.");
        entry.name.ends_with(b".wh..wh..opq") || entry.pax.iter().any(is_xattr)
    })
}

/// A layer's part of a compact index.
pub(crate) struct CompactPart {
    pub(crate) index: LayerIndex,
    pub(crate) table: Bytes,
    /// Number of spans.
    pub(crate) spans: usize,
    pub(crate) blob: PartBlob,
    /// The prefetch list for this table in the image's existing index.
    pub(crate) prefetch: Option<Bytes>,
}

/// The blob of a compact index part: the table and all windows.
pub(crate) enum PartBlob {
    /// New.
    New(Bytes),
    /// Exists at this source.
    At(Source),
}

impl CompactPart {
    /// A new part.
    pub(crate) fn of(layer: Digest, made: CompactBlob) -> Self {
        let bytes = Bytes::from(made.bytes);
        Self {
            index: LayerIndex {
                layer,
                blob: Digest::of(&bytes),
                size: bytes.len() as u64,
                table: made.table,
                table_size: made.table_size as u64,
                span_size: made.span_size,
            },
            table: bytes.slice(..made.table_size),
            spans: made.spans,
            blob: PartBlob::New(bytes),
            prefetch: None,
        }
    }

    pub(super) fn parse(&self) -> Result<Table> {
        Table::parse(&self.table).or_kind(Kind::Corrupt, || {
            format!("the compact table of layer {}", self.index.layer)
        })
    }
}
