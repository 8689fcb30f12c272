//! Any bytes as a tar: an error, or the same entries in whatever pieces they come, and a disk from them.

#![no_main]

#[allow(dead_code, reason = "each fuzzer takes what it needs")]
#[path = "common.rs"]
mod common;

use libfuzzer_sys::fuzz_target;
use socinbd::{
    tar::{Archive, Error, Event, Reader},
    ztoc,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = read(bytes, bytes.len().max(1));
    let in_pieces = read(bytes, usize::from(*piece) * 3 + 1);
    let (archive, data) = match (whole, in_pieces) {
        (Ok(whole), Ok(in_pieces)) => {
            assert_eq!(whole, in_pieces);
            whole
        }
        (Err(whole), Err(in_pieces)) => {
            assert_eq!(whole.to_string(), in_pieces.to_string());
            return;
        }
        (whole, in_pieces) => panic!("{whole:?} and {in_pieces:?}"),
    };
    assert!(data <= bytes.len());
    for entry in &archive.entries {
        assert!(entry.data_offset.get() <= bytes.len() as u64);
        ztoc::fingerprint(entry);
    }
    common::lay_out(&archive.entries, |_, _| ());
});

/// What is read in pieces of this length, and how many bytes of data there were.
fn read(bytes: &[u8], piece: usize) -> Result<(Archive, usize), Error> {
    let mut reader = Reader::new();
    let mut data = 0;
    for mut rest in bytes.chunks(piece) {
        while let Some(event) = reader.next(&mut rest)? {
            if let Event::Data { bytes, .. } = event {
                data += bytes.len();
            }
        }
    }
    Ok((reader.finish()?, data))
}
