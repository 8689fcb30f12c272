//! Descriptors over a Unix socket (SCM_RIGHTS, unix(7)): the daemon passes a mount to the client that attaches it.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::{Error, Kind, Result, ResultExt};

/// The byte that a descriptor travels with: on a stream it cannot travel alone.
const MARK: u8 = b'F';

/// Sends one descriptor.
pub fn send(socket: impl AsFd, descriptor: BorrowedFd<'_>) -> Result<()> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fits = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    debug_assert!(fits, "the buffer has room for one descriptor");
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(
            &socket,
            &[IoSlice::new(&[MARK])],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })
    .or_kind(Kind::Io, || "sending a descriptor".into())?;
    if sent == 1 {
        Ok(())
    } else {
        Err(Error::new(
            Kind::Io,
            "sending a descriptor: nothing was sent",
        ))
    }
}

/// Receives one descriptor; it is closed on exec.
pub fn receive(socket: impl AsFd) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut mark = [0];
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut mark)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })
    .or_kind(Kind::Io, || "receiving a descriptor".into())?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match descriptor {
        Some(descriptor) if received.bytes == 1 && mark == [MARK] => Ok(descriptor),
        _ if received.bytes == 0 => Err(Error::new(
            Kind::Unavailable,
            "receiving a descriptor: the peer closed the connection",
        )),
        _ => Err(Error::new(
            Kind::Corrupt,
            "receiving a descriptor: the message has none",
        )),
    }
}
