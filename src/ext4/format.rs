//! On-disk structures of ext4, little-endian, with the kernel's names (Documentation/filesystems/ext4 of the kernel, `fs/ext4/ext4.h`,
//! `fs/ext4/xattr.h`). Sizes and the offsets that other structures rely on are asserted at compile time.

#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use std::mem::{offset_of, size_of};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Where the first superblock is, whatever the block size.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// `s_magic`.
pub const SUPER_MAGIC: u16 = 0xEF53;
/// `s_state`: cleanly unmounted.
pub const STATE_VALID: u16 = 1;
/// `s_errors`: go on after an error.
pub const ERRORS_CONTINUE: u16 = 1;
/// `s_rev_level`: inodes of any size, feature flags.
pub const DYNAMIC_REV: u32 = 1;
/// `s_flags`: directory hashes take the bytes of names as signed.
pub const FLAGS_SIGNED_HASH: u32 = 1;
/// `s_default_mount_opts`: `user.*` xattrs and POSIX ACLs.
pub const DEFAULT_MOUNT_OPTS: u32 = 0x4 | 0x8;

/// `s_feature_compat`: xattrs.
pub const COMPAT_EXT_ATTR: u32 = 0x8;
/// `s_feature_compat`: hashed directories.
pub const COMPAT_DIR_INDEX: u32 = 0x20;
/// `s_feature_compat`: backup superblocks only in the groups that `s_backup_bgs` names; both zero is none.
pub const COMPAT_SPARSE_SUPER2: u32 = 0x200;
/// `s_feature_incompat`: file types in directory entries.
pub const INCOMPAT_FILETYPE: u32 = 0x2;
/// `s_feature_incompat`: extents.
pub const INCOMPAT_EXTENTS: u32 = 0x40;
/// `s_feature_incompat`: bitmaps and inode tables may be in another group than their own.
pub const INCOMPAT_FLEX_BG: u32 = 0x200;
/// `s_feature_ro_compat`: files over 2 GiB.
pub const RO_COMPAT_LARGE_FILE: u32 = 0x2;
/// `s_feature_ro_compat`: `i_blocks` of 48 bits.
pub const RO_COMPAT_HUGE_FILE: u32 = 0x8;
/// `s_feature_ro_compat`: check sums of group descriptors, and bitmaps that need not be initialized.
pub const RO_COMPAT_GDT_CSUM: u32 = 0x10;
/// `s_feature_ro_compat`: a directory with more than [`LINK_MAX`] links has 1.
pub const RO_COMPAT_DIR_NLINK: u32 = 0x20;
/// `s_feature_ro_compat`: inodes have `i_extra_isize` and what follows.
pub const RO_COMPAT_EXTRA_ISIZE: u32 = 0x40;
/// `s_feature_ro_compat`: never mounted for writing.
pub const RO_COMPAT_READONLY: u32 = 0x1000;

/// `bg_flags`: no inode of the group is in use; its bitmap is not on the disk.
pub const BG_INODE_UNINIT: u16 = 0x1;
/// `bg_flags`: no block of the group is in use; its bitmap is not on the disk.
pub const BG_BLOCK_UNINIT: u16 = 0x2;
/// `bg_flags`: what is not used of the inode table is zero.
pub const BG_INODE_ZEROED: u16 = 0x4;

/// The root directory's inode.
pub const ROOT_INO: u32 = 2;
/// The first inode that is not reserved.
pub const FIRST_INO: u32 = 11;
/// Bytes of an inode.
pub const INODE_SIZE: usize = 256;
/// Bytes that the oldest inodes had; the rest is counted by `i_extra_isize`.
pub const GOOD_OLD_INODE_SIZE: usize = 128;
/// The most names of a file.
pub const LINK_MAX: u32 = 65_000;
/// `i_flags`: a hashed directory.
pub const INDEX_FL: u32 = 0x1000;
/// `i_flags`: `i_block` holds an extent tree.
pub const EXTENTS_FL: u32 = 0x8_0000;

