//! The yardstick: zlib in C, used as AWS's tool uses it.
#![allow(unsafe_code, reason = "C's zlib")]

use std::mem::MaybeUninit;

use libz_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateInit2_,
    inflatePrime, inflateReset2, inflateSetDictionary, z_stream, zlibVersion,
};
use ring::digest::{Context, SHA256};

/// As AWS's tool: what is handed to zlib at once.
const INPUT: usize = 16 * 1024;
const WINDOW: usize = 32 * 1024;

struct Stream(Box<z_stream>);

impl Stream {
    fn new(window_bits: i32) -> Self {
        let mut stream = Box::new(MaybeUninit::<z_stream>::zeroed());
        // SAFETY: all-zero is how zlib wants a stream before its initialisation, which sets the allocator where there is none (so the
        // function pointers are not null behind it); the version and the size belong together.
        let stream = unsafe {
            let code = inflateInit2_(
                stream.as_mut_ptr(),
                window_bits,
                zlibVersion(),
                size_of::<z_stream>() as i32,
            );
            assert_eq!(code, Z_OK);
            stream.assume_init()
        };
        Self(stream)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it was initialised.
        unsafe { inflateEnd(&mut *self.0) };
    }
}

/// One pass that finds checkpoints (their windows are copied) and hashes each span's compressed bytes. Returns how many there are.
pub fn index(blob: &[u8], span_size: u64) -> usize {
    let mut stream = Stream::new(47);
    let mut window = vec![0; WINDOW];
    let mut windows: Vec<Vec<u8>> = Vec::new();
    let (mut total, mut last) = (0u64, 0u64);
    let mut hasher = Context::new(&SHA256);
    let mut digests = Vec::new();
    let (mut at, mut hashed) = (0, 0);
    stream.0.next_out = window.as_mut_ptr();
    stream.0.avail_out = 0;
    loop {
        let input = &blob[at..blob.len().min(at + INPUT)];
        if input.is_empty() {
            break;
        }
        stream.0.next_in = input.as_ptr().cast_mut();
        stream.0.avail_in = input.len() as u32;
        let mut ended = false;
        while stream.0.avail_in > 0 && !ended {
            if stream.0.avail_out == 0 {
                stream.0.next_out = window.as_mut_ptr();
                stream.0.avail_out = WINDOW as u32;
            }
            let before = stream.0.avail_out;
            // SAFETY: input and window are as long as the stream says, and live through the call.
            let code = unsafe { inflate(&mut *stream.0, Z_BLOCK) };
            total += u64::from(before - stream.0.avail_out);
            ended = code == Z_STREAM_END;
            assert!(
                ended || code == Z_OK || code == Z_BUF_ERROR,
                "zlib says {code}"
            );
            let boundary = stream.0.data_type & 128 != 0 && stream.0.data_type & 64 == 0;
            if boundary && (total == 0 || total - last > span_size) {
                let split = WINDOW - stream.0.avail_out as usize;
                let (new, old) = window.split_at(split);
                windows.push([old, new].concat());
                last = total;
                let here = at + input.len() - stream.0.avail_in as usize;
                hasher.update(&blob[hashed..here]);
                digests.push(std::mem::replace(&mut hasher, Context::new(&SHA256)).finish());
                hashed = here;
            }
        }
        at += input.len() - stream.0.avail_in as usize;
        if ended {
            // SAFETY: it was initialised.
            unsafe { inflateReset2(&mut *stream.0, 47) };
        }
    }
    hasher.update(&blob[hashed..]);
    digests.push(hasher.finish());
    windows.len()
}

/// Decodes spans, each from its checkpoint, with one stream.
pub struct Spans {
    stream: Stream,
    output: Vec<u8>,
}

impl Spans {
    /// For spans of at most so many bytes.
    pub fn new(longest: usize) -> Self {
        Self {
            stream: Stream::new(-15),
            output: vec![0; longest],
        }
    }

    /// One span. `compressed` starts with the byte that is shared, when `bits` is not 0. It lies in one member.
    pub fn decode(&mut self, compressed: &[u8], bits: u8, window: &[u8], length: usize) -> &[u8] {
        let stream = &mut *self.stream.0;
        // SAFETY: the stream was initialised; the slices live through the calls and are as long as is said.
        let code = unsafe {
            inflateReset2(stream, -15);
            let mut input = compressed;
            if bits != 0 {
                inflatePrime(
                    stream,
                    i32::from(bits),
                    i32::from(compressed[0] >> (8 - bits)),
                );
                input = &compressed[1..];
            }
            inflateSetDictionary(stream, window.as_ptr(), window.len() as u32);
            stream.next_in = input.as_ptr().cast_mut();
            stream.avail_in = input.len() as u32;
            stream.next_out = self.output.as_mut_ptr();
            stream.avail_out = length as u32;
            inflate(stream, Z_NO_FLUSH)
        };
        assert!(
            code == Z_OK || code == Z_STREAM_END || code == Z_BUF_ERROR,
            "zlib says {code}"
        );
        assert_eq!(stream.avail_out, 0, "the whole span");
        &self.output[..length]
    }
}
