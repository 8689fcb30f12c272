//! The layer's disk: fetched by span, or filled by a stream.

mod check;
mod damage;
mod failures;
mod faults;
pub mod fixture;
mod full;
mod hostile;
mod lazy;
mod restart;
mod sources;
mod streamed;
mod structure;
mod whole;
