//! Whether a table tells the truth.
//!
//! Each span is held against what the table says of it (`span`, `headers`), and the whole layer against the image (`whole_layer`), for which the
//! bytes that are in no file are kept (`non_file_bytes`, `trailer`). `progress` is how far that is, `revoked` the spans that were taken back.

pub(crate) mod headers;
pub(crate) mod lies;
pub(crate) mod non_file_bytes;
pub(crate) mod progress;
pub(crate) mod revoked;
pub(crate) mod span;
pub(crate) mod trailer;
pub(crate) mod whole_layer;
