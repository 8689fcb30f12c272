//! Limits of a descriptor store, whoever keeps it.

/// Descriptors in a store, at most: of 127 layers with eight each, four times.
pub const MAX_DESCRIPTORS: usize = 4096;
/// Bytes of all names, at most, with a separator each: they are passed in one variable of the environment, which has at most 128 KiB.
pub(super) const MAX_NAME_BYTES: usize = 120 << 10;
