//! Recorded sessions with bytes changed, cut, repeated and put in: whatever comes, the server answers or closes, and then serves the
//! next client.

use std::{
    io::{Read, Write},
    net::Shutdown,
    sync::Arc,
    time::Duration,
};

use socinbd::nbd::Limits;

use super::{
    client::*,
    export::{BLOCK, Block, Memory, Served},
};

/// What well-behaved clients send, in the order in which they send it.
fn sessions() -> Vec<Vec<u8>> {
    let hello = 3_u32.to_be_bytes().to_vec();
    let listing = [
        hello.clone(),
        option_bytes(OPT_LIST, &[]),
        option_bytes(OPT_STRUCTURED_REPLY, &[]),
        option_bytes(OPT_LIST_META_CONTEXT, &meta_query("", &["base:"])),
        option_bytes(OPT_INFO, &info_query("", &[1, 2, 3])),
        option_bytes(OPT_ABORT, &[]),
    ];
    let old = [
        1_u32.to_be_bytes().to_vec(),
        option_bytes(OPT_EXPORT_NAME, b""),
        request_bytes(0, READ, 1, 0, 4096),
        request_bytes(0, READ, 2, 5 * BLOCK, 4096),
        request_bytes(0, WRITE, 3, 0, 100),
        vec![0x67; 100],
        request_bytes(0, READ, 4, 100, 1),
        request_bytes(0, DISC, 0, 0, 0),
    ];
    let new = [
        hello,
        option_bytes(OPT_STARTTLS, &[]),
        option_bytes(OPT_STRUCTURED_REPLY, &[]),
        option_bytes(OPT_SET_META_CONTEXT, &meta_query("", &["base:allocation"])),
        option_bytes(OPT_GO, &info_query("", &[3])),
        request_bytes(0, BLOCK_STATUS, 1, 0, 16 * BLOCK as u32),
        request_bytes(0, READ, 2, 0, 16 * BLOCK as u32),
        request_bytes(FLAG_DF, READ, 3, 3 * BLOCK, 4 * BLOCK as u32),
        request_bytes(0, CACHE, 4, 4 * BLOCK, BLOCK as u32),
        request_bytes(0, FLUSH, 5, 0, 0),
        request_bytes(0, TRIM, 6, 0, 4096),
        request_bytes(0, WRITE_ZEROES, 7, 0, 4096),
        request_bytes(0, 8, 8, 0, 4096),
        request_bytes(0, READ, 9, u64::MAX, 4096),
        request_bytes(0, DISC, 0, 0, 0),
    ];
    [listing.concat(), old.concat(), new.concat()].to_vec()
}

/// A small generator (SplitMix64): the same seeds give the same sessions on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn mutate(session: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = session.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => bytes.truncate(at + 1),
            3 => {
                let count = random.below(40).min(bytes.len() - at);
                let again = bytes[at..at + count].to_vec();
                bytes.splice(at..at, again);
            }
            4 => {
                let count = random.below(40).min(bytes.len() - at);
                bytes.drain(at..at + count);
            }
            _ => {
                // a number where a length or count may stand
                let number = [0, 1, 0xffff_ffff, 0x0200_0001, 0x4001][random.below(5)];
                let count = 4.min(bytes.len() - at);
                bytes[at..at + count].copy_from_slice(&u32::to_be_bytes(number)[..count]);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

fn memory() -> Arc<Memory> {
    let memory = Memory::new(16)
        .with(4..8, Block::Absent)
        .with(8..12, Block::Zero)
        .with(12..13, Block::Failing(socinbd::error::Kind::Corrupt));
    memory.open_gate();
    Arc::new(memory)
}

/// Sends all, reads all; the server has to end the connection when the client has shut its side.
fn talk(served: &Served, bytes: &[u8], why: &str) -> usize {
    let mut stream = served.connect();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut writing = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // the server may close before it has read everything
            let _ = writing.write_all(bytes);
            let _ = writing.shutdown(Shutdown::Write);
        });
        let mut replies = Vec::new();
        match stream.read_to_end(&mut replies) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{why}: the server neither answers nor closes: {error}"),
        }
        replies.len()
    })
}

#[test]
fn recorded_sessions_are_served_as_they_are() {
    let served = Served::one(&memory());
    let lengths: Vec<_> = sessions()
        .iter()
        .map(|session| talk(&served, session, "unchanged"))
        .collect();
    // the old session: greeting, export with zeroes, two reads of a block, the refused write, one byte
    assert_eq!(lengths[1], 18 + 134 + 2 * (16 + 4096) + 16 + 17);
    let counts = served.exports.counters().get();
    assert_eq!(
        (counts.requests, counts.reads),
        (5 + 10, 3 + 1 + 1 - 1),
        "{counts:?}"
    );
}

#[test]
fn changed_sessions_neither_hang_nor_harm() {
    let memory = memory();
    let served = Served::one(&memory);
    let sessions = sessions();
    for seed in 0..3000 {
        let mut random = Random(seed);
        let session = &sessions[random.below(sessions.len())];
        let bytes = mutate(session, &mut random);
        talk(&served, &bytes, &format!("seed {seed}"));
    }
    served.wait_for_connections(0);
    let mut client = Client::simple(served.connect());
    assert_eq!(
        client.read_simple(0, 100),
        Ok(memory.data()[..100].to_vec())
    );
    assert_eq!(memory.waiting(), 0);
}

/// Every cut of every session: the client is gone at any moment.
#[test]
fn sessions_may_end_anywhere() {
    let served = Served::one(&memory());
    for session in sessions() {
        for cut in 0..session.len() {
            talk(&served, &session[..cut], &format!("cut at {cut}"));
        }
    }
    served.wait_for_connections(0);
}

/// Greedy clients cost what the limits say.
#[test]
fn many_clients_that_say_nothing_do_not_keep_out_others_for_long() {
    let limits = Limits {
        connections: 20,
        handshake: Duration::from_millis(100),
    };
    let exports = socinbd::nbd::Exports::single(memory());
    let served = Served::new(exports, limits);
    let mut silent: Vec<_> = (0..20).map(|_| served.connect()).collect();
    for client in &mut silent {
        // it has been greeted: it has a place
        client.read_exact(&mut [0; 18]).unwrap();
    }
    served.wait_for_connections(0);
    Client::simple(served.connect()).read_simple(0, 1).unwrap();
    drop(silent);
}
