//! Fetches spans before they are read.
//!
//! `sequential` detects sequential readers and the spans that they need next. `queue` starts their fetches one after another, while
//! `bytes_in_flight` are fewer than the link can carry. `fill_decision` decides by `cost` that the rest of a layer is fetched, and `fill`
//! fetches it. `quiet` has it fetched at once or after a quiet time. `prefetch` fetches the spans that an index lists. `background` gives precedence to fetches that readers wait for.
//! `recording` records which spans are read.

pub(crate) mod ahead_of_readers;
pub(crate) mod background;
pub(crate) mod bytes_in_flight;
pub(crate) mod cost;
pub(crate) mod fill;
pub(crate) mod fill_decision;
pub(crate) mod prefetch;
pub(crate) mod queue;
pub(crate) mod quiet;
pub(crate) mod recording;
pub(crate) mod sequential;
