//! On-disk structures of ext4 (Documentation/filesystems/ext4 of the kernel).
