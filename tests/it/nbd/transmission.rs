//! The transmission by the letter.

use std::{io::Write, net::Shutdown, sync::Arc};

use socinbd::error::Kind;

use super::{
    client::*,
    export::{BLOCK, Block, Memory, Served},
};
use crate::support::wait;

#[test]
fn simple_reads_at_any_offset_and_length() {
    let memory = Arc::new(Memory::new(1024));
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    let size = memory.data().len() as u64;
    for (offset, length) in [
        (0, 1),
        (0, 4096),
        (511, 4097),
        (size - 1, 1),
        (4096, 1 << 20),
        (1, (1 << 20) + 1),
        (0, 4 << 20),
    ] {
        let data = client.read_simple(offset, length).unwrap();
        let start = offset as usize;
        assert!(
            data == memory.data()[start..start + length as usize],
            "{offset} {length}"
        );
    }
    assert_eq!(client.read_simple(0, 0), Ok(vec![]));
    client.request(0, DISC, 0, 0, 0);
    client.assert_closed();
}

#[test]
fn ranges_outside_the_export_are_refused() {
    let served = Served::one(&Arc::new(Memory::new(4)));
    for mut client in [
        Client::simple(served.connect()),
        Client::structured(served.connect()),
    ] {
        for command in [READ, CACHE] {
            for (offset, length) in [
                (16384, 1),
                (16383, 2),
                (0, 16385),
                (u64::MAX, 1),
                (u64::MAX, u32::MAX),
                (u64::MAX - 3, 4),
                (16385, 0),
            ] {
                assert_eq!(client.status_of(0, command, offset, length), EINVAL);
            }
        }
    }
    let mut client = Client::structured(served.connect());
    assert_eq!(client.status_of(0, BLOCK_STATUS, 16384, 1), EINVAL);
    assert_eq!(client.status_of(0, BLOCK_STATUS, 0, 0), EINVAL);
}

#[test]
fn reads_above_the_limit_are_refused() {
    // 32 MiB and a block
    let served = Served::one(&Arc::new(Memory::new(8193)));
    let mut client = Client::simple(served.connect());
    assert_eq!(client.read_simple(0, (32 << 20) + 1), Err(EINVAL));
    assert_eq!(client.read_simple(0, 32 << 20).unwrap().len(), 32 << 20);
    let mut client = Client::structured(served.connect());
    assert_eq!(client.status_of(0, READ, 0, (32 << 20) + 1), EOVERFLOW);
    // "the server MUST support unfragmented reads in which the client's request length does not exceed 65,536 bytes"
    assert_eq!(client.status_of(FLAG_DF, READ, 0, (1 << 20) + 1), EOVERFLOW);
    client.request(FLAG_DF, READ, 1, 0, 65536);
    assert!(matches!(client.reply(), Reply::Data { done: true, data, .. } if data.len() == 65536));
}

#[test]
fn writes_are_refused_with_their_data_and_the_next_request_works() {
    let memory = Arc::new(Memory::new(4));
    let served = Served::one(&memory);
    for mut client in [
        Client::simple(served.connect()),
        Client::structured(served.connect()),
    ] {
        for length in [0, 1, 4096, 100_000, 5 << 20] {
            let stream = client.stream.try_clone().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut bytes = request_bytes(0, WRITE, 78, 0, length);
                    bytes.resize(bytes.len() + length as usize, 0x25);
                    bytes.extend(request_bytes(0, FLUSH, 79, 0, 0));
                    (&stream).write_all(&bytes).unwrap();
                });
                let error = match client.reply() {
                    Reply::Simple { cookie: 78, error }
                    | Reply::Error {
                        cookie: 78, error, ..
                    } => error,
                    other => panic!("{other:?}"),
                };
                assert_eq!(error, EPERM);
                assert_eq!(
                    client.reply(),
                    Reply::Simple {
                        cookie: 79,
                        error: 0
                    }
                );
            });
        }
        for command in [TRIM, WRITE_ZEROES] {
            assert_eq!(client.status_of(0, command, 0, 4096), EPERM);
        }
    }
    let mut client = Client::simple(served.connect());
    client.request(0, WRITE, 1, 0, (32 << 20) + 1);
    client.assert_closed();
}

