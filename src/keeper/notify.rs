//! The daemon's side of sd_notify(3).

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::message::{Message, Watchdog};
use crate::{
    error::{Error, Kind, Result, ResultExt as _, report},
    kernel::fdpass::send_with,
};

/// How long it is waited until whoever runs this daemon receives a notification: its queue may be full.
const SEND_TIME: Duration = Duration::from_secs(5);

/// Notifications to whoever runs this daemon; from any thread.
#[derive(Debug)]
pub struct Notify {
    socket: UnixDatagram,
    address: OsString,
    /// It was logged that nobody receives them.
    is_told: AtomicBool,
}

impl Notify {
    /// To this address: what `NOTIFY_SOCKET` has, a path or an abstract name after `@`.
    pub fn to(address: &OsStr) -> Result<Self> {
        let failed = || format!("the notification socket {}", address.display());
        let socket = UnixDatagram::unbound().or_kind(Kind::Io, failed)?;
        socket
            .set_write_timeout(Some(SEND_TIME))
            .or_kind(Kind::Io, failed)?;
        let notify = Self {
            socket,
            address: address.to_owned(),
            is_told: AtomicBool::new(false),
        };
        notify.connect().or_kind(Kind::Unavailable, failed)?;
        Ok(notify)
    }

    fn connect(&self) -> io::Result<()> {
        let address = match self.address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(&self.address)?,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        self.socket.connect_addr(&address)
    }

    /// The daemon has started, and serves.
    pub fn ready(&self) {
        self.tell(&Message {
            is_ready: true,
            ..Message::default()
        });
    }

    /// The daemon has begun to end.
    pub fn stopping(&self) {
        self.tell(&Message {
            is_stopping: true,
            ..Message::default()
        });
    }

    /// The daemon is about to end, and this program is to follow it. An error if its path cannot be told.
    pub(super) fn successor(&self, program: &Path) -> Result<()> {
        let is_told = |path: &str| path.starts_with('/') && !path.contains(['\n', '\r']);
        if !program.to_str().is_some_and(is_told) {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "{} is not an absolute path in UTF-8 on one line",
                    program.display()
                ),
            ));
        }
        let message = Message {
            successor: Some(program.to_owned()),
            ..Message::default()
        };
        self.send(&message, &[])
    }

    /// The daemon works.
    pub fn watchdog(&self) {
        self.tell(&Message {
            watchdog: Some(Watchdog::Alive),
            ..Message::default()
        });
    }

    /// Waits until all that was sent before has been acted upon.
    pub fn barrier(&self, time: Duration) -> Result<()> {
        let failed = || "waiting for what runs this daemon".to_owned();
        let (end, other_end) = io::pipe().or_kind(Kind::Io, failed)?;
        let message = Message {
            is_barrier: true,
            ..Message::default()
        };
        self.send(&message, &[other_end.as_fd()])?;
        drop(other_end);
        match is_hung_up(end.as_fd(), time).or_kind(Kind::Io, failed)? {
            true => Ok(()),
            false => Err(Error::new(Kind::Unavailable, failed())),
        }
    }

    /// Sends a notification. That nobody receives it is logged once: the daemon goes on without.
    fn tell(&self, message: &Message) {
        if let Err(error) = self.send(message, &[])
            && !self.is_told.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                "what runs this daemon has gone, and starts no other one when it dies: {}",
                report(&error)
            );
        }
    }

    /// Sends a message with descriptors.
    pub(super) fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let text = message.to_string();
        let send = || send_with(&self.socket, text.as_bytes(), descriptors);
        let sent = match send() {
            // the socket was made anew, as by a service manager that has started again
            Err(Errno::CONNREFUSED | Errno::NOTCONN | Errno::CONNRESET | Errno::PIPE) => {
                match self.connect() {
                    Ok(()) => send().map_err(io::Error::from),
                    Err(error) => Err(error),
                }
            }
            sent => sent.map_err(io::Error::from),
        };
        sent.map(drop).or_kind(Kind::Unavailable, || {
            format!("notifying {}", self.address.display())
        })
    }
}

/// Whether the other end of a pipe is closed, or comes to be in this time.
pub(super) fn is_hung_up(end: BorrowedFd<'_>, time: Duration) -> Result<bool, Errno> {
    let time = Timespec::try_from(time).map_err(|_| Errno::INVAL)?;
    let mut ends = [PollFd::from_borrowed_fd(end, PollFlags::empty())];
    rustix::io::retry_on_intr(|| poll(&mut ends, Some(&time)))?;
    Ok(ends[0].revents().contains(PollFlags::HUP))
}
