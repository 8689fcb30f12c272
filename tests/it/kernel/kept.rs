//! What a kill leaves of messages that are sent from shared memory: each was sent and is recorded, or neither.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::Ordering,
    time::Duration,
};

use socinbd::kernel::{
    fdpass,
    kept::{MESSAGE_WORDS, SENT_WORD, SharedMemory, largest_message},
};

/// Messages of a round, and words: the rounds that have begun, those that were sent, and the messages.
const COUNT: usize = 3;
const BEGUN: usize = 0;
const DONE: usize = 1;
const FIRST: usize = 2;
const WORDS: usize = FIRST + COUNT * MESSAGE_WORDS;

const SOCKET: &str = "SOCINBD_TEST_MESSAGES_SOCKET";

/// No test by itself: sends rounds of messages until it is killed.
#[test]
fn sends_what_it_is_given() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let control = UnixStream::connect(PathBuf::from(path)).unwrap();
    let socket = fdpass::receive(&control).unwrap();
    let memory = SharedMemory::open(fdpass::receive(&control).unwrap(), WORDS).unwrap();
    let words = memory.words();
    (&control).write_all(&[1]).unwrap();
    let long = vec![1; largest_message(&socket)];
    let messages: [&[u8]; COUNT] = [&long[..4112], &long, &long[..16]];
    loop {
        let round = words[DONE].load(Ordering::Acquire) + 1;
        let begin = || words[BEGUN].store(round, Ordering::Release);
        memory.send(&socket, FIRST, &messages, begin).unwrap();
        words[DONE].store(round, Ordering::Release);
    }
}

/// Kills a sender after some time; the bytes that have come, and those that are recorded.
fn killed(after: Duration, is_slow: bool) -> (usize, usize) {
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let memory = SharedMemory::create("test", WORDS).unwrap();
    let round = 4112 + largest_message(&socket) + 16;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kernel::kept::sends_what_it_is_given"])
        .env(SOCKET, &path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut control, _) = listener.accept().unwrap();
    fdpass::send(&control, socket.as_fd()).unwrap();
    fdpass::send(&control, memory.as_fd()).unwrap();
    control.read_exact(&mut [0]).unwrap();
    let reader = peer.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let (mut reader, mut count, mut buffer) = (reader, 0, vec![0; 10_000]);
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return count,
                Ok(more) => count += more,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted),
            }
            if is_slow {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    });
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let came = reader.join().unwrap();
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    let word = |at: usize| memory.words()[at].load(Ordering::Acquire) as usize;
    let in_part = match word(BEGUN) > word(DONE) {
        true => (0..COUNT)
            .map(|number| word(FIRST + number * MESSAGE_WORDS + SENT_WORD))
            .sum(),
        false => 0,
    };
    (came, word(DONE) * round + in_part)
}

#[test]
fn a_message_was_sent_and_is_recorded_or_neither() {
    let mut in_the_middle = 0;
    for kill in 0..60 {
        let after = Duration::from_micros(kill % 20 * 331);
        let (came, recorded) = killed(after, kill % 2 == 0);
        assert_eq!(came, recorded, "kill {kill}");
        let round = 4112 + (32 << 10) + 16;
        in_the_middle += u64::from(came % round != 0);
    }
    println!("{in_the_middle} of 60 kills were between messages of a round");
}
