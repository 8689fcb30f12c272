//! Disks read by a reader of other authors.

use std::{error::Error, fs::File, os::unix::fs::FileExt};

use ext4_view::{Ext4, Ext4Read, FileType};
use socinbd::tree::NodeKind;

use super::odd;

struct Disk(File);

impl Ext4Read for Disk {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(self.0.read_exact_at(dst, start_byte)?)
    }
}

#[test]
fn an_independent_reader_sees_the_tree() {
    let layer = odd::layer();
    let disk = layer.disk();
    let tree = layer.tree();
    let device = Disk(File::open(&disk.path).unwrap());
    let reader = Ext4::load(Box::new(device)).unwrap();
    let (mut count, mut skipped) = (0, 0);
    tree.walk(|path, id| {
        let node = tree.node(id);
        let path = [b"/", path].concat();
        let path = ext4_view::Path::try_from(&path[..]).unwrap();
        // version 1.0 of the reader takes seconds with their 31st bit set for damage; the kernel's tests look at these
        let seconds = node
            .mtime
            .seconds
            .clamp(i32::MIN.into(), (3 << 32) + 0x7fff_ffff);
        if (seconds as i32) < 0 {
            skipped += 1;
            return;
        }
        let found = reader
            .symlink_metadata(path)
            .unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let (kind, size) = match &node.kind {
            NodeKind::File { size, .. } => (FileType::Regular, *size),
            NodeKind::Directory(names) => {
                let mut listed: Vec<Vec<u8>> = reader
                    .read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().as_ref().to_vec())
                    .filter(|name| name != b"." && name != b"..")
                    .collect();
                listed.sort();
                assert!(
                    listed.iter().eq(names.iter().map(|(name, _)| name)),
                    "{path:?}"
                );
                (FileType::Directory, found.len())
            }
            NodeKind::Symlink(text) => {
                let read = reader.read_link(path).unwrap();
                assert_eq!(read.as_ref(), &text[..], "{path:?}");
                (FileType::Symlink, text.len() as u64)
            }
            NodeKind::Char(..) => (FileType::CharacterDevice, 0),
            NodeKind::Block(..) => (FileType::BlockDevice, 0),
            NodeKind::Fifo => (FileType::Fifo, 0),
        };
        assert_eq!(found.file_type(), kind, "{path:?}");
        assert_eq!(found.len(), size, "{path:?}");
        assert_eq!(found.modified().seconds(), seconds, "{path:?}");
        assert_eq!(found.mode(), node.mode, "{path:?}");
        assert_eq!((found.uid(), found.gid()), (node.uid, node.gid), "{path:?}");
        if let NodeKind::File { entry, size } = node.kind {
            let expected = layer.content(entry, size);
            assert!(reader.read(path).unwrap() == expected, "{path:?}");
        }
        count += 1;
    });
    assert!(count > 4000);
    assert_eq!(skipped, 6);
}
