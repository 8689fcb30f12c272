//! File systems of single layers that are mounted at paths, without an overlay, and devices of layers that another program mounts: for a
//! snapshotter, whose client stacks them.
//!
//! `table` has the mounts that this process serves, `record` their records, `steps` mounts and unmounts, `recover` takes over those of a
//! daemon that died.

pub(crate) mod record;
pub(crate) mod recover;
pub(crate) mod steps;
pub(crate) mod table;
