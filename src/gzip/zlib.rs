//! Inflate that stops at the ends of deflate blocks and says at which bit. Only zlib's C interface can do that (`Z_BLOCK`), here in
//! the crate `libz-rs-sys`; this file is all of the module's `unsafe`.
#![allow(
    unsafe_code,
    reason = "the crate has no safe interface to Z_BLOCK and data_type"
)]

use std::ffi::{CStr, c_int};

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateInit2_, inflateReset,
    z_stream, zlibVersion,
};

/// Window bits for a deflate stream without a wrapping, with the largest window.
const RAW: c_int = -15;

/// `z_stream.data_type`: unused bits of the last byte taken, in the low bits, and ...
const DATA_TYPE_BITS: c_int = 63;
/// ... the last block of the stream has been seen, and ...
const DATA_TYPE_LAST: c_int = 64;
/// ... the stream stands between two blocks.
const DATA_TYPE_BOUNDARY: c_int = 128;

/// What one call did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) taken: usize,
    /// Bytes written at the output's start.
    pub(super) written: usize,
    /// Why it stopped.
    pub(super) stop: Stop,
}

/// Why a call stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The input is used up, or the output is full.
    Buffers,
    /// A block is at its end and another follows; so many high bits (0 to 7) of the last byte taken belong to that.
    Block { bits: u8 },
    /// The stream is at its end; what was not taken is no part of it.
    End,
}

/// A raw deflate stream being inflated.
pub(super) struct BlockInflater {
    /// Initialised by `inflateInit2_` from `new` to `drop`. Boxed, because C's zlib forbids that it moves.
    stream: Box<z_stream>,
}

// SAFETY: the stream and the state behind it are owned by this value alone, are not tied to a thread, and are only used through
// `&mut self`.
unsafe impl Send for BlockInflater {}

impl BlockInflater {
    /// At the start of a stream.
    pub(super) fn new() -> Self {
        let mut stream = Box::<z_stream>::default();
        // SAFETY: the pointer is to a valid z_stream, whose default names the library's own allocator; version and size are those
        // of the library that is linked.
        let code = unsafe {
            inflateInit2_(
                &mut *stream,
                RAW,
                zlibVersion(),
                size_of::<z_stream>() as c_int,
            )
        };
        // it fails on a wrong argument, and these are constants; or without memory, where Rust's allocation aborts as well
        assert_eq!(code, Z_OK, "inflateInit2 takes these constants");
        Self { stream }
    }

    /// To the start of another stream.
    pub(super) fn reset(&mut self) {
        // SAFETY: the stream was initialised by `new`.
        let code = unsafe { inflateReset(&mut *self.stream) };
        debug_assert_eq!(code, Z_OK);
    }

    /// Inflates up to the end of a block, of the input or of the room in the output. The error is the library's text.
    pub(super) fn inflate(
        &mut self,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<Step, &'static str> {
        let stream = &mut *self.stream;
        let available_in = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let available_out = u32::try_from(output.len()).unwrap_or(u32::MAX);
        stream.next_in = input.as_ptr();
        stream.avail_in = available_in;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = available_out;
        // SAFETY: the stream was initialised by `new`; `next_in` and `next_out` are valid for `avail_in` and `avail_out` bytes (both
        // at most the slices' lengths) during the call, and are not used after it. The output is initialised, so whatever the
        // library leaves in it behind `next_out` is still bytes.
        let code = unsafe { inflate(stream, Z_BLOCK) };
        let taken = available_in.saturating_sub(stream.avail_in) as usize;
        let written = available_out.saturating_sub(stream.avail_out) as usize;
        stream.next_in = std::ptr::null();
        stream.next_out = std::ptr::null_mut();
        let state = stream.data_type;
        let stop = match code {
            Z_STREAM_END => Stop::End,
            Z_OK if state & DATA_TYPE_BOUNDARY != 0 && state & DATA_TYPE_LAST == 0 => {
                match u8::try_from(state & DATA_TYPE_BITS) {
                    Ok(bits @ 0..8) => Stop::Block { bits },
                    // zlib promises fewer than 8; without that promise no checkpoint stands here
                    _ => Stop::Buffers,
                }
            }
            Z_OK | Z_BUF_ERROR => Stop::Buffers,
            _ => return Err(self.message()),
        };
        Ok(Step {
            taken,
            written,
            stop,
        })
    }

