//! Xattrs: in what an inode has left of its 256 bytes, and in one block (Documentation/filesystems/ext4/attributes.rst).

use std::{borrow::Cow, collections::BTreeMap};

use zerocopy::IntoBytes;

use super::{
    BLOCK_SIZE, acl,
    format::{XATTR_MAGIC, XattrEntry, XattrHeader},
};

const BLOCK: usize = BLOCK_SIZE as usize;
/// Bytes of an inode that are free for xattrs.
pub(super) const BODY: usize = 96;
const MAGIC_BYTES: usize = 4;
/// A zero word ends the entries.
const END_BYTES: usize = 4;
/// Entries and values in an inode.
const BODY_ROOM: usize = BODY - MAGIC_BYTES - END_BYTES;
/// Entries and values in a block.
const BLOCK_ROOM: usize = BLOCK - size_of::<XattrHeader>() - END_BYTES;
/// XATTR_NAME_MAX, of the name with its namespace.
const NAME_LIMIT: usize = 255;

/// Xattrs as they go to the disk.
#[derive(Debug)]
pub(super) struct Laid {
    pub(super) body: [u8; BODY],
    /// A block, its `h_refcount` 1, if the body is not enough.
    pub(super) block: Option<Vec<u8>>,
}

/// What an inode cannot have.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Names and values take too many bytes.
    TooLarge { bytes: usize, limit: usize },
    /// A name is too long.
    Name { name: Vec<u8>, limit: usize },
    /// An ACL that setxattr(2) would refuse.
    Acl { name: Vec<u8> },
}

struct Attribute<'a> {
    /// `e_name_index`: the namespace.
    index: u8,
    /// The name without it.
    name: &'a [u8],
    value: Cow<'a, [u8]>,
}

impl Attribute<'_> {
    fn entry_size(&self) -> usize {
        (size_of::<XattrEntry>() + self.name.len()).next_multiple_of(4)
    }

    fn value_size(&self) -> usize {
        self.value.len().next_multiple_of(4)
    }

    fn size(&self) -> usize {
        self.entry_size() + self.value_size()
    }
}

/// Lays out the xattrs of a file with this mode: as many as fit into its inode, the rest in a block.
pub(super) fn lay_out(
    xattrs: &BTreeMap<Vec<u8>, Vec<u8>>,
    mode: u16,
    is_directory: bool,
) -> Result<Laid, Refused> {
    let mut all = Vec::with_capacity(xattrs.len());
    for (name, value) in xattrs {
        all.extend(attribute(name, value, mode, is_directory)?);
    }
    // the kernel searches a block in this order
    all.sort_by(|a, b| {
        let key = |x: &Attribute<'_>| (x.index, x.name.len());
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(b.name))
    });
    let mut room = BODY_ROOM;
    let (inside, outside): (Vec<_>, Vec<_>) = all.into_iter().partition(|attribute| {
        let fits = attribute.size() <= room;
        room -= if fits { attribute.size() } else { 0 };
        fits
    });
    let mut body = [0; BODY];
    if !inside.is_empty() {
        body[..MAGIC_BYTES].copy_from_slice(&XATTR_MAGIC.to_le_bytes());
        put(&mut body, MAGIC_BYTES, MAGIC_BYTES, &inside);
    }
    let bytes = outside.iter().map(Attribute::size).sum();
    if bytes > BLOCK_ROOM {
        return Err(Refused::TooLarge {
            bytes,
            limit: BLOCK_ROOM,
        });
    }
    let block = (!outside.is_empty()).then(|| block(&outside));
    Ok(Laid { body, block })
}

fn attribute<'a>(
    name: &'a [u8],
    value: &'a [u8],
    mode: u16,
    is_directory: bool,
) -> Result<Option<Attribute<'a>>, Refused> {
    let refused_acl = |_: acl::Invalid| Refused::Acl {
        name: name.to_vec(),
    };
    if name.len() > NAME_LIMIT {
        return Err(Refused::Name {
            name: name.to_vec(),
            limit: NAME_LIMIT,
        });
    }
    let acl = match name {
        b"system.posix_acl_access" => Some((2, acl::access(value, mode).map_err(refused_acl)?)),
        b"system.posix_acl_default" => {
            let stored = acl::default(value).map_err(refused_acl)?;
            if stored.is_some() && !is_directory {
                return Err(refused_acl(acl::Invalid));
            }
            Some((3, stored))
        }
        _ => None,
    };
    if let Some((index, stored)) = acl {
        return Ok(stored.map(|value| Attribute {
            index,
            name: b"",
            value: value.into(),
        }));
    }
    let namespaces = [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")];
    let found = namespaces
        .iter()
        .find_map(|&(index, prefix)| Some((index, name.strip_prefix(prefix)?)));
    // a tree has no xattrs of other namespaces
    Ok(found.map(|(index, name)| Attribute {
        index,
        name,
        value: value.into(),
    }))
}

