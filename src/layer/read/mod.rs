//! From a read of an absent range to its data on the disk.
//!
//! `make_present` finds the spans under the range, and joins or starts their fetches: at most one for each span (`in_flight`). `fetch` takes the
//! compressed bytes of one source or another as they arrive (`arrivals`); `decoders` are threads on which
//! `place_span` verifies, inflates (`windows`, `before`) and writes them (`scatter`). What the local disk does not take stays in memory (`held_spans`, `keep_later`).
//! `health` is what is told of all that.

pub(crate) mod arrivals;
pub(crate) mod before;
pub(crate) mod decoders;
pub(crate) mod fetch;
pub(crate) mod health;
pub(crate) mod held_spans;
pub(crate) mod hold;
pub(crate) mod in_flight;
pub(crate) mod keep_later;
pub(crate) mod make_present;
pub(crate) mod place_span;
pub(crate) mod scatter;
pub(crate) mod windows;
