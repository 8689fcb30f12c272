//! The journal of a FUSE file: what its server has received and not answered.
//!
//! | words | content |
//! |---|---|
//! | 0 to 13 | magic, version, counts of threads and of slots, the file's [`Identity`], CRC-32 of these |
//! | 1024 to 4095 | the slots: reads that wait for a fetch, 8 words each |
//! | 4096 to 12287 | the landings: one for each thread, 4096 words, where the kernel puts a request |
//!
//! A landing is empty while its first word, the length of the request, is zero. A slot is free while its state is zero. Each change ends
//! with one atomic store, so that a process can be killed between any two instructions: a request is in its landing, in its slot, or in
//! both. The kernel ignores an answer to a request that was answered before.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Release},
    },
};

use zerocopy::FromBytes;

use super::{
    init::{Agreed, MAX_READ},
    protocol::{InHeader, ReadIn},
};
use crate::{
    error::{Error, Kind, Result},
    kernel::kept::{SharedMemory, checksum, corrupt},
    versions::{is_read, readable},
};

/// Threads that take requests of one file: a copy of present data keeps one busy for a moment.
pub(super) const THREADS: usize = 2;

/// Reads that can wait for a fetch at a time. The kernel's own bound, `max_background`, is for asynchronous ones.
pub(super) const SLOTS: usize = 384;

/// The only version until now. A change of the layout needs a new one.
pub const JOURNAL_VERSION: u32 = 1;
const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"soci"), u32::from_le_bytes(*b"fusj")];

const CHECKSUM: usize = 13;
const SLOT_WORDS: usize = 8;
const SLOTS_START: usize = 1024;
const LANDINGS_START: usize = SLOTS_START + SLOTS * SLOT_WORDS;
/// The kernel asks for 8 KiB at least (FUSE_MIN_READ_BUFFER), and room for a write.
const LANDING_WORDS: usize = (16 << 10) / size_of::<u32>();
const WORDS: usize = LANDINGS_START + THREADS * LANDING_WORDS;
/// The first page of a landing has all of a request that is answered with more than an error.
const PAGE_WORDS: usize = 1024;
const _: () = assert!(LANDINGS_START.is_multiple_of(PAGE_WORDS) && CHECKSUM < SLOTS_START);

/// Words of a landed request that are looked at.
const REQUEST_WORDS: usize = (size_of::<InHeader>() + size_of::<ReadIn>()) / size_of::<u32>();

/// Where in a slot which word is.
const UNIQUE: usize = 0;
const OFFSET: usize = 2;
const SIZE: usize = 4;
const STATE: usize = 5;
const FREE: u32 = 0;
const NOTED: u32 = 1;

/// The file that a journal is of, and what was agreed with the kernel about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Bytes of the file.
    pub(super) size: u64,
    /// The kernel's number of the file system: the minor number of its `st_dev`.
    pub(super) connection: u32,
    pub(super) agreed: Agreed,
}

/// A request in a landing.
#[derive(Clone, Debug)]
pub(super) struct Landed {
    pub(super) header: InHeader,
    bytes: [u8; REQUEST_WORDS * size_of::<u32>()],
}

impl Landed {
    /// The start of what follows the header, as far as it is looked at.
    pub(super) fn body(&self) -> &[u8] {
        let length = usize::try_from(self.header.len).unwrap_or(usize::MAX);
        &self.bytes[size_of::<InHeader>()..length.min(self.bytes.len())]
    }
}

/// A read in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Noted {
    pub(super) unique: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
}

#[derive(Debug)]
pub(super) struct Journal {
    memory: SharedMemory,
    /// Another process has made it.
    is_inherited: bool,
}

impl Journal {
    /// A new journal, without requests.
    pub(super) fn create(identity: &Identity) -> Result<Self> {
        let journal = Self {
            memory: SharedMemory::create("socinbd-fuse-journal", WORDS)?,
            is_inherited: false,
        };
        let header = header(identity);
        for (word, value) in journal.words().iter().zip(header) {
            word.store(value, Release);
        }
        journal.words()[CHECKSUM].store(checksum(&header), Release);
        Ok(journal)
    }

