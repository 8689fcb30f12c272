//! The NBD protocol's wire structures and constants (doc/proto.md of the NetworkBlockDevice project).
