//! Block devices by their kernel name (`nbd0`, `loop3`): size, queue settings, and a node to open when `/dev` has none.

use std::{
    fs, io,
    num::NonZeroU64,
    ops::Range,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Advice, CWD, FileType, Mode, OFlags, fadvise, makedev, mknodat, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use crate::error::{Error, Kind, Result, ResultExt};

/// How long to wait for a device that the kernel has just been given to come up. It takes microseconds; the bound is for a device
/// whose server never answers.
const SETTLE: Duration = Duration::from_secs(10);

fn sys(name: &str) -> PathBuf {
    Path::new("/sys/block").join(name)
}

fn read_number(path: &Path) -> Result<u64> {
    let text =
        fs::read_to_string(path).or_kind(Kind::Kernel, || format!("reading {}", path.display()))?;
    text.trim()
        .parse()
        .or_kind(Kind::Kernel, || format!("reading {}", path.display()))
}

fn write_number(path: &Path, value: u64) -> Result<()> {
    fs::write(path, value.to_string()).or_kind(Kind::Kernel, || {
        format!("writing {value} to {}", path.display())
    })
}

/// The device's size in bytes.
pub fn size(name: &str) -> Result<u64> {
    // sysfs counts 512-byte units whatever the device's block size is
    read_number(&sys(name).join("size"))?
        .checked_mul(512)
        .ok_or_else(|| {
            Error::new(
                Kind::Kernel,
                format!("/sys/block/{name}/size is out of range"),
            )
        })
}

/// Waits until the device has this size; an error of kind `Unavailable` when it does not come.
pub fn wait_for_size(name: &str, bytes: u64) -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    let mut pause = Duration::from_micros(100);
    loop {
        let seen = size(name);
        match seen {
            Ok(seen) if seen == bytes => return Ok(()),
            _ if Instant::now() >= deadline => {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!(
                        "/dev/{name} did not get its size of {bytes} bytes within {SETTLE:?} (it has {seen:?})"
                    ),
                ));
            }
            _ => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// The kernel's read-ahead on the device in KiB.
pub fn read_ahead(name: &str) -> Result<u64> {
    read_number(&sys(name).join("queue/read_ahead_kb"))
}

/// Sets the maximum request size, if given, and then the read-ahead, both in KiB: writing `max_sectors_kb` resets `read_ahead_kb`, so the
/// order matters. The request size is capped at the maximum of the device. If one of the two cannot be set, the other is tried all the
/// same.
pub fn set_read_ahead(name: &str, max_request_kb: Option<u64>, read_ahead_kb: u64) -> Result<()> {
    let queue = sys(name).join("queue");
    let largest = max_request_kb.map_or(Ok(()), |kb| {
        let most = read_number(&queue.join("max_hw_sectors_kb"))?;
        write_number(&queue.join("max_sectors_kb"), kb.min(most))
    });
    let read_ahead = write_number(&queue.join("read_ahead_kb"), read_ahead_kb);
    largest.and(read_ahead)
}

/// The device's numbers, from sysfs.
pub fn numbers(name: &str) -> Result<(u32, u32)> {
    let path = sys(name).join("dev");
    let text = fs::read_to_string(&path)
        .or_kind(Kind::Kernel, || format!("reading {}", path.display()))?;
    super::mount::info::parse_device(text.trim().as_bytes()).ok_or_else(|| {
        Error::new(
            Kind::Kernel,
            format!("{} has the unexpected content {text:?}", path.display()),
        )
    })
}

/// A device node that can be opened: `/dev/NAME` where it is there and right, or a node of our own that no directory shows.
#[derive(Debug)]
pub struct Node {
    path: PathBuf,
    _private: Option<OwnedFd>,
}

impl Node {
    /// The path under which this process can open it while this value lives.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the device for reading.
    pub fn open(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(CWD, &self.path, flags, Mode::empty()).or_kind(Kind::Kernel, || {
            format!("opening the device {}", self.path.display())
        })
    }
}

/// Finds the node of a block device. Without udev or devtmpfs, `/dev` may not have it; then a node is made in a tmpfs that is not mounted
/// anywhere.
pub fn node(name: &str) -> Result<Node> {
    let (major, minor) = numbers(name)?;
    let device = makedev(major, minor);
    let path = Path::new("/dev").join(name);
    if let Ok(stat) = rustix::fs::stat(&path)
        && FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
        && stat.st_rdev == device
    {
        return Ok(Node {
            path,
            _private: None,
        });
    }
    let private = private_node(device)
        .or_kind(Kind::Kernel, || format!("making a device node for {name}"))?;
    use std::os::fd::AsRawFd;
    Ok(Node {
        path: format!("/proc/self/fd/{}", private.as_raw_fd()).into(),
        _private: Some(private),
    })
}

fn private_node(device: u64) -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&tmpfs)?;
    let root = fsmount(
        &tmpfs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    mknodat(
        &root,
        "node",
        FileType::BlockDevice,
        Mode::RUSR | Mode::WUSR,
        device,
    )?;
    Ok(openat(
        &root,
        "node",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Whether something (a mount) has the device for itself.
pub fn is_in_use(path: &Path) -> bool {
    let exclusive = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    openat(CWD, path, exclusive, Mode::empty()).err() == Some(rustix::io::Errno::BUSY)
}

/// Like [`is_in_use`], by the kernel name of a device; a device that does not exist is not in use.
pub fn is_used(name: &str) -> bool {
    node(name).is_ok_and(|node| is_in_use(node.path()))
}

/// Makes the kernel read a range of a device into its page cache, without waiting for it.
pub fn will_need(node: &Node, range: &Range<u64>) -> Result<()> {
    // open only for this call: a process that has a device open keeps it in use
    let device = node.open()?;
    let length = NonZeroU64::new(range.end.saturating_sub(range.start));
    fadvise(&device, range.start, length, Advice::WillNeed).or_kind(Kind::Kernel, || {
        format!("reading {} ahead", node.path.display())
    })
}

/// Opens a block device for reading.
pub fn open(name: &str) -> Result<OwnedFd> {
    node(name)?.open()
}
