//! The handshake by the letter.

use std::{
    io::{Read, Write},
    sync::Arc,
    time::Duration,
};

use socinbd::nbd::{Exports, Limits};

use super::{
    client::*,
    export::{Memory, Served},
};

/// Two exports, as an image with two layers has them.
fn two() -> Served {
    let mut exports = Exports::new();
    exports
        .add("sha256:aa", "layer 0 of 2", Arc::new(Memory::new(4)))
        .unwrap();
    exports
        .add("sha256:bb", "layer 1 of 2", Arc::new(Memory::new(8)))
        .unwrap();
    Served::new(exports, Limits::default())
}

fn one() -> Served {
    Served::one(&Arc::new(Memory::new(4)))
}

#[test]
fn export_name_goes_to_transmission_with_and_without_zeroes() {
    for (client_flags, zeroes) in [(1, 124), (3, 0)] {
        let served = one();
        let mut client = Client::greet(served.connect(), client_flags);
        client.send_option(OPT_EXPORT_NAME, b"");
        let reply = client.data(10 + zeroes);
        assert_eq!(be64(&reply), 16384);
        // HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN, SEND_CACHE; no SEND_DF without structured replies
        assert_eq!(reply[8..10], 0b101_0000_0011_u16.to_be_bytes());
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        assert_eq!(client.read_simple(0, 8).unwrap(), [0; 8]);
    }
}

#[test]
fn export_name_of_what_is_not_there_closes() {
    for name in [&b"nothing"[..], b"\xff\xff", &[b'a'; 20_000]] {
        let served = one();
        let mut client = Client::greet(served.connect(), 3);
        client.send_option(OPT_EXPORT_NAME, name);
        client.assert_closed();
    }
}

#[test]
fn unknown_client_flags_close() {
    let served = one();
    Client::greet(served.connect(), 4).assert_closed();
}

#[test]
fn list_names_every_export_once_with_its_description() {
    let served = two();
    let mut client = Client::greet(served.connect(), 3);
    client.send_option(OPT_LIST, &[]);
    let replies = client.option_replies(OPT_LIST);
    let data: Vec<_> = replies
        .iter()
        .map(|reply| (reply.kind, reply.data.as_slice()))
        .collect();
    assert_eq!(
        data,
        [
            (REP_SERVER, &b"\0\0\0\x09sha256:aalayer 0 of 2"[..]),
            (REP_SERVER, &b"\0\0\0\x09sha256:bblayer 1 of 2"[..]),
            (REP_ACK, &[]),
        ]
    );
    assert_eq!(client.option(OPT_LIST, b"x").kind, REP_ERR_INVALID);
}

#[test]
fn info_tells_what_is_asked_for_and_nothing_else() {
    let served = two();
    let mut client = Client::greet(served.connect(), 3);
    client.send_option(OPT_INFO, &info_query("1", &[3, 2, 1, 0x7777]));
    let replies = client.option_replies(OPT_INFO);
    let infos: Vec<_> = replies
        .iter()
        .map(|reply| (reply.kind, reply.data.as_slice()))
        .collect();
    assert_eq!(
        infos,
        [
            (REP_INFO, &[0, 0, 0, 0, 0, 0, 0, 0, 128, 0, 5, 3][..]),
            (REP_INFO, b"\0\x01sha256:bb"),
            (REP_INFO, b"\0\x02layer 1 of 2"),
            (REP_INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]),
            (REP_ACK, &[]),
        ]
    );
    // the export alone where nothing is asked for; and after INFO the handshake goes on
    client.send_option(OPT_INFO, &info_query("sha256:aa", &[]));
    assert_eq!(client.option_replies(OPT_INFO).len(), 2);
    client.go("sha256:aa");
    assert_eq!(client.size, 16384);
    assert_eq!(client.read_simple(8, 8).unwrap().len(), 8);
}

#[test]
fn names_are_digests_numbers_and_nothing_where_there_is_one() {
    let served = two();
    let mut client = Client::greet(served.connect(), 3);
    for name in ["", "2", "-1", "sha256:cc", "18446744073709551616"] {
        let reply = client.option(OPT_GO, &info_query(name, &[]));
        assert_eq!(reply.kind, REP_ERR_UNKNOWN, "{name:?}");
    }
    client.go("0");
    assert_eq!(client.size, 16384);

    let mut exports = Exports::new();
    exports
        .add("sha256:aa", "", Arc::new(Memory::new(4)))
        .unwrap();
    let served = Served::new(exports, Limits::default());
    for name in ["", "0", "sha256:aa"] {
        let mut client = Client::greet(served.connect(), 3);
        client.go(name);
    }
}

#[test]
fn structured_replies_bring_df() {
    let served = one();
    let mut client = Client::greet(served.connect(), 3);
    assert_eq!(
        client.option(OPT_STRUCTURED_REPLY, b"x").kind,
        REP_ERR_INVALID
    );
    assert_eq!(client.option(OPT_STRUCTURED_REPLY, &[]).kind, REP_ACK);
    client.go("");
    assert_eq!(client.flags, 0b101_1000_0011);
}

#[test]
fn metadata_contexts_need_structured_replies() {
    let served = one();
    let mut client = Client::greet(served.connect(), 3);
    let query = meta_query("", &["base:allocation"]);
    for option in [OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT] {
        assert_eq!(client.option(option, &query).kind, REP_ERR_INVALID);
    }
}

