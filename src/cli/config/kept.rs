//! The text of the last good configuration file, kept in the descriptor store: a daemon that follows one that died starts although the file
//! was broken meanwhile.

use super::file::MAX_BYTES;
use crate::{
    error::Result,
    keeper::{FdStore, Service},
};

/// The name in the descriptor store.
const NAME: &str = "config";

/// Keeps a text for the next daemon. An empty text needs no place.
pub(in crate::cli) fn keep(text: &str, store: &FdStore) -> Result<()> {
    match text.is_empty() {
        true => store.remove(NAME),
        false => store.put_bytes(NAME, text.as_bytes()),
    }
}

/// The text that the daemon before has kept; `None` if it has kept none, or it cannot be read.
pub(in crate::cli) fn kept(service: &mut Service) -> Option<Vec<u8>> {
    service.take_inherited_bytes(NAME, MAX_BYTES)
}
