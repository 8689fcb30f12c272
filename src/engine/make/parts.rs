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

/// What was made of a layer.
pub(crate) struct LayerResult {
    /// The zTOC, or why there is none.
    pub(crate) ztoc: std::result::Result<LayerTable, String>,
    /// Its part of the compact index, if one is wanted, or why there is none.
    pub(crate) compact: Option<std::result::Result<CompactPart, String>>,
    /// The layer's diff ID, if all of it was read.
    pub(crate) diff_id: Option<Digest>,
    /// What the person should know where the layer is not at the source and is done without.
    pub(crate) absent: Option<String>,
}

impl LayerResult {
    /// Nothing, for a reason.
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
    /// An index had it already.
    pub(super) reused: bool,
    /// What a start needs of it, as the image's own index lists it.
    pub(crate) prefetch: Option<Bytes>,
}

impl LayerResult {
    /// Says that a layer has not the diff ID that the image's configuration gives it.
    pub(super) fn other_diff_id(&self, layer: &LayerBlob) -> Option<String> {
        let other = self.diff_id.filter(|diff_id| *diff_id != layer.diff_id)?;
        Some(format!(
            "layer {} has the diff ID {other}, where the image's configuration says {}: container engines that unpack the layer refuse \
             the image, and an attach of it fails when the layer has been read in full; build the image again",
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
    /// Its descriptor in an index. A table that is asked to be optimized is parsed for that.
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

    /// What it says.
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

/// Whether a file of the layer has an xattr, or will get one: an opaque directory's.
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
    /// How many spans it has.
    pub(crate) spans: usize,
    pub(crate) blob: PartBlob,
    /// What a start needs of it, as the image's own index lists it.
    pub(crate) prefetch: Option<Bytes>,
}

/// The table and all windows.
pub(crate) enum PartBlob {
    /// Made here.
    New(Bytes),
    /// There already.
    At(Source),
}

impl CompactPart {
    /// One that was made.
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
