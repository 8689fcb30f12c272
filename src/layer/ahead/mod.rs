//! What is fetched before a read asks for it.
//!
//! `sequential` follows readers that read on, and says what they will want next; `queue` starts those fetches one after another, as the link has
//! room. `fill` decides by `cost` that the rest of a layer follows, and fetches it; `prefetch` fetches what an image's authors have listed.
//! `background` gives readers' fetches the right of way. `recording` notes what is read, to make such lists.

pub(crate) mod background;
pub(crate) mod cost;
pub(crate) mod fill;
pub(crate) mod fill_decision;
pub(crate) mod on_the_way;
pub(crate) mod prefetch;
pub(crate) mod queue;
pub(crate) mod recording;
pub(crate) mod sequential;
