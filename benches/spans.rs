//! Decoding spans from their checkpoints, on one core, against C's zlib with `inflatePrime` and `inflateSetDictionary`.
//!
//!     cargo bench --bench spans [--features libdeflater]            (LAYER=FILE: a gzip layer of your own, of one member)

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
};

use socinbd::{
    gzip::inflate::SpanDecoder,
    oci::Packing,
    soci::build::{LayerIndexer, NoSink, Options},
    ztoc::{Span, Ztoc},
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[allow(unsafe_code, reason = "an allocator that counts")]
// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    support::print_machine();
    let layer = support::layer();
    let mut indexer = LayerIndexer::new(Packing::Gzip, Options::default(), NoSink);
    indexer.write(&layer).expect("a sound layer");
    let ztoc = indexer.finish().expect("a whole layer").0.ztoc;
    let ztoc = ztoc
        .expect("one was asked for")
        .expect("the layer can have one");
    let spans = Ztoc::parse(&ztoc).expect("our own").spans;
    let zeros = vec![0; socinbd::ztoc::WINDOW_SIZE];
    let input = |span: &Span| {
        let compressed = span.compressed.start.get() as usize..span.compressed.end.get() as usize;
        let window = span.window.clone().map_or(&zeros[..], |range| &ztoc[range]);
        let length = (span.uncompressed.end.get() - span.uncompressed.start.get()) as usize;
        (&layer[compressed], window, length)
    };
    let longest = spans
        .spans
        .iter()
        .map(|span| input(span).2)
        .max()
        .unwrap_or(0);
    let bytes = spans.spans.iter().map(|span| input(span).2 as u64).sum();

    let mut ours = SpanDecoder::default();
    let mut theirs = support::zlib::Spans::new(longest);
    for span in &spans.spans {
        let (compressed, window, length) = input(span);
        let decoded = ours
            .decode(span, compressed, Some(window))
            .expect("a sound span");
        assert!(
            decoded == theirs.decode(compressed, span.bits, window, length),
            "both give the same"
        );
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let mut decode_all = || {
        for span in &spans.spans {
            let (compressed, window, _) = input(span);
            black_box(
                ours.decode(span, compressed, Some(window))
                    .expect("a sound span"),
            );
        }
    };
    decode_all();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    println!(
        "{} spans, {} MB, {allocations} allocations in a pass over all",
        spans.spans.len(),
        bytes >> 20
    );
    let name = match cfg!(feature = "libdeflater") {
        true => "span decode, one core, libdeflater",
        false => "span decode, one core, safe code",
    };
    support::pair(name, bytes, decode_all, || {
        for span in &spans.spans {
            let (compressed, window, length) = input(span);
            black_box(theirs.decode(compressed, span.bits, window, length));
        }
    });
}
