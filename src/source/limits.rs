//! Time limits and retries of a source.

use std::time::Duration;

/// How patient a registry's client is. The defaults suit people and daemons; tests take shorter ones. Each is longer than the one before
/// that it contains, and a read of a disk may take longer than all: one server that hangs does not use up its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Until a connection is established, including TLS.
    pub connect: Duration,
    /// For the head of an answer, connecting included.
    pub first_byte: Duration,
    /// For each 4 KiB of a body; a slower connection is treated as broken.
    pub stall: Duration,
    /// Maximum time for retries without any progress, of manifests, tokens and referrers.
    pub control_patience: Duration,
    /// The same for blobs. A reader that can wait longer asks again.
    pub data_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(20),
            stall: Duration::from_secs(25),
            control_patience: Duration::from_secs(15),
            data_patience: Duration::from_secs(30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_longer_than_the_one_in_it() {
        let Limits {
            connect,
            first_byte,
            stall,
            data_patience,
            ..
        } = Limits::default();
        let read = Duration::from_secs(60);
        assert!(connect < first_byte && first_byte < stall);
        assert!(stall < data_patience && data_patience < read);
        assert!(2 * stall < read, "a read has time for a second try");
    }
}
