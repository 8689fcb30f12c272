//! The sources of a layer's blob.
//!
//! `layer_sources` lists them, `race` asks one or more of them at a time, and `health` records which of their hosts answer.

pub(crate) mod health;
pub(crate) mod layer_sources;
pub(crate) mod race;
