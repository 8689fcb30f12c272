//! The root of a container: how it is entered, and what a program expects in it besides the files of the image.

use std::{
    fs,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::{PermissionsExt, symlink},
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, StatVfsMountFlags, fstat, fstatvfs, makedev, mkdirat,
        mknodat, statat, statvfs,
    },
    io::Errno,
    mount::{
        MountAttrFlags, MountFlags, OpenTreeFlags, UnmountFlags, mount_bind, mount_move,
        mount_remount, open_tree, unmount,
    },
    process::{chdir, chroot, pivot_root},
};

use crate::{
    error::{Kind, Result, ResultExt},
    kernel::{
        mount::{
            FsContext,
            overlay::{Lower, Overlay},
        },
        scratch,
    },
};

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;

/// A file of the host, to be shown in the container; `None` when the host has none.
pub(super) fn host_file(path: &str) -> Option<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags).ok()
}

/// The directories that something is mounted on in every container.
const MOUNT_POINTS: [&str; 3] = ["dev", "proc", "sys"];

/// The root, with the directories that are mounted on. If it lacks some of them and is read-only (an image's own files alone), they are in
/// a layer on top of it; it stays read-only.
pub(super) fn with_mount_points(root: OwnedFd) -> Result<OwnedFd> {
    let describe = || "reading the root of the image".to_owned();
    let flags = fstatvfs(&root).or_kind(Kind::Kernel, describe)?.f_flag;
    let is_missing = |name: &&str| {
        let found = statat(&root, *name, AtFlags::SYMLINK_NOFOLLOW);
        found.err() == Some(Errno::NOENT)
    };
    let missing: Vec<_> = MOUNT_POINTS.into_iter().filter(is_missing).collect();
    if missing.is_empty() || !flags.contains(StatVfsMountFlags::RDONLY) {
        return Ok(root);
    }
    // the root is seen with the attributes that it has in the topmost layer
    let stat = fstat(&root).or_kind(Kind::Kernel, describe)?;
    let context = FsContext::open("tmpfs")?;
    context.string("mode", format!("{:o}", stat.st_mode & 0o7777))?;
    context.string("uid", stat.st_uid.to_string())?;
    context.string("gid", stat.st_gid.to_string())?;
    context.create()?;
    let top = context.mount(MountAttrFlags::empty())?;
    for name in missing {
        mkdirat(&top, name, Mode::from_raw_mode(0o755))
            .or_kind(Kind::Kernel, || format!("making a directory {name}"))?;
    }
    let both = Overlay {
        lowers: vec![Lower::Mount(top), Lower::Mount(root)],
        upper: None,
        devices: !flags.contains(StatVfsMountFlags::NODEV),
        source: "socinbd-run".to_owned(),
        by_mount_call: false,
    };
    both.mount()
}

/// Makes a detached mount the root of this thread's mount namespace, and takes all else out of it. The working directory is in the
/// namespace's tmpfs.
pub(super) fn enter(root: BorrowedFd<'_>) -> Result<()> {
    fs::create_dir("root").or_kind(Kind::Kernel, || "making a directory".into())?;
    scratch::attach(root, "root")?;
    chdir("root").or_kind(Kind::Kernel, || "entering the root".into())?;
    match pivot_root(".", ".") {
        // The old root has landed on top of the new one, and the tmpfs is still on top of the old one: off with both.
        Ok(()) => {
            for what in ["the tmpfs", "the host's root"] {
                unmount(".", UnmountFlags::DETACH)
                    .or_kind(Kind::Kernel, || format!("leaving {what}"))?;
            }
        }
        // a host that runs from its initramfs has nothing below its root that could be pivoted
        Err(Errno::INVAL) => {
            mount_move(".", "/")
                .or_kind(Kind::Kernel, || "moving the root of the image to /".into())?;
            chroot(".").or_kind(Kind::Kernel, || "changing the root".into())?;
        }
        Err(errno) => {
            return Err(errno).or_kind(Kind::Kernel, || "pivot_root into the image".into());
        }
    }
    chdir("/").or_kind(Kind::Kernel, || "entering /".into())
}

/// From here on paths lead nowhere outside of the image's root.
pub(super) fn furnish(resolv_conf: Option<OwnedFd>) -> Result<()> {
    // so that modes are exact; the program gets the usual mask back
    rustix::process::umask(Mode::empty());
    dev().map_err(|error| error.context("setting up /dev"))?;
    directory("/sys")?;
    mount("sysfs", &[], "/sys", NOSUID | NOEXEC | NODEV | RDONLY)?;
    // in a cgroup namespace, this container's own part of the tree; a host with cgroup v1 has none to show
    if Path::new("/sys/fs/cgroup").is_dir() {
        let _ = mount(
            "cgroup2",
            &[],
            "/sys/fs/cgroup",
            NOSUID | NOEXEC | NODEV | RDONLY,
        );
    }
    directory("/proc")?;
    if let Some(file) = resolv_conf {
        show_file(&file, "/etc/resolv.conf");
    }
    Ok(())
}