/// The superblock.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct Superblock {
    pub s_inodes_count: U32,
    pub s_blocks_count_lo: U32,
    pub s_r_blocks_count_lo: U32,
    pub s_free_blocks_count_lo: U32,
    pub s_free_inodes_count: U32,
    pub s_first_data_block: U32,
    pub s_log_block_size: U32,
    pub s_log_cluster_size: U32,
    pub s_blocks_per_group: U32,
    pub s_clusters_per_group: U32,
    pub s_inodes_per_group: U32,
    pub s_mtime: U32,
    pub s_wtime: U32,
    pub s_mnt_count: U16,
    pub s_max_mnt_count: U16,
    pub s_magic: U16,
    pub s_state: U16,
    pub s_errors: U16,
    pub s_minor_rev_level: U16,
    pub s_lastcheck: U32,
    pub s_checkinterval: U32,
    pub s_creator_os: U32,
    pub s_rev_level: U32,
    pub s_def_resuid: U16,
    pub s_def_resgid: U16,
    pub s_first_ino: U32,
    pub s_inode_size: U16,
    pub s_block_group_nr: U16,
    pub s_feature_compat: U32,
    pub s_feature_incompat: U32,
    pub s_feature_ro_compat: U32,
    pub s_uuid: [u8; 16],
    pub s_volume_name: [u8; 16],
    pub s_last_mounted: [u8; 64],
    pub s_algorithm_usage_bitmap: U32,
    pub s_prealloc_blocks: u8,
    pub s_prealloc_dir_blocks: u8,
    pub s_reserved_gdt_blocks: U16,
    pub s_journal_uuid: [u8; 16],
    pub s_journal_inum: U32,
    pub s_journal_dev: U32,
    pub s_last_orphan: U32,
    pub s_hash_seed: [u8; 16],
    pub s_def_hash_version: u8,
    pub s_jnl_backup_type: u8,
    pub s_desc_size: U16,
    pub s_default_mount_opts: U32,
    pub s_first_meta_bg: U32,
    pub s_mkfs_time: U32,
    pub s_jnl_blocks: [U32; 17],
    pub s_blocks_count_hi: U32,
    pub s_r_blocks_count_hi: U32,
    pub s_free_blocks_count_hi: U32,
    pub s_min_extra_isize: U16,
    pub s_want_extra_isize: U16,
    pub s_flags: U32,
    pub s_raid_stride: U16,
    pub s_mmp_interval: U16,
    pub s_mmp_block: U64,
    pub s_raid_stripe_width: U32,
    pub s_log_groups_per_flex: u8,
    pub s_checksum_type: u8,
    pub s_reserved_pad: U16,
    pub s_kbytes_written: U64,
    pub s_snapshot: [U32; 5],
    pub s_error_count: U32,
    pub s_error_log: [u8; 104],
    pub s_mount_opts: [u8; 64],
    pub s_usr_quota_inum: U32,
    pub s_grp_quota_inum: U32,
    pub s_overhead_clusters: U32,
    pub s_backup_bgs: [U32; 2],
    pub s_encrypt_algos: [u8; 4],
    pub s_encrypt_pw_salt: [u8; 16],
    pub s_lpf_ino: U32,
    pub s_prj_quota_inum: U32,
    pub s_checksum_seed: U32,
    pub s_reserved: [u8; 392],
    pub s_checksum: U32,
}

const _: () = {
    assert!(size_of::<Superblock>() == 1024);
    assert!(offset_of!(Superblock, s_magic) == 0x38);
    assert!(offset_of!(Superblock, s_feature_compat) == 0x5C);
    assert!(offset_of!(Superblock, s_uuid) == 0x68);
    assert!(offset_of!(Superblock, s_hash_seed) == 0xEC);
    assert!(offset_of!(Superblock, s_blocks_count_hi) == 0x150);
    assert!(offset_of!(Superblock, s_flags) == 0x160);
    assert!(offset_of!(Superblock, s_log_groups_per_flex) == 0x174);
    assert!(offset_of!(Superblock, s_mount_opts) == 0x200);
    assert!(offset_of!(Superblock, s_backup_bgs) == 0x24C);
    assert!(offset_of!(Superblock, s_checksum_seed) == 0x270);
};

/// A group descriptor, of the size that file systems without the `64bit` feature have.
#[derive(Clone, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct GroupDescriptor {
    pub bg_block_bitmap_lo: U32,
    pub bg_inode_bitmap_lo: U32,
    pub bg_inode_table_lo: U32,
    pub bg_free_blocks_count_lo: U16,
    pub bg_free_inodes_count_lo: U16,
    pub bg_used_dirs_count_lo: U16,
    pub bg_flags: U16,
    pub bg_exclude_bitmap_lo: U32,
    pub bg_block_bitmap_csum_lo: U16,
    pub bg_inode_bitmap_csum_lo: U16,
    pub bg_itable_unused_lo: U16,
    pub bg_checksum: U16,
}

const _: () = {
    assert!(size_of::<GroupDescriptor>() == 32);
    assert!(offset_of!(GroupDescriptor, bg_checksum) == 0x1E);
};

/// An inode, with the room after it where xattrs go.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct Inode {
    pub i_mode: U16,
    pub i_uid: U16,
    pub i_size_lo: U32,
    pub i_atime: U32,
    pub i_ctime: U32,
    pub i_mtime: U32,
    pub i_dtime: U32,
    pub i_gid: U16,
    pub i_links_count: U16,
    pub i_blocks_lo: U32,
    pub i_flags: U32,
    pub i_version: U32,
    pub i_block: [u8; 60],
    pub i_generation: U32,
    pub i_file_acl_lo: U32,
    pub i_size_high: U32,
    pub i_obso_faddr: U32,
    pub l_i_blocks_high: U16,
    pub l_i_file_acl_high: U16,
    pub l_i_uid_high: U16,
    pub l_i_gid_high: U16,
    pub l_i_checksum_lo: U16,
    pub l_i_reserved: U16,
    pub i_extra_isize: U16,
    pub i_checksum_hi: U16,
    pub i_ctime_extra: U32,
    pub i_mtime_extra: U32,
    pub i_atime_extra: U32,
    pub i_crtime: U32,
    pub i_crtime_extra: U32,
    pub i_version_hi: U32,
    pub i_projid: U32,
    /// What is left of the inode: xattrs.
    pub body: [u8; 96],
}

