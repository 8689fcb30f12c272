//! The window of a span: the 32 KiB before the span, which its decoder needs.

use bytes::Bytes;

use crate::{
    compact::window::Window,
    error::{Kind, Result, ResultExt as _},
    gzip::WINDOW_SIZE,
};

/// A span's window: the known part of the 32 KiB before the span.
#[derive(Clone, Debug)]
pub enum SpanWindow {
    /// All 32 KiB, verified: the output of the previous span.
    Verified(Bytes),
    /// The part that the compact index states, and its stored form.
    Stated(Window, Bytes),
}

impl SpanWindow {
    /// The window of a layer's first span: zeros, as no bytes precede it.
    pub fn start() -> Self {
        Self::Verified(Bytes::from_static(&[0; WINDOW_SIZE]))
    }

    /// The window of a span that refers to no bytes before itself.
    pub fn unknown() -> Self {
        Self::Stated(Window::default(), Bytes::new())
    }

    /// A window as the compact index stores it. An error of kind `Corrupt`: it cannot be parsed.
    pub fn stated(stored: Bytes) -> Result<Self> {
        let window = Window::parse(&stored).or_kind(Kind::Corrupt, || {
            "a window of the compact index cannot be read".to_owned()
        })?;
        Ok(Self::Stated(window, stored))
    }

    /// The 32 KiB, with zeros for unknown bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Verified(bytes) => bytes,
            Self::Stated(window, _) => window.bytes(),
        }
    }

    /// The window of the next span, if this span's output is `decoded`; `None` if some of it is unknown.
    pub fn after(&self, decoded: &[u8]) -> Option<Bytes> {
        if let Some((_, tail)) = decoded.split_last_chunk::<WINDOW_SIZE>() {
            return Some(Bytes::copy_from_slice(tail));
        }
        match self {
            Self::Verified(bytes) => {
                let old = &bytes[decoded.len().min(bytes.len())..];
                Some([old, decoded].concat().into())
            }
            Self::Stated(..) => None,
        }
    }
}

/// What a span is decoded with, besides its bytes: its joint with the previous and the next span.
#[derive(Clone)]
pub(crate) struct SpanJoint {
    /// The window before the span.
    pub before: SpanWindow,
    /// The next span is decoded right after this one, from this one's output, so its window need not be stored.
    pub is_followed: bool,
}

impl SpanJoint {
    /// The same span, when the next one is not decoded right after it.
    pub(super) fn alone(&self) -> Self {
        Self {
            before: self.before.clone(),
            is_followed: false,
        }
    }
}
