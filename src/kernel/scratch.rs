//! A mount namespace for one thread, with an empty tmpfs to mount things in. It ends with the thread and all that the thread started in
//! it; nothing of it is visible outside.

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

/// The stay of this thread in its own namespace. When this is dropped, the thread is back, and all mounts made there are gone. (A thread
/// that merely exits is joined a moment before its namespaces end, and devices would be in use for that moment.)
#[derive(Debug)]
#[must_use]
pub(super) struct Scratch {
    home: File,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(errno) =
            move_into_link_name_space(self.home.as_fd(), Some(LinkNameSpaceType::Mount))
        {
            tracing::warn!("leaving a mount namespace: {errno}; it ends with its thread");
        }
    }
}

/// Enters a new mount namespace, with the working directory in the tmpfs. Only for a thread that was made for this: the rest of its
/// state does not come back.
pub(super) fn enter() -> Result<Scratch> {
    let scratch = unshare(UnshareFlags::NEWNS)?;
    change_to_tmpfs()?;
    Ok(scratch)
}

/// Like [`enter`], with further namespaces; and out of a chroot, if there is one, so that pivot_root(2) works. Absolute paths may then
/// lead elsewhere.
pub(super) fn enter_at_top(namespaces: UnshareFlags) -> Result<Scratch> {
    let scratch = unshare(namespaces | UnshareFlags::NEWNS)?;
    // In a chroot the namespace's own root is another than this thread's, and pivot_root(2) does not work.
    let namespace = own_namespace()?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .or_kind(Kind::Kernel, || "entering the mount namespace".into())?;
    change_to_tmpfs()?;
    Ok(scratch)
}

fn own_namespace() -> Result<File> {
    File::open("/proc/thread-self/ns/mnt")
        .or_kind(Kind::Kernel, || "opening /proc/thread-self/ns/mnt".into())
}

fn unshare(namespaces: UnshareFlags) -> Result<Scratch> {
    let home = own_namespace()?;
    // SAFETY: descriptors are not unshared, which safe code relies on; namespaces and the working directory are split off for a thread
    // that nothing else runs on.
    unsafe { unshare_unsafe(namespaces) }.or_kind(Kind::Kernel, || {
        format!("unshare of {namespaces:?} (it needs root)")
    })?;
    Ok(Scratch { home })
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