/// Writes entries from `first` on and values from the end down. Offsets of values count from `base`.
fn put(out: &mut [u8], first: usize, base: usize, attributes: &[Attribute<'_>]) {
    let mut entry_at = first;
    let mut value_at = out.len();
    for attribute in attributes {
        value_at -= attribute.value_size();
        let length = attribute.value.len();
        out[value_at..value_at + length].copy_from_slice(&attribute.value);
        let head = XattrEntry {
            // names have at most NAME_LIMIT bytes, and all offsets lie within a block
            e_name_len: attribute.name.len() as u8,
            e_name_index: attribute.index,
            e_value_offs: if length == 0 {
                0.into()
            } else {
                ((value_at - base) as u16).into()
            },
            e_value_inum: 0.into(),
            e_value_size: (length as u32).into(),
            e_hash: hash(attribute.name, &attribute.value).into(),
        };
        let name_at = entry_at + size_of::<XattrEntry>();
        out[entry_at..name_at].copy_from_slice(head.as_bytes());
        out[name_at..name_at + attribute.name.len()].copy_from_slice(attribute.name);
        entry_at += attribute.entry_size();
    }
}

fn block(attributes: &[Attribute<'_>]) -> Vec<u8> {
    let mut out = vec![0; BLOCK];
    put(&mut out, size_of::<XattrHeader>(), 0, attributes);
    // `ext4_xattr_rehash`: the kernel finds equal blocks by this; an entry without a hash makes it zero
    let mut hashes = attributes.iter().map(|a| hash(a.name, &a.value));
    let whole = hashes.try_fold(0u32, |whole, hash| {
        (hash != 0).then(|| whole.rotate_left(16) ^ hash)
    });
    let head = XattrHeader {
        h_magic: XATTR_MAGIC.into(),
        h_refcount: 1.into(),
        h_blocks: 1.into(),
        h_hash: whole.unwrap_or(0).into(),
        h_checksum: 0.into(),
        h_reserved: [0.into(); 3],
    };
    out[..size_of::<XattrHeader>()].copy_from_slice(head.as_bytes());
    out
}

/// `ext4_xattr_hash_entry`: the name's bytes, then the value's words.
fn hash(name: &[u8], value: &[u8]) -> u32 {
    let of_name = name
        .iter()
        .fold(0u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    value.chunks(4).fold(of_name, |hash, bytes| {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laid(xattrs: &[(&str, &[u8])]) -> Result<Laid, Refused> {
        let xattrs = xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
            .collect();
        lay_out(&xattrs, 0o644, false)
    }

    #[test]
    fn the_body_is_filled_before_a_block_is_taken() {
        assert_eq!(laid(&[]).unwrap().body, [0; BODY]);
        // 16 of head, 4 of name, 68 of value
        let full = laid(&[("user.abcd", &[1; 68])]).unwrap();
        assert!(full.block.is_none());
        assert_eq!(full.body[..4], XATTR_MAGIC.to_le_bytes());
        let over = laid(&[("user.abcd", &[1; 69])]).unwrap();
        assert!(over.block.is_some());
        assert_eq!(over.body, [0; BODY]);
        // what fits stays inside, also after one that does not
        let both = laid(&[("user.a", &[1; 200]), ("user.b", b"x")]).unwrap();
        assert!(both.block.is_some());
        assert_ne!(both.body, [0; BODY]);
    }

    #[test]
    fn more_than_a_block_is_refused_with_the_limit() {
        assert!(laid(&[("user.abcd", &[1; BLOCK_ROOM - 20])]).is_ok());
        assert_eq!(
            laid(&[("user.abcd", &[1; BLOCK_ROOM - 19])]).unwrap_err(),
            Refused::TooLarge {
                bytes: BLOCK_ROOM + 4,
                limit: BLOCK_ROOM
            }
        );
        let long = format!("user.{}", "n".repeat(251));
        assert!(matches!(
            laid(&[(&long, b"")]).unwrap_err(),
            Refused::Name { limit: 255, .. }
        ));
    }

    #[test]
    fn a_default_acl_is_for_directories() {
        let acl = [
            2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5,
            0, 255, 255, 255, 255,
        ];
        let xattrs = BTreeMap::from([(b"system.posix_acl_default".to_vec(), acl.to_vec())]);
        assert!(lay_out(&xattrs, 0o755, true).is_ok());
        assert!(matches!(
            lay_out(&xattrs, 0o755, false),
            Err(Refused::Acl { .. })
        ));
    }
}
