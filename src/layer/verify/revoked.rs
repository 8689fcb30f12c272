//! Revoked spans: a later check has shown that they contradict their table. The directory stores their numbers and a CRC-32 in the file
//! `disowned`, because such a span alone does not show the contradiction, and would be served again after a restart.

use std::{
    collections::BTreeSet,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    error::{Error, Kind, Result},
    layer::stored::{
        directory::{self, DiskDirectory},
        seal::{self, Damage},
    },
    units::SpanId,
};

/// The revoked spans of a disk.
pub(crate) struct RevokedSpans {
    directory: DiskDirectory,
    spans: Mutex<BTreeSet<SpanId>>,
}

impl RevokedSpans {
    /// The stored revoked spans of a disk with `count` spans. A damaged file is removed: `state.json` says that the table was shown to be
    /// false.
    pub(crate) fn open(directory: &DiskDirectory, count: u32) -> Result<Self> {
        let mut revoked = BTreeSet::new();
        if directory.has(directory::DISOWNED) {
            let file = directory.read(directory::DISOWNED);
            let spans = file.and_then(|bytes| {
                decode(&bytes, count).ok_or_else(|| {
                    let damage = Damage::check(directory::DISOWNED);
                    Error::with_source(
                        Kind::Corrupt,
                        directory.path().display().to_string(),
                        damage,
                    )
                })
            });
            match spans {
                Ok(spans) => revoked = spans,
                Err(error) if Damage::is_in(&error) => {
                    tracing::warn!("{}; the file is removed", error.report());
                    directory.remove(directory::DISOWNED)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            directory: directory.clone(),
            spans: Mutex::new(revoked),
        })
    }

    /// Whether this span was revoked.
    pub(crate) fn contains(&self, span: SpanId) -> bool {
        self.lock().contains(&span)
    }

    /// All revoked spans, ascending.
    pub(crate) fn spans(&self) -> Vec<SpanId> {
        self.lock().iter().copied().collect()
    }

    /// Calls `work` unless the span was revoked. The span is not revoked meanwhile. Returns whether `work` was called.
    pub(crate) fn unless(&self, span: SpanId, work: impl FnOnce()) -> bool {
        let revoked = self.lock();
        let is_free = !revoked.contains(&span);
        if is_free {
            work();
        }
        is_free
    }

    /// Revokes spans and stores their numbers. On an error they are revoked until the disk is closed.
    pub(crate) fn insert(&self, spans: &[SpanId]) -> io::Result<()> {
        let mut revoked = self.lock();
        revoked.extend(spans);
        self.directory
            .replace(directory::DISOWNED, &encode(&revoked))
            .map_err(|error| io::Error::other(error.report()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<SpanId>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(spans: &BTreeSet<SpanId>) -> Vec<u8> {
    let numbers = spans.iter().flat_map(|span| span.get().to_le_bytes());
    seal::seal(numbers.collect())
}

/// `None`: the bytes are not those of [`encode`] for a disk with `count` spans.
fn decode(bytes: &[u8], count: u32) -> Option<BTreeSet<SpanId>> {
    let (numbers, rest) = seal::unseal(bytes)?.as_chunks::<4>();
    let numbers = numbers.iter().map(|number| u32::from_le_bytes(*number));
    let spans: BTreeSet<_> = numbers.map(SpanId).collect();
    let fits = spans.last().is_none_or(|last| last.get() < count);
    (rest.is_empty() && fits).then_some(spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_used() {
        let spans = BTreeSet::from([3, 9].map(SpanId));
        let bytes = encode(&spans);
        assert_eq!(decode(&bytes, 10), Some(spans));
        assert_eq!(decode(&bytes, 9), None);
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!(decode(&flipped, 10), None);
            assert_eq!(decode(&bytes[..at], 10), None);
        }
        assert_eq!(decode(&seal::seal(vec![1, 0]), 10), None);
    }
}
