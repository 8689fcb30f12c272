//! From a read of an absent range to its data on the disk.
//!
//! `make_present` finds the spans of the range, and joins or starts their fetches: at most one per span (`in_flight`). `fetch` receives
//! their
//! compressed bytes (`arrivals`). On the threads of `decoders`, `place_span` verifies and inflates them (`windows`, `before`) and writes
//! them
//! (`scatter`). Spans that the local disk does not accept stay in memory (`held_spans`, `hold`, `keep_later`). `health` collects the
//! errors.

pub(crate) mod arrivals;
pub(crate) mod before;
pub(crate) mod decoders;
pub(crate) mod fetch;
pub(crate) mod health;
pub(crate) mod held_spans;
pub(crate) mod in_flight;
pub(crate) mod keep_later;
pub(crate) mod make_present;
pub(crate) mod place_span;
pub(crate) mod reader;
pub(crate) mod scatter;
pub(crate) mod span_windows;
pub(crate) mod windows;
