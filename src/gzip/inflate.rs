//! One span from its checkpoint.

use crate::ztoc::Span;

/// Decodes spans; keeps its memory from one to the next, so that the steady state allocates nothing. Not shared: one a thread.
#[derive(Default)]
pub struct SpanDecoder {}

impl SpanDecoder {
    /// The layer's bytes of this span. `compressed` are the bytes of `span.compressed`, already checked against the span's digest;
    /// `window` the 32 KiB before the span (`None`: zeros). The result has exactly the length of `span.uncompressed`.
    pub fn decode(
        &mut self,
        span: &Span,
        compressed: &[u8],
        window: Option<&[u8]>,
    ) -> Result<&[u8], Error> {
        let _ = (span, compressed, window);
        unimplemented!("module gzip")
    }
}

/// Why a span does not decode.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}
