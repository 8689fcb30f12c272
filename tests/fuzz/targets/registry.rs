//! Any bytes as a registry's answers: status lines, headers (challenges, links, ranges, redirects) and bodies. The client gives bytes or an
//! error, and does not hang.

#![no_main]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Mutex, OnceLock},
    thread,
    time::Duration,
};

use futures_util::StreamExt as _;
use libfuzzer_sys::fuzz_target;
use socinbd::{
    oci::Digest,
    source::{Access, Limits, Source},
};
use tokio::runtime::Runtime;

/// Between two answers in an input.
const NEXT: &[u8] = b"\n--\n";

/// What the registry answers, one connection after the other.
static ANSWERS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

fn registry() -> &'static (u16, Runtime) {
    static REGISTRY: OnceLock<(u16, Runtime)> = OnceLock::new();
    REGISTRY.get_or_init(|| {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its own").port();
        thread::spawn(move || listener.incoming().flatten().for_each(answer));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        (port, runtime.expect("a runtime"))
    })
}

fn answer(stream: TcpStream) {
    let mut lines = BufReader::new(&stream);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|length| length > 2) {
        line.clear();
    }
    let answer = ANSWERS.lock().expect("no panic").pop().unwrap_or_default();
    // a client that has gone does not want it
    let _ = (&stream).write_all(&answer);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let (port, runtime) = registry();
    let mut answers: Vec<Vec<u8>> = split(bytes);
    answers.reverse();
    *ANSWERS.lock().expect("no panic") = answers;
    runtime.block_on(ask(*choice, *port));
});

fn split(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    while let Some(end) = bytes.windows(NEXT.len()).position(|window| window == NEXT) {
        parts.push(bytes[..end].to_vec());
        bytes = &bytes[end + NEXT.len()..];
    }
    parts.push(bytes.to_vec());
    parts
}

async fn ask(choice: u8, port: u16) {
    let reference = format!("127.0.0.1:{port}/app:1").parse().expect("a reference");
    let limits = Limits {
        connect: Duration::from_secs(1),
        first_byte: Duration::from_millis(1300),
        stall: Duration::from_millis(300),
        control_patience: Duration::ZERO,
        data_patience: Duration::ZERO,
    };
    let source = Source::open_with(&reference, &Access::default(), limits).await.expect("it asks nobody");
    let digest = Digest::of(b"hello");
    match choice % 5 {
        0 => drop(source.root_manifest().await),
        1 => {
            if let Ok(bytes) = source.blob(&digest, 5, 100).await {
                assert_eq!(Digest::of(&bytes), digest);
            }
        }
        2 => {
            if let Ok(bytes) = source.range(&digest, 10..200).await {
                assert_eq!(bytes.len(), 190);
            }
        }
        3 => {
            let Ok(mut stream) = source.stream(&digest, 300).await else {
                return;
            };
            let mut length = 0;
            while let Some(piece) = stream.next().await {
                let Ok(piece) = piece else {
                    return;
                };
                length += piece.len();
            }
            assert_eq!(length, 300);
        }
        _ => drop(source.referrers(&digest, "application/vnd.amazon.soci.index.v1+json").await),
    }
}
