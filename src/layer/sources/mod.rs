//! Where a layer's blob can be had.
//!
//! `places` are those that images have named; `race` asks them, one or two at a time; `health` remembers which of their hosts answer.

pub(crate) mod health;
pub(crate) mod places;
pub(crate) mod race;
