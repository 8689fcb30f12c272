//! A mount namespace for one thread, with an empty tmpfs to mount things in. It ends with the thread and all that the thread started
//! in it; nothing of it is seen outside.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::CWD,
    mount::{MountAttrFlags, MountPropagationFlags, MoveMountFlags, mount_change, move_mount},
    process::fchdir,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::{
    error::{Kind, Result, ResultExt},
    kernel::mount::FsContext,
};

/// Enters a new mount namespace, with the working directory in the tmpfs. Only for a thread that was made for this: it cannot go back.
pub(super) fn enter() -> Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    change_to_tmpfs()
}

/// As [`enter`], with further namespaces; and out of a chroot, if this is one, so that pivot_root(2) works. Absolute paths may then
/// lead elsewhere.
pub(super) fn enter_at_top(namespaces: UnshareFlags) -> Result<()> {
    unshare(namespaces | UnshareFlags::NEWNS)?;
    leave_chroot()?;
    change_to_tmpfs()
}

fn unshare(namespaces: UnshareFlags) -> Result<()> {
    // SAFETY: descriptors are not unshared, which safe code relies on; namespaces and the working directory are split off for a thread
    // that nothing else runs on.
    unsafe { unshare_unsafe(namespaces) }.or_kind(Kind::Kernel, || {
        format!("unshare of {namespaces:?} (it needs root)")
    })
}

fn change_to_tmpfs() -> Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )
    .or_kind(Kind::Kernel, || "making the mounts private".into())?;
    let context = FsContext::open("tmpfs")?;
    context.string("mode", "0755")?;
    context.create()?;
    let tmpfs = context.mount(MountAttrFlags::empty())?;
    // Over the root, which hides nothing from a thread whose root is below it. It has to be attached: before Linux 6.15 nothing can
    // be mounted inside a detached mount.
    attach(tmpfs.as_fd(), "/")?;
    fchdir(&tmpfs).or_kind(Kind::Kernel, || "entering the tmpfs".into())
}

/// Attaches a mount at a path, relative to the working directory or not.
pub(super) fn attach(mount: BorrowedFd<'_>, path: &str) -> Result<()> {
    move_mount(
        mount,
        "",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .or_kind(Kind::Kernel, || format!("mounting at {path}"))
}

/// Makes the namespace's own root this thread's. In a chroot the two differ, and then pivot_root(2) does not work.
fn leave_chroot() -> Result<()> {
    let namespace = File::open("/proc/thread-self/ns/mnt")
        .or_kind(Kind::Kernel, || "opening /proc/thread-self/ns/mnt".into())?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .or_kind(Kind::Kernel, || "entering the mount namespace".into())
}
