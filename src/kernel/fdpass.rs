//! Descriptors over a Unix socket (SCM_RIGHTS, unix(7)): the daemon passes a mount to the client that attaches it.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};

use crate::error::{Error, Kind, Result, ResultExt};

/// The byte that a descriptor travels with: on a stream it cannot travel alone.
const MARK: u8 = b'F';

/// Descriptors of one message, at most (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

/// Sends one descriptor.
pub fn send(socket: impl AsFd, descriptor: BorrowedFd<'_>) -> Result<()> {
    let sent = send_with(socket, &[MARK], &[descriptor])
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

/// Sends a message and the descriptors that go with it; the bytes that were sent. A peer that is gone is an error, and no signal.
pub fn send_with(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL);
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })
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
