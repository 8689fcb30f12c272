//! One overlay over many layers, detached.
//!
//! It is made in a temporary mount namespace, by a thread of its own. There, the mounts of the layers are attached below a tmpfs under the
//! shortest names, and the thread works in that directory. So 127 layers fit the limits of any kernel (an fsconfig string ends at 255
//! bytes, the options of mount(2) at 4096), and kernels before 6.15, where a detached mount cannot be a lower layer, work as well as later
//! ones.

use std::{
    ffi::OsString,
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, mkdirat, symlinkat},
    mount::{
        MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree,
    },
};

use super::FsContext;
use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::scratch,
};

/// The most lower layers that the kernel stacks (`OVL_MAX_STACK`).
pub const MAX_LOWERS: usize = 500;

/// A lower layer.
#[derive(Debug)]
pub enum Lower {
    /// A detached mount. It is used up: its descriptor attaches nowhere afterwards.
    Mount(OwnedFd),
    /// A directory of this mount namespace.
    Directory(PathBuf),
}

/// The writable layer: two empty directories of one file system, by absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upper {
    /// The upper directory.
    pub upper: PathBuf,
    /// The kernel's own working place.
    pub work: PathBuf,
}

/// An overlay to be made.
#[derive(Debug)]
pub struct Overlay {
    /// The layers, topmost first; no two of them the same file system. Without `upper` two at least.
    pub lowers: Vec<Lower>,
    /// The writable layer; none gives a read-only mount.
    pub upper: Option<Upper>,
    /// Device files of the layers work.
    pub devices: bool,
    /// The source in the mount table.
    pub source: String,
    /// Uses mount(2) also where the kernel could add layers one by one. Kernels before 6.5 get it by themselves.
    pub by_mount_call: bool,
}

// xino: one device number for all files, and stable inode numbers. The other two are never looked for in layers, because the image would
// be trusted with them.
const OPTIONS: [(&str, &str); 3] = [("xino", "on"), ("metacopy", "off"), ("index", "off")];

impl Overlay {
    /// Makes the mount. It lives as long as the descriptor, or where it is attached.
    pub fn mount(self) -> Result<OwnedFd> {
        let layers = self.lowers.len();
        self.check()
            .and_then(|()| {
                std::thread::scope(|scope| {
                    std::thread::Builder::new()
                        .name("overlay".into())
                        .spawn_scoped(scope, || self.assemble())
                        .or_kind(Kind::Io, || "starting a thread".into())?
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
            })
            .map_err(|error| error.context(format!("stacking {layers} layers with overlayfs")))
    }

    fn check(&self) -> Result<()> {
        let count = self.lowers.len();
        let fewest = if self.upper.is_some() { 1 } else { 2 };
        if (fewest..=MAX_LOWERS).contains(&count) {
            Ok(())
        } else {
            Err(Error::new(
                Kind::InvalidArgument,
                format!("{count} layers: {fewest} to {MAX_LOWERS} are supported"),
            ))
        }
    }

    /// On a thread that ends after it.
    fn assemble(self) -> Result<OwnedFd> {
        let _scratch = scratch::enter()?;
        let mut names = Vec::with_capacity(self.lowers.len());
        for (index, lower) in self.lowers.into_iter().enumerate() {
            let name = index.to_string();
            attach_lower(lower, &name)
                .map_err(|error| error.context(format!("layer {index} from the top")))?;
            names.push(name);
        }
        let upper = self.upper.as_ref().map(link_upper).transpose()?;
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, !self.devices);
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, upper.is_none());
        if self.by_mount_call {
            return by_mount_call(&self.source, &names, upper.as_ref(), attributes);
        }
        let context = FsContext::open("overlay")?;
        for name in &names {
            match context.string("lowerdir+", name) {
                Ok(()) => {}
                // the option came with Linux 6.5
                Err(_) if name == "0" => {
                    return by_mount_call(&self.source, &names, upper.as_ref(), attributes);
                }
                Err(error) => return Err(error),
            }
        }
        for (key, value) in OPTIONS {
            context.string(key, value)?;
        }
        match &upper {
            Some((upper, work)) => {
                context.string("upperdir", upper).map_err(|error| {
                    error.context(
                        "the file system of --root does not support a writable layer (overlay and NFS do not): use a --root on another one",
                    )
                })?;
                context.string("workdir", work)?;
            }
            None => context.flag("ro")?,
        }
        context.string("source", &self.source)?;
        context.create()?;
        context.mount(attributes)
    }
}

fn attach_lower(lower: Lower, name: &str) -> Result<()> {
    let tree = match lower {
        Lower::Mount(mount) => mount,
        Lower::Directory(path) => open_tree(
            CWD,
            &path,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .or_kind(Kind::Kernel, || format!("opening {}", path.display()))?,
    };
    mkdirat(CWD, name, Mode::RWXU).or_kind(Kind::Kernel, || format!("making directory {name}"))?;
    move_mount(
        &tree,
        "",
        CWD,
        name,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .or_kind(Kind::Kernel, || format!("mounting it as {name}"))
}

/// The names of the upper directories: the paths themselves, which the mount table then shows, or links to those that an option
/// string cannot hold.
fn link_upper(upper: &Upper) -> Result<(PathBuf, PathBuf)> {
    let name = |path: &Path, link: &str| {
        let bytes = path.as_os_str().as_bytes();
        if !path.is_absolute() {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("{} is not absolute", path.display()),
            ));
        }
        if bytes.len() <= 255 && !bytes.iter().any(|byte| b",:\\".contains(byte)) {
            return Ok(path.to_owned());
        }
        symlinkat(path, CWD, link).or_kind(Kind::Kernel, || format!("linking {link}"))?;
        Ok(link.into())
    };
    Ok((name(&upper.upper, "u")?, name(&upper.work, "w")?))
}

/// Before Linux 6.5: all layers are in one option string of mount(2), which mounts on a path; a detached clone of that mount is made.
fn by_mount_call(
    source: &str,
    lowers: &[String],
    upper: Option<&(PathBuf, PathBuf)>,
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    let mut options = format!("lowerdir={}", lowers.join(":")).into_bytes();
    for (key, value) in OPTIONS {
        options.extend_from_slice(format!(",{key}={value}").as_bytes());
    }
    if let Some((upper, work)) = upper {
        for (key, path) in [(",upperdir=", upper), (",workdir=", work)] {
            options.extend_from_slice(key.as_bytes());
            options.extend_from_slice(path.as_os_str().as_bytes());
        }
    }
    let options = std::ffi::CString::new(OsString::from_vec(options).into_encoded_bytes())
        .or_kind(Kind::InvalidArgument, || {
            "a path contains a NUL byte".into()
        })?;
    let mut flags = MountFlags::empty();
    flags.set(
        MountFlags::NODEV,
        attributes.contains(MountAttrFlags::MOUNT_ATTR_NODEV),
    );
    flags.set(
        MountFlags::RDONLY,
        attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY),
    );
    mkdirat(CWD, "m", Mode::RWXU).or_kind(Kind::Kernel, || "making directory m".into())?;
    mount(source, "m", "overlay", flags, options.as_c_str()).or_kind(Kind::Kernel, || {
        format!("mount(2) of overlay with {options:?}")
    })?;
    open_tree(
        CWD,
        "m",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .or_kind(Kind::Kernel, || "detaching the overlay".into())
}
