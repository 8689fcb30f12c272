//! Generic netlink (netlink(7), include/uapi/linux/genetlink.h): requests with their answers and acknowledgements, and events.

use std::{
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    time::Duration,
};

use neli::{consts::socket::NlFamily, socket::NlSocket, utils::Groups};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
    time::Timespec,
};

use crate::error::{Error, Kind, Result, ResultExt};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// `struct nlmsghdr`
const MESSAGE_HEADER: usize = 16;
/// `struct genlmsghdr`
const GENERIC_HEADER: usize = 4;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;

/// The kernel answers a request while it is sent; the bound is for a driver that hangs with its lock held.
const ANSWER: Duration = Duration::from_secs(30);

/// More than any answer needed here (nbd's status of all devices: 20 bytes each; netlink's own limit is 32 KiB).
const BUFFER: usize = 64 << 10;

/// Attributes to be sent.
#[derive(Debug, Default)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // the callers' values are a few kilobytes at most
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(crate) fn u64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A string with its NUL.
    pub(crate) fn string(self, kind: u16, value: &str) -> Self {
        let mut value = value.as_bytes().to_vec();
        value.push(0);
        self.bytes(kind, &value)
    }

    pub(super) fn nested(self, kind: u16, inner: Attributes) -> Self {
        self.bytes(kind | NLA_F_NESTED, &inner.0)
    }
}

/// Attributes received: pairs of type and value. A broken rest is left out.
pub(super) fn parse_attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[l0, l1, k0, k1], _) = bytes.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
    })
}

/// The value of one attribute.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    parse_attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// The value of an attribute that is a number.
pub(super) fn find_u32(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_ne_bytes(find(bytes, kind)?.try_into().ok()?))
}

/// A message of a generic netlink family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) command: u8,
    pub(crate) attributes: Vec<u8>,
}

enum Parsed {
    Message(Message),
    /// The end of an answer, with its error if there was one.
    End(Option<Errno>),
}

