//! A span's window, reduced to the bytes that the span refers to.

use super::wire::{Cursor, put};
use crate::gzip::{WINDOW_SIZE, references::Used};

/// The longest stored window that is read.
pub const MAX_STORED_SIZE: u64 = 36 << 10;

/// The most that a stored window unpacks to: all bytes, and two numbers of three bytes for each of its runs.
const MAX_PAYLOAD_SIZE: usize = 3 * WINDOW_SIZE;

/// Bytes between two runs that cost less than the two numbers of another run.
const MERGED_GAP: usize = 3;

/// zstd's level for windows. They are most of the work of a compact index; level 19 takes 3.5 times as long for a hundredth less.
const LEVEL: i32 = 12;

/// A window as a span needs it.
#[derive(Clone, PartialEq, Eq)]
pub struct Window {
    bytes: Box<[u8]>,
    used: Used,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Window").field(&self.used).finish()
    }
}

impl Default for Window {
    /// Nothing is known.
    fn default() -> Self {
        Self {
            bytes: vec![0; WINDOW_SIZE].into_boxed_slice(),
            used: Used::default(),
        }
    }
}

/// Why a stored window cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is no zstd, or unpacks to more than a window can have.
    #[error("the stored window does not unpack")]
    Packed,
    /// Its runs are out of order or past its end, or have more or fewer bytes than stand behind them.
    #[error("the stored window's runs make no window")]
    Runs,
}

/// What is stored of a window; nothing when nothing is used. An error is zstd's, which has no memory.
pub fn encode(window: &[u8], used: &Used) -> std::io::Result<Vec<u8>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for run in used.runs() {
        match runs.last_mut() {
            Some(last) if run.start.saturating_sub(last.end) <= MERGED_GAP => last.end = run.end,
            _ => runs.push(run),
        }
    }
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let mut payload = Vec::new();
    let number = |to: &mut Vec<u8>, number: usize| put(to, number.try_into().unwrap_or(u64::MAX));
    number(&mut payload, runs.len());
    let mut end = 0_usize;
    for run in &runs {
        number(&mut payload, run.start.saturating_sub(end));
        end = run.end;
    }
    for run in &runs {
        number(&mut payload, run.len());
    }
    for run in runs {
        payload.extend_from_slice(window.get(run).unwrap_or_default());
    }
    zstd::bulk::compress(&payload, LEVEL)
}

