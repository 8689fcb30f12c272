//! Deflate: `scan`, one pass over a layer that finds checkpoints; `inflate`, one span from its checkpoint; `references`, which bytes
//! of its window a span needs. Pure.

mod filler;
pub mod header;
pub mod inflate;
pub mod references;
pub mod scan;
#[cfg(feature = "libdeflater")]
mod splice;
mod zlib;

/// Bytes of output that a deflate stream may refer back to, and so the size of a checkpoint's window.
pub const WINDOW_SIZE: usize = 32 * 1024;

/// Bytes of a gzip member after its deflate stream: CRC-32 and length (RFC 1952, 2.3.1), each little-endian.
const TRAILER_SIZE: usize = 8;
