//! Trees laid out as ext4, seen by e2fsck, debugfs, an independent reader and the kernel.

mod fixture;
mod kernel;
mod odd;
mod random;
mod reader;
mod reference;