/// Makes the root read-only; mounts in it are not changed.
pub(super) fn make_read_only() -> Result<()> {
    protect("/")
}

/// Makes one mount read-only and leaves its other attributes.
fn protect(path: &str) -> Result<()> {
    let describe = || format!("making {path} read-only");
    let now = statvfs(path).or_kind(Kind::Kernel, describe)?.f_flag;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    flags.set(MountFlags::NODEV, now.contains(StatVfsMountFlags::NODEV));
    flags.set(MountFlags::NOSUID, now.contains(StatVfsMountFlags::NOSUID));
    flags.set(MountFlags::NOEXEC, now.contains(StatVfsMountFlags::NOEXEC));
    mount_remount(path, flags, "").or_kind(Kind::Kernel, describe)
}

/// `/proc` of this pid namespace, as containers see it. Called in the new pid namespace.
pub(super) fn proc() -> Result<()> {
    mount("proc", &[], "/proc", NOSUID | NOEXEC | NODEV)?;
    // The paths that OCI runtimes mask or make read-only: they belong to the host, and root in the container is root. No kernel has all of
    // them.
    for path in [
        "/proc/bus",
        "/proc/fs",
        "/proc/irq",
        "/proc/sys",
        "/proc/sysrq-trigger",
    ] {
        if mount_bind(path, path).is_ok() {
            protect(path)?;
        }
    }
    for path in [
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/sched_debug",
    ] {
        if Path::new(path).exists() {
            mount_bind("/dev/null", path).or_kind(Kind::Kernel, || format!("hiding {path}"))?;
        }
    }
    for path in ["/proc/acpi", "/proc/scsi", "/proc/asound", "/sys/firmware"] {
        if Path::new(path).is_dir() {
            mount("tmpfs", &[("size", "0")], path, RDONLY)?;
        }
    }
    Ok(())
}

fn dev() -> Result<()> {
    directory("/dev")?;
    mount(
        "tmpfs",
        &[("mode", "0755"), ("size", "64k")],
        "/dev",
        NOSUID | NOEXEC,
    )?;
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        let path = Path::new("/dev").join(name);
        mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            makedev(major, minor),
        )
        .or_kind(Kind::Kernel, || format!("making {}", path.display()))?;
    }
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ] {
        symlink(target, Path::new("/dev").join(name))
            .or_kind(Kind::Kernel, || format!("making /dev/{name}"))?;
    }
    for name in ["pts", "shm", "mqueue"] {
        directory(&format!("/dev/{name}"))?;
    }
    let terminals = [
        ("newinstance", ""),
        ("ptmxmode", "0666"),
        ("mode", "0620"),
        ("gid", "5"),
    ];
    mount("devpts", &terminals, "/dev/pts", NOSUID | NOEXEC)?;
    mount(
        "tmpfs",
        &[("mode", "1777"), ("size", "64m")],
        "/dev/shm",
        NOSUID | NOEXEC | NODEV,
    )?;
    // not in every kernel
    let _ = mount("mqueue", &[], "/dev/mqueue", NOSUID | NOEXEC | NODEV);
    Ok(())
}

fn mount(
    fs_type: &'static str,
    options: &[(&str, &str)],
    path: &str,
    attributes: MountAttrFlags,
) -> Result<()> {
    let context = FsContext::open(fs_type)?;
    for (key, value) in options {
        if value.is_empty() {
            context.flag(key)?;
        } else {
            context.string(key, value)?;
        }
    }
    context.create()?;
    let mount = context.mount(attributes)?;
    use std::os::fd::AsFd;
    scratch::attach(mount.as_fd(), path)
}

/// Makes a directory, unless something is there.
fn directory(path: &str) -> Result<()> {
    let made = match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    made.or_kind(Kind::Kernel, || format!("making the directory {path}"))
}

/// Shows a host's file read-only at a path. Without it the image's own file stays.
fn show_file(file: &OwnedFd, path: &str) {
    use std::os::fd::AsFd;
    if !Path::new(path).exists() {
        let _ = fs::write(path, "")
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o644)));
    }
    let shown = scratch::attach(file.as_fd(), path).and_then(|()| protect(path));
    if let Err(error) = shown {
        tracing::debug!(
            "the host's {path} is not available in the container: {}",
            error.report()
        );
    }
}
