//! Device mapper: a device whose reads are passed to another device, which can be exchanged under a mounted file system
//! (include/uapi/linux/dm-ioctl.h, Documentation/admin-guide/device-mapper/linear.rst).

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Once},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    ioctl::{self, Opcode, Updater},
};

use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::{blockdev, load_module},
};

/// `_IOWR(DM_IOCTL, number, struct dm_ioctl)`
const fn call(number: Opcode) -> Opcode {
    0xC138_FD00 | number
}
const DM_DEV_CREATE: Opcode = call(3);
const DM_DEV_REMOVE: Opcode = call(4);
const DM_DEV_SUSPEND: Opcode = call(6);
const DM_TABLE_LOAD: Opcode = call(9);
const DM_TARGET_MSG: Opcode = call(14);

const DM_READONLY_FLAG: u32 = 1 << 0;
const DM_SKIP_LOCKFS_FLAG: u32 = 1 << 10;
const DM_DEFERRED_REMOVE: u32 = 1 << 17;

/// The interface's version that all calls here have: Linux 3.13, the first with deferred removal.
const VERSION: [u32; 3] = [4, 27, 0];
const SECTOR: u64 = 512;
/// The node through which the driver is talked to.
pub const CONTROL: &str = "/dev/mapper/control";

/// How long the kernel may take to take a device down. It takes microseconds.
const GOING: Duration = Duration::from_secs(1);

/// `struct dm_ioctl`, followed by the payload of a call.
#[repr(C)]
#[derive(Clone, Copy)]
struct Argument {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
    payload: [u8; 72],
}

/// `sizeof(struct dm_ioctl)`
const HEADER: usize = 312;
const _: () = assert!(
    std::mem::offset_of!(Argument, payload) == HEADER && size_of::<Argument>() == HEADER + 72
);

impl Argument {
    /// For a call on the device of this name.
    fn new(name: &str, flags: u32) -> Result<Self> {
        let mut argument = Self {
            version: VERSION,
            data_size: size_of::<Self>() as u32, // 384
            data_start: HEADER as u32,
            target_count: 0,
            open_count: 0,
            flags,
            event_nr: 0,
            padding: 0,
            dev: 0,
            name: [0; 128],
            uuid: [0; 129],
            data: [0; 7],
            payload: [0; 72],
        };
        copy_text(&mut argument.name, name)?;
        Ok(argument)
    }

    /// For DM_TABLE_LOAD: the whole of the device `below` (`nbd3`), of so many bytes.
    fn table(name: &str, below: &str, bytes: u64) -> Result<Self> {
        let (major, minor) = blockdev::numbers(below)?;
        let mut argument = Self::new(name, DM_READONLY_FLAG)?;
        argument.target_count = 1;
        // struct dm_target_spec: start and length in sectors, two numbers for answers, the target's name; then its parameters
        argument.payload[8..16].copy_from_slice(&(bytes / SECTOR).to_ne_bytes());
        copy_text(&mut argument.payload[24..40], "linear")?;
        copy_text(&mut argument.payload[40..], &format!("{major}:{minor} 0"))?;
        Ok(argument)
    }

    /// For DM_TARGET_MSG.
    fn message(name: &str, message: &str) -> Result<Self> {
        let mut argument = Self::new(name, 0)?;
        // struct dm_target_msg: the sector whose target it is for, then the text; one that begins with @ is for the device
        copy_text(&mut argument.payload[8..], message)?;
        Ok(argument)
    }

    fn call<const CALL: Opcode>(&mut self, control: &OwnedFd) -> Result<(), Errno> {
        // SAFETY: all calls here read and write a `struct dm_ioctl` and its payload up to `data_size`, which is the size of this type (its
        // layout is asserted above); any bytes are a valid value of it.
        unsafe { ioctl::ioctl(control, Updater::<CALL, Self>::new(self)) }
    }
}

