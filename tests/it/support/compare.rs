//! Compares two directory trees path by path, on whatever is mounted there.
//!
//! Used to hold an attached image against an independent unpack. It tells every difference it finds, not only the first, and its own
//! tests show that it finds each kind. Needs root where owners and `trusted.*` are to be seen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    fmt,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// What counts as a difference. `default()` compares everything but the sizes of directories, which are a file system's own affair.
#[derive(Clone, Debug)]
pub struct Options {
    /// Compare sizes and link counts of directories too (overlayfs has its own).
    pub directory_sizes: bool,
    /// Compare numbers of links of what is no directory, and which paths are the same inode.
    pub links: bool,
    /// Compare parts of a second of the modification time (some unpackers drop them).
    pub nanoseconds: bool,
    /// Compare modification times of directories (some unpackers leave those of directories that the tar only implies to the clock).
    pub directory_times: bool,
    /// Read all files. Off: sizes only, for a look that must fetch nothing.
    pub content: bool,
    /// Xattrs whose names start so are not looked at.
    pub ignored_xattrs: Vec<Vec<u8>>,
    /// Paths, relative to the roots, that are not looked at, nor what is below them.
    pub ignored_paths: BTreeSet<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            directory_sizes: false,
            links: true,
            nanoseconds: true,
            directory_times: true,
            content: true,
            ignored_xattrs: vec![],
            ignored_paths: BTreeSet::new(),
        }
    }
}

/// One difference between two trees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Relative to the roots; empty for the root itself.
    pub path: PathBuf,
    /// What differs.
    pub aspect: Aspect,
    /// How it is on the left and on the right.
    pub values: String,
}

/// What of a path may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// The path is only on the left.
    Missing,
    /// The path is only on the right.
    Extra,
    Type,
    Mode,
    Owner,
    Time,
    Size,
    Device,
    LinkTarget,
    Links,
    Xattrs,
    Content,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}: {}", self.path, self.aspect, self.values)
    }
}

/// All differences of the tree at `right` from the tree at `left`, in order of their paths.
pub fn compare(left: &Path, right: &Path, options: &Options) -> io::Result<Vec<Difference>> {
    let mut comparer = Comparer {
        left,
        right,
        options,
        inodes: [HashMap::new(), HashMap::new()],
        buffers: [vec![0; 1 << 20], vec![0; 1 << 20]],
        found: vec![],
    };
    comparer.path(Path::new(""))?;
    Ok(comparer.found)
}

/// Panics with the list of differences if there is any.
#[track_caller]
pub fn assert_same(left: &Path, right: &Path, options: &Options) {
    let found = compare(left, right, options).unwrap_or_else(|error| {
        panic!("cannot compare {left:?} with {right:?}: {error}");
    });
    let lines: Vec<String> = found.iter().take(50).map(Difference::to_string).collect();
    assert!(
        found.is_empty(),
        "{} differences between {left:?} and {right:?}:\n{}",
        found.len(),
        lines.join("\n")
    );
}

struct Comparer<'a> {
    left: &'a Path,
    right: &'a Path,
    options: &'a Options,
    /// On each side the first path seen of an inode with several names.
    inodes: [HashMap<(u64, u64), PathBuf>; 2],
    /// For what is read of each side: made once, as there are many files.
    buffers: [Vec<u8>; 2],
    found: Vec<Difference>,
}

