//! How a disk's folder is made.
//!
//! `lazy` makes it from a table alone (`import`), and the data comes later. `streamed` writes all of a layer that has no table, while it comes
//! (`stream_sink`, `entry_table`). `buffered_writer` writes in large pieces.

pub(crate) mod buffered_writer;
pub(crate) mod entry_table;
pub(crate) mod import;
pub(crate) mod lazy;
pub(crate) mod stream_sink;
pub(crate) mod streamed;
pub(crate) mod streams;
