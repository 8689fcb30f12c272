//! A socket with one time limit for a whole exchange, however many reads and writes it takes.

use std::{
    io,
    time::{Duration, Instant},
};

use zerocopy::{FromBytes, IntoBytes};

use super::{error::ConnectionError, stream::Stream};

/// Bytes of option data that are read. The longest that makes sense are a name and a few queries.
pub(super) const MAX_OPTION_DATA: u32 = 16 << 10;

/// A client socket and its deadline.
pub(super) trait Wire {
    fn now(&self) -> Instant;
    /// How long one read or write may block; `None` is for ever.
    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// Reads available bytes, and blocks if there are none; zero bytes are the end of the stream.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes some of the bytes.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
}

impl Wire for Stream {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        Self::set_timeouts(self, timeout)
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Self::read(self, buffer)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Self::write(self, bytes)
    }
}

/// A client, until the deadline.
pub(super) struct Timed<'a, W> {
    wire: &'a W,
    deadline: Instant,
}

impl<'a, W: Wire> Timed<'a, W> {
    /// From now on for so long.
    pub(super) fn new(wire: &'a W, limit: Duration) -> Self {
        Self {
            wire,
            deadline: wire.now() + limit,
        }
    }

    /// Ends the time limit.
    pub(super) fn lift(&self) -> Result<(), ConnectionError> {
        self.wire
            .set_timeouts(None)
            .map_err(ConnectionError::io("lifting the handshake's time limit"))
    }

    /// Lets the next call block until the deadline and no longer: a client that sends a byte now and then gains nothing by it.
    fn arm(&self) -> Result<(), ConnectionError> {
        let left = self.deadline.saturating_duration_since(self.wire.now());
        if left.is_zero() {
            return Err(ConnectionError::HandshakeTimeout);
        }
        self.wire
            .set_timeouts(Some(left))
            .map_err(ConnectionError::io("setting the handshake's time limit"))
    }

    fn fill(&self, mut buffer: &mut [u8]) -> Result<(), ConnectionError> {
        while !buffer.is_empty() {
            self.arm()?;
            match self.wire.read(buffer) {
                Ok(0) => return Err(ConnectionError::Disconnected),
                Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
                Err(error) => return Err(blocked(error, "reading an option")),
            }
        }
        Ok(())
    }

    pub(super) fn receive<T: FromBytes + IntoBytes>(&self) -> Result<T, ConnectionError> {
        let mut value = T::new_zeroed();
        self.fill(value.as_mut_bytes())?;
        Ok(value)
    }

    /// Reads so many bytes, of which there are [`MAX_OPTION_DATA`] at most.
    pub(super) fn receive_data(&self, length: u32) -> Result<Vec<u8>, ConnectionError> {
        let mut data = vec![0; length.min(MAX_OPTION_DATA) as usize];
        self.fill(&mut data)?;
        Ok(data)
    }

    pub(super) fn skip(&self, length: u32) -> Result<(), ConnectionError> {
        let mut left = length as usize;
        let mut scratch = [0; 4096];
        while left > 0 {
            let count = left.min(scratch.len());
            self.fill(scratch.get_mut(..count).unwrap_or_default())?;
            left -= count;
        }
        Ok(())
    }

    pub(super) fn send(&self, mut bytes: &[u8]) -> Result<(), ConnectionError> {
        while !bytes.is_empty() {
            self.arm()?;
            match self.wire.write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) => return Err(blocked(error, "answering an option")),
            }
        }
        Ok(())
    }
}

/// a socket with a time limit returns `WouldBlock` when the limit is over
fn blocked(error: io::Error, doing: &'static str) -> ConnectionError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ConnectionError::HandshakeTimeout,
        _ => ConnectionError::io(doing)(error),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A client that sends or takes a byte every so often, by a clock that nobody waits for.
    struct Slow {
        began: Instant,
        now: Cell<Instant>,
        pace: Duration,
        timeout: Cell<Option<Duration>>,
    }

    impl Slow {
        fn new(pace: Duration) -> Self {
            let began = Instant::now();
            Self {
                began,
                now: Cell::new(began),
                pace,
                timeout: Cell::new(None),
            }
        }

        fn one_byte(&self) -> io::Result<usize> {
            let timeout = self.timeout.get().filter(|timeout| *timeout < self.pace);
            self.now.set(self.now.get() + timeout.unwrap_or(self.pace));
            match timeout {
                Some(_) => Err(io::ErrorKind::WouldBlock.into()),
                None => Ok(1),
            }
        }

        fn took(&self) -> Duration {
            self.now.get() - self.began
        }
    }

    impl Wire for Slow {
        fn now(&self) -> Instant {
            self.now.get()
        }

        fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
            self.timeout.set(timeout);
            Ok(())
        }

        fn read(&self, _: &mut [u8]) -> io::Result<usize> {
            self.one_byte()
        }

        fn write(&self, _: &[u8]) -> io::Result<usize> {
            self.one_byte()
        }
    }

    type Saying = fn(&Timed<'_, Slow>) -> Result<(), ConnectionError>;

    /// Each way to hear or say sixteen bytes.
    const WAYS: [Saying; 4] = [
        |timed| timed.receive::<u128>().map(drop),
        |timed| timed.receive_data(16).map(drop),
        |timed| timed.skip(16),
        |timed| timed.send(&[0; 16]),
    ];

    #[test]
    fn a_byte_now_and_then_does_not_prolong_the_handshake() {
        // says nothing; says a little; would have been ready a second later
        for pace in [3600 * SECOND, 4 * SECOND, SECOND] {
            for say in WAYS {
                let client = Slow::new(pace);
                let timed = Timed::new(&client, 15 * SECOND);
                let error = say(&timed).unwrap_err();
                assert!(matches!(error, ConnectionError::HandshakeTimeout));
                assert_eq!(client.took(), 15 * SECOND);
                // and it stays over
                let error = say(&timed).unwrap_err();
                assert!(matches!(error, ConnectionError::HandshakeTimeout));
                assert_eq!(client.took(), 15 * SECOND);
            }
        }
    }

    #[test]
    fn who_is_ready_in_time_has_no_limit_afterwards() {
        for say in WAYS {
            let client = Slow::new(SECOND);
            let timed = Timed::new(&client, 17 * SECOND);
            say(&timed).unwrap();
            assert_eq!(client.took(), 16 * SECOND);
            assert_eq!(client.timeout.get(), Some(2 * SECOND));
            timed.lift().unwrap();
            assert_eq!(client.timeout.get(), None);
        }
    }
}
