//! Layers made by hand, their disks, and what looks at a disk: e2fsck, debugfs, a kernel mount.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use socinbd::{
    ext4::Layout,
    tar::{Entry, EntryKind, Segment, Timestamp},
    tree::Tree,
    units::LayerOffset,
};
use tempfile::TempDir;

pub const SEED: [u8; 32] = *b"0123456789abcdef\xfe\xdc\xba9876543210ABC";

/// Entries and the bytes of a layer, without its tar headers.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    pub entries: Vec<Entry>,
    pub bytes: Vec<u8>,
}

impl Layer {
    /// Adds an entry with what all kinds have, and returns it for more.
    pub fn add(&mut self, kind: EntryKind, name: impl AsRef<[u8]>) -> &mut Entry {
        self.entries.push(Entry {
            name: name.as_ref().to_vec(),
            kind,
            data_offset: LayerOffset(self.bytes.len() as u64),
            size: 0,
            linkname: vec![],
            mode: if kind == EntryKind::Directory {
                0o755
            } else {
                0o644
            },
            uid: 0,
            gid: 0,
            uname: Default::default(),
            gname: Default::default(),
            mtime: Some(Timestamp {
                seconds: 1_700_000_000,
                nanoseconds: 123_456_789,
            }),
            devmajor: 0,
            devminor: 0,
            pax: vec![],
            sparse: None,
        });
        self.entries.last_mut().unwrap()
    }

    pub fn dir(&mut self, name: impl AsRef<[u8]>) -> &mut Entry {
        self.add(EntryKind::Directory, name)
    }

    pub fn file(&mut self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> &mut Entry {
        let content = content.as_ref();
        // a header, as in a tar
        self.bytes.resize(self.bytes.len() + 512, 0xEE);
        let offset = LayerOffset(self.bytes.len() as u64);
        self.bytes.extend_from_slice(content);
        self.bytes
            .resize(self.bytes.len().next_multiple_of(512), 0xEE);
        let entry = self.add(EntryKind::Regular, name);
        entry.data_offset = offset;
        entry.size = content.len() as u64;
        entry
    }

    /// A sparse file of `size` bytes with these pieces.
    pub fn sparse(
        &mut self,
        name: impl AsRef<[u8]>,
        size: u64,
        pieces: &[(u64, &[u8])],
    ) -> &mut Entry {
        let all: Vec<u8> = pieces.iter().flat_map(|(_, p)| p.iter().copied()).collect();
        let entry = self.file(name, all);
        let mut layer_offset = entry.data_offset;
        let mut segments = vec![];
        for &(file_offset, piece) in pieces {
            let length = piece.len() as u64;
            segments.push(Segment {
                file_offset,
                layer_offset,
                length,
            });
            layer_offset.0 += length;
        }
        entry.size = size;
        entry.sparse = Some(segments);
        entry
    }

    pub fn symlink(&mut self, name: impl AsRef<[u8]>, text: impl AsRef<[u8]>) -> &mut Entry {
        let entry = self.add(EntryKind::Symlink, name);
        entry.linkname = text.as_ref().to_vec();
        entry
    }

    pub fn hardlink(&mut self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Entry {
        let entry = self.add(EntryKind::Hardlink, name);
        entry.linkname = target.as_ref().to_vec();
        entry
    }

    pub fn device(&mut self, kind: EntryKind, name: &str, major: i64, minor: i64) -> &mut Entry {
        let entry = self.add(kind, name);
        entry.devmajor = major;
        entry.devminor = minor;
        entry
    }

    /// The bytes of an entry's file.
    pub fn content(&self, entry: usize, size: u64) -> Vec<u8> {
        let entry = &self.entries[entry];
        let mut content = vec![0; size as usize];
        let whole = [Segment {
            file_offset: 0,
            layer_offset: entry.data_offset,
            length: size,
        }];
        for s in entry.sparse.as_deref().unwrap_or(&whole) {
            let from = s.layer_offset.get() as usize..(s.layer_offset.get() + s.length) as usize;
            let to = s.file_offset as usize..(s.file_offset + s.length) as usize;
            content[to].copy_from_slice(&self.bytes[from]);
        }
        content
    }

    pub fn tree(&self) -> Tree<'_> {
        Tree::build(&self.entries).unwrap()
    }

    /// The layer's disk, complete.
    pub fn disk(&self) -> Disk {
        let tree = self.tree();
        let layout = Layout::new(&tree, &self.entries, &SEED).unwrap();
        let disk = Disk::of_metadata(&layout);
        let file = File::options().write(true).open(&disk.path).unwrap();
        for region in layout.table().data() {
            let range = region.layer.start.get() as usize..region.layer.end.get() as usize;
            file.write_all_at(&self.bytes[range], region.disk.start.get())
                .unwrap();
        }
        disk
    }
}

/// Adds an xattr.
pub fn xattr(entry: &mut Entry, name: &str, value: impl AsRef<[u8]>) {
    let key = format!("SCHILY.xattr.{name}").into_bytes();
    entry.pax.push((key, value.as_ref().to_vec()));
    entry.pax.sort();
}

/// A disk in a file.
pub struct Disk {
    pub path: PathBuf,
    #[expect(dead_code, reason = "the folder goes when this does")]
    folder: TempDir,
}

impl Disk {
    /// A disk with its metadata alone.
    pub fn of_metadata(layout: &Layout<'_>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.ext4");
        let file = File::create(&path).unwrap();
        file.set_len(layout.size).unwrap();
        let written = layout.write_metadata(|offset, bytes| file.write_all_at(bytes, offset.get()));
        written.unwrap();
        Self { path, folder }
    }

    /// `e2fsck -fn` finds nothing to remark.
    #[track_caller]
    pub fn check(&self) {
        let output = run(
            Command::new("e2fsck").arg("-fn").arg(&self.path),
            "e2fsprogs",
        );
        let text = String::from_utf8_lossy(&output.stdout);
        let unexpected: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("Pass ") && !line.contains(" files ("))
            .collect();
        assert!(
            output.status.success() && unexpected.is_empty(),
            "e2fsck -fn: {}\n{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// What a command of debugfs prints.
    pub fn debugfs(&self, command: &str) -> String {
        let mut debugfs = Command::new("debugfs");
        let output = run(debugfs.args(["-R", command]).arg(&self.path), "e2fsprogs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Mounts it through a loop device.
    pub fn mount(&self) -> Mount {
        Mount::new(&self.path, "loop,ro")
    }
}

/// A mounted disk, until this is dropped.
pub struct Mount {
    folder: TempDir,
}

impl Mount {
    pub fn new(disk: &Path, options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "ext4", "-o", options]);
        let output = run(mount.arg(disk).arg(folder.path()), "mount, and root");
        assert!(
            output.status.success(),
            "cannot mount (this test needs root and loop devices): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // where this fails there is a test that failed before it
        let _ = Command::new("umount").arg(self.folder.path()).status();
    }
}

fn run(command: &mut Command, package: &str) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; this test needs {package}"))
}