impl Window {
    /// Reads a stored window, untrusted bytes; time and memory are bounded.
    pub fn parse(stored: &[u8]) -> Result<Self, Error> {
        let mut window = Self::default();
        if stored.is_empty() {
            return Ok(window);
        }
        let payload =
            zstd::bulk::decompress(stored, MAX_PAYLOAD_SIZE).map_err(|_| Error::Packed)?;
        let runs = || -> Result<_, super::Error> {
            let mut cursor = Cursor::new(&payload, "runs of the window");
            let count = cursor.number()?;
            let numbers = |cursor: &mut Cursor<'_>| -> Result<Vec<u64>, super::Error> {
                (0..count).map(|_| cursor.number()).collect()
            };
            let (gaps, lengths) = (numbers(&mut cursor)?, numbers(&mut cursor)?);
            Ok((gaps, lengths, cursor))
        };
        let (gaps, lengths, mut cursor) = runs().map_err(|_| Error::Runs)?;
        let mut at = 0_usize;
        for (gap, length) in gaps.into_iter().zip(lengths) {
            let start = usize::try_from(gap)
                .ok()
                .and_then(|gap| at.checked_add(gap));
            let end = usize::try_from(length)
                .ok()
                .filter(|length| *length > 0)
                .and_then(|length| start?.checked_add(length));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(Error::Runs);
            };
            let to = window.bytes.get_mut(start..end).ok_or(Error::Runs)?;
            to.copy_from_slice(cursor.take(length).map_err(|_| Error::Runs)?);
            window.used.add(start..end);
            at = end;
        }
        cursor.finish().map_err(|_| Error::Runs)?;
        Ok(window)
    }

    /// The 32 KiB: zero where nothing is known.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Which of the bytes are known.
    pub fn used(&self) -> &Used {
        &self.used
    }

    /// Whether all bytes are known.
    pub fn is_whole(&self) -> bool {
        self.used == Used::all()
    }

    /// Whether the known bytes are those of the true window.
    pub fn agrees_with(&self, window: &[u8]) -> bool {
        self.used
            .runs()
            .all(|run| self.bytes.get(run.clone()) == window.get(run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> Vec<u8> {
        (0..WINDOW_SIZE).map(|at| (at * at / 7) as u8 | 1).collect()
    }

    #[test]
    fn the_used_bytes_come_back_and_no_others() {
        let window = window();
        let mut used = Used::default();
        used.add(10..20);
        used.add(22..30);
        used.add(1000..1500);
        used.add(WINDOW_SIZE - 1..WINDOW_SIZE);
        let stored = encode(&window, &used).unwrap();
        assert!(stored.len() < 600, "{}", stored.len());
        let found = Window::parse(&stored).unwrap();
        assert!(found.used().contains(&used));
        let runs: Vec<_> = found.used().runs().collect();
        assert_eq!(runs, [10..30, 1000..1500, WINDOW_SIZE - 1..WINDOW_SIZE]);
        for (at, byte) in found.bytes().iter().enumerate() {
            let is_used = runs.iter().any(|run| run.contains(&at));
            assert_eq!(*byte, if is_used { window[at] } else { 0 }, "at {at}");
        }
        assert!(found.agrees_with(&window));
        let mut other = window.clone();
        other[5] ^= 1;
        assert!(found.agrees_with(&other));
        other[1499] ^= 1;
        assert!(!found.agrees_with(&other));
        assert!(!found.agrees_with(&[]));
    }

    #[test]
    fn nothing_and_all_are_windows_too() {
        let window = window();
        let nothing = encode(&window, &Used::default()).unwrap();
        assert!(nothing.is_empty());
        assert!(Window::parse(&nothing).unwrap().used().is_empty());
        let all = encode(&window, &Used::all()).unwrap();
        assert_eq!(Window::parse(&all).unwrap().bytes(), window);
        // as many runs as there can be
        let mut used = Used::default();
        for at in (0..WINDOW_SIZE).step_by(MERGED_GAP + 2) {
            used.add(at..at + 1);
        }
        let stored = encode(&window, &used).unwrap();
        assert!(stored.len() as u64 <= MAX_STORED_SIZE);
        assert_eq!(Window::parse(&stored).unwrap().used(), &used);
    }

    #[test]
    fn what_is_no_window_has_a_name() {
        let pack = |payload: &[u8]| zstd::bulk::compress(payload, 1).unwrap();
        for payload in [
            &[][..],
            &[1],                                                       // no runs
            &[1, 0],                                                    // no length
            &[1, 0, 3, 1, 2],                                           // a byte too few
            &[1, 0, 1, 1, 2],                                           // one too many
            &[1, 0, 0],                                                 // an empty run
            &[1, 0xff, 0xff, 1, 1, 9], // starts at 32767, one byte: fits
            &[1, 0x80, 0x80, 2, 1, 9], // at 32768
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], // so many runs
        ] {
            let found = Window::parse(&pack(payload));
            match payload {
                [1, 0xff, ..] => assert!(found.is_ok()),
                _ => assert_eq!(found, Err(Error::Runs), "{payload:?}"),
            }
        }
        assert_eq!(Window::parse(b"no zstd"), Err(Error::Packed));
        let long = pack(&vec![0; MAX_PAYLOAD_SIZE + 1]);
        assert_eq!(Window::parse(&long), Err(Error::Packed));
    }
}
