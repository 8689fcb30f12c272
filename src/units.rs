//! Offsets and numbers that must not be mixed. All are counted in bytes from zero unless their name says otherwise.

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The plain number.
            pub const fn get(self) -> $inner {
                self.0
            }

            /// This offset moved up by `count`, or `None` where that overflows.
            pub fn checked_add(self, count: $inner) -> Option<Self> {
                self.0.checked_add(count).map(Self)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

offset! {
    /// A byte of a layer's uncompressed tar stream.
    LayerOffset(u64)
}
offset! {
    /// A byte of a layer's blob as the registry stores it.
    CompressedOffset(u64)
}
offset! {
    /// A byte of a layer's disk, its ext4 image.
    DiskOffset(u64)
}
offset! {
    /// The number of a span of a layer, from zero.
    SpanId(u32)
}
offset! {
    /// The number of a 4 KiB block of a disk, from zero.
    BlockIndex(u32)
}
