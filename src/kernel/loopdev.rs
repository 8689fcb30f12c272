//! Loop devices (loop(4)): a file as a block device.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    ioctl::{self, Getter, NoArg, Opcode, Setter},
};

use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::blockdev,
};

// include/uapi/linux/loop.h
const LOOP_CLR_FD: Opcode = 0x4C01;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LO_NAME_SIZE: usize = 64;

/// Another process may take the device that LOOP_CTL_GET_FREE named before we configure it. With a hundred attaches at once each
/// try is won by one of them.
const TRIES: usize = 1000;

/// `struct loop_info64`
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; LO_NAME_SIZE],
    lo_crypt_name: [u8; LO_NAME_SIZE],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

/// How a loop device is set up.
#[derive(Clone, Debug)]
pub struct LoopOptions {
    /// Writes are refused.
    pub read_only: bool,
    /// The backing file's page cache is passed by, where the file can do that (else the kernel falls back by itself).
    pub direct_io: bool,
    /// The device's block size in bytes.
    pub block_size: u32,
    /// The kernel frees the device when its last user (descriptor or mount) is gone: nothing is left over after a crash.
    pub autoclear: bool,
    /// A name to recognise the device by, of at most 63 bytes; [`name`] returns it.
    pub name: String,
}

impl Default for LoopOptions {
    fn default() -> Self {
        Self {
            read_only: true,
            direct_io: true,
            block_size: 4096,
            autoclear: true,
            name: String::new(),
        }
    }
}

/// A loop device. Dropping this frees the device, unless it is in use (then its last user frees it) or [`keep`] was called.
///
/// [`keep`]: LoopDevice::keep
#[derive(Debug)]
pub struct LoopDevice {
    index: u32,
    node: Arc<blockdev::Node>,
    device: OwnedFd,
    kept: bool,
}

impl LoopDevice {
    /// Takes over a device that a process that ended has set up. Dropping the value frees the device, as of one from [`attach`].
    pub fn adopt(index: u32) -> Result<Self> {
        let node = Arc::new(blockdev::node(&format!("loop{index}"))?);
        Ok(Self {
            index,
            device: node.open()?,
            node,
            kept: false,
        })
    }

    /// The number N of `/dev/loopN`.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The kernel's name of it, `loopN`.
    pub fn name(&self) -> String {
        format!("loop{}", self.index)
    }

    /// A path that opens it, while this value lives.
    pub fn path(&self) -> &Path {
        self.node.path()
    }

    /// Its node, for code that opens it.
    pub fn node(&self) -> &Arc<blockdev::Node> {
        &self.node
    }

    /// Whether reads pass the page cache of the backing file by.
    pub fn direct_io(&self) -> Result<bool> {
        let path = format!("/sys/block/{}/loop/dio", self.name());
        Ok(std::fs::read_to_string(&path)
            .or_kind(Kind::Kernel, || format!("reading {path}"))?
            .trim()
            == "1")
    }

    /// Leaves the device to its users. With `autoclear` it is freed with its last user, so there must be one (a mount) by then; without
    /// it, the device stays until [`detach`].
    pub fn keep(mut self) -> u32 {
        self.kept = true;
        self.index
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if !self.kept {
            // for a device in use this sets autoclear: the last user frees it
            let _ = clear(self.device.as_fd());
        }
    }
}

/// Sets a free loop device on a file.
pub fn attach(file: BorrowedFd<'_>, options: &LoopOptions) -> Result<LoopDevice> {
    let control = openat(
        CWD,
        "/dev/loop-control",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| super::driver_error("/dev/loop-control", "loop", errno))?;
    let config = config(file, options)?;
    // the kernel offers the same number to all processes until one of them has taken it
    static TAKING: Mutex<()> = Mutex::new(());
    let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..TRIES {
        let index = free_index(control.as_fd())
            .or_kind(Kind::Kernel, || "requesting a free loop device".into())?;
        let name = format!("loop{index}");
        let node = blockdev::node(&name)?;
        let flags = if options.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let device = match openat(CWD, node.path(), flags | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => device,
            // removed between the two calls
            Err(Errno::NXIO | Errno::NOENT) => continue,
            Err(errno) => {
                return Err(Error::with_source(
                    Kind::Kernel,
                    format!("opening {name}"),
                    errno,
                ));
            }
        };
        match configure(device.as_fd(), config) {
            Ok(()) => {
                return Ok(LoopDevice {
                    index,
                    node: Arc::new(node),
                    device,
                    kept: false,
                });
            }
            Err(Errno::BUSY) => continue,
            Err(errno) => {
                let why = match errno {
                    Errno::INVAL | Errno::NOTTY => " (it needs Linux 5.8 or newer)",
                    _ => "",
                };
                return Err(Error::with_source(
                    Kind::Kernel,
                    format!("LOOP_CONFIGURE of {name}{why}"),
                    errno,
                ));
            }
        }
    }
    Err(Error::new(
        Kind::Busy,
        format!("no free loop device after {TRIES} tries: other processes take them first"),
    ))
}

