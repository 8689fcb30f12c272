//! `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)): the mounts of a mount namespace.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::error::{Kind, Result, ResultExt};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number in its namespace.
    pub id: u64,
    /// The ID of the parent mount.
    pub parent: u64,
    /// Device numbers of the file system (`st_dev`), major and minor.
    pub device: (u32, u32),
    /// The root of the mount within the file system.
    pub root: PathBuf,
    /// The mount point, as seen from the root of the process.
    pub mount_point: PathBuf,
    /// Options of the mount itself (`ro,nodev`).
    pub options: String,
    /// The file system's type.
    pub fs_type: String,
    /// The source that was given.
    pub source: OsString,
    /// Options of the file system.
    pub super_options: OsString,
}

/// The mounts that this thread sees.
pub fn own() -> Result<Vec<Mount>> {
    // not /proc/self: a thread may have its own mount namespace
    read("thread-self")
}

/// The mounts that a process sees.
pub fn of(pid: u32) -> Result<Vec<Mount>> {
    read(&pid.to_string())
}

fn read(who: &str) -> Result<Vec<Mount>> {
    let path = format!("/proc/{who}/mountinfo");
    let text = fs::read(&path).or_kind(Kind::Kernel, || format!("reading {path}"))?;
    Ok(parse(&text))
}

/// A mount with this source, in the mount namespace of any process.
pub fn find_anywhere(source: &str) -> Result<Option<Mount>> {
    let mut found = None;
    in_namespaces(|_, mounts| {
        found = mounts.into_iter().find(|mount| mount.source == source);
        found.is_none()
    })?;
    Ok(found)
}

/// Opens the roots of the mounts with these sources, in the mount namespaces of all processes, as paths (`O_PATH`). A source is left out if
/// it has no mount, or what is mounted over it hides it.
pub fn open_anywhere(sources: &[String]) -> Result<HashMap<String, OwnedFd>> {
    let mut found = HashMap::new();
    in_namespaces(|pid, mounts| {
        for mount in &mounts {
            if let Some(source) = sources
                .iter()
                .find(|source| mount.source == source.as_str())
                && !found.contains_key(source)
                && let Some(opened) = open_of(pid, mount)
            {
                found.insert(source.clone(), opened);
            }
        }
        found.len() < sources.len()
    })?;
    Ok(found)
}

fn open_of(pid: u32, mount: &Mount) -> Option<OwnedFd> {
    let place = mount.mount_point.strip_prefix("/").ok()?;
    let path = Path::new("/proc")
        .join(pid.to_string())
        .join("root")
        .join(place);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = openat(CWD, &path, flags, Mode::empty()).ok()?;
    let device = rustix::fs::fstat(&opened).ok()?.st_dev;
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    (device == mount.device).then_some(opened)
}

/// Passes the mounts of each mount namespace that a process is in to the callback, with one process, until the callback returns that it
/// needs no more.
fn in_namespaces(mut wants_more: impl FnMut(u32, Vec<Mount>) -> bool) -> Result<()> {
    let processes = fs::read_dir("/proc").or_kind(Kind::Kernel, || "listing /proc".into())?;
    let mut seen = HashSet::new();
    for process in processes.filter_map(io::Result::ok) {
        let pid = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // those that end meanwhile are left out
        if let Some(pid) = pid
            && let Ok(namespace) = fs::read_link(process.path().join("ns/mnt"))
            && seen.insert(namespace)
            && let Ok(mounts) = of(pid)
            && !wants_more(pid, mounts)
        {
            break;
        }
    }
    Ok(())
}

/// The topmost mount whose mount point is this path.
pub fn at(path: &Path) -> Result<Option<Mount>> {
    let path = match fs::canonicalize(path) {
        Ok(path) => path,
        // a mount whose server is gone cannot be resolved, but it can still be listed
        Err(_) => std::path::absolute(path)
            .or_kind(Kind::InvalidArgument, || format!("{}", path.display()))?,
    };
    Ok(topmost(&own()?, &path).cloned())
}

