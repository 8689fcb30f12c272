//! Spans that were taken back: a later look has shown that they are not what the table says. The directory remembers them, in the file
//! `disowned`, which is made with the first: alone such a span shows nothing, and would be served again. The file is their numbers, and a
//! check.

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

/// The spans of a disk that were taken back.
pub(crate) struct RevokedSpans {
    directory: DiskDirectory,
    known: Mutex<BTreeSet<SpanId>>,
}

impl RevokedSpans {
    /// Those of a disk with so many spans that the directory remembers. A file that is damaged accuses nobody, and goes: that the table was
    /// shown to lie stands in `state.json`.
    pub(crate) fn open(directory: &DiskDirectory, count: u32) -> Result<Self> {
        let mut known = BTreeSet::new();
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
                Ok(spans) => known = spans,
                Err(error) if Damage::is_in(&error) => {
                    tracing::warn!("{}; it is removed", error.report());
                    directory.remove(directory::DISOWNED)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            directory: directory.clone(),
            known: Mutex::new(known),
        })
    }

    /// Whether this span was taken back.
    pub(crate) fn contains(&self, span: SpanId) -> bool {
        self.lock().contains(&span)
    }

    /// All of them, ascending.
    pub(crate) fn spans(&self) -> Vec<SpanId> {
        self.lock().iter().copied().collect()
    }

    /// Does something with a span unless it was taken back, and none takes it back meanwhile. Whether it was done.
    pub(crate) fn unless(&self, span: SpanId, work: impl FnOnce()) -> bool {
        let known = self.lock();
        let free = !known.contains(&span);
        if free {
            work();
        }
        free
    }

    /// Takes spans back, for as long as there is the directory. On an error for as long as the disk is open.
    pub(crate) fn insert(&self, spans: &[SpanId]) -> io::Result<()> {
        let mut known = self.lock();
        known.extend(spans);
        self.directory
            .replace(directory::DISOWNED, &encode(&known))
            .map_err(|error| io::Error::other(error.report()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<SpanId>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(spans: &BTreeSet<SpanId>) -> Vec<u8> {
    let numbers = spans.iter().flat_map(|span| span.get().to_le_bytes());
    seal::seal(numbers.collect())
}

/// `None`: the file is not one that [`encode`] made for a disk with so many spans.
fn decode(bytes: &[u8], count: u32) -> Option<BTreeSet<SpanId>> {
    let (numbers, rest) = seal::unseal(bytes)?.as_chunks::<4>();
    let numbers = numbers.iter().map(|number| u32::from_le_bytes(*number));
    let spans: BTreeSet<_> = numbers.map(SpanId).collect();
    let fit = spans.last().is_none_or(|last| last.get() < count);
    (rest.is_empty() && fit).then_some(spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_none() {
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
