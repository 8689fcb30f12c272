//! The digest of the entries of a streamed layer, which has no table digest.

use crate::{
    oci::{Digest, digest::Hasher},
    tar::{Entry, EntryKind},
};

/// Hashed first, so that another encoding has another digest.
const VERSION: &[u8] = b"socinbd entry table 1\n";

/// The digest of the entries. It has all fields that a disk is laid out from: numbers little-endian in eight bytes, strings after their
/// length.
pub(crate) fn digest(entries: &[Entry]) -> Digest {
    let mut hash = EntryHash {
        hasher: Hasher::default(),
        buffer: VERSION.to_vec(),
    };
    hash.number(entries.len() as u64);
    for entry in entries {
        hash.string(&entry.name);
        hash.number(match entry.kind {
            EntryKind::Regular => 0,
            EntryKind::Directory => 1,
            EntryKind::Symlink => 2,
            EntryKind::Hardlink => 3,
            EntryKind::Char => 4,
            EntryKind::Block => 5,
            EntryKind::Fifo => 6,
        });
        hash.number(entry.data_offset.get());
        hash.number(entry.size);
        hash.string(&entry.linkname);
        hash.number(entry.mode as u64);
        hash.number(entry.uid.into());
        hash.number(entry.gid.into());
        // the names of owner and group are not on the disk
        hash.number(entry.mtime.is_some().into());
        let mtime = entry.mtime.unwrap_or_default();
        hash.number(mtime.seconds as u64);
        hash.number(mtime.nanoseconds.into());
        hash.number(entry.devmajor as u64);
        hash.number(entry.devminor as u64);
        hash.number(entry.pax.len() as u64);
        for (key, value) in &entry.pax {
            hash.string(key);
            hash.string(value);
        }
        hash.number(entry.sparse.is_some().into());
        let segments = entry.sparse.as_deref().unwrap_or_default();
        hash.number(segments.len() as u64);
        for segment in segments {
            hash.number(segment.file_offset);
            hash.number(segment.layer_offset.get());
            hash.number(segment.length);
        }
        hash.flush();
    }
    hash.flush();
    hash.hasher.finish()
}

struct EntryHash {
    hasher: Hasher,
    buffer: Vec<u8>,
}

impl EntryHash {
    fn number(&mut self, number: u64) {
        self.buffer.extend_from_slice(&number.to_le_bytes());
    }

    fn string(&mut self, string: &[u8]) {
        self.number(string.len() as u64);
        self.buffer.extend_from_slice(string);
    }

    fn flush(&mut self) {
        self.hasher.update(&self.buffer);
        self.buffer.clear();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{tar::Timestamp, units::LayerOffset};

    fn entry() -> Entry {
        Entry {
            name: b"a/b".to_vec(),
            kind: EntryKind::Regular,
            data_offset: LayerOffset(512),
            size: 5,
            linkname: Vec::new(),
            mode: 0o644,
            uid: 1,
            gid: 2,
            uname: Bytes::new(),
            gname: Bytes::new(),
            mtime: None,
            devmajor: 0,
            devminor: 0,
            pax: Vec::new(),
            sparse: None,
        }
    }

    #[test]
    fn what_the_disk_depends_on_makes_a_difference() {
        let same = digest(&[entry()]);
        assert_eq!(digest(&[entry()]), same);
        let changes: [fn(&mut Entry); 11] = [
            |entry| entry.name = b"a/c".to_vec(),
            |entry| entry.kind = EntryKind::Fifo,
            |entry| entry.data_offset = LayerOffset(1024),
            |entry| entry.size = 6,
            |entry| entry.linkname = b"x".to_vec(),
            |entry| entry.mode = 0o4644,
            |entry| entry.uid = 2,
            |entry| entry.gid = 3,
            |entry| entry.mtime = Some(Timestamp::default()),
            |entry| entry.pax = vec![(b"k".to_vec(), b"v".to_vec())],
            |entry| entry.sparse = Some(Vec::new()),
        ];
        for change in changes {
            let mut other = entry();
            change(&mut other);
            assert_ne!(digest(&[other]), same);
        }
        // the end of one field is not the start of the next
        let mut moved = entry();
        (moved.name, moved.linkname) = (b"a/".to_vec(), b"b".to_vec());
        assert_ne!(digest(&[moved]), same);
        assert_ne!(digest(&[]), digest(&[entry(), entry()]));
    }

    /// The digest is the name of directories: if it changes, no streamed disk is found any more.
    #[test]
    fn the_digest_of_nothing_is_pinned() {
        let mut bytes = VERSION.to_vec();
        bytes.extend_from_slice(&[0; 8]);
        assert_eq!(digest(&[]), Digest::of(&bytes));
    }
}
