//! Deflate: `scan`, one pass over a layer that finds checkpoints; `inflate`, one span from its checkpoint. Pure.

pub mod inflate;
