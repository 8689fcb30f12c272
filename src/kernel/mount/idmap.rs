//! Mounts that show other owners than their file system has (mount_setattr(2) with `MOUNT_ATTR_IDMAP`), by the maps of a user namespace
//! (user_namespaces(7)). The file system does not change.
//!
//! ext4 has such mounts since Linux 5.12, and overlayfs takes them as lower layers since 5.19.

use std::{
    io::{self, PipeReader, Read as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::{OpenTreeFlags, open_tree},
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};

use crate::error::{Error, Kind, Result, ResultExt as _};

/// Ranges of a map, at most (`UID_GID_MAP_MAX_EXTENTS`).
const MAX_RANGES: usize = 340;
/// A map is written in one piece of less than a page.
const MAX_BYTES: usize = 4096;

// include/uapi/linux/mount.h
const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr`
#[repr(C)]
struct MountAttributes {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// A range of owners, and their numbers on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IdRange {
    inside: u32,
    host: u32,
    count: u32,
}

/// The owners of a user namespace on the host: users and groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

impl IdMaps {
    /// Parses maps as `INSIDE:HOST:COUNT`, several with commas. Both have to map 0.
    pub fn parse(users: &str, groups: &str) -> Result<Self> {
        let maps = Self {
            users: parse(users).map_err(|error| error.context(format!("user map {users:?}")))?,
            groups: parse(groups)
                .map_err(|error| error.context(format!("group map {groups:?}")))?,
        };
        Ok(maps)
    }

    /// A user on the host; `None`: it is not mapped.
    pub fn user(&self, inside: u32) -> Option<u32> {
        host(&self.users, inside)
    }

    /// A group on the host; `None`: it is not mapped.
    pub fn group(&self, inside: u32) -> Option<u32> {
        host(&self.groups, inside)
    }

    /// The maps in the form that [`IdMaps::parse`] reads.
    pub fn texts(&self) -> [String; 2] {
        [&self.users, &self.groups].map(|ranges| {
            let ranges = ranges.iter();
            let ranges: Vec<_> = ranges
                .map(|it| format!("{}:{}:{}", it.inside, it.host, it.count))
                .collect();
            ranges.join(",")
        })
    }
}

fn parse(text: &str) -> Result<Vec<IdRange>> {
    let refused = |why: &str| Error::new(Kind::InvalidArgument, why);
    let mut ranges = Vec::new();
    for range in text.split(',') {
        if ranges.len() >= MAX_RANGES {
            return Err(refused(&format!("it has more than {MAX_RANGES} ranges")));
        }
        let numbers: Vec<Option<u32>> = range.split(':').map(|it| it.parse().ok()).collect();
        let [Some(inside), Some(host), Some(count @ 1..)] = numbers[..] else {
            return Err(refused("a range is INSIDE:HOST:COUNT, three numbers"));
        };
        // the last number is nobody's
        if [inside, host]
            .iter()
            .any(|start| start.checked_add(count).is_none())
        {
            return Err(refused("a range ends beyond the last number"));
        }
        ranges.push(IdRange {
            inside,
            host,
            count,
        });
    }
    if host(&ranges, 0).is_none() {
        return Err(refused("it does not map 0, the root user"));
    }
    match lines(&ranges).len() < MAX_BYTES {
        true => Ok(ranges),
        false => Err(refused("it is longer than the kernel takes")),
    }
}

fn host(ranges: &[IdRange], inside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = inside.checked_sub(range.inside)?;
        (offset < range.count).then(|| range.host + offset)
    })
}

/// The text of a map for the kernel.
fn lines(ranges: &[IdRange]) -> String {
    let ranges = ranges.iter();
    ranges
        .map(|it| format!("{} {} {}\n", it.inside, it.host, it.count))
        .collect()
}

/// A user namespace without a process.
#[derive(Debug)]
pub struct UserNamespace(OwnedFd);

impl UserNamespace {
    /// Makes a user namespace with these maps. It needs root. Blocks.
    pub fn new(maps: &IdMaps) -> Result<Self> {
        let context = || "making a user namespace".to_owned();
        let (mut told, tell) = io::pipe().or_kind(Kind::Io, context)?;
        let (wait, go) = io::pipe().or_kind(Kind::Io, context)?;
        // A namespace is made by a process that enters it: a child, which waits until its maps are written.
        // SAFETY: the child is a copy of this thread alone, so it makes system calls only: no allocation, no lock, nothing that is dropped.
        let child = match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()).or_kind(Kind::Kernel, context),
            // SAFETY: as above; the descriptors are open, the buffers are valid for a byte, and `_exit` ends the process at once.
            0 => unsafe {
                libc::close(go.as_raw_fd());
                let mut byte = match libc::unshare(libc::CLONE_NEWUSER) {
                    0 => 0,
                    _ => Errno::from_io_error(&io::Error::last_os_error())
                        .map_or(u8::MAX, |errno| errno.raw_os_error() as u8),
                };
                libc::write(tell.as_raw_fd(), (&raw const byte).cast(), 1);
                libc::read(wait.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(0)
            },
            pid => Child(Pid::from_raw(pid)),
        };
        drop((tell, wait));
        let made = child.namespace(&mut told, maps);
        drop(child);
        drop(go);
        made
    }
}

/// The process in a new namespace. It is killed when this is dropped.
struct Child(Option<Pid>);

impl Child {
    fn namespace(&self, told: &mut PipeReader, maps: &IdMaps) -> Result<UserNamespace> {
        let pid = self.0.map_or(0, |pid| pid.as_raw_nonzero().get());
        let mut byte = [0];
        told.read_exact(&mut byte)
            .or_kind(Kind::Kernel, || "a process for a user namespace".to_owned())?;
        if byte != [0] {
            let errno = Errno::from_raw_os_error(i32::from(byte[0]));
            let why =
                "the kernel refuses a user namespace (see user.max_user_namespaces in sysctl)";
            return Err(Error::with_source(Kind::Unsupported, why, errno));
        }
        for (name, ranges) in [("uid_map", &maps.users), ("gid_map", &maps.groups)] {
            let path = PathBuf::from(format!("/proc/{pid}/{name}"));
            std::fs::write(&path, lines(ranges))
                .or_kind(Kind::Kernel, || format!("writing {}", path.display()))?;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = openat(CWD, format!("/proc/{pid}/ns/user"), flags, Mode::empty());
        let namespace =
            namespace.or_kind(Kind::Kernel, || "opening a user namespace".to_owned())?;
        Ok(UserNamespace(namespace))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // it ends by itself too, when the other end of its pipe is closed
            let _ = kill_process(pid, Signal::KILL);
            let _ = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
        }
    }
}

/// A detached, read-only copy of the mount of a directory, with the owners that a user namespace gives them.
pub fn mapped(directory: &Path, namespace: &UserNamespace) -> Result<OwnedFd> {
    let context = || format!("mapping the owners of {}", directory.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, directory, flags).or_kind(Kind::Kernel, context)?;
    let attributes = MountAttributes {
        attr_set: MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.0.as_raw_fd() as u64,
    };
    set_attributes(tree.as_fd(), &attributes).map_err(|errno| {
        let (kind, why) = match errno {
            Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => (
                Kind::Unsupported,
                ": its file system or this kernel has no ID-mapped mounts",
            ),
            _ => (Kind::Kernel, ""),
        };
        Error::with_source(kind, format!("{}{why}", context()), errno)
    })?;
    Ok(tree)
}

fn set_attributes(mount: BorrowedFd<'_>, attributes: &MountAttributes) -> Result<(), Errno> {
    // SAFETY: the descriptor is open, the path is an empty string with its NUL, and the kernel reads a `struct mount_attr` of the given size,
    // which `MountAttributes` is.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}

/// Whether the owners of a directory on the file system of this path can be mapped, for overlayfs too. It needs root. Blocks.
pub fn is_possible(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.is_dir());
    let tried = existing.map(|directory| {
        let maps = IdMaps::parse("0:0:1", "0:0:1")?;
        mapped(directory, &UserNamespace::new(&maps)?)
    });
    is_stackable() && tried.is_some_and(|tried| tried.is_ok())
}

/// Whether overlayfs of this kernel takes ID-mapped mounts as lower layers.
pub fn is_stackable() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    is_at_least(&release, (5, 19))
}

fn is_at_least(release: &str, least: (u32, u32)) -> bool {
    let mut numbers = release.split(|it: char| !it.is_ascii_digit());
    let mut next = || numbers.next().and_then(|it| it.parse().ok()).unwrap_or(0);
    (next(), next()) >= least
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn maps_are_those_of_containerd() {
        let maps = IdMaps::parse("0:100000:65536", "0:1000:1,1:200000:10").unwrap();
        assert_eq!(
            [maps.user(0), maps.user(65535), maps.user(65536)],
            [Some(100_000), Some(165_535), None]
        );
        assert_eq!(
            [maps.group(0), maps.group(3), maps.group(11)],
            [Some(1000), Some(200_002), None]
        );
        assert_eq!(maps.texts(), ["0:100000:65536", "0:1000:1,1:200000:10"]);
        assert_eq!(lines(&maps.groups), "0 1000 1\n1 200000 10\n");
    }

    #[test]
    fn hostile_maps_are_refused() {
        let long = vec!["1:1:1"; MAX_RANGES].join(",");
        let wide = vec!["4000000000:4000000000:1"; 200].join(",");
        for map in [
            "",
            "0",
            "0:1",
            "0:1:2:3",
            "0:1:0",
            "1:0:1",
            "0:-1:1",
            "0:4294967295:1",
            "4294967290:0:10",
            "0:1:1,",
            "0 1 1",
            "0:1:99999999999",
            &format!("0:0:1,{long}"),
            &format!("0:0:1,{wide}"),
        ] {
            let error = IdMaps::parse(map, "0:0:1").unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{map}");
            IdMaps::parse("0:0:1", map).unwrap_err();
        }
    }

    #[test]
    fn releases_are_compared_by_their_numbers() {
        for (release, is) in [
            ("5.19.0-45-generic", true),
            ("6.1", true),
            ("10.0.0", true),
            ("5.4.0", false),
            ("4.19", false),
            ("x", false),
        ] {
            assert_eq!(is_at_least(release, (5, 19)), is, "{release}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "[0-9:, -]{0,40}|\\PC*") {
            if let Ok(maps) = IdMaps::parse(&text, "0:0:1") {
                let [users, groups] = maps.texts();
                prop_assert_eq!(IdMaps::parse(&users, &groups).unwrap(), maps);
            }
        }
    }
}
