//! Any bytes as the parts of a compact index: its manifest, a layer's table, a stored window.

#![no_main]

#[allow(dead_code, reason = "each fuzzer takes what it needs")]
#[path = "common.rs"]
mod common;

use libfuzzer_sys::fuzz_target;
use socinbd::compact::{Table, manifest::Manifest, window::Window};

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    match choice & 3 {
        0 => drop(Manifest::parse(bytes)),
        1 => {
            if let Ok(table) = Table::parse(bytes) {
                common::lay_out(&table.entries);
            }
        }
        2 => drop(Window::parse(bytes)),
        _ => {
            // what a window's packing holds
            let packed = zstd::bulk::compress(bytes, 1).expect("it has no limit");
            drop(Window::parse(&packed));
        }
    }
});