impl Comparer<'_> {
    fn differ(&mut self, path: &Path, aspect: Aspect, values: String) {
        self.found.push(Difference {
            path: path.to_owned(),
            aspect,
            values,
        });
    }

    fn check<T: PartialEq + fmt::Debug>(&mut self, path: &Path, aspect: Aspect, values: [T; 2]) {
        if values[0] != values[1] {
            let [left, right] = values;
            self.differ(path, aspect, format!("{left:?} and {right:?}"));
        }
    }

    fn path(&mut self, path: &Path) -> io::Result<()> {
        if self.options.ignored_paths.contains(path) {
            return Ok(());
        }
        let places = [join(self.left, path), join(self.right, path)];
        let look = |place: &PathBuf| at(fs::symlink_metadata(place), place);
        let (l, r) = (look(&places[0])?, look(&places[1])?);
        let kinds = [kind(&l), kind(&r)];
        if kinds[0] != kinds[1] {
            self.check(path, Aspect::Type, kinds);
            return Ok(());
        }
        let is_dir = l.is_dir();
        let modes = [&l, &r].map(|m| format!("{:o}", m.mode() & 0o7777));
        self.check(path, Aspect::Mode, modes);
        self.check(path, Aspect::Owner, [&l, &r].map(|m| (m.uid(), m.gid())));
        if !is_dir || self.options.directory_times {
            let nanoseconds = |m: &Metadata| {
                if self.options.nanoseconds {
                    m.mtime_nsec()
                } else {
                    0
                }
            };
            let times = [&l, &r].map(|m| (m.mtime(), nanoseconds(m)));
            self.check(path, Aspect::Time, times);
        }
        if !is_dir || self.options.directory_sizes {
            self.check(path, Aspect::Size, [l.size(), r.size()]);
        }
        self.check(path, Aspect::Device, [l.rdev(), r.rdev()]);
        if self.options.links {
            self.links(path, [&l, &r]);
        }
        let xattrs = [self.xattrs(&places[0])?, self.xattrs(&places[1])?];
        self.check(path, Aspect::Xattrs, xattrs);
        if l.is_symlink() {
            let targets = [fs::read_link(&places[0])?, fs::read_link(&places[1])?];
            self.check(path, Aspect::LinkTarget, targets);
        } else if l.is_file() && l.size() == r.size() && self.options.content {
            self.content(path, &places)?;
        } else if is_dir {
            self.directory(path, &places)?;
        }
        Ok(())
    }

    fn directory(&mut self, path: &Path, places: &[PathBuf; 2]) -> io::Result<()> {
        let [left, right] = [names(&places[0])?, names(&places[1])?];
        for name in left.union(&right) {
            let child = path.join(name);
            if left.contains(name) && right.contains(name) {
                self.path(&child)?;
            } else if !self.options.ignored_paths.contains(&child) {
                let (aspect, side) = if left.contains(name) {
                    (Aspect::Missing, "left")
                } else {
                    (Aspect::Extra, "right")
                };
                self.differ(&child, aspect, format!("only on the {side}"));
            }
        }
        Ok(())
    }

    fn links(&mut self, path: &Path, metadata: [&Metadata; 2]) {
        if metadata[0].is_dir() {
            if self.options.directory_sizes {
                self.check(path, Aspect::Links, metadata.map(|m| m.nlink()));
            }
            return;
        }
        self.check(path, Aspect::Links, metadata.map(|m| m.nlink()));
        let mut first = [PathBuf::new(), PathBuf::new()];
        for side in 0..2 {
            let inode = (metadata[side].dev(), metadata[side].ino());
            let seen = self.inodes[side].entry(inode);
            first[side].clone_from(seen.or_insert_with(|| path.to_owned()));
        }
        self.check(path, Aspect::Links, first);
    }

    fn xattrs(&self, place: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        let mut all = BTreeMap::new();
        for name in at(xattr::list(place), place)? {
            let bytes = name.as_encoded_bytes();
            let ignored = &self.options.ignored_xattrs;
            if ignored.iter().any(|prefix| bytes.starts_with(prefix)) {
                continue;
            }
            let value = at(xattr::get(place, &name), place)?;
            // listed and not there: that is a difference from not listed
            all.insert(name, value.unwrap_or_else(|| b"<none>".to_vec()));
        }
        Ok(all)
    }

    fn content(&mut self, path: &Path, places: &[PathBuf; 2]) -> io::Result<()> {
        let open = |place: &PathBuf| at(File::open(place), place);
        let mut files = [open(&places[0])?, open(&places[1])?];
        let mut offset = 0;
        loop {
            let mut counts = [0; 2];
            for side in 0..2 {
                let read = fill(&mut files[side], &mut self.buffers[side]);
                counts[side] = at(read, &places[side])?;
            }
            let [l, r] = [0, 1].map(|side| &self.buffers[side][..counts[side]]);
            if l != r {
                let same = l.iter().zip(r).take_while(|(a, b)| a == b).count();
                let values = format!("first at byte {}", offset + same);
                self.differ(path, Aspect::Content, values);
                return Ok(());
            }
            if l.is_empty() {
                return Ok(());
            }
            offset += l.len();
        }
    }
}

