//! The journal of a connection: its requests, and how their replies are being sent.
//!
//! | words | content |
//! |---|---|
//! | 0 to 8 | magic, version, number of slots, inodes of the socket and of the pipe, CRC-32 of these |
//! | 16 | the phase |
//! | 32 to 159 | for each slot a mark: zero, or the number of the message that has its reply; any number if the reply goes into the pipe |
//! | 512 to 895 | the messages: for each a `struct mmsghdr`, of which only the length is read by a successor: zero until it was sent |
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
    kernel::kept::{MESSAGE_WORDS, SENT_WORD, SharedMemory, checksum, corrupt},
    nbd::protocol::{NBD_REQUEST_MAGIC, Request},
    versions::{is_read, readable},
};

/// Requests that can be in flight: the kernel's driver has at most so many on a connection.
pub(super) const SLOTS: usize = 128;

/// Bytes of a request.
pub(super) const REQUEST: usize = size_of::<Request>();

/// Messages of one send.
pub(super) const MESSAGES: usize = 24;

/// A change of the layout, or of the meaning of a phase, needs a new one. Version 1 had no messages.
pub const JOURNAL_VERSION: u32 = 2;
const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"soci"), u32::from_le_bytes(*b"nbdj")];

const WORDS: usize = 2048;
const VERSION: usize = 2;
const CHECKSUM: usize = 8;
const PHASE: usize = 16;
const MARKS: usize = 32;
const SENT: usize = 512;
const REQUESTS: usize = 1024;
const REQUEST_WORDS: usize = REQUEST / size_of::<u32>();
const _: () = assert!(MARKS + SLOTS <= SENT && SENT + MESSAGES * MESSAGE_WORDS <= REQUESTS);
const _: () = assert!(REQUESTS + SLOTS * REQUEST_WORDS <= WORDS);

/// How replies are being sent, and what the pipe holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Phase {
    /// Nothing. No slot is marked.
    Empty = 0,
    /// A part of the replies of the marked slots, or nothing; nothing of them was sent. A successor drains it and makes the replies again.
    Filling = 1,
    /// All that was not sent yet of the replies of the marked slots. A successor sends it, and then frees these slots.
    Sending = 2,
    /// Nothing; but a reply that is larger than the pipe is being sent without it. A successor cannot know how much of it was sent.
    Direct = 3,
    /// Nothing; the replies of the marked slots are in messages. A successor frees the slots of those that were sent.
    Messages = 4,
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
pub(super) struct Journal {
    memory: SharedMemory,
    /// That of the process which made it. It stays: that process may be the next one again.
    version: u32,
}

