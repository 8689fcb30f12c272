//! The journal of a connection: its requests, and what its pipe holds.
//!
//! | words | content |
//! |---|---|
//! | 0 to 8 | magic, version, number of slots, inodes of the socket and of the pipe, CRC-32 of these |
//! | 16 | the phase of the pipe |
//! | 32 to 159 | for each slot whether its reply is in the pipe (a mark) |
//! | 1024 to 1919 | the slots: requests as they were received, 7 words each, on one page |
//!
//! A slot is free while its first word is zero. Each change is one atomic store. A process can be killed between any two of them; a
//! successor that starts after its end sees all that it had stored.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Release},
    },
};

use zerocopy::FromBytes;

use crate::{
    error::{Error, Kind, Result},
    kernel::kept::SharedMemory,
    nbd::protocol::{NBD_REQUEST_MAGIC, Request},
};

/// Requests that can be in flight: the kernel's driver has at most so many on a connection.
pub(super) const SLOTS: usize = 128;

/// Bytes of a request.
pub(super) const REQUEST: usize = size_of::<Request>();

/// The only version until now. A change of the layout, or of the meaning of a phase, needs a new one.
const VERSION: u32 = 1;
const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"soci"), u32::from_le_bytes(*b"nbdj")];

const WORDS: usize = 2048;
const CHECKSUM: usize = 8;
const PHASE: usize = 16;
const MARKS: usize = 32;
const REQUESTS: usize = 1024;
const REQUEST_WORDS: usize = REQUEST / size_of::<u32>();
const _: () = assert!(MARKS + SLOTS <= REQUESTS && REQUESTS + SLOTS * REQUEST_WORDS <= WORDS);

/// What the pipe holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Phase {
    /// Nothing. No slot is marked.
    Empty = 0,
    /// A part of the replies of the marked slots; nothing of them was sent. A successor drains it and makes the replies again.
    Filling = 1,
    /// All that was not sent yet of the replies of the marked slots. A successor sends it, and then frees these slots.
    Sending = 2,
    /// Nothing; but a reply that is larger than the pipe is being sent without it. A successor cannot know how much of it was sent.
    Direct = 3,
}

/// The objects that a journal belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) socket: u64,
    pub(super) pipe: u64,
}

/// What a process has left in a journal.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) phase: Phase,
    /// Slots with a mark; some may be free.
    pub(super) marked: Vec<usize>,
    /// Slots with a request and without a mark.
    pub(super) received: Vec<usize>,
}

#[derive(Debug)]
pub(super) struct Journal(SharedMemory);

impl Journal {
    /// A new journal, without requests.
    pub(super) fn create(identity: Identity) -> Result<Self> {
        let memory = SharedMemory::create("socinbd-nbd-journal", WORDS)?;
        let journal = Self(memory);
        let header = header(identity);
        for (word, value) in journal.words().iter().zip(header) {
            word.store(value, Release);
        }
        journal.words()[CHECKSUM].store(checksum(&header), Release);
        Ok(journal)
    }

    /// The journal that another process has made. Checked as a whole, and not changed.
    pub(super) fn open(memory: OwnedFd) -> Result<(Self, Identity)> {
        let journal = Self(SharedMemory::open(memory, WORDS)?);
        let words = journal.load();
        let identity = identity(&words)?;
        left(&words)?;
        Ok((journal, identity))
    }

    /// What is in it.
    pub(super) fn left(&self) -> Result<Left> {
        left(&self.load())
    }

    fn load(&self) -> Vec<u32> {
        let words = self.words().iter();
        words.map(|word| word.load(Acquire)).collect()
    }

    fn words(&self) -> &[AtomicU32] {
        self.0.words()
    }

    /// Receives into free slots that follow each other. The number of bytes.
    pub(super) fn receive(
        &self,
        socket: impl AsFd,
        first: usize,
        count: usize,
    ) -> io::Result<usize> {
        let start = place(first);
        self.0.receive(socket, start..start + count * REQUEST_WORDS)
    }

    /// The request in a slot.
    pub(super) fn request(&self, slot: usize) -> Request {
        let start = place(slot);
        let mut words = [0; REQUEST_WORDS];
        for (value, word) in words
            .iter_mut()
            .zip(&self.words()[start..start + REQUEST_WORDS])
        {
            *value = word.load(Acquire);
        }
        request(&words)
    }

