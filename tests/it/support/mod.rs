//! What several topics share.
#![allow(
    dead_code,
    reason = "a helper that is made for the topics to come is not an error"
)]

pub mod compare;
