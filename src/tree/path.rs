//! Paths as a tar has them, and what they come to.

use super::{Error, shown};

/// NAME_MAX.
pub(super) const NAME_LIMIT: usize = 255;
/// PATH_MAX without its zero byte: a longer path cannot be unpacked either. It also bounds the depth of a tree.
pub(super) const PATH_LIMIT: usize = 4095;

/// What OCI image layers put before the name of what they remove.
pub(super) const WHITEOUT_PREFIX: &[u8] = b".wh.";
const META_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// What the last component of a path says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Leaf<'a> {
    /// A name.
    Name(&'a [u8]),
    /// This name of the lower layers is gone.
    Whiteout(&'a [u8]),
    /// All names of the lower layers are gone from the directory.
    Opaque,
    /// Another mark of AUFS, or a whiteout of `.` and the like: nothing.
    Nothing,
}

impl<'a> Leaf<'a> {
    pub(super) fn of(name: &'a [u8]) -> Self {
        if name == OPAQUE_NAME {
            return Self::Opaque;
        }
        if name.starts_with(META_PREFIX) {
            return Self::Nothing;
        }
        match name.strip_prefix(WHITEOUT_PREFIX) {
            // containerd refuses these, AWS's tool does not
            Some(b"" | b"." | b"..") => Self::Nothing,
            Some(hidden) => Self::Whiteout(hidden),
            None => Self::Name(name),
        }
    }

    /// The name that will stand in a directory.
    fn name(&self) -> &'a [u8] {
        match *self {
            Self::Name(name) | Self::Whiteout(name) => name,
            Self::Opaque | Self::Nothing => b"",
        }
    }
}

/// The components of a path with `.`, `..` and empty ones taken out, by their text alone, as Go's `filepath.Clean("/" + path)` does:
/// `..` at the root stays there.
#[derive(Debug, Default)]
pub(super) struct Clean<'a> {
    components: Vec<&'a [u8]>,
}

impl<'a> Clean<'a> {
    /// Cleans a path into this (which keeps its memory) and checks it against Linux's limits.
    pub(super) fn set(&mut self, path: &'a [u8]) -> Result<(), Error> {
        self.components.clear();
        if path.contains(&0) {
            return Err(Error::ZeroByte { path: shown(path) });
        }
        let mut length = 0;
        for component in path.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => {
                    if let Some(last) = self.components.pop() {
                        length -= last.len() + 1;
                    }
                }
                name => {
                    self.components.push(name);
                    length += name.len() + 1;
                }
            }
        }
        if length > PATH_LIMIT + 1 {
            return Err(Error::PathTooLong {
                path: shown(&path[..path.len().min(100)]),
                length: length - 1,
                limit: PATH_LIMIT,
            });
        }
        let (leaf, parents) = match self.components.split_last() {
            Some((leaf, parents)) => (Leaf::of(leaf).name(), parents),
            None => (&b""[..], &[][..]),
        };
        let longest = parents
            .iter()
            .map(|name| name.len())
            .fold(leaf.len(), usize::max);
        if longest > NAME_LIMIT {
            return Err(Error::NameTooLong {
                path: shown(path),
                length: longest,
                limit: NAME_LIMIT,
            });
        }
        Ok(())
    }

    /// The parents' names and the last one; `None` is the root itself.
    pub(super) fn split(&self) -> Option<(&'a [u8], &[&'a [u8]])> {
        let (leaf, parents) = self.components.split_last()?;
        Some((leaf, parents))
    }
}