    /// The reply to a slot is going into the pipe, or not any more.
    pub(super) fn mark(&self, slot: usize, is_marked: bool) {
        self.words()[MARKS + slot].store(u32::from(is_marked), Release);
    }

    /// Makes a slot free: the first word goes first.
    pub(super) fn free(&self, slot: usize) {
        let start = place(slot);
        for word in &self.words()[start..start + REQUEST_WORDS] {
            word.store(0, Release);
        }
        self.mark(slot, false);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.words()[PHASE].store(phase as u32, Release);
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where a slot starts, in words.
fn place(slot: usize) -> usize {
    REQUESTS + slot * REQUEST_WORDS
}

fn request(words: &[u32; REQUEST_WORDS]) -> Request {
    let mut bytes = [0; REQUEST];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    // any bytes are a request
    Request::read_from_bytes(&bytes)
        .unwrap_or_else(|_| unreachable!("the length is that of a request"))
}

fn header(identity: Identity) -> [u32; CHECKSUM] {
    let halves = |number: u64| [number as u32, (number >> 32) as u32];
    let ([s0, s1], [p0, p1]) = (halves(identity.socket), halves(identity.pipe));
    [MAGIC[0], MAGIC[1], VERSION, SLOTS as u32, s0, s1, p0, p1]
}

fn checksum(header: &[u32]) -> u32 {
    let mut crc = flate2::Crc::new();
    for word in header {
        crc.update(&word.to_le_bytes());
    }
    crc.sum()
}

fn corrupt(why: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, why)
}

/// Reads a journal's header.
fn identity(words: &[u32]) -> Result<Identity> {
    let (header, rest) = words
        .split_at_checked(CHECKSUM)
        .ok_or_else(|| corrupt("the journal is too short"))?;
    if header[..2] != MAGIC {
        return Err(corrupt(
            "the shared memory is not a journal of a connection",
        ));
    }
    // before the checksum: another version may have another one
    if header[2] != VERSION {
        let why = format!(
            "the journal of a connection has version {}, and this program knows version {VERSION} only",
            header[2]
        );
        return Err(Error::new(Kind::Unsupported, why));
    }
    if rest.first() != Some(&checksum(header)) || header[3] != SLOTS as u32 {
        return Err(corrupt("the header of the connection's journal is damaged"));
    }
    let whole = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(Identity {
        socket: whole(header[4], header[5]),
        pipe: whole(header[6], header[7]),
    })
}

/// Reads a journal's phase, marks and slots.
fn left(words: &[u32]) -> Result<Left> {
    let word = |at: usize| words.get(at).copied().unwrap_or(0);
    let phase = match word(PHASE) {
        0 => Phase::Empty,
        1 => Phase::Filling,
        2 => Phase::Sending,
        3 => {
            let why = "a reply that is larger than the connection's pipe was sent in part";
            return Err(Error::new(Kind::Unavailable, why));
        }
        other => return Err(corrupt(format!("the journal has the phase {other}"))),
    };
    let (mut marked, mut received) = (Vec::new(), Vec::new());
    for slot in 0..SLOTS {
        let magic = word(place(slot)).to_ne_bytes();
        let is_free = match u32::from_be_bytes(magic) {
            0 => true,
            NBD_REQUEST_MAGIC => false,
            other => {
                let why = format!("slot {slot} of the journal starts with {other:#x}");
                return Err(corrupt(why));
            }
        };
        match word(MARKS + slot) {
            0 if is_free => {}
            0 => received.push(slot),
            1 if phase != Phase::Empty => marked.push(slot),
            other => {
                let why = format!("slot {slot} of the journal has the mark {other}");
                return Err(corrupt(why));
            }
        }
    }
    Ok(Left {
        phase,
        marked,
        received,
    })
}

/// Whether a slot has only the start of the request that is the next to be received: its process was killed while the kernel copied it, and
/// the kernel has then kept the request.
pub(super) fn is_cut(slot: &[u8; REQUEST], next: &[u8; REQUEST]) -> bool {
    let same = slot.iter().zip(next).take_while(|(a, b)| a == b).count();
    same > 0 && slot[same..].iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    const IDENTITY: Identity = Identity {
        socket: 0x1_0000_0002,
        pipe: 3,
    };

    fn put(journal: &Journal, slot: usize, cookie: u64) {
        let (peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        let request = sample(cookie);
        rustix::io::write(&peer, request.as_bytes()).unwrap();
        assert_eq!(journal.receive(&socket, slot, 1).unwrap(), REQUEST);
    }

    fn sample(cookie: u64) -> Request {
        Request {
            magic: NBD_REQUEST_MAGIC.into(),
            flags: 0.into(),
            command: 0.into(),
            cookie: cookie.into(),
            offset: 4096.into(),
            length: 8192.into(),
        }
    }

    #[test]
    fn what_is_stored_is_found_by_a_successor() {
        let journal = Journal::create(IDENTITY).unwrap();
        for slot in [0, 5, SLOTS - 1] {
            put(&journal, slot, 100 + slot as u64);
        }
        journal.set_phase(Phase::Filling);
        journal.mark(5, true);
        let memory = journal.as_fd().try_clone_to_owned().unwrap();
        drop(journal);
        let (journal, identity) = Journal::open(memory).unwrap();
        assert_eq!(identity, IDENTITY);
        let left = journal.left().unwrap();
        assert_eq!(left.phase, Phase::Filling);
        assert_eq!((left.marked, left.received), (vec![5], vec![0, SLOTS - 1]));
        let request = journal.request(SLOTS - 1);
        assert_eq!(
            request.as_bytes(),
            sample(100 + SLOTS as u64 - 1).as_bytes()
        );
        journal.free(5);
        journal.free(0);
        journal.set_phase(Phase::Empty);
        let left = journal.left().unwrap();
        assert_eq!((left.marked, left.received), (vec![], vec![SLOTS - 1]));
    }

    #[test]
    fn other_versions_and_damage_are_refused() {
        let change = |word: usize, value: u32| {
            let journal = Journal::create(IDENTITY).unwrap();
            journal.words()[word].store(value, Release);
            let memory = journal.as_fd().try_clone_to_owned().unwrap();
            Journal::open(memory).map(|_| ()).unwrap_err()
        };
        assert!(change(0, 7).report().contains("not a journal"));
        let error = change(2, 2);
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.report().contains("version 2"), "{}", error.report());
        for (word, value) in [
            (3, 64),
            (4, 7),
            (CHECKSUM, 1),
            (PHASE, 4),
            (MARKS, 2),
            (MARKS, 1),
        ] {
            assert_eq!(change(word, value).kind(), Kind::Corrupt);
        }
        assert_eq!(change(place(7), 7).kind(), Kind::Corrupt);
        assert_eq!(change(PHASE, 3).kind(), Kind::Unavailable);
    }

    #[test]
    fn a_request_that_was_copied_in_part_is_known() {
        let bytes = |request: Request| -> [u8; REQUEST] { request.as_bytes().try_into().unwrap() };
        let (slot, next) = (bytes(sample(7)), bytes(sample(8)));
        assert!(!is_cut(&slot, &next));
        assert!(is_cut(&next, &next));
        for length in 1..REQUEST {
            let mut cut = [0; REQUEST];
            cut[..length].copy_from_slice(&next[..length]);
            assert!(is_cut(&cut, &next), "{length}");
        }
        assert!(!is_cut(&[0; REQUEST], &next));
    }

    proptest! {
        #[test]
        fn any_words_are_read_or_refused(
            words in prop::collection::vec(any::<u32>(), 0..WORDS + 1),
            good in any::<bool>(),
            changes in prop::collection::vec((0..WORDS, prop_oneof![0..4_u32, any::<u32>()]), 0..6),
        ) {
            let mut words = words;
            if good {
                words = Journal::create(IDENTITY).unwrap().load();
                for (at, value) in changes {
                    words[at] = value;
                }
            }
            let _ = identity(&words);
            if let Ok(left) = left(&words) {
                prop_assert!(left.marked.len() + left.received.len() <= SLOTS);
            }
        }
    }
}