fn config(file: BorrowedFd<'_>, options: &LoopOptions) -> Result<LoopConfig> {
    let mut lo_file_name = [0; LO_NAME_SIZE];
    let name = options.name.as_bytes();
    // the kernel makes the last byte a NUL
    if name.len() >= LO_NAME_SIZE {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "the name of a loop device is longer than {} bytes: {:?}",
                LO_NAME_SIZE - 1,
                options.name
            ),
        ));
    }
    lo_file_name[..name.len()].copy_from_slice(name);
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    Ok(LoopConfig {
        // a descriptor in use is never negative
        fd: file.as_raw_fd() as u32,
        block_size: options.block_size,
        info: LoopInfo64 {
            lo_device: 0,
            lo_inode: 0,
            lo_rdevice: 0,
            lo_offset: 0,
            lo_sizelimit: 0,
            lo_number: 0,
            lo_encrypt_type: 0,
            lo_encrypt_key_size: 0,
            lo_flags: flag(options.read_only, LO_FLAGS_READ_ONLY)
                | flag(options.autoclear, LO_FLAGS_AUTOCLEAR)
                | flag(options.direct_io, LO_FLAGS_DIRECT_IO),
            lo_file_name,
            lo_crypt_name: [0; LO_NAME_SIZE],
            lo_encrypt_key: [0; 32],
            lo_init: [0; 2],
        },
        reserved: [0; 8],
    })
}

/// Frees the loop device of this name; one in use is freed by its last user. If the number is that of another device by now, nothing is
/// done.
pub fn detach(index: u32, name: &str) -> Result<()> {
    let device = blockdev::open(&format!("loop{index}"))?;
    // while it is open, it cannot become another one
    if name_of(device.as_fd()).is_ok_and(|found| found != name) {
        return Ok(());
    }
    match clear(device.as_fd()) {
        // it is free already
        Ok(()) | Err(Errno::NXIO) => Ok(()),
        Err(errno) => Err(Error::with_source(
            Kind::Kernel,
            format!("LOOP_CLR_FD of loop{index}"),
            errno,
        )),
    }
}

/// A loop device in use, as it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The number N of `/dev/loopN`.
    pub index: u32,
    /// The name it was given in [`LoopOptions::name`] (or, from others, the start of their file's path).
    pub name: String,
    /// Its backing file, as the kernel shows it; the kernel appends ` (deleted)`.
    pub backing: PathBuf,
}

/// All loop devices in use.
pub fn attached() -> Result<Vec<Attached>> {
    let mut found = Vec::new();
    let entries =
        std::fs::read_dir("/sys/block").or_kind(Kind::Kernel, || "listing /sys/block".into())?;
    for entry in entries.filter_map(io::Result::ok) {
        let file_name = entry.file_name();
        let Some(index) = file_name
            .to_str()
            .and_then(|name| name.strip_prefix("loop")?.parse().ok())
        else {
            continue;
        };
        if let Some(backing) = backing(index) {
            found.push(Attached {
                index,
                // gone in the meantime: no name
                name: name(index).unwrap_or_default(),
                backing,
            });
        }
    }
    found.sort_by_key(|device| device.index);
    Ok(found)
}

/// The backing file of a loop device, or `None` for a free one.
pub fn backing(index: u32) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut text = std::fs::read(format!("/sys/block/loop{index}/loop/backing_file")).ok()?;
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    Some(std::ffi::OsString::from_vec(text).into())
}

/// The name that a loop device in use was given.
pub fn name(index: u32) -> Result<String> {
    let device = blockdev::open(&format!("loop{index}"))?;
    name_of(device.as_fd()).or_kind(Kind::Kernel, || format!("LOOP_GET_STATUS64 of loop{index}"))
}

fn name_of(device: BorrowedFd<'_>) -> Result<String, Errno> {
    // SAFETY: LOOP_GET_STATUS64 fills a `struct loop_info64`, which `LoopInfo64` is (its size is asserted above).
    let info = unsafe { ioctl::ioctl(device, Getter::<LOOP_GET_STATUS64, LoopInfo64>::new()) }?;
    let end = info
        .lo_file_name
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(LO_NAME_SIZE);
    Ok(String::from_utf8_lossy(&info.lo_file_name[..end]).into_owned())
}

fn free_index(control: BorrowedFd<'_>) -> Result<u32, Errno> {
    /// LOOP_CTL_GET_FREE: no argument; the result is the return value.
    struct GetFree;
    // SAFETY: the call has no argument, so the null pointer is never used; the output is the call's own return value.
    unsafe impl ioctl::Ioctl for GetFree {
        type Output = i32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> Opcode {
            LOOP_CTL_GET_FREE
        }
        fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            output: ioctl::IoctlOutput,
            _: *mut rustix::ffi::c_void,
        ) -> rustix::io::Result<i32> {
            Ok(output)
        }
    }
    // SAFETY: `control` is /dev/loop-control, and `GetFree` is its call.
    let index = unsafe { ioctl::ioctl(control, GetFree) }?;
    u32::try_from(index).map_err(|_| Errno::RANGE)
}

fn configure(device: BorrowedFd<'_>, config: LoopConfig) -> Result<(), Errno> {
    // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`, which `LoopConfig` is (its size is asserted above).
    unsafe { ioctl::ioctl(device, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) }
}

fn clear(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: LOOP_CLR_FD has no argument.
    unsafe { ioctl::ioctl(device, NoArg::<LOOP_CLR_FD>::new()) }
}
