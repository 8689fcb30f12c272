//! A client that sends what it is told, right or wrong, and reads replies by the specification. It has its own idea of the wire
//! format: nothing here comes from the server's code.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub(super) const REP_ERR_INVALID: u32 = 0x8000_0003;
pub(super) const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
pub(super) const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISC: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

pub(super) const FLAG_FUA: u16 = 1;
pub(super) const FLAG_DF: u16 = 4;
pub(super) const FLAG_REQ_ONE: u16 = 8;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const EOVERFLOW: u32 = 75;
pub(super) const ESHUTDOWN: u32 = 108;

/// A reply to an option.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

/// A simple reply, or one part of a structured one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Simple {
        cookie: u64,
        error: u32,
    },
    None {
        cookie: u64,
    },
    Data {
        cookie: u64,
        done: bool,
        offset: u64,
        data: Vec<u8>,
    },
    Hole {
        cookie: u64,
        done: bool,
        offset: u64,
        length: u32,
    },
    Status {
        cookie: u64,
        context: u32,
        extents: Vec<(u32, u32)>,
    },
    Error {
        cookie: u64,
        error: u32,
        message: String,
    },
}

pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) flags: u16,
    pub(super) size: u64,
}

impl Client {
    /// Connects and exchanges flags.
    pub(super) fn greet(mut stream: UnixStream, client_flags: u32) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        stream.write_all(&client_flags.to_be_bytes()).unwrap();
        Self {
            stream,
            flags: 0,
            size: 0,
        }
    }

    /// A client in transmission on the default export, with simple replies.
    pub(super) fn simple(stream: UnixStream) -> Self {
        let mut client = Self::greet(stream, 3);
        client.go("");
        client
    }

    /// A client in transmission on the default export, with structured replies and `base:allocation`.
    pub(super) fn structured(stream: UnixStream) -> Self {
        let mut client = Self::greet(stream, 3);
        assert_eq!(client.option(OPT_STRUCTURED_REPLY, &[]).kind, REP_ACK);
        client.send_option(OPT_SET_META_CONTEXT, &meta_query("", &["base:allocation"]));
        let replies = client.option_replies(OPT_SET_META_CONTEXT);
        assert_eq!(replies.len(), 2, "{replies:?}");
        client.go("");
        client
    }

    pub(super) fn send_option(&mut self, option: u32, data: &[u8]) {
        let bytes = option_bytes(option, data);
        self.stream.write_all(&bytes).unwrap();
    }

    pub(super) fn option_reply(&mut self, option: u32) -> OptionReply {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header).unwrap();
        assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(header[8..12], option.to_be_bytes());
        let mut data = vec![0; be32(&header[16..]) as usize];
        self.stream.read_exact(&mut data).unwrap();
        OptionReply {
            kind: be32(&header[12..]),
            data,
        }
    }

    /// All replies up to the acknowledgement or the error.
    pub(super) fn option_replies(&mut self, option: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply(option);
            let last = reply.kind == REP_ACK || reply.kind & 0x8000_0000 != 0;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// Sends an option that has one reply.
    pub(super) fn option(&mut self, option: u32, data: &[u8]) -> OptionReply {
        self.send_option(option, data);
        self.option_reply(option)
    }

    pub(super) fn go(&mut self, name: &str) {
        self.send_option(OPT_GO, &info_query(name, &[]));
        let replies = self.option_replies(OPT_GO);
        assert_eq!(replies.last().unwrap().kind, REP_ACK, "{replies:?}");
        let export = &replies[0].data;
        assert_eq!((export.len(), &export[..2]), (12, &[0, 0][..]));
        self.size = be64(&export[2..]);
        self.flags = u16::from_be_bytes([export[10], export[11]]);
    }

    pub(super) fn request(
        &mut self,
        flags: u16,
        command: u16,
        cookie: u64,
        offset: u64,
        length: u32,
    ) {
        let bytes = request_bytes(flags, command, cookie, offset, length);
        self.stream.write_all(&bytes).unwrap();
    }

    /// A simple reply without data, or a part of a structured one.
    pub(super) fn reply(&mut self) -> Reply {
        self.try_reply().unwrap()
    }

    pub(super) fn try_reply(&mut self) -> io::Result<Reply> {
        let mut start = [0; 16];
        self.stream.read_exact(&mut start)?;
        let cookie = be64(&start[8..]);
        match be32(&start) {
            0x6744_6698 => Ok(Reply::Simple {
                cookie,
                error: be32(&start[4..]),
            }),
            0x668e_33ef => {
                let mut length = [0; 4];
                self.stream.read_exact(&mut length)?;
                let mut payload = vec![0; u32::from_be_bytes(length) as usize];
                self.stream.read_exact(&mut payload)?;
                Ok(part(cookie, be32(&start[4..]), &payload))
            }
            other => panic!("a reply starts with {other:#x}"),
        }
    }

    /// The data of a simple reply to a read.
    pub(super) fn data(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// Reads with simple replies: data or the error value.
    pub(super) fn read_simple(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.request(0, READ, 77, offset, length);
        match self.reply() {
            Reply::Simple {
                cookie: 77,
                error: 0,
            } => Ok(self.data(length as usize)),
            Reply::Simple { cookie: 77, error } => Err(error),
            other => panic!("{other:?}"),
        }
    }

    /// The error value of a request that has no data in its reply.
    pub(super) fn status_of(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> u32 {
        self.request(flags, command, 78, offset, length);
        match self.reply() {
            Reply::Simple { cookie: 78, error }
            | Reply::Error {
                cookie: 78, error, ..
            } => error,
            Reply::None { cookie: 78 } => 0,
            other => panic!("{other:?}"),
        }
    }

    /// Asserts that the server closes the connection and says no more.
    pub(super) fn assert_closed(mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(count) => assert_eq!(count, 0, "{rest:?}"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }
}

fn part(cookie: u64, flags_and_kind: u32, payload: &[u8]) -> Reply {
    let (flags, kind) = (flags_and_kind >> 16, flags_and_kind & 0xffff);
    assert!(flags <= 1, "flags {flags:#x}");
    let done = flags == 1;
    match kind {
        0 => {
            assert!(done && payload.is_empty());
            Reply::None { cookie }
        }
        1 => Reply::Data {
            cookie,
            done,
            offset: be64(payload),
            data: payload[8..].to_vec(),
        },
        2 => {
            assert_eq!(payload.len(), 12);
            Reply::Hole {
                cookie,
                done,
                offset: be64(payload),
                length: be32(&payload[8..]),
            }
        }
        5 => {
            assert!(done);
            Reply::Status {
                cookie,
                context: be32(payload),
                extents: payload[4..]
                    .chunks_exact(8)
                    .map(|extent| (be32(extent), be32(&extent[4..])))
                    .collect(),
            }
        }
        0x8001 => {
            assert!(done);
            let length = u16::from_be_bytes([payload[4], payload[5]]) as usize;
            assert_eq!(payload.len(), 6 + length);
            Reply::Error {
                cookie,
                error: be32(payload),
                message: String::from_utf8(payload[6..].to_vec()).unwrap(),
            }
        }
        other => panic!("a structured reply of type {other:#x}"),
    }
}

pub(super) fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub(super) fn request_bytes(
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

pub(super) fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

pub(super) fn info_query(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

pub(super) fn meta_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

pub(super) fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

pub(super) fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}
