//! The streams of layers that run.

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

/// How far a stream is.
#[derive(Clone, Default)]
pub(super) struct StreamProgress {
    pub(super) bytes: u64,
    pub(super) outcome: Option<Result<Arc<Disk>, Arc<Error>>>,
}

/// The blob, and what its content must be.
pub(super) type Key = (Digest, Digest);

/// The streams that are running. A stream ends when nobody waits for it.
#[derive(Default)]
pub(crate) struct Streams(Mutex<HashMap<Key, Weak<watch::Sender<StreamProgress>>>>);

impl Streams {
    /// The stream of this key; the sender comes with it when it has to be started.
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
