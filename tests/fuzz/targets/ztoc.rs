//! Any bytes as a zTOC: refused with words, or a table that keeps what the rest of the program relies on, and from which a disk can be
//! laid out.

#![no_main]

#[allow(dead_code, reason = "each fuzzer takes what it needs")]
#[path = "common.rs"]
mod common;

use libfuzzer_sys::fuzz_target;
use socinbd::{
    units::LayerOffset,
    ztoc::{WINDOW_SIZE, Ztoc, ZtocParts, write},
};

fuzz_target!(|bytes: &[u8]| {
    let ztoc = match Ztoc::parse(bytes) {
        Ok(ztoc) => ztoc,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    check(&ztoc, bytes);
    common::lay_out(&ztoc.entries, |_, _| ());
});

fn check(ztoc: &Ztoc, bytes: &[u8]) {
    let mut end = LayerOffset(0);
    for span in &ztoc.spans.spans {
        assert_eq!(span.uncompressed.start, end, "spans follow each other");
        assert!(span.uncompressed.end >= end);
        end = span.uncompressed.end;
        assert!(span.compressed.start <= span.compressed.end);
        assert!(span.compressed.end.get() <= ztoc.spans.compressed_size);
        assert!(span.bits <= 7);
        if let Some(window) = &span.window {
            assert_eq!(bytes[window.clone()].len(), WINDOW_SIZE);
        }
    }
    let mut data_end = 0;
    for entry in &ztoc.entries {
        let data = entry.data_offset.get();
        assert!(data >= data_end + 512 && data.is_multiple_of(512));
        data_end = data + entry.size;
        assert!(data_end <= end.get(), "data is within the spans");
        assert!(!entry.name.contains(&0) && !entry.linkname.contains(&0));
    }
    let digests: Vec<_> = ztoc.spans.spans.iter().map(|span| span.digest).collect();
    let again = write(&ZtocParts {
        version: &ztoc.version,
        build_tool: &ztoc.build_tool,
        entries: &ztoc.entries,
        compressed_size: ztoc.spans.compressed_size,
        uncompressed_size: ztoc.spans.uncompressed_size,
        compression: ztoc.spans.compression,
        digests: &digests,
        checkpoints: &bytes[ztoc.checkpoints.clone()],
    });
    let again = Ztoc::parse(&again).expect("what was read can be written");
    let names = |ztoc: &Ztoc| ztoc.entries.iter().map(|it| it.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&again), names(ztoc));
}