    /// The journal that another process has made. Checked as a whole, and not changed.
    pub(super) fn open(memory: OwnedFd) -> Result<(Self, Identity)> {
        let journal = Self {
            memory: SharedMemory::open(memory, WORDS)?,
            is_inherited: true,
        };
        let words: Vec<u32> = journal.words().iter().map(|w| w.load(Acquire)).collect();
        let identity = check(&words)?;
        Ok((journal, identity))
    }

    fn words(&self) -> &[AtomicU32] {
        self.memory.words()
    }

    /// Makes a landing ready for a thread. A request is copied from the kernel to it without a page fault: a fault in a process that is
    /// being killed fails, and then the kernel fails the request.
    pub(super) fn prepare(&self, thread: usize) {
        let start = landing(thread);
        if let Err(error) = self.memory.lock(start..start + PAGE_WORDS) {
            tracing::debug!("a FUSE journal's page stays unlocked: {error}");
        }
        // present and writable in this process
        self.words()[start + PAGE_WORDS - 1].store(0, Release);
    }

    /// Receives a request into a thread's landing; the number of bytes.
    pub(super) fn receive(&self, thread: usize, device: impl AsFd) -> io::Result<usize> {
        let start = landing(thread);
        self.memory.receive(device, start..start + LANDING_WORDS)
    }

    /// The request in a thread's landing.
    pub(super) fn landed(&self, thread: usize) -> Option<Landed> {
        let start = landing(thread);
        let words = &self.words()[start..start + REQUEST_WORDS];
        let mut bytes = [0; REQUEST_WORDS * size_of::<u32>()];
        for (place, word) in bytes.chunks_exact_mut(size_of::<u32>()).zip(words) {
            place.copy_from_slice(&word.load(Acquire).to_ne_bytes());
        }
        let (header, _) = InHeader::read_from_prefix(&bytes).ok()?;
        is_length(header.len).then_some(Landed { header, bytes })
    }

    /// Makes a thread's landing empty.
    pub(super) fn clear(&self, thread: usize) {
        self.words()[landing(thread)].store(0, Release);
    }

    /// Puts a read into a slot.
    pub(super) fn note(&self, slot: usize, noted: &Noted) {
        let words = self.slot(slot);
        let [u0, u1] = halves(noted.unique);
        let [o0, o1] = halves(noted.offset);
        for (word, value) in words.iter().zip([u0, u1, o0, o1, noted.size, NOTED]) {
            word.store(value, Release);
        }
    }

    /// The read in a slot.
    pub(super) fn noted(&self, slot: usize) -> Option<Noted> {
        let word = |at: usize| self.slot(slot)[at].load(Acquire);
        (word(STATE) == NOTED).then(|| Noted {
            unique: whole(word(UNIQUE), word(UNIQUE + 1)),
            offset: whole(word(OFFSET), word(OFFSET + 1)),
            size: word(SIZE),
        })
    }

    /// The reads that another process has left in slots, before this one has used any. Nothing of a new journal is touched: its pages would be
    /// made for that.
    pub(super) fn left(&self) -> Vec<(usize, Noted)> {
        let slots = if self.is_inherited { 0..SLOTS } else { 0..0 };
        slots
            .filter_map(|slot| Some((slot, self.noted(slot)?)))
            .collect()
    }

    /// Makes a slot free.
    pub(super) fn free(&self, slot: usize) {
        self.slot(slot)[STATE].store(FREE, Release);
    }

