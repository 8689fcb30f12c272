//! What an operator sees of attachments and of the node.

pub mod families;
pub mod fetches;
pub mod layers;
pub mod metrics;
mod process;
pub mod snapshots;
pub mod soci_names;
