//! The superblock of a disk.

use zerocopy::FromZeros;

use super::{
    BLOCK_SIZE,
    format::{
        COMPAT_DIR_INDEX, COMPAT_EXT_ATTR, COMPAT_SPARSE_SUPER2, DEFAULT_MOUNT_OPTS,
        DX_HASH_HALF_MD4, DYNAMIC_REV, ERRORS_CONTINUE, EXTRA_ISIZE, FIRST_INO, FLAGS_SIGNED_HASH,
        INCOMPAT_EXTENTS, INCOMPAT_FILETYPE, INCOMPAT_FLEX_BG, INODE_SIZE, RO_COMPAT_DIR_NLINK,
        RO_COMPAT_EXTRA_ISIZE, RO_COMPAT_GDT_CSUM, RO_COMPAT_HUGE_FILE, RO_COMPAT_LARGE_FILE,
        RO_COMPAT_READONLY, STATE_VALID, SUPER_MAGIC, Superblock,
    },
    group::{GROUP_BLOCKS, Geometry, Groups},
};

/// What sets one disk apart from another with the same tree.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) uuid: [u8; 16],
    pub(super) hash_seed: [u8; 16],
}

impl Identity {
    /// From a digest: its first half is the UUID (version 8, RFC 9562: made by a rule of one's own), its second the hash seed.
    pub(super) fn new(seed: &[u8; 32]) -> Self {
        let mut uuid = [0; 16];
        let mut hash_seed = [0; 16];
        uuid.copy_from_slice(&seed[..16]);
        hash_seed.copy_from_slice(&seed[16..]);
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Self { uuid, hash_seed }
    }
}

/// The superblock. No field of it has a time: the same tree gives the same bytes.
pub(super) fn superblock(geometry: &Geometry, groups: &Groups, identity: &Identity) -> Superblock {
    let mut s = Superblock::new_zeroed();
    let log_block_size = BLOCK_SIZE.ilog2() - 10;
    // a disk has less than 2^32 blocks and inodes
    s.s_inodes_count = ((geometry.groups * geometry.inodes_per_group) as u32).into();
    s.s_blocks_count_lo = (geometry.blocks as u32).into();
    s.s_free_blocks_count_lo = (groups.free_blocks as u32).into();
    s.s_free_inodes_count = (groups.free_inodes as u32).into();
    s.s_log_block_size = log_block_size.into();
    s.s_log_cluster_size = log_block_size.into();
    s.s_blocks_per_group = (GROUP_BLOCKS as u32).into();
    s.s_clusters_per_group = (GROUP_BLOCKS as u32).into();
    s.s_inodes_per_group = (geometry.inodes_per_group as u32).into();
    // no check after so many mounts
    s.s_max_mnt_count = u16::MAX.into();
    s.s_magic = SUPER_MAGIC.into();
    s.s_state = STATE_VALID.into();
    s.s_errors = ERRORS_CONTINUE.into();
    s.s_rev_level = DYNAMIC_REV.into();
    s.s_first_ino = FIRST_INO.into();
    s.s_inode_size = (INODE_SIZE as u16).into();
    s.s_feature_compat = (COMPAT_EXT_ATTR | COMPAT_DIR_INDEX | COMPAT_SPARSE_SUPER2).into();
    s.s_feature_incompat = (INCOMPAT_FILETYPE | INCOMPAT_EXTENTS | INCOMPAT_FLEX_BG).into();
    s.s_feature_ro_compat = (RO_COMPAT_LARGE_FILE
        | RO_COMPAT_HUGE_FILE
        | RO_COMPAT_GDT_CSUM
        | RO_COMPAT_DIR_NLINK
        | RO_COMPAT_EXTRA_ISIZE
        | RO_COMPAT_READONLY)
        .into();
    s.s_uuid = identity.uuid;
    s.s_hash_seed = identity.hash_seed;
    s.s_def_hash_version = DX_HASH_HALF_MD4;
    s.s_flags = FLAGS_SIGNED_HASH.into();
    s.s_default_mount_opts = DEFAULT_MOUNT_OPTS.into();
    s.s_min_extra_isize = EXTRA_ISIZE.into();
    s.s_want_extra_isize = EXTRA_ISIZE.into();
    // 16 groups, as mke2fs has it
    s.s_log_groups_per_flex = 4;
    // what the kernel would count at each mount: superblock, descriptors, bitmaps and inode tables
    let overhead =
        1 + geometry.descriptor_blocks() + geometry.groups * (geometry.table_blocks() + 2);
    s.s_overhead_clusters = (overhead as u32).into();
    s
}