/// The netlink messages of one datagram, with their sequence numbers.
fn parse(mut datagram: &[u8]) -> Vec<(u32, Parsed)> {
    let mut messages = Vec::new();
    while let Some((header, _)) = datagram.split_first_chunk::<MESSAGE_HEADER>() {
        let [l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let Some(body) = datagram.get(MESSAGE_HEADER..length) else {
            break;
        };
        let sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
        let parsed = match u16::from_ne_bytes([t0, t1]) {
            NLMSG_ERROR => body.first_chunk().map(|&code| {
                let code = i32::from_ne_bytes(code);
                Parsed::End((code != 0).then(|| Errno::from_raw_os_error(code.wrapping_neg())))
            }),
            NLMSG_DONE => Some(Parsed::End(None)),
            _ => body
                .split_at_checked(GENERIC_HEADER)
                .map(|(generic, rest)| {
                    Parsed::Message(Message {
                        command: generic.first().copied().unwrap_or_default(),
                        attributes: rest.to_vec(),
                    })
                }),
        };
        messages.extend(parsed.map(|parsed| (sequence, parsed)));
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    messages
}

/// A family of generic netlink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    name: &'static str,
    id: u16,
    groups: Vec<(String, u32)>,
}

impl Family {
    /// The number of one of its multicast groups.
    pub(crate) fn group(&self, name: &str) -> Result<u32> {
        self.groups
            .iter()
            .find_map(|(found, id)| (found == name).then_some(*id))
            .ok_or_else(|| {
                Error::new(
                    Kind::Unsupported,
                    format!("the kernel's {} has no multicast group {name}", self.name),
                )
            })
    }
}

/// A generic netlink socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(crate) fn open() -> Result<Self> {
        Self::subscribed(&[])
    }

    /// A socket that gets the events of these groups.
    pub(super) fn subscribed(groups: &[u32]) -> Result<Self> {
        let socket = NlSocket::connect(NlFamily::Generic, None, Groups::new_groups(groups))
            .or_kind(Kind::Kernel, || "opening a netlink socket".into())?;
        // SAFETY: the descriptor was just made, and `into_raw_fd` gives up its ownership.
        let fd = unsafe { OwnedFd::from_raw_fd(socket.into_raw_fd()) };
        Ok(Self { fd, sequence: 0 })
    }

    /// Looks a family up; `None` when the kernel has none of this name (its module is not loaded).
    pub(super) fn family(&mut self, name: &'static str) -> Result<Option<Family>> {
        let attributes = Attributes::default().string(CTRL_ATTR_FAMILY_NAME, name);
        let answers = match self.exchange(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attributes)? {
            Ok(answers) => answers,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => {
                return Err(Error::with_source(
                    Kind::Kernel,
                    format!("looking up the generic netlink family {name}"),
                    errno,
                ));
            }
        };
        let answer = answers.first().map(|answer| answer.attributes.as_slice());
        let id = answer
            .and_then(|answer| find(answer, CTRL_ATTR_FAMILY_ID)?.try_into().ok())
            .map(u16::from_ne_bytes)
            .ok_or_else(|| {
                Error::new(
                    Kind::Kernel,
                    format!("the generic netlink family {name} has no ID"),
                )
            })?;
        let groups = answer
            .and_then(|answer| find(answer, CTRL_ATTR_MCAST_GROUPS))
            .into_iter()
            .flat_map(parse_attributes)
            .filter_map(|(_, group)| {
                let name = find(group, CTRL_ATTR_MCAST_GRP_NAME)?;
                let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0');
                Some((name.to_owned(), find_u32(group, CTRL_ATTR_MCAST_GRP_ID)?))
            })
            .collect();
        Ok(Some(Family { name, id, groups }))
    }

    /// One request of a family: its answers, or the error number that the kernel gave.
    pub(crate) fn request(
        &mut self,
        family: &Family,
        command: u8,
        attributes: Attributes,
    ) -> Result<Result<Vec<Message>, Errno>> {
        self.exchange(family.id, command, attributes)
    }

    fn exchange(
        &mut self,
        family: u16,
        command: u8,
        attributes: Attributes,
    ) -> Result<Result<Vec<Message>, Errno>> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = MESSAGE_HEADER + GENERIC_HEADER + attributes.0.len();
        let mut message = Vec::with_capacity(length);
        let length = u32::try_from(length).or_kind(Kind::InvalidArgument, || {
            "a netlink request is too long".into()
        })?;
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&family.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        // the sender's port: the kernel knows it
        message.extend_from_slice(&0u32.to_ne_bytes());
        // version 1 of the family's commands
        message.extend_from_slice(&[command, 1, 0, 0]);
        message.extend_from_slice(&attributes.0);
        rustix::io::retry_on_intr(|| send(&self.fd, &message, SendFlags::empty()))
            .or_kind(Kind::Kernel, || "sending a netlink request".into())?;

        let mut answers = Vec::new();
        loop {
            if !self.readable(Some(ANSWER))? {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!("the kernel did not answer a netlink request within {ANSWER:?}"),
                ));
            }
            for (sequence, parsed) in parse(&self.receive()?) {
                match parsed {
                    _ if sequence != self.sequence => {}
                    Parsed::Message(message) => answers.push(message),
                    Parsed::End(None) => return Ok(Ok(answers)),
                    Parsed::End(Some(errno)) => return Ok(Err(errno)),
                }
            }
        }
    }

    /// The next events, waiting for them up to a time. An overrun, which loses events, is `ENOBUFS`.
    pub(crate) fn events(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Result<Vec<Message>, Errno>> {
        if !self.readable(timeout)? {
            return Ok(Ok(Vec::new()));
        }
        let mut buffer = vec![0; BUFFER];
        match rustix::io::retry_on_intr(|| recv(&self.fd, &mut buffer, RecvFlags::DONTWAIT)) {
            Ok((_, count)) => Ok(Ok(parse(buffer.get(..count).unwrap_or_default())
                .into_iter()
                .filter_map(|(_, parsed)| match parsed {
                    Parsed::Message(message) => Some(message),
                    Parsed::End(_) => None,
                })
                .collect())),
            Err(Errno::AGAIN) => Ok(Ok(Vec::new())),
            Err(errno) => Ok(Err(errno)),
        }
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let mut buffer = vec![0; BUFFER];
        let (_, count) =
            rustix::io::retry_on_intr(|| recv(&self.fd, &mut buffer, RecvFlags::empty()))
                .or_kind(Kind::Kernel, || "receiving a netlink answer".into())?;
        buffer.truncate(count);
        Ok(buffer)
    }

    fn readable(&self, timeout: Option<Duration>) -> Result<bool> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(Error::with_source(
                Kind::Kernel,
                "waiting for a netlink message",
                errno,
            )),
        }
    }
}

impl std::os::fd::AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back_as_they_were_put() {
        let sent = Attributes::default()
            .string(2, "nbd")
            .nested(7, Attributes::default().u32(1, 5).u64(2, 6))
            .bytes(9, b"12345");
        assert_eq!(sent.0.len() % 4, 0);
        let found: Vec<_> = parse_attributes(&sent.0).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0], (2, &b"nbd\0"[..]));
        assert_eq!(find_u32(found[1].1, 1), Some(5));
        assert_eq!(found[2], (9, &b"12345"[..]));
    }

    #[test]
    fn broken_attributes_end_the_walk() {
        assert_eq!(parse_attributes(&[]).count(), 0);
        assert_eq!(parse_attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(parse_attributes(&[9, 0, 1, 0, 1, 2, 3, 4]).count(), 0);
        // the last one's padding may be missing
        let mut bytes = 5u16.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&[1, 0, 42]);
        assert_eq!(
            parse_attributes(&bytes).collect::<Vec<_>>(),
            [(1, &[42][..])]
        );
    }

    #[test]
    fn broken_messages_end_the_walk() {
        assert!(parse(&[0; 15]).is_empty());
        // a length shorter than the header
        assert!(parse(&[0; 64]).is_empty());
        let mut long = vec![0; 20];
        long[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(parse(&long).is_empty());
    }

    #[test]
    fn the_kernel_knows_its_controller() {
        let mut socket = Socket::open().unwrap();
        let family = socket.family("nlctrl").unwrap().unwrap();
        assert_eq!(family.id, GENL_ID_CTRL);
        assert!(family.group("notify").is_ok());
        assert!(family.group("no such").is_err());
        assert_eq!(socket.family("no such").unwrap(), None);
    }
}