/// A text with a NUL at its end.
fn copy_text(place: &mut [u8], text: &str) -> Result<()> {
    if text.len() >= place.len() || text.bytes().any(|byte| byte == 0) {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{text:?} is not a valid string for the device mapper, of less than {} bytes",
                place.len()
            ),
        ));
    }
    place[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

/// A device all of whose reads go to another one. It goes when this is dropped, or, if it is in use then, with its last user (a mount).
/// That is so after a crash as well.
#[derive(Debug)]
pub struct MappedDevice {
    mapped_name: String,
    minor: u32,
    node: Arc<blockdev::Node>,
    /// Keeps it until it is mounted, and from then on too.
    device: Option<OwnedFd>,
}

impl MappedDevice {
    /// Makes a read-only device of `bytes` bytes over the whole of the device `below` (`nbd3`). The name is one that no other device of
    /// the device mapper has, and of at most 127 bytes. Loads the driver when it is not there.
    pub fn new(name: &str, below: &str, bytes: u64) -> Result<Self> {
        let control = control()?;
        let mut table = Argument::table(name, below, bytes)?;
        let mut created = Argument::new(name, DM_READONLY_FLAG)?;
        created
            .call::<DM_DEV_CREATE>(&control)
            .map_err(|errno| failed("making", name, errno))?;
        let made = table
            .call::<DM_TABLE_LOAD>(&control)
            .and_then(|()| resume(&control, name))
            .map_err(|errno| failed("setting up", name, errno))
            .and_then(|()| {
                let minor = rustix::fs::minor(created.dev);
                let kernel_name = format!("dm-{minor}");
                let node = Arc::new(blockdev::node(&kernel_name)?);
                let device = Some(node.open()?);
                Ok(Self {
                    mapped_name: name.to_owned(),
                    minor,
                    node,
                    device,
                })
            });
        // now, while it is open: whatever happens to this process, the device is removed with its last user
        if let Err(error) = remove_when_unused(&control, name) {
            tracing::warn!("{}", failed("giving back", name, error).report());
        }
        made
    }

    /// Takes over a device that a process that ended has made. Dropping the value removes the device, as of one from [`MappedDevice::new`].
    pub fn adopt(mapped: &Mapped) -> Result<Self> {
        let minor = mapped.name.strip_prefix("dm-");
        let minor = minor
            .and_then(|minor| minor.parse().ok())
            .ok_or_else(|| failed("finding", &mapped.mapped_name, Errno::NODEV))?;
        let node = Arc::new(blockdev::node(&mapped.name)?);
        Ok(Self {
            mapped_name: mapped.mapped_name.clone(),
            minor,
            device: Some(node.open()?),
            node,
        })
    }

    /// Removes the device at once if it has no other user. (If this is left to the kernel, a kernel thread does it, and the device below
    /// is released a moment later.)
    fn remove(&mut self) -> Result<()> {
        let context = |errno| failed("removing", &self.mapped_name, errno);
        let control = control()?;
        Argument::message(&self.mapped_name, "@cancel_deferred_remove")?
            .call::<DM_TARGET_MSG>(&control)
            .map_err(context)?;
        drop(self.device.take());
        remove_when_unused(&control, &self.mapped_name).map_err(context)
    }

    /// The kernel's name of it, `dm-N`.
    pub fn name(&self) -> String {
        format!("dm-{}", self.minor)
    }

    /// Its node, for code that opens it.
    pub fn node(&self) -> &Arc<blockdev::Node> {
        &self.node
    }

    /// Passes its reads to another device with the same bytes from now on. Reads that have begun end on the old device, which is then
    /// released. After an error, nothing has changed.
    pub fn move_to(&self, below: &str, bytes: u64) -> Result<()> {
        let context = |errno| failed(&format!("moving to {below}"), &self.mapped_name, errno);
        let control = control()?;
        let mut table = Argument::table(&self.mapped_name, below, bytes)?;
        table.call::<DM_TABLE_LOAD>(&control).map_err(context)?;
        resume(&control, &self.mapped_name)
            .inspect_err(|_| {
                // the kernel drops a table that it cannot take, and leaves the device suspended: this gives it the old one back
                let _ = resume(&control, &self.mapped_name);
            })
            .map_err(context)
    }
}

impl Drop for MappedDevice {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!("{}", error.report());
        }
    }
}

