//! The processes that keep a mount busy.

use std::{collections::BTreeSet, fmt, fs, io, path::Path};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::mount::info;
use crate::error::{Error, Kind, Result, ResultExt};

/// Maximum number of users that are listed; further ones are counted.
const MAX_NAMES: usize = 20;

/// How a process uses a mount.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Use {
    /// Its working directory.
    WorkingDirectory,
    /// Its root.
    Root,
    /// A file that it has open.
    OpenFile,
    /// A mapped file: the program, a library, data.
    Mapping,
    /// The process sees a copy of the mount in another mount namespace. An unmount here does not fail because of it, but the file system
    /// stays in use.
    Namespace,
}

/// A process that uses a mount.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct User {
    /// Its number.
    pub pid: u32,
    /// Its name (`/proc/<pid>/comm`).
    pub name: String,
    /// How it uses the mount.
    pub uses: BTreeSet<Use>,
}

impl User {
    /// Whether it holds files of the mount, and not only a copy of it in another namespace.
    pub fn holds_mount(&self) -> bool {
        self.uses.iter().any(|&held| held != Use::Namespace)
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.pid, self.name)
    }
}

/// The processes that keep the file system mounted at this path in use, by number. Those that end meanwhile are left out.
pub fn users(path: &Path) -> Result<Vec<User>> {
    let mount = info::at(path)?.ok_or_else(|| {
        Error::new(
            Kind::NotFound,
            format!("nothing is mounted at {}", path.display()),
        )
    })?;
    find(mount.device, Some(mount.id))
}

/// The processes that keep the file system with this device number in use, by number, in whatever mount namespaces it is mounted, or
/// in none any more.
pub fn users_of_device(device: (u32, u32)) -> Result<Vec<User>> {
    find(device, None)
}

/// The names of users in one line.
pub fn names(users: &[User]) -> String {
    let shown = users.iter().take(MAX_NAMES).map(ToString::to_string);
    let mut names = shown.collect::<Vec<_>>().join(", ");
    if let Some(more @ 1..) = users.len().checked_sub(MAX_NAMES) {
        names.push_str(&format!(" and {more} more"));
    }
    names
}

fn find(device: (u32, u32), mount: Option<u64>) -> Result<Vec<User>> {
    let own_namespace = fs::read_link("/proc/thread-self/ns/mnt").ok();
    let mut users = Vec::new();
    let processes = fs::read_dir("/proc").or_kind(Kind::Kernel, || "listing /proc".into())?;
    for entry in processes.filter_map(io::Result::ok) {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let mut uses = uses(&entry.path(), device, mount);
        if fs::read_link(entry.path().join("ns/mnt")).ok() != own_namespace
            && info::of(pid).is_ok_and(|mounts| mounts.iter().any(|mount| mount.device == device))
        {
            uses.insert(Use::Namespace);
        }
        if !uses.is_empty() {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            users.push(User {
                pid,
                name: name.trim_end().to_owned(),
                uses,
            });
        }
    }
    users.sort_by_key(|user| user.pid);
    Ok(users)
}

fn uses(process: &Path, device: (u32, u32), mount: Option<u64>) -> BTreeSet<Use> {
    let mut uses = BTreeSet::new();
    for (link, what) in [
        ("cwd", Use::WorkingDirectory),
        ("root", Use::Root),
        ("exe", Use::Mapping),
    ] {
        if is_on(&process.join(link), device, mount) {
            uses.insert(what);
        }
    }
    for (folder, what) in [("fd", Use::OpenFile), ("map_files", Use::Mapping)] {
        let links = fs::read_dir(process.join(folder));
        if links
            .into_iter()
            .flatten()
            .filter_map(io::Result::ok)
            .any(|link| is_on(&link.path(), device, mount))
        {
            uses.insert(what);
        }
    }
    uses
}

/// Whether the target of a link in /proc is on the mount, or on the file system in any mount. The kernel follows the link without a path
/// look-up, so this works across namespaces; no file system is asked (AT_STATX_DONT_SYNC).
fn is_on(link: &Path, device: (u32, u32), mount: Option<u64>) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    statx(CWD, link, flags, StatxFlags::MNT_ID).is_ok_and(|stat| {
        let has_id = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        (has_id && Some(stat.stx_mnt_id) == mount)
            || (stat.stx_dev_major, stat.stx_dev_minor) == device
    })
}
