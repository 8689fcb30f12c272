//! The part of an inode that depends on where its data is.

use super::super::extent::{self, ExtentRun};

/// What one inode has by its place.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) body: Body,
    pub(super) flags: u32,
    pub(super) size: u64,
    /// A disk has less than 2^32.
    pub(super) blocks: u32,
    /// 0: none.
    pub(super) xattr_block: u32,
}

/// `i_block`, in few bytes where it can be.
#[derive(Debug)]
pub(super) enum Body {
    /// An extent tree over one run, which needs no block.
    Run(ExtentRun),
    Other(Box<[u8; 60]>),
}

impl Placed {
    /// An inode without blocks.
    pub(super) fn bare(i_block: [u8; 60], size: u64) -> Self {
        Self {
            body: Body::Other(i_block.into()),
            flags: 0,
            size,
            blocks: 0,
            xattr_block: 0,
        }
    }

    pub(super) fn i_block(&self) -> [u8; 60] {
        match &self.body {
            Body::Run(run) => extent::root(&[*run]),
            Body::Other(i_block) => **i_block,
        }
    }
}