    fn message(&self) -> &'static str {
        if self.stream.msg.is_null() {
            return "invalid data";
        }
        // SAFETY: a message that is not null is one of the library's NUL-terminated constants.
        let message: &'static CStr = unsafe { CStr::from_ptr(self.stream.msg) };
        message.to_str().unwrap_or("invalid data")
    }
}

impl Drop for BlockInflater {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new`, and is not used again.
        let _ = unsafe { inflateEnd(&mut *self.stream) };
    }
}

impl std::fmt::Debug for BlockInflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockInflater").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    /// A stream of stored blocks, or of packed ones with empty stored ones between them, and what it holds. It is small: `scripts/sanitize`
    /// runs these tests in an interpreter.
    fn stream(level: Compression) -> (Vec<u8>, Vec<u8>) {
        let parts: [&[u8]; 3] = [
            b"a block, a block, and another block\n",
            &[7; 300],
            b"the last",
        ];
        let mut compress = Compress::new(level, false);
        let mut packed = Vec::with_capacity(1000);
        for (number, part) in parts.iter().enumerate() {
            let flush = [FlushCompress::Sync, FlushCompress::Finish][number / 2];
            compress.compress_vec(part, &mut packed, flush).unwrap();
        }
        (packed, parts.concat())
    }

    /// What comes out, and where blocks end, as the bit of the input and the byte of the output.
    type Inflated = (Vec<u8>, Vec<(usize, usize)>);

    /// Inflates input that comes in pieces into so much room.
    fn inflated(
        inflater: &mut BlockInflater,
        stream: &[u8],
        piece: usize,
        room: usize,
    ) -> Result<Inflated, &'static str> {
        let (mut bytes, mut ends, mut at) = (Vec::new(), Vec::new(), 0);
        let mut output = vec![0; room];
        loop {
            let input = &stream[at..stream.len().min(at + piece)];
            let step = inflater.inflate(input, &mut output)?;
            at += step.taken;
            bytes.extend(&output[..step.written]);
            match step.stop {
                Stop::End => return Ok((bytes, ends)),
                Stop::Block { bits } => ends.push((at * 8 - usize::from(bits), bytes.len())),
                Stop::Buffers if step.taken + step.written == 0 => return Err("cut short"),
                Stop::Buffers => {}
            }
        }
    }

    #[test]
    fn however_small_the_buffers_the_bytes_and_the_ends_of_blocks_are_the_same() {
        for level in [Compression::none(), Compression::default()] {
            let (packed, bytes) = stream(level);
            let mut inflater = BlockInflater::new();
            let whole = inflated(&mut inflater, &packed, packed.len(), 1000).unwrap();
            assert!(whole.0 == bytes);
            assert!(whole.1.len() >= 4, "{:?}", whole.1);
            for (piece, room) in [(1, 1000), (packed.len(), 1), (1, 1), (7, 3)] {
                inflater.reset();
                // it is not tied to a thread
                let (pieces, used) = std::thread::scope(|scope| {
                    let run = scope.spawn(|| {
                        let pieces = inflated(&mut inflater, &packed, piece, room);
                        (pieces, inflater)
                    });
                    run.join().unwrap()
                });
                assert!(pieces.as_ref() == Ok(&whole), "{piece}, {room}: {pieces:?}");
                inflater = used;
            }
        }
    }

    #[test]
    fn after_any_damage_it_can_be_used_again() {
        let (packed, bytes) = stream(Compression::default());
        let mut inflater = BlockInflater::new();
        let mut texts = std::collections::BTreeSet::new();
        for place in 0..packed.len() {
            let mut damaged = packed.clone();
            damaged[place] ^= 0xff;
            inflater.reset();
            texts.extend(inflated(&mut inflater, &damaged, 16, 64).err());
            inflater.reset();
            let cut = inflated(&mut inflater, &packed[..place], 16, 64);
            assert_eq!(cut, Err("cut short"));
        }
        assert!(texts.contains("invalid distance too far back"), "{texts:?}");
        inflater.reset();
        let whole = inflated(&mut inflater, &packed, 16, 64).unwrap();
        assert!(whole.0 == bytes);
    }
}