    fn slot(&self, slot: usize) -> &[AtomicU32] {
        let start = SLOTS_START + slot * SLOT_WORDS;
        &self.words()[start..start + SLOT_WORDS]
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// Where a landing starts, in words.
fn landing(thread: usize) -> usize {
    LANDINGS_START + thread * LANDING_WORDS
}

/// Whether a request can be this long.
fn is_length(length: u32) -> bool {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    (size_of::<InHeader>()..=LANDING_WORDS * size_of::<u32>()).contains(&length)
}

fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

fn whole(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn header(identity: &Identity) -> [u32; CHECKSUM] {
    let [s0, s1] = halves(identity.size);
    let agreed = &identity.agreed;
    let [o0, o1] = halves(agreed.offered);
    [
        MAGIC[0],
        MAGIC[1],
        JOURNAL_VERSION,
        THREADS as u32,
        SLOTS as u32,
        s0,
        s1,
        identity.connection,
        agreed.minor,
        o0,
        o1,
        agreed.used,
        agreed.max_read,
    ]
}

/// Reads a journal's words.
fn check(words: &[u32]) -> Result<Identity> {
    let &[
        m0,
        m1,
        version,
        threads,
        slots,
        s0,
        s1,
        connection,
        minor,
        o0,
        o1,
        used,
        max_read,
        sum,
        ..,
    ] = words
    else {
        return Err(corrupt("the FUSE journal is too short"));
    };
    if [m0, m1] != MAGIC {
        return Err(corrupt("the shared memory is not a FUSE journal"));
    }
    // before the checksum: another version may have another one
    if !is_read(version, JOURNAL_VERSION) {
        let why = format!(
            "the FUSE journal has version {version}, and this program reads {}",
            readable(JOURNAL_VERSION)
        );
        return Err(Error::new(Kind::Unsupported, why));
    }
    if sum != checksum(&words[..CHECKSUM]) || words.len() != WORDS {
        return Err(corrupt("the header of the FUSE journal is damaged"));
    }
    if threads != THREADS as u32 || slots != SLOTS as u32 {
        let why = format!("the FUSE journal is for {threads} threads and {slots} slots");
        return Err(Error::new(Kind::Unsupported, why));
    }
    if max_read > MAX_READ {
        let why = format!(
            "the FUSE file has reads of {max_read} bytes, and at most {MAX_READ} can be answered"
        );
        return Err(Error::new(Kind::Unsupported, why));
    }
    let word = |at: usize| words.get(at).copied().unwrap_or(0);
    for slot in 0..SLOTS {
        let start = SLOTS_START + slot * SLOT_WORDS;
        let (state, size) = (word(start + STATE), word(start + SIZE));
        if state != FREE && (state != NOTED || size > max_read) {
            let why =
                format!("slot {slot} of the FUSE journal has the state {state} and {size} bytes");
            return Err(corrupt(why));
        }
    }
    for thread in 0..THREADS {
        let length = word(landing(thread));
        if length != 0 && !is_length(length) {
            let why = format!("a request of {length} bytes is in the FUSE journal");
            return Err(corrupt(why));
        }
    }
    Ok(Identity {
        size: whole(s0, s1),
        connection,
        agreed: Agreed {
            minor,
            offered: whole(o0, o1),
            used,
            max_read,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        size: 0x1_0000_1000,
        connection: 41,
        agreed: Agreed {
            minor: 31,
            offered: 1 << 39 | 1,
            used: 1,
            max_read: MAX_READ,
        },
    };

    fn words(journal: &Journal) -> Vec<u32> {
        journal.words().iter().map(|w| w.load(Acquire)).collect()
    }

    fn reopened(journal: Journal) -> (Journal, Identity) {
        let memory = journal.as_fd().try_clone_to_owned().unwrap();
        drop(journal);
        Journal::open(memory).unwrap()
    }

    #[test]
    fn what_is_stored_is_found_by_a_successor() {
        let journal = Journal::create(&IDENTITY).unwrap();
        let read = Noted {
            unique: 1 << 63 | 12,
            offset: 1 << 40 | 4096,
            size: 131_072,
        };
        journal.note(0, &read);
        journal.note(SLOTS - 1, &read);
        let (mut peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut request = [7; 56];
        request[..4].copy_from_slice(&56_u32.to_ne_bytes());
        peer.write_all(&request).unwrap();
        journal.prepare(1);
        assert_eq!(journal.receive(1, &socket).unwrap(), 56);
        let (journal, identity) = reopened(journal);
        assert_eq!(identity, IDENTITY);
        assert!(journal.landed(0).is_none());
        let landed = journal.landed(1).unwrap();
        assert_eq!((landed.header.len, landed.header.opcode), (56, 0x0707_0707));
        assert_eq!(landed.body(), [7; 16]);
        let noted = (0..SLOTS).filter_map(|slot| journal.noted(slot));
        assert_eq!(noted.collect::<Vec<_>>(), [read, read]);
        journal.free(0);
        journal.clear(1);
        let (journal, _) = reopened(journal);
        assert!(journal.landed(1).is_none() && journal.noted(0).is_none());
        assert_eq!(journal.noted(SLOTS - 1), Some(read));
    }

    #[test]
    fn other_versions_and_damage_are_refused() {
        let change = |at: usize, value: u32, is_summed: bool| {
            let journal = Journal::create(&IDENTITY).unwrap();
            journal.words()[at].store(value, Release);
            if is_summed {
                let sum = checksum(&words(&journal)[..CHECKSUM]);
                journal.words()[CHECKSUM].store(sum, Release);
            }
            let memory = journal.as_fd().try_clone_to_owned().unwrap();
            Journal::open(memory).map(|_| ()).unwrap_err()
        };
        assert!(change(0, 7, true).report().contains("not a FUSE journal"));
        let error = change(2, 2, false);
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.report().contains("version 2"), "{}", error.report());
        for (at, value) in [(5, 7), (12, 4096), (CHECKSUM, 1)] {
            assert_eq!(change(at, value, false).kind(), Kind::Corrupt);
        }
        for (at, value) in [(3, 3), (4, 512), (12, MAX_READ + 1)] {
            assert_eq!(change(at, value, true).kind(), Kind::Unsupported);
        }
        for (at, value) in [
            (SLOTS_START + STATE, 2),
            (landing(0), 39),
            (landing(1), 16385),
        ] {
            assert_eq!(change(at, value, false).kind(), Kind::Corrupt);
        }
        let journal = Journal::create(&IDENTITY).unwrap();
        let noted = Noted {
            unique: 2,
            offset: 0,
            size: MAX_READ + 1,
        };
        journal.note(5, &noted);
        assert_eq!(check(&words(&journal)).unwrap_err().kind(), Kind::Corrupt);
    }

    proptest! {
        #[test]
        fn any_words_are_read_or_refused(
            bytes in prop::collection::vec(any::<u32>(), 0..2 * CHECKSUM),
            good in any::<bool>(),
            changes in prop::collection::vec(
                (
                    prop_oneof![0..CHECKSUM + 1, SLOTS_START..WORDS, Just(landing(0)), Just(landing(1))],
                    prop_oneof![Just(0), Just(1), Just(80), any::<u32>()],
                ),
                0..8,
            ),
            is_summed in any::<bool>(),
        ) {
            let journal = Journal::create(&IDENTITY).unwrap();
            let mut all = words(&journal);
            if !good {
                all[..bytes.len()].copy_from_slice(&bytes);
                all.truncate(WORDS - bytes.len() % 3);
            }
            for (at, value) in changes {
                if let Some(word) = all.get_mut(at) {
                    *word = value;
                }
            }
            if is_summed {
                all[CHECKSUM] = checksum(&all[..CHECKSUM]);
            }
            for (word, value) in journal.words().iter().zip(&all) {
                word.store(*value, Release);
            }
            // what is accepted can be used: each part is in its bounds
            if check(&all).is_ok() {
                for thread in 0..THREADS {
                    if let Some(landed) = journal.landed(thread) {
                        prop_assert!(landed.body().len() <= size_of::<ReadIn>());
                    }
                }
                for noted in (0..SLOTS).filter_map(|slot| journal.noted(slot)) {
                    prop_assert!(noted.size <= MAX_READ);
                }
            }
        }
    }
}
