//! The version that is told.

/// That of the tools whose command lines are taken. nerdctl wants 0.10 or later.
pub(super) const VERSION: &str =
    concat!("version v0.16.1 (socinbd ", env!("CARGO_PKG_VERSION"), ")");
