//! Any list of entries as a layer: refused with words, or an ext4 image in which another reader finds each node of the tree.

#![no_main]

#[allow(dead_code, reason = "each fuzzer takes what it needs")]
#[path = "common.rs"]
mod common;

use ext4_view::Ext4;
use libfuzzer_sys::fuzz_target;
use socinbd::{
    tar::{Entry, EntryKind, Timestamp},
    tree::{NodeKind, Tree},
    units::LayerOffset,
};

/// A disk that is larger is laid out and not read.
const MAX_DISK: u64 = 64 << 20;

fuzz_target!(|bytes: &[u8]| {
    common::lay_out(&Source(bytes).entries(), |tree, layout| {
        if layout.size > MAX_DISK {
            return;
        }
        let mut disk = vec![0; layout.size as usize];
        let written = layout.write_metadata(|offset, bytes| {
            let start = offset.get() as usize;
            disk[start..start + bytes.len()].copy_from_slice(bytes);
            Ok::<_, std::convert::Infallible>(())
        });
        written.expect("nothing refuses it");
        let ext4 = Ext4::load(Box::new(disk)).expect("it is an ext4 file system");
        walk(tree, &ext4);
    });
});

/// Each path of the tree is there, and is what it should be.
fn walk(tree: &Tree<'_>, ext4: &Ext4) {
    tree.walk(|path, node| {
        // the reader takes names up to 255 bytes and paths of any length, as Linux does
        let mut full = vec![b'/'];
        full.extend_from_slice(path);
        let found = ext4
            .symlink_metadata(ext4_view::Path::try_from(&full[..]).expect("a path"))
            .unwrap_or_else(|error| panic!("{}: {error}", path.escape_ascii()));
        let node = tree.node(node);
        assert_eq!(found.is_dir(), matches!(node.kind, NodeKind::Directory(_)));
        assert_eq!(found.is_symlink(), matches!(node.kind, NodeKind::Symlink(_)));
        assert_eq!(found.mode() & 0o7777, node.mode & 0o7777);
        assert_eq!((found.uid(), found.gid()), (node.uid, node.gid));
    });
}

/// Takes a fuzzer's bytes for numbers and names.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *byte
    }

    fn number(&mut self) -> u64 {
        let mut word = [0; 8];
        let length = usize::from(self.byte() % 9);
        word[..length].iter_mut().for_each(|byte| *byte = self.byte());
        u64::from_le_bytes(word)
    }

    /// Often one of few, so that names meet; sometimes long, and sometimes of any bytes.
    fn name(&mut self) -> Vec<u8> {
        let parts = self.byte();
        let mut name = Vec::new();
        for number in 0..=parts % 4 {
            if number > 0 || parts & 64 > 0 {
                name.push(b'/');
            }
            let choice = self.byte();
            match choice % 8 {
                0 => name.extend_from_slice(b".."),
                1 => name.extend_from_slice(b".wh.a"),
                2 => name.extend_from_slice(b".wh..wh..opq"),
                3 => name.extend(std::iter::repeat_n(choice | 1, usize::from(self.byte()) * 2)),
                4 => (0..choice / 16).for_each(|_| name.push(self.byte())),
                _ => name.push(b'a' + choice / 8 % 4),
            }
        }
        if parts & 128 > 0 {
            name.push(b'/');
        }
        name
    }

    fn entries(&mut self) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut offset = 0_u64;
        while !self.0.is_empty() && entries.len() < 300 {
            let choice = self.byte();
            let kind = match choice % 8 {
                0 | 1 => EntryKind::Regular,
                2 => EntryKind::Directory,
                3 => EntryKind::Symlink,
                4 => EntryKind::Hardlink,
                5 => EntryKind::Char,
                6 => EntryKind::Block,
                _ => EntryKind::Fifo,
            };
            let size = match kind {
                EntryKind::Regular if choice & 8 > 0 => self.number() >> 16,
                EntryKind::Regular => u64::from(self.byte()) * 37,
                _ => 0,
            };
            offset += 512;
            let entry = self.entry(kind, size, LayerOffset(offset));
            entries.push(entry);
            let Some(next) = offset.checked_add(size).and_then(|it| it.checked_next_multiple_of(512))
            else {
                break;
            };
            offset = next;
        }
        entries
    }

    fn entry(&mut self, kind: EntryKind, size: u64, data_offset: LayerOffset) -> Entry {
        let name = self.name();
        let choice = self.byte();
        let is_link = matches!(kind, EntryKind::Symlink | EntryKind::Hardlink);
        let pax = (0..choice % 4).map(|number| {
            let space = ["user.", "trusted.", "security.capability", "system.posix_acl_access"];
            let place = space[usize::from(self.byte() % 4)];
            let key = format!("SCHILY.xattr.{place}{number}");
            let length = usize::from(self.byte()) * usize::from(choice / 16);
            (key.into_bytes(), vec![self.byte(); length])
        });
        let mut pax: Vec<_> = pax.collect();
        pax.sort();
        pax.dedup_by(|a, b| a.0 == b.0);
        Entry {
            name,
            kind,
            data_offset,
            size,
            linkname: if is_link { self.name() } else { Vec::new() },
            mode: i64::from(self.byte()) << 4,
            uid: u32::from(self.byte()),
            gid: u32::from(self.byte()),
            uname: Default::default(),
            gname: Default::default(),
            mtime: (choice & 4 > 0).then(|| Timestamp {
                // the other reader takes no time whose first 32 bits are negative
                seconds: (self.number() & 0x7fff_ffff) as i64,
                nanoseconds: u32::from(self.byte()),
            }),
            devmajor: i64::from(self.byte()),
            devminor: i64::from(self.byte()),
            pax,
            sparse: None,
        }
    }
}
