//! The user of an image's program: the `User` of its configuration (`user`, `uid`, `user:group`, ...), looked up in `/etc/passwd` and
//! `/etc/group` of the image.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2},
    io::Errno,
};

use crate::error::{Error, Kind, Result, ResultExt};

/// Maximum number of bytes of a file that are read; the author of the image wrote it.
const MOST: u64 = 4 << 20;

/// Numbers to run a program with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// The user's home directory, from `/etc/passwd`.
    pub home: Option<PathBuf>,
}

impl Credentials {
    /// Root with its own group.
    pub fn root() -> Self {
        Self {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: None,
        }
    }
}

/// Resolves a user string inside a root (a directory, or a detached mount), as container runtimes do: a number need not be in
/// `/etc/passwd` (its group is then 0); further groups of a user are those of `/etc/group`, unless a group is given.
pub fn resolve(root: impl AsFd, user: &str) -> Result<Credentials> {
    let (user, group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let passwd = read(root.as_fd(), "etc/passwd")?;
    let groups = read(root.as_fd(), "etc/group")?;
    resolve_in(&passwd, &groups, user, group)
}

fn resolve_in(passwd: &str, groups: &str, user: &str, group: Option<&str>) -> Result<Credentials> {
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let mut entries = passwd.lines().filter_map(PasswdEntry::parse);
    // a numeric name is looked up as a name first
    let entry = entries
        .clone()
        .find(|entry| entry.name == user)
        .or_else(|| entries.find(|entry| Some(entry.uid) == number));
    let uid = match (&entry, number) {
        (Some(entry), _) => entry.uid,
        (None, Some(number)) => number,
        (None, None) => {
            return Err(Error::new(
                Kind::NotFound,
                format!("the image's /etc/passwd has no user {user:?}"),
            ));
        }
    };
    let mut credentials = Credentials {
        uid,
        gid: entry.as_ref().map_or(0, |entry| entry.gid),
        groups: Vec::new(),
        home: entry
            .as_ref()
            .map(|entry| PathBuf::from(entry.home))
            .filter(|home| home.is_absolute()),
    };
    let mut known = groups.lines().filter_map(GroupEntry::parse);
    match (group, entry) {
        (Some(group), _) => {
            credentials.gid = known
                .find(|entry| entry.name == group)
                .map(|entry| entry.gid)
                .or_else(|| group.parse().ok())
                .ok_or_else(|| {
                    Error::new(
                        Kind::NotFound,
                        format!("the image's /etc/group has no group {group:?}"),
                    )
                })?;
        }
        (None, Some(entry)) => {
            credentials.groups = known
                .filter(|group| group.members.split(',').any(|member| member == entry.name))
                .map(|group| group.gid)
                .collect();
        }
        (None, None) => {}
    }
    Ok(credentials)
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> PasswdEntry<'a> {
    /// `name:password:uid:gid:comment:home:shell`
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Self {
            name,
            uid,
            gid,
            home,
        })
    }
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> GroupEntry<'a> {
    /// `name:password:gid:member,member`
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        Some(Self { name, gid, members })
    }
}

/// A file of the image as text; empty if it does not exist. Links in it cannot lead out of the root.
fn read(root: impl AsFd, path: &str) -> Result<String> {
    let file = match open_inside(root, Path::new(path)) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(String::new()),
        Err(errno) => {
            return Err(Error::with_source(
                Kind::Io,
                format!("opening the image's /{path}"),
                errno,
            ));
        }
    };
    let stat = fstat(&file).or_kind(Kind::Io, || format!("the image's /{path}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(String::new());
    }
    let mut text = Vec::new();
    File::from(file)
        .take(MOST)
        .read_to_end(&mut text)
        .or_kind(Kind::Io, || format!("reading the image's /{path}"))?;
    // text that is not UTF-8 is in comments, or in names that no configuration (JSON) can have
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Opens a file for reading as if this directory were `/`. A fifo does not block, a terminal does not become ours.
fn open_inside(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    openat2(
        root,
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # comment\n\
        www:x:33:34:web:/var/www:/bin/sh\n\
        broken:x:abc:0::/:\n\
        7:x:70:71::/seven:\n\
        short:x:80:81\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,www\nweb:x:34:\nlog:x:44:other,www\nnothing:x\n\
        longer:x:50:www2,awww,www-data\nnone:x:51:\nempty:x:52:,\nalone:x:53:ww\n";

    fn resolved(user: &str, group: Option<&str>) -> (u32, u32, Vec<u32>, Option<String>) {
        let found = resolve_in(PASSWD, GROUP, user, group).unwrap();
        let home = found.home.map(|home| home.display().to_string());
        (found.uid, found.gid, found.groups, home)
    }

    #[test]
    fn as_container_runtimes_do() {
        let home = |home: &str| Some(home.to_owned());
        assert_eq!(resolved("", None), (0, 0, vec![10], home("/root")));
        assert_eq!(
            resolved("www", None),
            (33, 34, vec![10, 44], home("/var/www"))
        );
        assert_eq!(
            resolved("33", None),
            (33, 34, vec![10, 44], home("/var/www"))
        );
        assert_eq!(
            resolved("www", Some("log")),
            (33, 44, vec![], home("/var/www"))
        );
        assert_eq!(resolved("1000", None), (1000, 0, vec![], None));
        assert_eq!(resolved("1000", Some("2000")), (1000, 2000, vec![], None));
        assert_eq!(resolved("7", None), (70, 71, vec![], home("/seven")));
        assert_eq!(resolved("short", None), (80, 81, vec![], None));
    }

    #[test]
    fn unknown_names_are_named() {
        for (user, group) in [
            ("nobody", None),
            ("broken", None),
            ("-1", None),
            ("root", Some("x")),
        ] {
            let error = resolve_in(PASSWD, GROUP, user, group).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound);
            assert!(error.report().contains(group.unwrap_or(user)), "{error}");
        }
    }

    #[test]
    fn links_lead_nowhere_outside() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd-real", root.path().join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("../../../../etc/group", root.path().join("etc/group")).unwrap();
        std::fs::write(root.path().join("etc/passwd-real"), PASSWD).unwrap();
        let directory = File::open(root.path()).unwrap();
        // /etc/group is a link to itself here: a loop, so no groups
        let found = resolve(&directory, "www").unwrap();
        assert_eq!((found.uid, found.gid, found.groups), (33, 34, vec![]));
        let empty = tempfile::tempdir().unwrap();
        let directory = File::open(empty.path()).unwrap();
        assert_eq!(resolve(&directory, "").unwrap(), Credentials::root());
        resolve(&directory, "www").unwrap_err();
    }

    #[test]
    fn a_fifo_does_not_block() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.path().join("etc/passwd"),
            FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let directory = File::open(root.path()).unwrap();
        assert_eq!(resolve(&directory, "5").unwrap().uid, 5);
    }
}
