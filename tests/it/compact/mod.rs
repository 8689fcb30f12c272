//! The compact index: made beside the zTOC, read, attached.

mod spans;
