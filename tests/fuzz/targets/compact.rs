//! Any bytes as the parts of a compact index: its manifest, a layer's table, a stored window.

#![no_main]

#[allow(dead_code, reason = "each fuzzer takes what it needs")]
#[path = "common.rs"]
mod common;

use libfuzzer_sys::fuzz_target;
use socinbd::{
    compact::{HEADER_SIZE, NewSpan, NewTable, Table, manifest::Manifest, window::Window, write},
    ztoc::Compression,
};

/// Where the header says things (docs/compact.md).
const SPANS_AT: usize = 88;

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    match choice & 7 {
        0 => {
            if let Ok(manifest) = Manifest::parse(bytes) {
                let again = Manifest::parse(&manifest.to_bytes().expect("it can be written"));
                assert_eq!(again.expect("its own bytes"), manifest);
            }
        }
        1 => drop(table(bytes)),
        // what a table's packing holds, behind a header that fits: counts come first
        2 | 3 => {
            let Some((counts, body)) = bytes.split_first_chunk::<4>() else {
                return;
            };
            let stored = zstd::bulk::compress(body, 1).expect("it has no limit");
            let mut whole = header(choice & 7 == 3);
            whole[64..72].copy_from_slice(&(stored.len() as u64).to_le_bytes());
            whole[72..80].copy_from_slice(&(body.len() as u64).to_le_bytes());
            let [spans, entries, windows, _] = counts.map(u32::from);
            whole[80..88].copy_from_slice(&u64::from(windows).to_le_bytes());
            whole[SPANS_AT..SPANS_AT + 4].copy_from_slice(&spans.to_le_bytes());
            whole[SPANS_AT + 4..].copy_from_slice(&entries.to_le_bytes());
            whole.extend(stored);
            if let Some(table) = table(&whole) {
                written_again(&table);
            }
        }
        4 => drop(Window::parse(bytes)),
        _ => {
            // what a window's packing holds
            let packed = zstd::bulk::compress(bytes, 1).expect("it has no limit");
            drop(Window::parse(&packed));
        }
    }
});

/// The header of a table without anything, of a gzip layer or of a plain tar.
fn header(plain: bool) -> Vec<u8> {
    let compression = match plain {
        true => Compression::Uncompressed,
        false => Compression::Gzip,
    };
    let empty = write(&NewTable {
        layer: socinbd::oci::Digest::of(b"layer"),
        layer_size: 1 << 20,
        compression,
        span_size: 1 << 16,
        spans: &[],
        entries: &[],
    });
    empty.expect("it has no limit")[..HEADER_SIZE].to_vec()
}

/// A table, and what an attach does with it.
fn table(bytes: &[u8]) -> Option<Table> {
    let table = Table::parse(bytes)
        .inspect_err(|error| assert!(!error.to_string().is_empty()))
        .ok()?;
    let mut end = 0;
    for span in &table.spans.spans {
        assert_eq!(span.uncompressed.start.get(), end, "spans follow each other");
        end = span.uncompressed.end.get();
        assert!(span.compressed.end.get() <= table.spans.compressed_size);
        assert!(span.window.as_ref().is_none_or(|window| window.end as u64 <= table.blob_size));
    }
    common::lay_out(&table.entries, |_, _| ());
    Some(table)
}

/// What was read can be written, and is then read as the same.
fn written_again(table: &Table) {
    let spans: Vec<NewSpan> = table
        .spans
        .spans
        .iter()
        .map(|span| NewSpan {
            compressed_start: span.compressed.start,
            bits: span.bits,
            length: span.uncompressed.end.get() - span.uncompressed.start.get(),
            digest: span.digest,
            window_size: span.window.as_ref().map_or(0, |window| window.len() as u32),
        })
        .collect();
    let bytes = write(&NewTable {
        layer: table.layer,
        layer_size: table.spans.compressed_size,
        compression: table.spans.compression,
        span_size: table.spans.span_size,
        spans: &spans,
        entries: &table.entries,
    });
    let again = Table::parse(&bytes.expect("it has no limit")).expect("its own bytes");
    assert_eq!(again.entries, table.entries);
    assert_eq!(again.spans.covered(), table.spans.covered());
    assert_eq!(again.spans.spans.len(), table.spans.spans.len());
}