#[test]
fn what_is_unknown_is_refused_and_what_is_no_request_closes() {
    let served = Served::one(&Arc::new(Memory::new(4)));
    let mut client = Client::simple(served.connect());
    assert_eq!(client.status_of(0, 8, 0, 0), EINVAL);
    assert_eq!(client.status_of(0, 0xffff, 0, 100), EINVAL);
    assert_eq!(client.status_of(FLAG_FUA, READ, 0, 100), EINVAL);
    assert_eq!(
        client.status_of(FLAG_DF, READ, 0, 100),
        EINVAL,
        "without structured replies"
    );
    assert_eq!(client.status_of(FLAG_REQ_ONE, CACHE, 0, 100), EINVAL);
    assert_eq!(
        client.status_of(0, BLOCK_STATUS, 0, 100),
        EINVAL,
        "without a context"
    );
    assert_eq!(client.status_of(0, FLUSH, 0, 0), 0);
    assert_eq!(client.status_of(0, FLUSH, 0, 1), EINVAL);
    client.stream.write_all(&[0x25; 28]).unwrap();
    client.assert_closed();
}

#[test]
fn structured_reads_have_parts_and_holes() {
    // 2 data, 32 zero, 1 data, 2 zero (too few for a hole), 11 data
    let memory = Memory::new(48)
        .with(2..34, Block::Zero)
        .with(35..37, Block::Zero);
    let memory = Arc::new(memory);
    let served = Served::one(&memory);
    let mut client = Client::structured(served.connect());
    client.request(0, READ, 9, 100, 47 * BLOCK as u32);
    let mut at = 100;
    let mut kinds = Vec::new();
    loop {
        let done = match client.reply() {
            Reply::Data {
                cookie: 9,
                done,
                offset,
                data,
            } => {
                assert_eq!(offset, at);
                assert!(data == memory.data()[at as usize..at as usize + data.len()]);
                at += data.len() as u64;
                kinds.push(('d', data.len() as u64));
                done
            }
            Reply::Hole {
                cookie: 9,
                done,
                offset,
                length,
            } => {
                assert_eq!(offset, at);
                at += u64::from(length);
                kinds.push(('h', u64::from(length)));
                done
            }
            other => panic!("{other:?}"),
        };
        if done {
            break;
        }
    }
    assert_eq!(
        kinds,
        [
            ('d', 2 * BLOCK - 100),
            ('h', 32 * BLOCK),
            ('d', 13 * BLOCK + 100)
        ]
    );
    // the same with DF is one part of data
    client.request(FLAG_DF, READ, 10, 100, 47 * BLOCK as u32);
    match client.reply() {
        Reply::Data {
            cookie: 10,
            done: true,
            offset: 100,
            data,
        } => {
            assert!(data == memory.data()[100..100 + 47 * BLOCK as usize]);
        }
        other => panic!("{other:?}"),
    }
    client.request(0, READ, 11, 0, 0);
    assert_eq!(client.reply(), Reply::None { cookie: 11 });
}

