//! Making a zTOC, on one core, against a pass of C's zlib that finds the same checkpoints and hashes the spans with the same SHA-256.
//!
//!     cargo bench --bench index            (LAYER=FILE: a gzip layer of your own)

mod support;

use socinbd::{
    oci::Packing,
    soci::build::{Indexed, LayerIndexer, NoSink, Options},
};

/// What a registry's answer comes in, about.
const PIECE: usize = 64 * 1024;
const SPAN_SIZE: u64 = 4 << 20;

fn main() {
    support::print_machine();
    let layer = support::layer();
    let made = index(&layer);
    let ztoc = made
        .ztoc
        .expect("one was asked for")
        .expect("the layer can have one");
    let spans = support::zlib::index(&layer, SPAN_SIZE);
    assert_eq!(made.spans, spans, "both find the same");
    println!(
        "{} MB of tar, {spans} spans, {} entries",
        made.uncompressed_size >> 20,
        made.entries.len()
    );
    let ztoc_size = ztoc.len() as u64;
    drop((made.entries, ztoc));

    support::reset_peak();
    let before = support::peak();
    drop(index(&layer));
    let used = support::peak().saturating_sub(before);
    println!(
        "memory: {:.1} MB, and {:.1} MB of it is the zTOC",
        used as f64 / 1e6,
        ztoc_size as f64 / 1e6
    );
    support::pair(
        "index create, one core",
        made.uncompressed_size,
        || drop(index(&layer)),
        || assert_eq!(support::zlib::index(&layer, SPAN_SIZE), spans),
    );
}

fn index(layer: &[u8]) -> Indexed {
    let mut indexer = LayerIndexer::new(
        Packing::Gzip,
        Options {
            span_size: SPAN_SIZE,
            // as `index create` and `ztoc create` have it: the blob's digest is known
            diff_id: false,
            ..Options::default()
        },
        NoSink,
    );
    for piece in layer.chunks(PIECE) {
        indexer.write(piece).expect("a sound layer");
    }
    indexer.finish().expect("a whole layer").0
}