impl Journal {
    /// A new journal, without requests.
    pub(super) fn create(identity: Identity) -> Result<Self> {
        let journal = Self {
            memory: SharedMemory::create("socinbd-nbd-journal", WORDS)?,
            version: JOURNAL_VERSION,
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
        let mut journal = Self {
            memory: SharedMemory::open(memory, WORDS)?,
            version: 0,
        };
        let words = journal.load();
        let identity = identity(&words)?;
        left(&words)?;
        journal.version = words[VERSION];
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
        self.memory.words()
    }

    /// Receives into free slots that follow each other. The number of bytes.
    pub(super) fn receive(
        &self,
        socket: impl AsFd,
        first: usize,
        count: usize,
    ) -> io::Result<usize> {
        let start = place(first);
        let slots = start..start + count * REQUEST_WORDS;
        self.memory.receive(socket, slots)
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

    /// The reply to a slot is going into the pipe or into this message.
    pub(super) fn mark(&self, slot: usize, message: usize) {
        let mark = match self.has_messages() {
            true => message.min(MESSAGES - 1) as u32 + 1,
            false => 1,
        };
        self.words()[MARKS + slot].store(mark, Release);
    }

    /// There is no reply to a slot yet.
    pub(super) fn unmark(&self, slot: usize) {
        self.words()[MARKS + slot].store(0, Release);
    }

    /// Whether it has a place for messages.
    pub(super) fn has_messages(&self) -> bool {
        self.version > 1
    }

    /// Makes the memory ready: the kernel's access to the place of messages waits for nothing.
    pub(super) fn prepare(&self) {
        // all of it: a part would be a mapping of its own
        if let Err(error) = self.memory.lock(0..WORDS) {
            tracing::debug!("an nbd journal stays unlocked: {error}");
        }
    }

    /// Sends messages, each of them as a whole; `begin` is called when nothing is sent and a successor would find that.
    pub(super) fn send(
        &self,
        socket: impl AsFd,
        messages: &[&[u8]],
        begin: impl FnOnce(),
    ) -> io::Result<()> {
        let messages = messages
            .get(..MESSAGES.min(messages.len()))
            .filter(|it| it.len() == messages.len());
        let messages = messages.ok_or(io::ErrorKind::InvalidInput)?;
        self.memory.send(socket, SENT, messages, begin)
    }

    /// Whether the message with the reply to a slot was sent.
    pub(super) fn was_sent(&self, slot: usize) -> bool {
        let mark = self.words()[MARKS + slot].load(Acquire) as usize;
        let message = (1..=MESSAGES).contains(&mark).then(|| mark - 1);
        message.is_some_and(|message| {
            let at = SENT + message * MESSAGE_WORDS + SENT_WORD;
            self.words()[at].load(Acquire) != 0
        })
    }

    /// Makes a slot free: the first word goes first.
    pub(super) fn free(&self, slot: usize) {
        let start = place(slot);
        for word in &self.words()[start..start + REQUEST_WORDS] {
            word.store(0, Release);
        }
        self.unmark(slot);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.words()[PHASE].store(phase as u32, Release);
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
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
    [
        MAGIC[0],
        MAGIC[1],
        JOURNAL_VERSION,
        SLOTS as u32,
        s0,
        s1,
        p0,
        p1,
    ]
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
    if !is_read(header[VERSION], JOURNAL_VERSION) {
        let why = format!(
            "the journal of a connection has version {}, and this program reads {}",
            header[VERSION],
            readable(JOURNAL_VERSION)
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
        4 => Phase::Messages,
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
            mark if phase != Phase::Empty && mark as usize <= MESSAGES => marked.push(slot),
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
        journal.mark(5, 0);
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
    fn replies_of_messages_that_were_sent_are_known() {
        let journal = Journal::create(IDENTITY).unwrap();
        let (peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        for (slot, message) in [(0, 0), (1, 0), (2, 1), (3, MESSAGES + 7)] {
            put(&journal, slot, 100);
            journal.mark(slot, message);
        }
        let sent = |journal: &Journal| {
            let slots = 0..5;
            slots
                .filter(|slot| journal.was_sent(*slot))
                .collect::<Vec<_>>()
        };
        let begin = || {
            assert_eq!(sent(&journal), [0; 0]);
            journal.set_phase(Phase::Messages);
        };
        journal
            .send(&socket, &[b"two replies".as_slice()], begin)
            .unwrap();
        drop(peer);
        let memory = journal.as_fd().try_clone_to_owned().unwrap();
        drop(journal);
        let (journal, _) = Journal::open(memory).unwrap();
        let left = journal.left().unwrap();
        assert_eq!(left.phase, Phase::Messages);
        assert_eq!(left.marked, [0, 1, 2, 3]);
        assert_eq!(sent(&journal), [0, 1]);
        let too_many = [b"a".as_slice(); MESSAGES + 1];
        journal.send(&socket, &too_many, || ()).unwrap_err();
    }

    #[test]
    fn a_journal_of_the_version_before_stays_one() {
        let journal = Journal::create(IDENTITY).unwrap();
        assert!(journal.has_messages());
        let mut before = header(IDENTITY);
        before[VERSION] = 1;
        journal.words()[VERSION].store(1, Release);
        journal.words()[CHECKSUM].store(checksum(&before), Release);
        let memory = journal.as_fd().try_clone_to_owned().unwrap();
        let (journal, identity) = Journal::open(memory).unwrap();
        assert_eq!(identity, IDENTITY);
        assert!(!journal.has_messages());
        journal.mark(7, 3);
        assert_eq!(journal.load()[MARKS + 7], 1);
        assert_eq!(journal.load()[VERSION], 1);
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
        let error = change(VERSION, 3);
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.report().contains("version 3"), "{}", error.report());
        for (word, value) in [
            (3, 64),
            (4, 7),
            (CHECKSUM, 1),
            (PHASE, 5),
            (MARKS, MESSAGES as u32 + 1),
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
