//! Any bytes as a span, with any window and any claim of its length: an error, or exactly so many bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use socinbd::{
    gzip::inflate::SpanDecoder,
    oci::Digest,
    units::{CompressedOffset, LayerOffset},
    ztoc::{Span, WINDOW_SIZE},
};

fuzz_target!(|bytes: &[u8]| {
    let Some((head, compressed)) = bytes.split_first_chunk::<4>() else {
        return;
    };
    let [a, b, c, bits] = *head;
    let length = u64::from(u32::from_le_bytes([a, b, c, 0]));
    let span = Span {
        compressed: CompressedOffset(10)..CompressedOffset(10 + compressed.len() as u64),
        uncompressed: LayerOffset(512)..LayerOffset(512 + length),
        digest: Digest::new([0; 32]),
        bits: bits & 7,
        end_bits: 0,
        window: None,
    };
    let window: Vec<u8> = (0..WINDOW_SIZE).map(|at| (at as u8).wrapping_mul(bits)).collect();
    let window = (bits & 8 > 0).then_some(&window[..]);
    let mut decoder = SpanDecoder::default();
    let decoded = match bits & 16 {
        0 => decoder.decode(&span, compressed, window),
        _ => decoder.decode_beyond(&span, compressed, window, 10_000),
    };
    match decoded {
        Ok(decoded) => assert_eq!(decoded.len() as u64, length),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    assert!(decoder.beyond().len() <= 10_000);
});
