//! Any bytes as the checkpoints of a zTOC whose FlatBuffer is well.

#![no_main]

use libfuzzer_sys::fuzz_target;
use socinbd::{
    oci::Digest,
    ztoc::{Compression, Ztoc, ZtocParts, write},
};

/// Spans whose digests are there at most: more say nothing new.
const MAX_SPANS: usize = 500;

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, checkpoints)) = bytes.split_first() else {
        return;
    };
    let count = checkpoints.first_chunk().map_or(0, |count| i32::from_le_bytes(*count));
    let spans = usize::try_from(count).unwrap_or(0).min(MAX_SPANS) + usize::from(choice & 2 > 0);
    let size = 1_u64 << (choice >> 3);
    let ztoc = write(&ZtocParts {
        version: "0.9",
        build_tool: "fuzz",
        entries: &[],
        compressed_size: size,
        uncompressed_size: size.saturating_mul(3),
        compression: match choice & 1 {
            0 => Compression::Gzip,
            _ => Compression::Uncompressed,
        },
        digests: &vec![Digest::new([1; 32]); spans],
        checkpoints,
    });
    match Ztoc::parse(&ztoc) {
        Ok(ztoc) => {
            let mut end = 0;
            for span in &ztoc.spans.spans {
                assert_eq!(span.uncompressed.start.get(), end);
                assert!(span.uncompressed.end.get() >= end);
                end = span.uncompressed.end.get();
                assert!(span.compressed.start <= span.compressed.end);
                assert!(span.compressed.end.get() <= size);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