/// Puts the table that was loaded last into effect: waits for the reads of the old one, without freezing the file system.
fn resume(control: &OwnedFd, name: &str) -> Result<(), Errno> {
    let argument = Argument::new(name, DM_SKIP_LOCKFS_FLAG).map_err(|_| Errno::INVAL)?;
    // a signal ends the wait, and the table is kept for the next try
    rustix::io::retry_on_intr(|| {
        let mut argument = argument;
        argument.call::<DM_DEV_SUSPEND>(control)
    })
}

/// Removes a device now, or when its last user goes.
fn remove_when_unused(control: &OwnedFd, name: &str) -> Result<(), Errno> {
    let argument = Argument::new(name, DM_DEFERRED_REMOVE);
    argument
        .map_err(|_| Errno::INVAL)?
        .call::<DM_DEV_REMOVE>(control)
}

/// One of the mapper's devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The kernel's name of it, `dm-N`.
    pub name: String,
    /// The name that it was given.
    pub mapped_name: String,
}

/// All devices of the device mapper, by whomever, but those that are being taken down.
pub fn mapped() -> Result<Vec<Mapped>> {
    let found = entries()?.into_iter();
    Ok(found.filter_map(|(_, mapped)| mapped).collect())
}

/// The kernel names of the device mapper's devices. The given name of a device that is being removed is not available.
fn entries() -> Result<Vec<(String, Option<Mapped>)>> {
    let entries =
        fs::read_dir("/sys/block").or_kind(Kind::Kernel, || "listing /sys/block".into())?;
    Ok(entries
        .filter_map(io::Result::ok)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("dm-"))
        .map(|name| {
            let given = fs::read_to_string(format!("/sys/block/{name}/dm/name")).ok();
            let mapped = given.map(|given| Mapped {
                name: name.clone(),
                mapped_name: given.trim_end().to_owned(),
            });
            (name, mapped)
        })
        .collect())
}

/// The kernel names of the devices that this device (`dm-N`) passes its reads to; none if it does not exist.
pub fn below(name: &str) -> Vec<String> {
    let slaves = fs::read_dir(Path::new("/sys/block").join(name).join("slaves"));
    slaves
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// Waits for devices that are being removed: a kernel thread does that when their last user is gone, and releases the devices below at its
/// end.
pub fn settle() -> Result<()> {
    let deadline = Instant::now() + GOING;
    while entries()?.iter().any(|(_, mapped)| mapped.is_none()) && Instant::now() < deadline {
        thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Removes the device with this given name; if it is in use, it is removed with its last user. If it does not exist, this succeeds.
pub fn remove(mapped_name: &str) -> Result<()> {
    match remove_when_unused(&control()?, mapped_name) {
        Err(Errno::NXIO) => settle(),
        done => done.map_err(|errno| failed("removing", mapped_name, errno)),
    }
}

/// Whether the driver is there, or can be loaded. It is tried once in a process.
pub fn is_available() -> bool {
    static LOADING: Once = Once::new();
    LOADING.call_once(|| {
        if control().is_err() {
            load_module("dm-mod");
        }
    });
    control().is_ok()
}

/// Whether the driver is there, loaded or built in, with its node.
pub fn is_loaded() -> bool {
    Path::new(CONTROL).exists()
}

fn control() -> Result<OwnedFd> {
    openat(CWD, CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| super::driver_error(CONTROL, "dm-mod", errno))
}

fn failed(what: &str, name: &str, errno: Errno) -> Error {
    let kind = match errno {
        Errno::PERM | Errno::ACCESS => Kind::Unauthorized,
        Errno::BUSY => Kind::Busy,
        _ => Kind::Kernel,
    };
    Error::with_source(kind, format!("{what} the device {name}"), errno)
}
