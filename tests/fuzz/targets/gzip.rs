//! Any bytes as a gzip blob, and any bytes in one: an error, or checkpoints from each of which its span decodes alone to the bytes that
//! the whole has there.

#![no_main]

use std::{convert::Infallible, io::Write as _};

use flate2::{Compression, write::GzEncoder};
use libfuzzer_sys::fuzz_target;
use socinbd::{
    gzip::{
        inflate::SpanDecoder,
        scan::{Event, Scanner},
    },
    oci::Digest,
    units::{CompressedOffset, LayerOffset},
    ztoc::Span,
};

/// A bomb says nothing after its first megabytes.
const MAX_OUTPUT: usize = 8 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    match choice & 1 {
        0 => drop(decoded(bytes, *choice)),
        // nothing makes no member
        _ if bytes.is_empty() => {}
        _ => {
            let level = Compression::new(u32::from(choice >> 1) % 10);
            let blob = packed(bytes, level).unwrap_or_else(|never| match never {});
            assert!(decoded(&blob, *choice).is_some_and(|found| found == bytes));
        }
    }
});

/// Two members, in blocks of some kilobytes.
fn packed(bytes: &[u8], level: Compression) -> Result<Vec<u8>, Infallible> {
    let mut blob = Vec::new();
    for half in bytes.chunks(bytes.len().div_ceil(2).max(1)) {
        let mut encoder = GzEncoder::new(Vec::new(), level);
        for block in half.chunks(5000) {
            encoder.write_all(block).and_then(|()| encoder.flush()).expect("memory");
        }
        blob.extend(encoder.finish().expect("memory"));
    }
    Ok(blob)
}

/// The uncompressed stream, when the scan takes it: all its spans have been decoded alone.
fn decoded(blob: &[u8], choice: u8) -> Option<Vec<u8>> {
    let mut scanner = Scanner::new(u64::from(choice >> 1) * 100);
    let mut out = Vec::new();
    let mut starts: Vec<(u64, u64, u8, Vec<u8>)> = Vec::new();
    for mut piece in blob.chunks(usize::from(choice) * 7 + 1) {
        loop {
            match scanner.next(&mut piece) {
                Ok(None) => break,
                Ok(Some(Event::Data(bytes))) => out.extend_from_slice(bytes),
                Ok(Some(Event::Checkpoint(it))) => starts.push((
                    it.input.get(),
                    it.output.get(),
                    it.bits,
                    it.window.to_vec(),
                )),
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return None;
                }
            }
            if out.len() > MAX_OUTPUT {
                return None;
            }
        }
    }
    scanner.finish().ok()?;
    let mut decoder = SpanDecoder::default();
    for (number, (input, output, bits, window)) in starts.iter().enumerate() {
        let next = starts.get(number + 1);
        let (input_end, output_end) = next.map_or(
            (blob.len() as u64, out.len() as u64),
            |(input, output, ..)| (*input, *output),
        );
        // a byte that two spans share belongs to both
        let first = input - u64::from(*bits > 0);
        let span = Span {
            compressed: CompressedOffset(first)..CompressedOffset(input_end),
            uncompressed: LayerOffset(*output)..LayerOffset(output_end),
            digest: Digest::new([0; 32]),
            bits: *bits,
            end_bits: next.map_or(0, |(_, _, bits, _)| *bits),
            window: None,
        };
        let compressed = &blob[first as usize..input_end as usize];
        let bytes = decoder.decode(&span, compressed, Some(window)).expect("its span decodes");
        assert!(bytes == &out[*output as usize..output_end as usize]);
    }
    Some(out)
}
