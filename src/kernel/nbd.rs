//! The kernel's nbd driver over generic netlink (include/uapi/linux/nbd-netlink.h).

mod netlink;

use std::{
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, Once},
    time::Duration,
};

use rustix::io::Errno;

use self::netlink::{Attributes, Family, Message, Socket};
use super::{blockdev, load_module};
use crate::error::{Error, Kind, Result, ResultExt};

const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_CMD_LINK_DEAD: u8 = 4;
const NBD_CMD_STATUS: u8 = 5;

const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_ATTR_DEVICE_LIST: u16 = 9;
const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
const NBD_DEVICE_INDEX: u16 = 1;
const NBD_DEVICE_CONNECTED: u16 = 2;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

// transmission flags, as in the handshake
const NBD_FLAG_HAS_FLAGS: u64 = 1;
const NBD_FLAG_READ_ONLY: u64 = 1 << 1;
const NBD_FLAG_CAN_MULTI_CONN: u64 = 1 << 8;

/// The block size of every device: that of the ext4 on it.
const BLOCK_SIZE: u64 = 4096;

/// How a device behaves when its server does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// After this time without a reply the kernel drops the connection, and sends the request again on another. Whole seconds.
    pub timeout: Duration,
    /// For how long the kernel holds requests back when no connection is left, before they fail. Whole seconds.
    pub dead: Duration,
    /// The backend identifier; [`connected`] returns it, and RECONFIGURE must repeat it.
    pub backend_id: String,
}

/// A connected device. Dropping it disconnects the device, unless [`NbdDevice::keep`] was called.
#[derive(Debug)]
pub struct NbdDevice {
    index: u32,
    node: Arc<blockdev::Node>,
    kept: bool,
}

impl NbdDevice {
    /// Takes over a device that a process that ended has connected. Dropping the value disconnects the device.
    pub fn adopt(index: u32) -> Result<Self> {
        Ok(Self {
            index,
            node: Arc::new(blockdev::node(&name(index))?),
            kept: false,
        })
    }

    /// The number N of `/dev/nbdN`.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The kernel's name of it, `nbdN`.
    pub fn name(&self) -> String {
        name(self.index)
    }

    /// A path that opens it, while this value lives.
    pub fn path(&self) -> &Path {
        self.node.path()
    }

    /// Its node, for code that opens it.
    pub fn node(&self) -> &Arc<blockdev::Node> {
        &self.node
    }

    /// Leaves the device connected.
    pub fn keep(mut self) -> u32 {
        self.kept = true;
        self.index
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = disconnect(self.index)
        {
            tracing::warn!("{}", error.report());
        }
    }
}

fn name(index: u32) -> String {
    format!("nbd{index}")
}

/// A pair of connected sockets: the kernel's end, for [`connect`], and the server's. No handshake is spoken on them: the server
/// starts with transmission.
pub fn socket_pair() -> Result<(OwnedFd, UnixStream)> {
    let (kernel, server) =
        UnixStream::pair().or_kind(Kind::Io, || "making a socket pair".into())?;
    Ok((kernel.into(), server))
}

/// Makes a read-only device of `size` bytes from connected sockets, with a number that the kernel chooses. The sockets must be served by
/// then. The kernel keeps its own references to them. Loads the driver if it is missing.
pub fn connect(size: u64, sockets: &[OwnedFd], options: &NbdOptions) -> Result<NbdDevice> {
    let (mut socket, family) = open_loading()?;
    let attributes = Attributes::default()
        .u64(NBD_ATTR_SIZE_BYTES, size)
        .u64(NBD_ATTR_BLOCK_SIZE_BYTES, BLOCK_SIZE)
        .u64(
            NBD_ATTR_SERVER_FLAGS,
            NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_CAN_MULTI_CONN,
        );
    let attributes = with_sockets(attributes, sockets, options);
    let answers = socket
        .request(&family, NBD_CMD_CONNECT, attributes)?
        .map_err(|errno| kernel_error("connecting an nbd device", errno))?;
    let index = answers
        .iter()
        .find_map(|answer| netlink::find_u32(&answer.attributes, NBD_ATTR_INDEX))
        .ok_or_else(|| {
            Error::new(
                Kind::Kernel,
                "the nbd driver did not report the device that it connected",
            )
        })?;
    match blockdev::wait_for_size(&name(index), size).and_then(|()| blockdev::node(&name(index))) {
        Ok(node) => Ok(NbdDevice {
            index,
            node: Arc::new(node),
            kept: false,
        }),
        Err(error) => {
            if let Err(error) = disconnect(index) {
                tracing::warn!("{}", error.report());
            }
            Err(error)
        }
    }
}

fn with_sockets(attributes: Attributes, sockets: &[OwnedFd], options: &NbdOptions) -> Attributes {
    let mut list = Attributes::default();
    for socket in sockets {
        // a descriptor in use is never negative
        let fd = socket.as_raw_fd() as u32;
        list = list.nested(NBD_SOCK_ITEM, Attributes::default().u32(NBD_SOCK_FD, fd));
    }
    attributes
        .u64(NBD_ATTR_TIMEOUT, options.timeout.as_secs())
        .u64(NBD_ATTR_DEAD_CONN_TIMEOUT, options.dead.as_secs())
        .string(NBD_ATTR_BACKEND_IDENTIFIER, &options.backend_id)
        .nested(NBD_ATTR_SOCKETS, list)
}