/// `base/path` without the trailing slash that `join("")` adds (it would follow a symlink).
fn join(base: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() {
        base.to_owned()
    } else {
        base.join(path)
    }
}

fn at<T>(result: io::Result<T>, place: &Path) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{place:?}: {error}")))
}

fn names(place: &Path) -> io::Result<BTreeSet<OsString>> {
    at(fs::read_dir(place), place)?
        .map(|entry| Ok(entry?.file_name()))
        .collect()
}

fn kind(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_file() => "file",
        () if kind.is_dir() => "directory",
        () if kind.is_symlink() => "symlink",
        () if kind.is_char_device() => "character device",
        () if kind.is_block_device() => "block device",
        () if kind.is_fifo() => "fifo",
        () => "other",
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match file.read(&mut buffer[count..])? {
            0 => break,
            more => count += more,
        }
    }
    Ok(count)
}

mod tests {
    use super::*;
    use std::{
        os::unix::fs::{PermissionsExt, lchown, symlink},
        time::{Duration, SystemTime},
    };

    /// Makes two equal trees, changes the right one, and returns what the comparer says.
    fn after(change: impl FnOnce(&Path)) -> Vec<(PathBuf, Aspect)> {
        let [left, right] = [(); 2].map(|()| {
            let tree = tempfile::tempdir().unwrap();
            let p = tree.path();
            fs::create_dir(p.join("d")).unwrap();
            fs::write(p.join("d/file"), vec![7; 3_000_000]).unwrap();
            fs::hard_link(p.join("d/file"), p.join("second")).unwrap();
            fs::write(p.join("third"), "x").unwrap();
            fs::write(p.join("fourth"), "x").unwrap();
            symlink("d/file", p.join("link")).unwrap();
            set_xattr(p, "d/file", b"value");
            for path in ["d/file", "third", "fourth", "d", ""] {
                set_time(p, path, 1_000_000_007);
            }
            stamp_link(&p.join("link"));
            tree
        });
        change(right.path());
        compare(left.path(), right.path(), &Options::default())
            .unwrap()
            .into_iter()
            .map(|difference| (difference.path, difference.aspect))
            .collect()
    }

    fn set_xattr(tree: &Path, path: &str, value: &[u8]) {
        xattr::set(tree.join(path), "trusted.test", value).expect(
            "this test sets a trusted xattr: it needs root and a file system that has xattrs",
        );
    }

    fn set_time(tree: &Path, path: &str, nanoseconds: u64) {
        let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
        let file = File::open(join(tree, Path::new(path))).unwrap();
        file.set_modified(time).unwrap();
    }

