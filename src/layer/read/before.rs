//! The window of a span: the 32 KiB before it, which its decoder needs.

use bytes::Bytes;

use crate::{
    compact::window::Window,
    error::{Kind, Result, ResultExt as _},
    gzip::WINDOW_SIZE,
};

/// What is known of the 32 KiB before a span.
#[derive(Clone, Debug)]
pub enum SpanWindow {
    /// All of it, from the span before.
    True(Bytes),
    /// What the compact index says, and how it is stored there.
    Stated(Window, Bytes),
}

impl SpanWindow {
    /// The layer's start: nothing stands before it.
    pub fn start() -> Self {
        Self::True(Bytes::from_static(&[0; WINDOW_SIZE]))
    }

    /// Nothing is known, and nothing needed.
    pub fn unknown() -> Self {
        Self::Stated(Window::default(), Bytes::new())
    }

    /// What the compact index stores of a window. `Corrupt` where that is none.
    pub fn stated(stored: Bytes) -> Result<Self> {
        let window = Window::parse(&stored).or_kind(Kind::Corrupt, || {
            "a window of the compact index cannot be read".to_owned()
        })?;
        Ok(Self::Stated(window, stored))
    }

    /// The 32 KiB, zero where nothing is known.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::True(bytes) => bytes,
            Self::Stated(window, _) => window.bytes(),
        }
    }

    /// The window of the next span, when this one's bytes are `decoded`; `None` where not all of it is known.
    pub fn after(&self, decoded: &[u8]) -> Option<Bytes> {
        if let Some((_, tail)) = decoded.split_last_chunk::<WINDOW_SIZE>() {
            return Some(Bytes::copy_from_slice(tail));
        }
        match self {
            Self::True(bytes) => {
                let old = &bytes[decoded.len().min(bytes.len())..];
                Some([old, decoded].concat().into())
            }
            Self::Stated(..) => None,
        }
    }
}

/// A span between its neighbours.
#[derive(Clone)]
pub(crate) struct SpanJoint {
    /// What stands before it.
    pub before: SpanWindow,
    /// The next span is decoded right after it, with the window that is given for it: that need not be kept.
    pub is_followed: bool,
}

impl SpanJoint {
    /// For the time when the next span is not decoded right after it.
    pub(super) fn alone(&self) -> Self {
        Self {
            before: self.before.clone(),
            is_followed: false,
        }
    }
}