/// Gives a device new connections in place of its dead ones. If none is dead, the kernel drops them silently. The device is identified by
/// its number and `options.backend_id`.
pub fn reconfigure(index: u32, sockets: &[OwnedFd], options: &NbdOptions) -> Result<()> {
    let (mut socket, family) = open()?;
    let attributes = Attributes::default().u32(NBD_ATTR_INDEX, index);
    socket
        .request(
            &family,
            NBD_CMD_RECONFIGURE,
            with_sockets(attributes, sockets, options),
        )?
        .map_err(|errno| kernel_error(&format!("giving nbd{index} new connections"), errno))?;
    Ok(())
}

/// Disconnects a device: requests on it fail from now on. If it is not connected, this succeeds.
pub fn disconnect(index: u32) -> Result<()> {
    let (mut socket, family) = open()?;
    let attributes = Attributes::default().u32(NBD_ATTR_INDEX, index);
    match socket.request(&family, NBD_CMD_DISCONNECT, attributes)? {
        Ok(_) => Ok(()),
        // the kernel has never had a device of this number
        Err(Errno::INVAL) if !is_connected(index) => Ok(()),
        Err(errno) => Err(kernel_error(&format!("disconnecting nbd{index}"), errno)),
    }
}

fn is_connected(index: u32) -> bool {
    Path::new("/sys/block")
        .join(name(index))
        .join("pid")
        .exists()
}

/// A device that is connected, by any process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// The number N of `/dev/nbdN`.
    pub index: u32,
    /// Its backend identifier, if it was set.
    pub backend_id: Option<String>,
    /// The process that connected it; it may be gone.
    pub pid: Option<u32>,
}

/// All connected devices, by number. None where the driver is not loaded.
pub fn connected() -> Result<Vec<Connected>> {
    let mut socket = Socket::open()?;
    let Some(family) = socket.family("nbd")? else {
        return Ok(Vec::new());
    };
    let answers = socket
        .request(&family, NBD_CMD_STATUS, Attributes::default())?
        .map_err(|errno| kernel_error("listing the nbd devices", errno))?;
    let mut found: Vec<_> = answers
        .iter()
        .filter_map(|answer| netlink::find(&answer.attributes, NBD_ATTR_DEVICE_LIST))
        .flat_map(netlink::parse_attributes)
        .filter(|(_, item)| {
            netlink::find(item, NBD_DEVICE_CONNECTED)
                .and_then(|value| value.first())
                .is_some_and(|&connected| connected != 0)
        })
        .filter_map(|(_, item)| netlink::find_u32(item, NBD_DEVICE_INDEX))
        .map(|index| Connected {
            index,
            backend_id: sys_text(index, "backend"),
            pid: sys_text(index, "pid").and_then(|pid| pid.parse().ok()),
        })
        .collect();
    found.sort_by_key(|device| device.index);
    Ok(found)
}

fn sys_text(index: u32, file: &str) -> Option<String> {
    let path = Path::new("/sys/block").join(name(index)).join(file);
    Some(std::fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// The events of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// A connection of this device is dead.
    Dead(u32),
    /// Events were lost: any device may have a dead connection.
    Lost,
}

/// Tells when the kernel gives a connection up (events LINK_DEAD). For async use wait for its descriptor to be readable.
#[derive(Debug)]
pub struct DeadLinks(Socket);

impl DeadLinks {
    /// Starts listening. Loads the driver when it is not there.
    pub fn watch() -> Result<Self> {
        let (_, family) = open_loading()?;
        Ok(Self(Socket::subscribed(&[family.group("nbd_mc_group")?])?))
    }

    /// The next events, waiting for them up to a time (`None`: until there is one). May return none early.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Vec<LinkEvent>> {
        match self.0.events(timeout)? {
            Ok(messages) => Ok(messages.iter().filter_map(link_event).collect()),
            Err(Errno::NOBUFS) => Ok(vec![LinkEvent::Lost]),
            Err(errno) => Err(kernel_error("waiting for nbd's events", errno)),
        }
    }
}

impl AsFd for DeadLinks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn link_event(message: &Message) -> Option<LinkEvent> {
    if message.command != NBD_CMD_LINK_DEAD {
        return None;
    }
    netlink::find_u32(&message.attributes, NBD_ATTR_INDEX).map(LinkEvent::Dead)
}

/// Whether the driver is there, loaded or built in.
pub fn is_loaded() -> Result<bool> {
    Ok(Socket::open()?.family("nbd")?.is_some())
}

/// Whether the driver is there or can be loaded, which is tried once in a process.
pub fn is_available() -> bool {
    open_loading().is_ok()
}

fn open() -> Result<(Socket, Family)> {
    let mut socket = Socket::open()?;
    let family = socket.family("nbd")?.ok_or_else(|| {
        Error::new(
            Kind::Unsupported,
            "this kernel has no nbd driver (try `modprobe nbd`; the kernel packages of Debian and Ubuntu have it)",
        )
    })?;
    Ok((socket, family))
}

/// Like [`open`]; if the driver is missing, it is loaded, once per process.
fn open_loading() -> Result<(Socket, Family)> {
    static LOADING: Once = Once::new();
    if !is_loaded()? {
        LOADING.call_once(|| load_module("nbd"));
    }
    open()
}

fn kernel_error(what: &str, errno: Errno) -> Error {
    let kind = match errno {
        Errno::PERM | Errno::ACCESS => Kind::Unauthorized,
        Errno::BUSY => Kind::Busy,
        Errno::NOENT | Errno::NODEV => Kind::NotFound,
        _ => Kind::Kernel,
    };
    Error::with_source(kind, what, errno)
}