/// The part of a path before its last component, and that component, if nothing has to be cleaned in the latter; so that the many
/// paths of one directory need only the comparison of their first parts.
pub(super) fn split_plain(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let at = path.iter().rposition(|&byte| byte == b'/')?;
    let (parent, name) = (&path[..at], &path[at + 1..]);
    let plain = !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_LIMIT
        && path.len() <= PATH_LIMIT
        && !name.contains(&0);
    plain.then_some((parent, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(path: &str) -> String {
        let mut clean = Clean::default();
        clean.set(path.as_bytes()).unwrap();
        String::from_utf8(clean.components.join(&b'/')).unwrap()
    }

    #[test]
    fn paths_are_cleaned_by_their_text() {
        for (path, expected) in [
            ("", ""),
            (".", ""),
            ("./", ""),
            ("/", ""),
            ("..", ""),
            ("../../a", "a"),
            ("./a//b/", "a/b"),
            ("a/./b/..", "a"),
            ("a/../../b", "b"),
            ("bar/../bar////foo", "bar/foo"),
            ("...", "..."),
            (" ", " "),
        ] {
            assert_eq!(cleaned(path), expected, "{path}");
        }
    }

    #[test]
    fn whiteouts_are_told_from_names() {
        assert_eq!(Leaf::of(b"a.wh."), Leaf::Name(b"a.wh."));
        assert_eq!(Leaf::of(b".wh"), Leaf::Name(b".wh"));
        assert_eq!(Leaf::of(b".wh.x"), Leaf::Whiteout(b"x"));
        assert_eq!(Leaf::of(b".wh....."), Leaf::Whiteout(b"...."));
        assert_eq!(Leaf::of(b".wh..wh..opq"), Leaf::Opaque);
        for nothing in [".wh.", ".wh..", ".wh...", ".wh..wh.plnk", ".wh..wh.aufs"] {
            assert_eq!(Leaf::of(nothing.as_bytes()), Leaf::Nothing, "{nothing}");
        }
    }

    #[test]
    fn limits_are_those_of_linux() {
        let mut clean = Clean::default();
        let name = |length| vec![b'n'; length];
        let (longest, longer) = (name(255), name(256));
        assert!(clean.set(&longest).is_ok());
        assert!(matches!(
            clean.set(&longer),
            Err(Error::NameTooLong {
                length: 256,
                limit: 255,
                ..
            })
        ));
        // the name that a whiteout leaves is what counts
        let hidden = [&b".wh."[..], &name(255)].concat();
        assert!(Clean::default().set(&hidden).is_ok());
        let longest = [&b"d/".repeat(2047)[..], b"n"].concat();
        assert!(Clean::default().set(&longest).is_ok());
        let longer = b"d/".repeat(2049);
        assert!(matches!(
            Clean::default().set(&longer),
            Err(Error::PathTooLong {
                length: 4097,
                limit: 4095,
                ..
            })
        ));
        assert!(matches!(
            Clean::default().set(b"a\0b"),
            Err(Error::ZeroByte { .. })
        ));
    }

    #[test]
    fn the_short_way_agrees_with_cleaning() {
        for path in ["a/b", "./a/b/", "a//b", "/b", "a/../c/b", "a/.wh.b"] {
            let (parent, name) = split_plain(path.as_bytes()).unwrap();
            let mut whole = Clean::default();
            whole.set(path.as_bytes()).unwrap();
            let (leaf, parents) = whole.split().unwrap();
            let mut first = Clean::default();
            first.set(parent).unwrap();
            assert_eq!((leaf, parents), (name, &first.components[..]), "{path}");
        }
        for path in ["a", "a/..", "a/.", "a//", ""] {
            assert_eq!(split_plain(path.as_bytes()), None, "{path}");
        }
    }

    #[test]
    fn the_longest_path_and_one_byte_more() {
        let path = |length: usize| {
            let mut path = b"d/".repeat(length / 2);
            path.resize(length, b'n');
            path
        };
        let (longest, longer) = (path(PATH_LIMIT), path(PATH_LIMIT + 1));
        assert!(longest.ends_with(b"/n") && longer.ends_with(b"d/"));
        Clean::default().set(&longest).unwrap();
        // a slash at its end is none of its bytes
        Clean::default()
            .set(&[&longest[..], b"/"].concat())
            .unwrap();
        Clean::default().set(&longer).unwrap();
        let longer = [&longest[..], b"n"].concat();
        let error = Clean::default().set(&longer).unwrap_err();
        assert!(
            matches!(error, Error::PathTooLong { length: 4096, .. }),
            "{error}"
        );
        // by its cleaned length alone
        let cleaned = [&b"x/../".repeat(2000)[..], &longest].concat();
        Clean::default().set(&cleaned).unwrap();
        // the short way leaves to the long one what it cannot take
        assert!(split_plain(&longest).is_some());
        assert_eq!(split_plain(&longer), None);
    }

    #[test]
    fn the_longest_name_and_one_byte_more() {
        let name = |length| [&b"a/"[..], &vec![b'n'; length]].concat();
        for (length, is_short) in [(NAME_LIMIT, true), (NAME_LIMIT + 1, false)] {
            assert_eq!(split_plain(&name(length)).is_some(), is_short);
            assert_eq!(Clean::default().set(&name(length)).is_ok(), is_short);
            // of a parent too, also behind a whiteout's prefix, which is a part of its name there
            let parent = [&name(length)[..], b"/x"].concat();
            assert_eq!(Clean::default().set(&parent).is_ok(), is_short);
        }
        let parent = [&b".wh."[..], &vec![b'n'; NAME_LIMIT], b"/x"].concat();
        assert!(Clean::default().set(&parent).is_err());
        assert_eq!(split_plain(b"a/b\0"), None);
    }
}
