//! From a read of an absent range to its data on the disk.
//!
//! `make_present` finds the spans of the range, and joins or starts their fetches: at most one per span (`in_flight`). `fetch` receives
//! their compressed bytes (`arrivals`). On the threads of `decoders`, `place_span` verifies and inflates them (`compact_windows`,
//! `span_window`) and writes their data to the disk (`scatter`). Spans that the local disk does not accept stay in memory (`held_spans`,
//! `keep_later`). `health` collects the errors.

pub(crate) mod arrivals;
pub(crate) mod compact_windows;
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
pub(crate) mod span_window;
pub(crate) mod window_store;
