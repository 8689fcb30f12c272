//! The commands that show what attached images do.

mod layer_lines;
pub(super) mod list;
mod page;
pub(super) mod report;
mod screen;
mod snapshots;
mod summary;
pub(super) mod top;
pub(super) mod why;
