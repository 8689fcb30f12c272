//! zTOCs that are written again with one part changed.

use socinbd::{
    tar::Entry,
    ztoc::{self, Ztoc, ZtocParts},
};

/// The zTOC with these entries and these checkpoints, and all else as it was parsed.
pub fn rewritten(ztoc: &Ztoc, entries: &[Entry], checkpoints: &[u8]) -> Vec<u8> {
    let digests: Vec<_> = ztoc.spans.spans.iter().map(|span| span.digest).collect();
    ztoc::write(&ZtocParts {
        version: &ztoc.version,
        build_tool: &ztoc.build_tool,
        entries,
        compressed_size: ztoc.spans.compressed_size,
        uncompressed_size: ztoc.spans.uncompressed_size,
        compression: ztoc.spans.compression,
        digests: &digests,
        checkpoints,
    })
}

/// The zTOC with its entries changed.
pub fn with_entries(ztoc: &[u8], change: impl FnOnce(&mut Vec<Entry>)) -> Vec<u8> {
    let parsed = Ztoc::parse(ztoc).unwrap();
    let mut entries = parsed.entries.clone();
    change(&mut entries);
    rewritten(&parsed, &entries, &ztoc[parsed.checkpoints.clone()])
}
