//! The datagrams between a daemon and what runs it, as sd_notify(3) has them: lines of `NAME=value`.
//!
//! Those that the keeper knows are read and written here; a line with another name is passed over, as the protocol wants it.

use std::{fmt, path::PathBuf};

use crate::error::{Error, Kind, Result};

/// Bytes of a datagram, at most.
pub const MAX_BYTES: usize = 4096;
/// Bytes of a descriptor's name, at most.
const MAX_NAME: usize = 255;
/// The name of a line of this program.
const SUCCESSOR: &str = "X_SOCINBD_SUCCESSOR";

/// The name of descriptors in a store: ASCII without control characters and `:`, which separates names in `LISTEN_FDNAMES`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// A name, if it is one.
    pub fn new(name: &str) -> Result<Self> {
        let is_allowed = |byte: u8| (b' '..0x7f).contains(&byte) && byte != b':';
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_allowed) {
            let start: String = name.chars().take(32).collect();
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "{start:?} ({} bytes) is no name of a descriptor: 1 to {MAX_NAME} bytes of ASCII without `:`",
                    name.len()
                ),
            ));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a datagram asks of the descriptor store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreChange {
    /// The descriptors of the datagram are kept under this name.
    Put(Name),
    /// All descriptors of this name are closed.
    Remove(Name),
}

/// What a datagram says of the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watchdog {
    /// The daemon works.
    Alive,
    /// The daemon hangs and asks to be replaced.
    Trigger,
}

/// A datagram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The daemon has started.
    pub is_ready: bool,
    /// The daemon has begun to end.
    pub is_stopping: bool,
    /// Whether the daemon works.
    pub watchdog: Option<Watchdog>,
    /// The daemon ends so that this program can follow it. For a keeper; a service manager passes it over.
    pub successor: Option<PathBuf>,
    /// A change of the descriptor store.
    pub store: Option<StoreChange>,
    /// The descriptor of the datagram is to be closed when all datagrams before it have been acted upon.
    pub is_barrier: bool,
}

impl Message {
    /// Reads a datagram.
    pub fn parse(datagram: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::new(Kind::Corrupt, format!("a notification: {what}"));
        if datagram.len() > MAX_BYTES {
            return Err(wrong("more than 4096 bytes"));
        }
        let text = std::str::from_utf8(datagram).map_err(|_| wrong("it is not UTF-8"))?;
        let mut message = Self::default();
        let (mut puts, mut removes, mut name) = (false, false, None);
        for line in text.lines() {
            match line.split_once('=') {
                Some(("READY", "1")) => message.is_ready = true,
                Some(("STOPPING", "1")) => message.is_stopping = true,
                Some(("WATCHDOG", "1")) => message.watchdog = Some(Watchdog::Alive),
                Some(("WATCHDOG", "trigger")) => message.watchdog = Some(Watchdog::Trigger),
                Some((SUCCESSOR, path)) if path.starts_with('/') => {
                    message.successor = Some(path.into());
                }
                Some(("BARRIER", "1")) => message.is_barrier = true,
                Some(("FDSTORE", "1")) => puts = true,
                Some(("FDSTOREREMOVE", "1")) => removes = true,
                Some(("FDNAME", value)) => name = Some(Name::new(value)?),
                _ => {}
            }
        }
        message.store = match (puts, removes, name) {
            (false, false, _) => None,
            (true, false, Some(name)) => Some(StoreChange::Put(name)),
            (false, true, Some(name)) => Some(StoreChange::Remove(name)),
            (true, true, _) => return Err(wrong("FDSTORE and FDSTOREREMOVE in one datagram")),
            (_, _, None) => return Err(wrong("FDSTORE or FDSTOREREMOVE without FDNAME")),
        };
        if message.is_barrier && message.store.is_some() {
            return Err(wrong("BARRIER with FDSTORE or FDSTOREREMOVE"));
        }
        Ok(message)
    }
}