#[test]
fn long_structured_reads_come_in_parts_that_cover_them() {
    let memory = Arc::new(Memory::new(1024));
    let served = Served::one(&memory);
    let mut client = Client::structured(served.connect());
    client.request(0, READ, 9, 3, (4 << 20) - 5);
    let mut got = Vec::new();
    loop {
        match client.reply() {
            Reply::Data {
                cookie: 9,
                done,
                offset,
                data,
            } => {
                assert_eq!(offset, 3 + got.len() as u64);
                got.extend(data);
                if done {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(got == memory.data()[3..(4 << 20) - 2]);
}

#[test]
fn a_slow_read_does_not_hold_up_the_next_ones() {
    let memory = Arc::new(Memory::new(16).with(4..8, Block::Absent));
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    client.request(0, READ, 1, 4 * BLOCK, 100);
    client.request(0, READ, 2, 5 * BLOCK, 100);
    memory.wait_for_fetches(2);
    for _ in 0..3 {
        assert_eq!(client.read_simple(0, 8), Ok(memory.data()[..8].to_vec()));
    }
    memory.open_gate();
    let mut cookies = [1, 2].map(|_| match client.reply() {
        Reply::Simple { cookie, error: 0 } => {
            let start = ((3 + cookie) * BLOCK) as usize;
            assert_eq!(client.data(100), memory.data()[start..start + 100]);
            cookie
        }
        other => panic!("{other:?}"),
    });
    cookies.sort_unstable();
    assert_eq!(cookies, [1, 2]);
    assert_eq!(served.exports.counters().get().waits, 2);
}

/// Other readers may have a range evicted again and again before this one comes to it.
#[test]
fn a_range_that_is_evicted_many_times_is_read_in_the_end() {
    let memory = Arc::new(Memory::new(64).with(8..9, Block::Evicted(20)));
    memory.open_gate();
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    client.request(0, READ, 7, 8 * BLOCK, BLOCK as u32);
    match client.reply() {
        Reply::Simple { cookie, error } => assert_eq!((cookie, error), (7, 0)),
        other => panic!("{other:?}"),
    }
    let start = 8 * BLOCK as usize;
    assert!(client.data(BLOCK as usize) == memory.data()[start..start + BLOCK as usize]);
}

/// Reads that wait for the local disk come after those that need not, and in their order.
#[test]
fn a_slow_disk_does_not_hold_up_what_is_in_memory() {
    let memory = Memory::new(512)
        .with(4..8, Block::Slow)
        .with(10..11, Block::Zero)
        .with(400..401, Block::Slow);
    let memory = Arc::new(memory);
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    // in one write, so that the server has all before it waits
    let requests: Vec<u8> = [4, 0, 5, 1, 6]
        .iter()
        .flat_map(|block| request_bytes(0, READ, *block, block * BLOCK, BLOCK as u32))
        .chain(request_bytes(0, DISC, 0, 0, 0))
        .collect();
    client.stream.write_all(&requests).unwrap();
    let cookies = [(); 5].map(|()| match client.reply() {
        Reply::Simple { cookie, error: 0 } => {
            let start = (cookie * BLOCK) as usize;
            assert!(client.data(BLOCK as usize) == memory.data()[start..start + BLOCK as usize]);
            cookie
        }
        other => panic!("{other:?}"),
    });
    assert_eq!(cookies, [0, 1, 4, 5, 6]);
    client.assert_closed();
    // as many as the client likes
    let mut client = Client::simple(served.connect());
    for _ in 0..500 {
        client.request(0, READ, 1, 4 * BLOCK, 1);
    }
    for _ in 0..500 {
        assert_eq!(
            client.reply(),
            Reply::Simple {
                cookie: 1,
                error: 0
            }
        );
        client.data(1);
    }
    // in a later part of a long read
    assert!(client.read_simple(0, 512 * BLOCK as u32).unwrap() == memory.data());
    assert_eq!(served.exports.counters().get().errors, 0);
}

#[test]
fn errors_are_told_for_the_read_that_has_them() {
    for kind in [
        Kind::Corrupt,
        Kind::Unavailable,
        Kind::Unauthorized,
        Kind::NotFound,
    ] {
        let memory = Memory::new(16)
            .with(4..5, Block::Failing(kind))
            .with(8..9, Block::Broken);
        let memory = Arc::new(memory);
        memory.open_gate();
        let served = Served::one(&memory);
        let mut client = Client::simple(served.connect());
        assert_eq!(client.read_simple(4 * BLOCK, 1), Err(EIO));
        assert_eq!(client.read_simple(8 * BLOCK, 1), Err(EIO));
        assert!(client.read_simple(0, 4 * BLOCK as u32).is_ok());
        let mut client = Client::structured(served.connect());
        for (block, why) in [
            (4, "failed on purpose"),
            (8, "the local disk cannot be read"),
        ] {
            client.request(0, READ, 3, block * BLOCK, 1);
            let (cookie, error, message) = (3, EIO, why.to_owned());
            assert_eq!(
                client.reply(),
                Reply::Error {
                    cookie,
                    error,
                    message
                }
            );
        }
    }
}

/// An error in a later part of a long read: a structured reply can say so, a simple one can only be cut off.
#[test]
fn errors_in_the_middle_of_a_long_read() {
    let memory = Arc::new(Memory::new(1024).with(600..601, Block::Broken));
    let served = Served::one(&memory);
    let mut client = Client::structured(served.connect());
    client.request(0, READ, 3, 0, 4 << 20);
    for offset in [0, 1 << 20] {
        assert!(
            matches!(client.reply(), Reply::Data { done: false, offset: at, .. } if at == offset)
        );
    }
    assert!(matches!(
        client.reply(),
        Reply::Error {
            cookie: 3,
            error: EIO,
            ..
        }
    ));
    assert_eq!(client.status_of(0, FLUSH, 0, 0), 0);

    let mut client = Client::simple(served.connect());
    client.request(0, READ, 3, 0, 4 << 20);
    assert_eq!(
        client.reply(),
        Reply::Simple {
            cookie: 3,
            error: 0
        }
    );
    assert!(client.data(2 << 20) == memory.data()[..2 << 20]);
    client.assert_closed();
}

#[test]
fn cache_starts_the_fetch_and_answers_at_once() {
    let memory = Arc::new(Memory::new(16).with(4..8, Block::Absent));
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    assert_eq!(client.status_of(0, CACHE, 0, 2 * BLOCK as u32), 0);
    assert_eq!(memory.fetches(), 0, "what is present is not fetched");
    assert_eq!(client.status_of(0, CACHE, 4 * BLOCK, 4 * BLOCK as u32), 0);
    memory.wait_for_fetches(1);
    memory.open_gate();
    wait("the hint's fetch", || memory.waiting() == 0);
    assert!(client.read_simple(4 * BLOCK, 4 * BLOCK as u32).is_ok());
    assert_eq!(memory.fetches(), 1);
}

#[test]
fn hints_are_bounded() {
    let memory = Arc::new(Memory::new(300).with(0..300, Block::Absent));
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    for block in 0..300 {
        assert_eq!(client.status_of(0, CACHE, block * BLOCK, 1), 0);
    }
    memory.wait_for_fetches(64);
    assert_eq!(memory.waiting(), 64);
    memory.open_gate();
}

#[test]
fn block_status_knows_zeroes_and_takes_absent_for_data() {
    let memory = Memory::new(64)
        .with(4..8, Block::Absent)
        .with(8..16, Block::Zero)
        .with(62..64, Block::Zero);
    let served = Served::one(&Arc::new(memory));
    let mut client = Client::structured(served.connect());
    let block = BLOCK as u32;
    let mut status = |flags, offset, length| {
        client.request(flags, BLOCK_STATUS, 6, offset, length);
        match client.reply() {
            Reply::Status {
                cookie: 6,
                context: 1,
                extents,
            } => extents,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        status(0, 0, 64 * block),
        [
            (8 * block, 0),
            (8 * block, 3),
            (46 * block, 0),
            (2 * block, 3)
        ]
    );
    assert_eq!(status(0, 7 * BLOCK + 1, block), [(block - 1, 0), (1, 3)]);
    assert_eq!(status(FLAG_REQ_ONE, 0, 64 * block), [(8 * block, 0)]);
    assert_eq!(status(FLAG_REQ_ONE, 9 * BLOCK, 2 * block), [(2 * block, 3)]);
}

#[test]
fn after_disc_waiting_reads_are_answered_also_when_the_client_has_shut_its_side() {
    let memory = Arc::new(Memory::new(16).with(4..8, Block::Absent));
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    client.request(0, READ, 1, 4 * BLOCK, 100);
    client.request(0, DISC, 0, 0, 0);
    client.stream.shutdown(Shutdown::Write).unwrap();
    memory.wait_for_fetches(1);
    memory.open_gate();
    assert_eq!(
        client.reply(),
        Reply::Simple {
            cookie: 1,
            error: 0
        }
    );
    client.data(100);
    client.assert_closed();
}

#[test]
fn a_client_that_is_gone_leaves_nothing_behind() {
    let memory = Arc::new(Memory::new(200).with(0..200, Block::Absent));
    let served = Served::one(&memory);
    // as many as may wait, and more: then the server does not even read
    for count in [1, 128, 150] {
        let before = memory.fetches();
        let mut client = Client::simple(served.connect());
        for block in 0..count {
            client.request(0, READ, block, block * BLOCK, 1);
        }
        memory.wait_for_fetches(before + count.min(128));
        drop(client);
        served.wait_for_connections(0);
        wait("the end of the fetches", || memory.waiting() == 0);
    }
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_reply_harms_nobody() {
    let memory = Arc::new(Memory::new(4096));
    let served = Served::one(&memory);
    let mut other = Client::simple(served.connect());
    for _ in 0..20 {
        let mut client = Client::simple(served.connect());
        client.request(0, READ, 1, 0, 16 << 20);
        client.data(1000);
        drop(client);
        other.read_simple(0, 4096).unwrap();
    }
    served.wait_for_connections(1);
}

/// A client that asks and does not read holds up its own connection and nothing else, and does not hold up the stop.
#[test]
fn a_client_that_stops_reading_is_alone_with_it() {
    let memory = Arc::new(Memory::new(4096));
    let served = Served::one(&memory);
    let mut stuck: Vec<_> = (0..4).map(|_| Client::simple(served.connect())).collect();
    for client in &mut stuck {
        client.request(0, READ, 1, 0, 16 << 20);
        client.request(0, READ, 2, 0, 16 << 20);
        assert_eq!(
            client.reply(),
            Reply::Simple {
                cookie: 1,
                error: 0
            }
        );
    }
    let mut client = Client::simple(served.connect());
    for _ in 0..100 {
        client.read_simple(0, 4096).unwrap();
    }
    let start = std::time::Instant::now();
    served.server.stop();
    assert!(start.elapsed().as_secs() < 10);
}

#[test]
fn stop_answers_who_waits_and_takes_the_socket_away() {
    let memory = Arc::new(Memory::new(16).with(4..8, Block::Absent));
    let served = Served::one(&memory);
    let mut client = Client::simple(served.connect());
    client.request(0, READ, 1, 4 * BLOCK, 100);
    memory.wait_for_fetches(1);
    served.server.stop();
    assert_eq!(
        client.reply(),
        Reply::Simple {
            cookie: 1,
            error: ESHUTDOWN
        }
    );
    client.assert_closed();
    assert!(!served.socket.exists());
    assert_eq!(memory.waiting(), 0);
}

#[test]
fn eight_connections_at_once() {
    let memory = Arc::new(Memory::new(1024).with(100..900, Block::Absent));
    memory.open_gate();
    let served = Served::one(&memory);
    std::thread::scope(|scope| {
        for seed in 0..8u64 {
            let (served, memory) = (&served, &memory);
            scope.spawn(move || {
                let mut client = Client::simple(served.connect());
                for step in 0..200 {
                    let offset = (seed * 7919 + step * 104_729) % (1000 * BLOCK);
                    let data = client.read_simple(offset, 20_000).unwrap();
                    let start = offset as usize;
                    assert!(data == memory.data()[start..start + 20_000]);
                }
            });
        }
    });
    assert_eq!(served.exports.counters().get().read_bytes, 8 * 200 * 20_000);
}
