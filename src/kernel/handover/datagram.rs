//! Datagrams that have descriptors and the process of their sender with them (SCM_RIGHTS, SCM_CREDENTIALS; unix(7)).

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
};

/// Descriptors of one datagram, at most (SCM_MAX_FD).
const MAX_DESCRIPTORS: u32 = 253;

/// What a socket with SO_PASSCRED has received.
#[derive(Debug)]
pub struct Datagram {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors, closed on exec.
    pub descriptors: Vec<OwnedFd>,
    /// The sender's process; 0 where this process cannot see it.
    pub sender: u32,
    /// It was longer than allowed, or not all of its descriptors could be received.
    pub is_cut: bool,
}

/// The next datagram, if one has come.
///
/// Not with rustix: its credentials cannot say that a sender is not seen from here.
pub fn receive(socket: impl AsFd, most: usize) -> io::Result<Option<Datagram>> {
    // SAFETY: both are computations on numbers.
    let space = unsafe {
        libc::CMSG_SPACE(MAX_DESCRIPTORS * size_of::<libc::c_int>() as u32)
            + libc::CMSG_SPACE(size_of::<libc::ucred>() as u32)
    };
    let mut bytes = vec![0_u8; most];
    // aligned as a header of a control message
    let mut control = vec![0_u64; (space as usize).div_ceil(size_of::<u64>())];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a header of zeros is valid: null pointers and lengths of 0.
    let mut header = unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = space as _;
    let length = loop {
        // SAFETY: the header's pointers lead to buffers of the lengths that it states, which live until the end of this function.
        let length = unsafe {
            libc::recvmsg(
                socket.as_fd().as_raw_fd(),
                &raw mut header,
                libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
            )
        };
        if let Ok(length) = usize::try_from(length) {
            break length;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    };
    bytes.truncate(length);
    let (mut descriptors, mut sender) = (Vec::new(), 0);
    // SAFETY: recvmsg has filled the header and the control buffer, so each pointer of this walk is null or leads to a whole control
    // message in that buffer. The descriptors were made for this process by that call, and nobody else has them.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            let length = ((*message).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for index in 0..length / size_of::<libc::c_int>() {
                        let number = ptr::read_unaligned(data.cast::<libc::c_int>().add(index));
                        descriptors.push(OwnedFd::from_raw_fd(number));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                    let credentials = ptr::read_unaligned(data.cast::<libc::ucred>());
                    sender = u32::try_from(credentials.pid).unwrap_or(0);
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    Ok(Some(Datagram {
        bytes,
        descriptors,
        sender,
        is_cut: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
    }))
}
