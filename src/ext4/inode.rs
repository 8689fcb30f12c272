//! Fields of an inode that are encoded in their own ways.

use super::format::{
    EXTRA_ISIZE, FT_BLKDEV, FT_CHRDEV, FT_DIR, FT_FIFO, FT_REG_FILE, FT_SYMLINK, Inode, LINK_MAX,
};
use crate::{
    tar::Timestamp,
    tree::{Node, NodeKind},
};

/// The first and last seconds of 34 bits from 1901 on.
const SECONDS_MIN: i64 = i32::MIN as i64;
const SECONDS_MAX: i64 = SECONDS_MIN + (1 << 34) - 1;

/// Symlinks that are shorter stand in `i_block`, with a zero after them.
pub(super) const FAST_SYMLINK_LIMIT: usize = 60;

/// `st_mode`'s bits for the type, and the directory entry's type.
pub(super) fn types(kind: &NodeKind<'_>) -> (u16, u8) {
    match kind {
        NodeKind::File { .. } => (0o100_000, FT_REG_FILE),
        NodeKind::Directory(_) => (0o040_000, FT_DIR),
        NodeKind::Symlink(_) => (0o120_000, FT_SYMLINK),
        NodeKind::Char(..) => (0o020_000, FT_CHRDEV),
        NodeKind::Block(..) => (0o060_000, FT_BLKDEV),
        NodeKind::Fifo => (0o010_000, FT_FIFO),
    }
}

/// `i_block` of a device: the old form where both numbers have 8 bits, else Linux's form of 12 and 20 bits. `None` where they have
/// more.
pub(super) fn device(major: u32, minor: u32) -> Option<[u8; 60]> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return None;
    }
    let mut i_block = [0; 60];
    if major < 256 && minor < 256 {
        let old = major << 8 | minor;
        i_block[..4].copy_from_slice(&old.to_le_bytes());
    } else {
        let new = minor & 0xff | major << 8 | (minor & !0xff) << 12;
        i_block[4..8].copy_from_slice(&new.to_le_bytes());
    }
    Some(i_block)
}

/// A time as the field of old and its extra: 32 bits of seconds, then two more bits of them below the nanoseconds. Beyond 1901 and
/// 2446 it is the nearest second, as in the kernel.
///
/// From 2310-04-04 to 2378-04-22 the bits are those that kernels before 3.14 wrote for times before 1970. e2fsck asks whether it should
/// take them so, here as on a disk where a kernel has unpacked the same file; the kernel reads them as they are meant.
fn time(time: Timestamp) -> (u32, u32) {
    let seconds = time.seconds.clamp(SECONDS_MIN, SECONDS_MAX);
    let nanoseconds = if seconds == time.seconds && seconds != SECONDS_MAX && seconds != SECONDS_MIN
    {
        time.nanoseconds.min(999_999_999)
    } else {
        0
    };
    let low = seconds as i32;
    let epoch = ((seconds - i64::from(low)) >> 32) as u32 & 3;
    (low as u32, nanoseconds << 2 | epoch)
}

/// The inode of a node, without what depends on its place: `i_block`, size, blocks, flags and xattrs.
pub(super) fn inode(node: &Node<'_>) -> Inode {
    let (type_bits, _) = types(&node.kind);
    let (low, extra) = time(node.mtime);
    let links = match node.kind {
        // the feature dir_nlink: too many to be counted
        NodeKind::Directory(_) if node.links > LINK_MAX => 1,
        _ => node.links,
    };
    Inode {
        i_mode: (type_bits | node.mode & 0o7777).into(),
        i_uid: (node.uid as u16).into(),
        i_size_lo: 0.into(),
        i_atime: low.into(),
        i_ctime: low.into(),
        i_mtime: low.into(),
        i_dtime: 0.into(),
        i_gid: (node.gid as u16).into(),
        // at most LINK_MAX: for files the caller has looked
        i_links_count: (links as u16).into(),
        i_blocks_lo: 0.into(),
        i_flags: 0.into(),
        i_version: 0.into(),
        i_block: [0; 60],
        i_generation: 0.into(),
        i_file_acl_lo: 0.into(),
        i_size_high: 0.into(),
        i_obso_faddr: 0.into(),
        l_i_blocks_high: 0.into(),
        l_i_file_acl_high: 0.into(),
        l_i_uid_high: ((node.uid >> 16) as u16).into(),
        l_i_gid_high: ((node.gid >> 16) as u16).into(),
        l_i_checksum_lo: 0.into(),
        l_i_reserved: 0.into(),
        i_extra_isize: EXTRA_ISIZE.into(),
        i_checksum_hi: 0.into(),
        i_ctime_extra: extra.into(),
        i_mtime_extra: extra.into(),
        i_atime_extra: extra.into(),
        i_crtime: low.into(),
        i_crtime_extra: extra.into(),
        i_version_hi: 0.into(),
        i_projid: 0.into(),
        body: [0; 96],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_take_34_bits_from_1901_to_2446() {
        let at = |seconds, nanoseconds| {
            time(Timestamp {
                seconds,
                nanoseconds,
            })
        };
        assert_eq!(at(0, 1), (0, 1 << 2));
        assert_eq!(at(-1, 999_999_999), (u32::MAX, 999_999_999 << 2));
        assert_eq!(at(1 << 31, 5), (1 << 31, 5 << 2 | 1));
        assert_eq!(at((1 << 32) + 7, 0), (7, 1));
        assert_eq!(at(SECONDS_MAX - 1, 3), (i32::MAX as u32 - 1, 3 << 2 | 3));
        assert_eq!(at(SECONDS_MAX + 1, 3), (i32::MAX as u32, 3));
        assert_eq!(at(i64::MAX, 3), (i32::MAX as u32, 3));
        assert_eq!(at(i64::MIN, 3), (i32::MIN as u32, 0));
    }

    #[test]
    fn devices_have_two_forms_and_a_limit() {
        let words = |major, minor| {
            device(major, minor).map(|b| {
                let word = |at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
                (word(0), word(4))
            })
        };
        assert_eq!(words(0, 0), Some((0, 0)));
        assert_eq!(words(8, 255), Some((0x8ff, 0)));
        assert_eq!(words(8, 256), Some((0, 0x10_0800)));
        assert_eq!(words(4095, 0xf_ffff), Some((0, 0xffff_ffff)));
        assert_eq!(words(4096, 0), None);
        assert_eq!(words(0, 1 << 20), None);
    }
}
