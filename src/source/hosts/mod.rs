//! The hosts that serve a registry, as containerd's `hosts.toml` configures them: mirrors in the order of the file, then the registry.
//!
//! [`directory`] finds the file of a registry, [`file`] reads it, [`host`] is the result: one host, what it may be asked for, and how it is
//! reached. [`memory`] knows which hosts have failed a short time ago.

mod directory;
pub(super) mod file;
pub(super) mod host;
pub(super) mod memory;

pub(crate) use directory::{of_registry, warn_once};
pub(crate) use host::RegistryHost;
