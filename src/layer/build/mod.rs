//! Makes the directory of a disk.
//!
//! `lazy` makes it from a table (`import`); data is fetched later. `streamed` downloads a layer without a table and writes its disk in the
//! same pass (`streams`, `stream_sink`, `entry_table`). `buffered_writer` writes large pieces.

pub(crate) mod buffered_writer;
pub(crate) mod entry_table;
pub(crate) mod import;
pub(crate) mod lazy;
pub(crate) mod stream_sink;
pub(crate) mod streamed;
pub(crate) mod streams;