/// The topmost of these mounts at this mount point: the one that no other mount there has as its parent. (The order of the lines is not
/// the order of mounting.)
pub fn topmost<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let here = || mounts.iter().filter(|mount| mount.mount_point == path);
    here().find(|mount| here().all(|other| other.parent != mount.id))
}

/// The mounts in all mount namespaces that processes are in.
pub fn everywhere() -> Result<Vec<Mount>> {
    let mut all = Vec::new();
    in_namespaces(|_, mounts| {
        all.extend(mounts);
        true
    })?;
    Ok(all)
}

/// Parses the file. Lines that cannot be parsed are left out: the kernel writes none.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = parse_device(fields.next()?)?;
    let root = unescape(fields.next()?).into();
    let mount_point = unescape(fields.next()?).into();
    let options = String::from_utf8_lossy(fields.next()?).into_owned();
    // optional fields (peer groups) up to a lone dash
    fields.find(|&field| field == b"-")?;
    Some(Mount {
        id,
        parent,
        device,
        root,
        mount_point,
        options,
        fs_type: String::from_utf8_lossy(fields.next()?).into_owned(),
        source: unescape(fields.next()?),
        super_options: unescape(fields.next()?),
    })
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `8:17` as major and minor.
pub(crate) fn parse_device(text: &[u8]) -> Option<(u32, u32)> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The kernel writes space, tab, newline, backslash (and `#`) as a backslash and three octal digits.
fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = tail;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

impl Mount {
    /// Whether the mount is below this path (or at it).
    pub fn is_below(&self, path: &Path) -> bool {
        self.mount_point.starts_with(path)
    }

    /// Whether an option of the mount is set.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|set| set == option)
    }

    /// The value of an option of the file system, if it has one.
    pub fn super_option(&self, key: &str) -> Option<&[u8]> {
        self.super_options
            .as_bytes()
            .split(|&byte| byte == b',')
            .find_map(|option| option.strip_prefix(key.as_bytes())?.strip_prefix(b"="))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_manual() {
        let mounts = parse(
            b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
              37 35 0:52 / /a\\040b\\134c\\011d\\012e\\043 ro,nodev - overlay socinbd ro,lowerdir=0:1,xino=on\n",
        );
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].id, 36);
        assert_eq!(mounts[0].parent, 35);
        assert_eq!(mounts[0].device, (98, 0));
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[0].mount_point, Path::new("/mnt2"));
        assert_eq!(mounts[0].fs_type, "ext3");
        assert_eq!(mounts[0].source, "/dev/root");
        assert_eq!(mounts[1].mount_point, Path::new("/a b\\c\td\ne#"));
        assert!(mounts[1].has_option("nodev") && !mounts[1].has_option("node"));
        assert_eq!(mounts[1].super_option("lowerdir"), Some(&b"0:1"[..]));
        assert!(mounts[1].is_below(Path::new("/")) && !mounts[1].is_below(Path::new("/a")));
    }

    #[test]
    fn the_topmost_mount_is_the_one_that_nothing_stands_on() {
        let mounts = parse(
            b"9 8 0:9 / /a ro - overlay top ro\n2 1 0:2 / /b ro - overlay other ro\n\
              7 1 0:7 / /a ro - overlay below ro\n8 7 0:8 / /a ro - overlay middle ro\n",
        );
        let top = |path: &str| Some(topmost(&mounts, Path::new(path))?.id);
        assert_eq!((top("/a"), top("/b"), top("/c")), (Some(9), Some(2), None));
    }

    #[test]
    fn what_is_no_escape_stays() {
        assert_eq!(unescape(b"\\8\\04\\400\\"), "\\8\\04\\400\\");
        assert_eq!(unescape(b"\\303\\244"), "ä");
    }

    #[test]
    fn broken_lines_are_left_out() {
        assert_eq!(
            parse(b"\n1 2\n36 35 98 / / rw - a b c\n36 35 98:0 / / rw a b c\n"),
            []
        );
    }

    #[test]
    fn own_mounts_have_a_root() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert!(at(Path::new("/proc/self/task")).unwrap().is_none());
    }
}