    /// A symlink's own time, which the standard library cannot set.
    fn stamp_link(path: &Path) {
        use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
        let time = Timespec {
            tv_sec: 1,
            tv_nsec: 7,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }

    fn one(path: &str, aspect: Aspect) -> Vec<(PathBuf, Aspect)> {
        vec![(path.into(), aspect)]
    }

    /// A file with two names has two paths that differ.
    fn both(aspect: Aspect) -> Vec<(PathBuf, Aspect)> {
        vec![("d/file".into(), aspect), ("second".into(), aspect)]
    }

    #[test]
    fn equal_trees_have_no_difference() {
        assert_eq!(after(|_| ()), []);
    }

    #[test]
    fn one_changed_byte_is_found() {
        let found = after(|tree| {
            use std::os::unix::fs::FileExt;
            let file = File::options().write(true).open(tree.join("d/file"));
            file.unwrap().write_all_at(&[8], 2_999_999).unwrap();
            set_time(tree, "d/file", 1_000_000_007);
        });
        assert_eq!(found, both(Aspect::Content));
    }

    #[test]
    fn a_changed_mode_is_found() {
        let found = after(|tree| {
            let mode = fs::Permissions::from_mode(0o4755);
            fs::set_permissions(tree.join("third"), mode).unwrap();
        });
        assert_eq!(found, one("third", Aspect::Mode));
    }

    #[test]
    fn one_nanosecond_is_found() {
        let found = after(|tree| set_time(tree, "third", 1_000_000_008));
        assert_eq!(found, one("third", Aspect::Time));
        let found = after(|tree| set_time(tree, "d", 1_000_000_008));
        assert_eq!(found, one("d", Aspect::Time));
    }

    #[test]
    fn a_changed_and_an_added_xattr_are_found() {
        let found = after(|tree| set_xattr(tree, "d/file", b"valuf"));
        assert_eq!(found, both(Aspect::Xattrs));
        let found = after(|tree| set_xattr(tree, "d", b""));
        assert_eq!(found, one("d", Aspect::Xattrs));
    }

    #[test]
    fn a_changed_owner_is_found_on_a_symlink() {
        let found = after(|tree| {
            lchown(tree.join("link"), None, Some(70_000))
                .expect("this test changes an owner: it needs root");
        });
        assert_eq!(found, one("link", Aspect::Owner));
    }

    #[test]
    fn a_missing_and_an_extra_path_are_found() {
        let found = after(|tree| {
            fs::remove_file(tree.join("third")).unwrap();
            fs::write(tree.join("thirds"), "x").unwrap();
            set_time(tree, "", 1_000_000_007);
        });
        assert_eq!(
            found,
            [
                ("third".into(), Aspect::Missing),
                ("thirds".into(), Aspect::Extra)
            ]
        );
    }

    #[test]
    fn another_link_target_size_and_type_are_found() {
        let found = after(|tree| {
            fs::remove_file(tree.join("link")).unwrap();
            symlink("d/filf", tree.join("link")).unwrap();
            stamp_link(&tree.join("link"));
            fs::write(tree.join("third"), "xx").unwrap();
            set_time(tree, "third", 1_000_000_007);
            fs::remove_file(tree.join("fourth")).unwrap();
            symlink("x", tree.join("fourth")).unwrap();
            set_time(tree, "", 1_000_000_007);
        });
        assert_eq!(
            found,
            [
                ("fourth".into(), Aspect::Type),
                ("link".into(), Aspect::LinkTarget),
                ("third".into(), Aspect::Size)
            ]
        );
    }

    #[test]
    fn hard_links_to_another_file_of_the_same_content_are_found() {
        let found = after(|tree| {
            fs::copy(tree.join("second"), tree.join("copy")).unwrap();
            fs::remove_file(tree.join("second")).unwrap();
            fs::rename(tree.join("copy"), tree.join("second")).unwrap();
            set_xattr(tree, "second", b"value");
            set_time(tree, "second", 1_000_000_007);
            set_time(tree, "", 1_000_000_007);
        });
        assert_eq!(
            found,
            [
                ("d/file".into(), Aspect::Links),
                ("second".into(), Aspect::Links),
                ("second".into(), Aspect::Links)
            ]
        );
    }

    #[test]
    fn what_is_ignored_is_not_reported() {
        let [left, right] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        fs::create_dir(right.path().join("lost+found")).unwrap();
        let options = Options {
            directory_times: false,
            links: false,
            ignored_paths: BTreeSet::from(["lost+found".into()]),
            ..Options::default()
        };
        assert_eq!(compare(left.path(), right.path(), &options).unwrap(), []);
    }
}
