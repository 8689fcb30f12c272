//! Tars of layers, entry by entry.

use tar::{Builder, EntryType, Header};

/// A layer's tar in the making.
pub struct Layer {
    tar: Builder<Vec<u8>>,
}

/// The time of every entry.
const TIME: u64 = 1_600_000_000;

impl Layer {
    pub fn new() -> Self {
        Self {
            tar: Builder::new(Vec::new()),
        }
    }

    fn entry(
        mut self,
        kind: EntryType,
        name: &str,
        mode: u32,
        content: &[u8],
        link: Option<&str>,
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(2000);
        header.set_mtime(TIME);
        header.set_size(content.len() as u64);
        match link {
            Some(link) => self.tar.append_link(&mut header, name, link).unwrap(),
            None => self.tar.append_data(&mut header, name, content).unwrap(),
        }
        self
    }

    pub fn directory(self, name: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, name, mode, b"", None)
    }

    /// A directory with an extended attribute.
    pub fn directory_with_xattr(mut self, name: &str, mode: u32, xattr: (&str, &str)) -> Self {
        let key = format!("SCHILY.xattr.{}", xattr.0);
        self.tar
            .append_pax_extensions([(&key[..], xattr.1.as_bytes())])
            .unwrap();
        self.directory(name, mode)
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, 0o644, content, None)
    }

    pub fn program(self, name: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, 0o755, content, None)
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, 0o777, b"", Some(target))
    }

    pub fn hardlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, 0o644, b"", Some(target))
    }

    /// `.wh.NAME` beside where NAME was.
    pub fn whiteout(self, name: &str) -> Self {
        let (folder, name) = name
            .rsplit_once('/')
            .map_or(("", name), |(folder, name)| (folder, name));
        let separator = if folder.is_empty() { "" } else { "/" };
        self.file(&format!("{folder}{separator}.wh.{name}"), b"")
    }

    /// `.wh..wh..opq` in a folder; the root is empty.
    pub fn opaque(self, folder: &str) -> Self {
        let separator = if folder.is_empty() { "" } else { "/" };
        self.file(&format!("{folder}{separator}.wh..wh..opq"), b"")
    }

    pub fn tar(self) -> Vec<u8> {
        self.tar.into_inner().unwrap()
    }
}
