//! The running streams of layers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::watch;

use crate::{
    error::{Error, Result},
    layer::disk::Disk,
    oci::Digest,
};

/// The progress of a stream.
#[derive(Clone, Default)]
pub(super) struct StreamProgress {
    pub(super) bytes: u64,
    pub(super) outcome: Option<Result<Arc<Disk>, Arc<Error>>>,
}

/// The blob and its expected diff ID.
pub(super) type Key = (Digest, Digest);

/// The running streams. A stream ends when it has no waiter.
#[derive(Default)]
pub(crate) struct Streams(Mutex<HashMap<Key, Weak<watch::Sender<StreamProgress>>>>);

impl Streams {
    /// The stream of this key, and the sender if the caller has to start it.
    pub(super) fn join(
        &self,
        key: Key,
    ) -> (
        watch::Receiver<StreamProgress>,
        Option<Arc<watch::Sender<StreamProgress>>>,
    ) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|_, stream| stream.strong_count() > 0);
        let entry = streams.entry(key).or_default();
        if let Some(sender) = entry.upgrade() {
            return (sender.subscribe(), None);
        }
        let (sender, receiver) = watch::channel(StreamProgress::default());
        let sender = Arc::new(sender);
        *entry = Arc::downgrade(&sender);
        (receiver, Some(sender))
    }
}
