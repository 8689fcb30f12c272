//! The layer's disk: fetched by span, or filled by a stream.

mod check;
mod damage;
pub mod damage_matrix;
mod eviction;
mod failing_sync;
mod failures;
mod faults;
pub mod fixture;
mod full;
mod hostile;
mod lazy;
mod mirrors;
mod power_cut;
mod quiet;
mod restart;
mod sources;
mod streamed;
mod structure;
mod whole;
