//! How long a source waits, and how often it tries again.

use std::time::Duration;

/// How patient a registry's client is. The defaults suit people and daemons; tests take shorter ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// For a connection to stand, TLS included.
    pub connect: Duration,
    /// For the beginning of an answer, and for each further 4 KiB of its body: a slower connection counts as broken.
    pub stall: Duration,
    /// How long what fails without any progress is tried again: manifests, tokens, referrers.
    pub control_patience: Duration,
    /// The same for blobs. A reader that can wait longer asks again.
    pub data_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(15),
            control_patience: Duration::from_secs(15),
            data_patience: Duration::from_secs(30),
        }
    }
}
