//! The commands for the space of images and layers on the root.

pub(super) mod df;
pub(super) mod limits;
pub(super) mod pin;
pub(super) mod prune;
mod root;
