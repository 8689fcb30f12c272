//! Kernel interfaces: nbd over generic netlink, loop, device mapper, FUSE, mounts, namespaces. The only module with `unsafe` for system
//! calls.
//!
//! All functions block except the one that waits for the end of mounts; async code calls them on a blocking thread. A guard owns what a
//! function makes: dropping the guard removes it, `keep` leaves it. A mount is made *detached*, as a descriptor that can be sent to
//! another process, and becomes visible in a mount namespace only with [`mount::attach`].

#![allow(
    unsafe_code,
    reason = "system calls that have no safe interface; each use says why it is sound"
)]

pub mod blockdev;
pub mod busy;
pub mod dm;
pub mod fdpass;
pub mod fuse;
pub mod handover;
pub mod kept;
pub mod loopdev;
pub mod memory;
pub mod mount;
pub mod namespace;
pub mod nbd;
pub mod probe;
mod scratch;
pub mod session;
pub mod user;

use std::process::{Command, Stdio};

use rustix::io::Errno;

use crate::error::{Error, Kind, Result, ResultExt};

/// Why the node of a driver could not be opened. That the driver is missing is said only of errors that mean so.
fn driver_error(node: &str, module: &str, errno: Errno) -> Error {
    let (kind, why) = match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => (
            Kind::Unsupported,
            format!(
                " (the kernel has no {module}, or this container does not have the node: try `modprobe {module}`)"
            ),
        ),
        Errno::PERM | Errno::ACCESS => (Kind::Unauthorized, String::new()),
        _ => (Kind::Kernel, String::new()),
    };
    Error::with_source(kind, format!("opening {node}{why}"), errno)
}

/// The identifier of the current boot (random(4)).
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).or_kind(Kind::Kernel, || format!("reading {path}"))?;
    Ok(text.trim().to_owned())
}

/// Loads a kernel module. The caller checks for the feature of the module to see whether it worked.
fn load_module(name: &str) {
    let _ = Command::new("modprobe")
        .args(["-q", name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