#[test]
fn metadata_contexts_are_listed_by_wildcard_and_set_by_name() {
    let served = one();
    let mut client = Client::greet(served.connect(), 3);
    assert_eq!(client.option(OPT_STRUCTURED_REPLY, &[]).kind, REP_ACK);
    for (option, queries, expected) in [
        (OPT_LIST_META_CONTEXT, &[][..], Some(0)),
        (OPT_LIST_META_CONTEXT, &["base:"], Some(0)),
        (OPT_LIST_META_CONTEXT, &["base:allocation"], Some(0)),
        (OPT_LIST_META_CONTEXT, &["base:other"], None),
        (OPT_LIST_META_CONTEXT, &["qemu:"], None),
        (OPT_SET_META_CONTEXT, &[], None),
        (OPT_SET_META_CONTEXT, &["base:"], None),
        (
            OPT_SET_META_CONTEXT,
            &["x-what:ever", "base:allocation"],
            Some(1),
        ),
    ] {
        client.send_option(option, &meta_query("", queries));
        let replies = client.option_replies(option);
        assert_eq!(replies.last().unwrap().kind, REP_ACK);
        let contexts: Vec<_> = replies[..replies.len() - 1]
            .iter()
            .map(|reply| {
                assert_eq!(reply.kind, REP_META_CONTEXT);
                assert_eq!(&reply.data[4..], b"base:allocation");
                be32(&reply.data)
            })
            .collect();
        assert_eq!(contexts, Vec::from_iter(expected), "{option} {queries:?}");
    }
    let reply = client.option(OPT_SET_META_CONTEXT, &meta_query("nothing", &[]));
    assert_eq!(reply.kind, REP_ERR_UNKNOWN);
}

/// A context holds for the export that it was chosen for, and until the next attempt to choose.
#[test]
fn metadata_contexts_are_lost_by_another_choice() {
    let served = two();
    for (then, goes_to, expected) in [
        (None, "0", true),
        (None, "sha256:aa", true),
        (None, "1", false),
        (Some(meta_query("0", &[])), "0", false),
        (Some(meta_query("nothing", &[])), "0", false),
        (Some(b"bad".to_vec()), "0", false),
    ] {
        let mut client = Client::greet(served.connect(), 3);
        client.option(OPT_STRUCTURED_REPLY, &[]);
        client.send_option(OPT_SET_META_CONTEXT, &meta_query("0", &["base:allocation"]));
        client.option_replies(OPT_SET_META_CONTEXT);
        if let Some(data) = then {
            client.send_option(OPT_SET_META_CONTEXT, &data);
            client.option_replies(OPT_SET_META_CONTEXT);
        }
        client.go(goes_to);
        client.request(0, BLOCK_STATUS, 5, 0, 4096);
        let works = matches!(client.reply(), Reply::Status { .. });
        assert_eq!(works, expected, "{goes_to}");
    }
}

#[test]
fn options_that_are_unknown_malformed_or_too_long_are_refused_and_the_next_one_works() {
    let served = one();
    let mut client = Client::greet(served.connect(), 3);
    for (option, data, expected) in [
        (OPT_STARTTLS, &[][..], REP_ERR_UNSUP),
        (4, &[], REP_ERR_UNSUP),
        (11, &[], REP_ERR_UNSUP),
        (0, b"data", REP_ERR_UNSUP),
        (u32::MAX, &[7; 300], REP_ERR_UNSUP),
        (OPT_GO, &[], REP_ERR_INVALID),
        (OPT_GO, &[0, 0, 0, 9, b'a', 0, 0], REP_ERR_INVALID),
        (OPT_GO, &[0xff; 6], REP_ERR_INVALID),
        (OPT_INFO, &[0, 0, 0, 0, 0, 2, 0, 0], REP_ERR_INVALID),
        (OPT_INFO, &[0, 0, 0, 0, 0, 0, 0], REP_ERR_INVALID),
        (OPT_INFO, &[0; 20_000], REP_ERR_TOO_BIG),
        (OPT_LIST, &[0; 1 << 20], REP_ERR_TOO_BIG),
    ] {
        let reply = client.option(option, data);
        assert_eq!(reply.kind, expected, "option {option}");
    }
    client.go("");
}

#[test]
fn an_option_beyond_all_measure_closes() {
    let served = one();
    let mut client = Client::greet(served.connect(), 3);
    client
        .stream
        .write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")
        .unwrap();
    client.assert_closed();
    let mut client = Client::greet(served.connect(), 3);
    client
        .stream
        .write_all(b"IHAVENOT\0\0\0\x07\0\0\0\0")
        .unwrap();
    client.assert_closed();
}

#[test]
fn abort_is_acknowledged_and_closes() {
    let served = one();
    let mut client = Client::greet(served.connect(), 3);
    assert_eq!(client.option(OPT_ABORT, b"ignored").kind, REP_ACK);
    client.assert_closed();
}

#[test]
fn a_handshake_that_takes_too_long_is_ended() {
    let limits = Limits {
        handshake: Duration::from_millis(100),
        ..Limits::default()
    };
    let exports = Exports::single(Arc::new(Memory::new(4)));
    let served = Served::new(exports, limits);
    // says nothing
    let mut silent = served.connect();
    let mut all = Vec::new();
    silent.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 18);
}

#[test]
fn connections_are_limited() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let served = Served::new(Exports::single(Arc::new(Memory::new(4))), limits);
    let first = Client::simple(served.connect());
    let mut second = Client::simple(served.connect());
    let mut third = served.connect();
    assert_eq!(third.read(&mut [0]).unwrap(), 0);
    drop(first);
    served.wait_for_connections(1);
    let mut third = Client::simple(served.connect());
    second.read_simple(0, 512).unwrap();
    third.read_simple(0, 512).unwrap();
}
