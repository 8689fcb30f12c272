//! The sources of a layer's blob.
//!
//! `places` lists them, `race` asks one or two of them at a time, `health` remembers which of their hosts answer.

pub(crate) mod health;
pub(crate) mod places;
pub(crate) mod race;
