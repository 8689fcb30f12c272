//! The list of referrers under the tag `sha256-<hex>`, which clients maintain if a registry has no referrers API (OCI distribution 1.1,
//! "Referrers Tag Schema").
//!
//! Registries have no compare-and-swap: if two clients change a list at the same time, one may overwrite the change of the other. Within
//! this process a lock prevents it. Against other clients, each client reads the list again after its write, after a pause as long as its
//! own time from reading to writing. By then a client that overwrites the list has done so, and the change is made once more.
//!
//! The content under the tag is changed only if it is such a list. A list that was replaced is not removed: registries remove a manifest
//! with all of its tags, and the lists of two subjects may have the same bytes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::Value;

use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest,
        media_type::OCI_INDEX,
        referrers::{Candidate, NotAList, ReferrersList, referrers_tag, referring},
    },
    source::registry::{client::Client, manifest},
};

/// How often a change that was lost is made again.
const MAX_TURNS: usize = 16;
const SHORTEST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Locks of the lists that are being changed, by `HOST/REPOSITORY@SUBJECT`.
static CHANGING: Mutex<Option<HashMap<String, Weak<tokio::sync::Mutex<()>>>>> = Mutex::new(None);

/// The content under the tag of the list of a subject.
pub(crate) enum Tagged {
    Nothing,
    List(ReferrersList),
    /// Content that this program must not change, and why it is not a list.
    Other(NotAList),
}

/// Reads the content under the tag of the list of a subject.
pub(crate) async fn read(client: &Client, subject: &Digest) -> Result<Tagged> {
    let tag = referrers_tag(subject);
    let found = match manifest::find_tag(client, &tag).await? {
        Ok(found) => found,
        // a missing repository is not the same as a missing tag
        Err(refusal) if refusal.kind() == Kind::NotFound && !refusal.has_code("NAME_UNKNOWN") => {
            return Ok(Tagged::Nothing);
        }
        Err(refusal) => {
            let what = format!("reading manifest {tag} of {}", client.name());
            return Err(refusal.error().context(what));
        }
    };
    let candidate = match Candidate::read(&found.bytes, &found.media_type, subject) {
        Ok(candidate) => candidate,
        Err(why) => return Ok(Tagged::Other(why)),
    };
    let mut looked_at = HashMap::new();
    for digest in candidate.untyped() {
        match manifest::by_digest(client, &digest).await {
            Ok(manifest) => {
                if let Some(found) = referring(&manifest.bytes, subject) {
                    looked_at.insert(digest, found);
                }
            }
            // then it shows nothing
            Err(error)
                if matches!(
                    error.kind(),
                    Kind::NotFound | Kind::Corrupt | Kind::Unsupported
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(match candidate.prove(looked_at) {
        Ok(list) => Tagged::List(list),
        Err(why) => Tagged::Other(why),
    })
}

/// Adds a descriptor to the list of a subject, at its end, unless it is there. An error where something else has the list's tag.
pub(crate) async fn add(client: &Client, subject: &Digest, entry: &Value) -> Result<()> {
    match change(client, subject, &|list| list.add(entry)).await? {
        Change::Made | Change::NotNeeded => Ok(()),
        Change::Other(why) => Err(Error::with_source(
            Kind::Unsupported,
            format!(
                "{} has no referrers API, and its tag {} is not a list of referrers: nothing was changed \
                 (`socinbd convert` makes an image that needs no such list)",
                client.name(),
                referrers_tag(subject)
            ),
            why,
        )),
    }
}

/// Takes a manifest out of the list of a subject, where there is one. Whether it was listed.
pub(crate) async fn remove(client: &Client, subject: &Digest, digest: &Digest) -> Result<bool> {
    let change = change(client, subject, &|list| list.remove(digest)).await?;
    Ok(matches!(change, Change::Made))
}

/// The result of a change.
enum Change {
    Made,
    NotNeeded,
    /// Something else has the tag.
    Other(NotAList),
}

/// Makes a change and checks that it persists; `edit` returns whether it has changed anything.
async fn change(
    client: &Client,
    subject: &Digest,
    edit: &(dyn Fn(&mut ReferrersList) -> bool + Send + Sync),
) -> Result<Change> {
    let lock = lock_of(&format!("{}@{subject}", client.name()));
    let _changing = lock.lock().await;
    let tag = referrers_tag(subject);
    let mut change = Change::NotNeeded;
    for _ in 0..MAX_TURNS {
        let start = Instant::now();
        let mut list = match read(client, subject).await? {
            Tagged::Nothing => ReferrersList::default(),
            Tagged::List(list) => list,
            Tagged::Other(why) => return Ok(Change::Other(why)),
        };
        if !edit(&mut list) {
            // also the second look after a write
            return Ok(change);
        }
        manifest::put(client, &tag, OCI_INDEX, &Bytes::from(list.to_bytes())).await?;
        change = Change::Made;
        let wait = start.elapsed().clamp(SHORTEST_WAIT, LONGEST_WAIT);
        tokio::time::sleep(wait).await;
    }
    Err(Error::new(
        Kind::Unavailable,
        format!(
            "{tag} of {}: other clients keep overwriting this list of referrers",
            client.name()
        ),
    ))
}

fn lock_of(name: &str) -> Arc<tokio::sync::Mutex<()>> {
    let mut locks = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let locks = locks.get_or_insert_default();
    locks.retain(|_, lock| lock.strong_count() > 0);
    if let Some(lock) = locks.get(name).and_then(Weak::upgrade) {
        return lock;
    }
    let lock = Arc::new(tokio::sync::Mutex::new(()));
    locks.insert(name.to_owned(), Arc::downgrade(&lock));
    lock
}
