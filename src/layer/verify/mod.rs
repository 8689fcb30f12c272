//! Detects tables that contradict the layer's bytes.
//!
//! Each span is compared with its table (`span`, `headers`), and the whole layer with the image (`whole_layer`). For the latter, the bytes
//! that belong to no file are stored (`non_file_bytes`, `trailer`). `progress` is the state of this verification, and `revoked` has the
//! spans that were found to be wrong after they had been present. `contradictions` are the findings.

pub(crate) mod contradictions;
pub(crate) mod headers;
pub(crate) mod non_file_bytes;
pub(crate) mod progress;
pub(crate) mod revoked;
pub(crate) mod span;
pub(crate) mod trailer;
pub(crate) mod verification;
pub(crate) mod whole_layer;
