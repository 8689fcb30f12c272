//! The compact index: made beside the zTOC, read, attached.

mod disk;
mod hostile;
mod image;
mod spans;

use std::sync::Arc;

use bytes::Bytes;
use socinbd::{
    compact::{Table, manifest::LayerIndex},
    layer::{Disk, Store, StoreOptions, TableBytes},
    oci::{Digest, Packing},
    soci::build::{CompactBlob, NoSink},
    units::DiskOffset,
};

use crate::{
    gzip::{index, options},
    layer::fixture::{Lab, Layer, REPOSITORY, source},
    support::until,
};

/// A layer with a compact index, a registry that has both, and a store that is empty.
pub struct CompactLab {
    pub lab: Lab,
    pub blob: Bytes,
    pub index: LayerIndex,
    pub table: Table,
}

/// The layer's part of a compact index.
pub fn compact_of(layer: &Layer, span_size: u64) -> CompactBlob {
    let options = socinbd::soci::build::Options {
        compact_span_size: Some(span_size),
        ..options(1 << 20)
    };
    let packing = match layer.layer.packing {
        Packing::Plain => Packing::Plain,
        _ => Packing::Gzip,
    };
    let (indexed, NoSink) = index(&layer.blob, packing, options, 1 << 16, NoSink).unwrap();
    indexed.compact.unwrap().unwrap()
}

impl CompactLab {
    /// Spans of 64 KiB and more.
    pub fn new(layer: Layer) -> Self {
        let blob = compact_of(&layer, 64 << 10);
        Self::of(layer, blob.bytes, blob.table_size)
    }

    /// With these bytes for the compact index.
    pub fn of(layer: Layer, blob: Vec<u8>, table_size: usize) -> Self {
        let options = StoreOptions {
            never_whole: true, // so that counts are of what is asked for
            ..StoreOptions::default()
        };
        let table = &blob[..table_size];
        let index = LayerIndex {
            layer: layer.layer.digest,
            blob: Digest::of(&blob),
            size: blob.len() as u64,
            table: Digest::of(table),
            table_size: table_size as u64,
            span_size: 64 << 10,
        };
        let table = Table::parse(table).unwrap();
        let lab = Lab::with_options(layer, options);
        let blob = Bytes::from(blob);
        lab.registry.add_blob(REPOSITORY, blob.clone());
        Self {
            lab,
            blob,
            index,
            table,
        }
    }

    pub async fn disk(&self) -> Arc<Disk> {
        self.disk_in(&self.lab.store).await
    }

    pub async fn disk_in(&self, store: &Arc<Store>) -> Arc<Disk> {
        self.try_disk_in(store).await.unwrap()
    }

    pub async fn try_disk_in(&self, store: &Arc<Store>) -> socinbd::error::Result<Arc<Disk>> {
        let source = source(&self.lab.registry).await;
        let table = self.blob.slice(..self.index.table_size as usize);
        store
            .compact(
                &self.lab.layer.layer,
                &self.index,
                TableBytes::of(table),
                &source,
                &source,
            )
            .await
    }

    /// GETs of windows, and their bytes.
    pub fn windows_fetched(&self) -> (u64, u64) {
        let count = self.lab.registry.counters().blob(&self.index.blob);
        (count.requests, count.bytes)
    }

    /// A place on the disk whose data is in this span alone, with its bytes; the spans of the big file have some.
    pub fn place_in(&self, span: usize) -> (std::ops::Range<DiskOffset>, Vec<u8>) {
        let layer = &self.lab.layer;
        let big = layer.place("data/big");
        let start = layer
            .regions
            .iter()
            .find(|region| region.disk.start == big.start)
            .unwrap()
            .layer
            .start
            .get();
        let bytes = &self.table.spans.spans[span].uncompressed;
        // the middle of the span
        let from = (bytes.start.get() + bytes.end.get()) / 2 - start;
        let disk = DiskOffset(big.start.get() + from)..DiskOffset(big.start.get() + from + 100);
        let content = layer.files["data/big"][from as usize..from as usize + 100].to_vec();
        (disk, content)
    }

    /// Where the fetch ends that a miss of this span has begun, once all of it is present: 96 KiB behind the span.
    pub async fn end_of_miss(&self, disk: &Disk, span: usize) -> usize {
        let spans = &self.table.spans.spans;
        let reach = spans[span].compressed.end.get() + (96 << 10);
        let more = spans[span + 1..]
            .iter()
            .take_while(|next| next.compressed.end.get() <= reach);
        let end = span + 1 + more.count();
        let is_present = || disk.is_present(self.place_in(end - 1).0);
        until("the miss has come", is_present).await;
        end
    }

    /// A span in the middle of the big file whose neighbours are in it too, with a window.
    pub fn span_in_big(&self) -> usize {
        let layer = &self.lab.layer;
        let big = layer.place("data/big");
        let data = layer
            .regions
            .iter()
            .find(|region| region.disk.start == big.start)
            .unwrap();
        let inside = |span: usize| {
            let range = &self.table.spans.spans[span].uncompressed;
            data.layer.start < range.start && range.end < data.layer.end
        };
        (3..self.table.spans.spans.len() - 3)
            .find(|span| {
                (span - 2..span + 3).all(inside)
                    && (span - 1..span + 2)
                        .all(|span| self.table.spans.spans[span].window.is_some())
            })
            .expect("the big file has several spans")
    }
}
