//! The verification of one disk: the tar headers that its table states, the state of the check of the whole layer, and the revoked spans.

use super::{
    contradictions::Refutation, headers::Headers, progress::LayerCheck, revoked::RevokedSpans,
};
use crate::units::SpanId;

/// The verification of one disk.
pub(crate) struct Verification {
    headers: Option<Headers>,
    layer_check: LayerCheck,
    revoked: RevokedSpans,
}

impl Verification {
    /// The disk of a streamed layer has no `headers`: it was verified before it was made.
    pub(crate) fn new(
        headers: Option<Headers>,
        layer_check: LayerCheck,
        revoked: RevokedSpans,
    ) -> Self {
        Self {
            headers,
            layer_check,
            revoked,
        }
    }

    /// The tar headers that the table states.
    pub(crate) fn headers(&self) -> Option<&Headers> {
        self.headers.as_ref()
    }

    /// The check of the whole layer.
    pub(crate) fn layer_check(&self) -> &LayerCheck {
        &self.layer_check
    }

    /// The spans that were revoked.
    pub(crate) fn revoked(&self) -> &RevokedSpans {
        &self.revoked
    }

    /// The evidence that a span contradicts its table, if it was revoked. `earlier` is the evidence that the directory has, from before the
    /// disk was opened.
    pub(crate) fn refutation(
        &self,
        span: SpanId,
        earlier: impl FnOnce() -> Option<String>,
    ) -> Option<Refutation> {
        if !self.revoked.contains(span) {
            return None;
        }
        let evidence = self.layer_check.refutation(span);
        Some(evidence.unwrap_or_else(|| match earlier() {
            Some(why) => Refutation::Earlier(why),
            None => Refutation::Window,
        }))
    }
}