const _: () = {
    assert!(size_of::<Inode>() == INODE_SIZE);
    assert!(offset_of!(Inode, i_block) == 0x28);
    assert!(offset_of!(Inode, i_extra_isize) == GOOD_OLD_INODE_SIZE);
    // `EXTRA_ISIZE`
    assert!(offset_of!(Inode, body) == GOOD_OLD_INODE_SIZE + 32);
};

/// `i_extra_isize`: the bytes from that field itself to the body.
pub const EXTRA_ISIZE: u16 = 32;

/// `eh_magic`.
pub const EXTENT_MAGIC: u16 = 0xF30A;
/// The most blocks of an extent (more would say that it is not yet written).
pub const EXTENT_LENGTH_MAX: u32 = 1 << 15;

/// The head of a node of an extent tree.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct ExtentHeader {
    pub eh_magic: U16,
    pub eh_entries: U16,
    pub eh_max: U16,
    pub eh_depth: U16,
    pub eh_generation: U32,
}

/// An entry of an inner node of an extent tree.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct ExtentIndex {
    pub ei_block: U32,
    pub ei_leaf_lo: U32,
    pub ei_leaf_hi: U16,
    pub ei_unused: U16,
}

/// An entry of a leaf of an extent tree.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct Extent {
    pub ee_block: U32,
    pub ee_len: U16,
    pub ee_start_hi: U16,
    pub ee_start_lo: U32,
}

const _: () = {
    assert!(size_of::<ExtentHeader>() == 12);
    assert!(size_of::<ExtentIndex>() == 12);
    assert!(size_of::<Extent>() == 12);
};

/// The head of a directory entry; the name follows, and zeros up to `rec_len`.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct DirEntry2 {
    pub inode: U32,
    pub rec_len: U16,
    pub name_len: u8,
    pub file_type: u8,
}

/// `file_type` of a directory entry: regular file.
pub const FT_REG_FILE: u8 = 1;
/// `file_type` of a directory entry: directory.
pub const FT_DIR: u8 = 2;
/// `file_type` of a directory entry: character device.
pub const FT_CHRDEV: u8 = 3;
/// `file_type` of a directory entry: block device.
pub const FT_BLKDEV: u8 = 4;
/// `file_type` of a directory entry: fifo.
pub const FT_FIFO: u8 = 5;
/// `file_type` of a directory entry: symlink.
pub const FT_SYMLINK: u8 = 7;

/// `hash_version`: half MD4, of signed or unsigned bytes as `s_flags` says.
pub const DX_HASH_HALF_MD4: u8 = 1;

/// What stands in the first block of a hashed directory after the entries `.` and `..`.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct DxRootInfo {
    pub reserved_zero: U32,
    pub hash_version: u8,
    pub info_length: u8,
    pub indirect_levels: u8,
    pub unused_flags: u8,
}

/// Room for and number of index entries; it stands where the first of them would have its hash.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct DxCountLimit {
    pub limit: U16,
    pub count: U16,
}

/// An index entry of a hashed directory.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct DxEntry {
    pub hash: U32,
    pub block: U32,
}

const _: () = {
    assert!(size_of::<DirEntry2>() == 8);
    assert!(size_of::<DxRootInfo>() == 8);
    assert!(size_of::<DxCountLimit>() == offset_of!(DxEntry, block));
    assert!(size_of::<DxEntry>() == 8);
};

/// `h_magic` of xattrs, in an inode's body and in a block.
pub const XATTR_MAGIC: u32 = 0xEA02_0000;
/// The most inodes that share an xattr block.
pub const XATTR_REFCOUNT_MAX: u32 = 1024;

/// The head of an xattr block.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct XattrHeader {
    pub h_magic: U32,
    pub h_refcount: U32,
    pub h_blocks: U32,
    pub h_hash: U32,
    pub h_checksum: U32,
    pub h_reserved: [U32; 3],
}

/// The head of an xattr; the name without its namespace follows, and zeros up to a multiple of 4.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's names, documented there")]
pub struct XattrEntry {
    pub e_name_len: u8,
    pub e_name_index: u8,
    pub e_value_offs: U16,
    pub e_value_inum: U32,
    pub e_value_size: U32,
    pub e_hash: U32,
}

const _: () = {
    assert!(size_of::<XattrHeader>() == 32);
    assert!(size_of::<XattrEntry>() == 16);
};