/// The datagram's text.
impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_ready {
            f.write_str("READY=1\n")?;
        }
        if self.is_stopping {
            f.write_str("STOPPING=1\n")?;
        }
        match self.watchdog {
            Some(Watchdog::Alive) => f.write_str("WATCHDOG=1\n")?,
            Some(Watchdog::Trigger) => f.write_str("WATCHDOG=trigger\n")?,
            None => {}
        }
        if let Some(path) = &self.successor {
            writeln!(f, "{SUCCESSOR}={}", path.display())?;
        }
        match &self.store {
            // systemd would drop a descriptor with a hang-up or an error, which a socket has whose peer is gone
            Some(StoreChange::Put(name)) => write!(f, "FDSTORE=1\nFDPOLL=0\nFDNAME={}\n", name.0)?,
            Some(StoreChange::Remove(name)) => write!(f, "FDSTOREREMOVE=1\nFDNAME={}\n", name.0)?,
            None => {}
        }
        if self.is_barrier {
            f.write_str("BARRIER=1\n")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn names_are_those_of_systemd() {
        for good in ["control", "nbd 0-1.a", "~", &"x".repeat(255)] {
            assert_eq!(name(good).as_str(), good);
        }
        for bad in ["", "a:b", "a\nb", "\x7f", "ä", &"x".repeat(256)] {
            let error = Name::new(bad).unwrap_err().report();
            assert!(error.contains("no name of a descriptor"), "{error}");
            assert!(error.len() < 300, "{error}");
        }
    }

    #[test]
    fn each_line_is_read() {
        let parsed = |text: &str| Message::parse(text.as_bytes()).unwrap();
        let nothing = Message::default();
        assert_eq!(parsed(""), nothing);
        assert_eq!(parsed("STATUS=READY=1\nX\nREADY=0\nREADY=11"), nothing);
        let ready = Message {
            is_ready: true,
            ..Message::default()
        };
        assert_eq!(parsed("READY=1\nMAINPID=4"), ready);
        let watchdog = |text| parsed(text).watchdog;
        assert_eq!(watchdog("WATCHDOG=1"), Some(Watchdog::Alive));
        assert_eq!(watchdog("WATCHDOG=trigger\n"), Some(Watchdog::Trigger));
        let successor = |path: &str| parsed(&format!("X_SOCINBD_SUCCESSOR={path}")).successor;
        assert_eq!(successor("/usr/bin/a b"), Some("/usr/bin/a b".into()));
        assert_eq!([successor("a"), successor("")], [None, None]);
        assert!(parsed("STOPPING=1").is_stopping && parsed("BARRIER=1").is_barrier);
        assert_eq!(
            parsed("FDSTORE=1\nFDPOLL=0\nFDNAME=a b").store,
            Some(StoreChange::Put(name("a b")))
        );
        assert_eq!(
            parsed("FDNAME=a\nFDSTOREREMOVE=1").store,
            Some(StoreChange::Remove(name("a")))
        );
    }

    #[test]
    fn what_is_no_notification_is_an_error_that_says_why() {
        for (bytes, why) in [
            (&b"FDSTORE=1"[..], "without FDNAME"),
            (b"FDSTOREREMOVE=1\n", "without FDNAME"),
            (b"FDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=a", "in one datagram"),
            (b"FDSTORE=1\nFDNAME=a:b", "no name"),
            (b"FDSTORE=1\nFDNAME=", "no name"),
            (b"FDSTORE=1\nFDNAME=a\nBARRIER=1", "BARRIER with"),
            (b"READY=1\n\xff", "not UTF-8"),
            (&[b'a'; MAX_BYTES + 1], "more than 4096 bytes"),
        ] {
            let error = Message::parse(bytes).unwrap_err().report();
            assert!(error.contains(why), "{error}");
        }
    }

    fn messages() -> impl Strategy<Value = Message> {
        let name = "[ -9;-~]{1,255}".prop_map(|text| name(&text));
        let store = prop_oneof![
            name.clone().prop_map(StoreChange::Put),
            name.prop_map(StoreChange::Remove)
        ];
        let watchdog = prop_oneof![Just(Watchdog::Alive), Just(Watchdog::Trigger)];
        let options = (proptest::option::of(watchdog), proptest::option::of(store));
        let successor = proptest::option::of("/[ -~]{0,99}".prop_map(PathBuf::from));
        (any::<[bool; 3]>(), options, successor).prop_map(|(bits, (watchdog, store), successor)| {
            let [ready, stopping, barrier] = bits;
            Message {
                is_ready: ready,
                successor,
                is_stopping: stopping,
                watchdog,
                is_barrier: barrier && store.is_none(),
                store,
            }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(message in messages()) {
            let text = message.to_string();
            prop_assert!(text.len() <= MAX_BYTES);
            prop_assert_eq!(Message::parse(text.as_bytes()).unwrap(), message);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            if let Ok(message) = Message::parse(&bytes) {
                prop_assert_eq!(Message::parse(message.to_string().as_bytes()).unwrap(), message);
            }
        }
    }
}
