//! The list of referrers under the tag `sha256-<hex>`, which clients keep where a registry has no referrers API (OCI distribution 1.1,
//! "Referrers Tag Schema").
//!
//! Registries have no compare-and-swap: of two who change one list at once, one may write over the other's change. In this process a
//! lock prevents it. Against others each looks again after its write, as long after as it had itself taken from reading to writing:
//! by then, who wrote over it has done so, and its change is made once more.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{client::Client, manifest};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, media_type::OCI_INDEX},
};

/// How often a change that was lost is made again.
const MAX_TURNS: usize = 16;
const SHORTEST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Locks of the lists that are being changed, by `HOST/REPOSITORY@SUBJECT`.
static CHANGING: Mutex<Option<HashMap<String, Weak<tokio::sync::Mutex<()>>>>> = Mutex::new(None);

/// Adds a descriptor to the list of a subject, at its end, unless it is there.
pub(super) async fn add(client: &Client, subject: &Digest, entry: &Value) -> Result<()> {
    let digest = entry["digest"].clone();
    change(client, subject, &|entries: &mut Vec<Value>| {
        let missing = !entries.iter().any(|known| known["digest"] == digest);
        if missing {
            entries.push(entry.clone());
        }
        missing
    })
    .await
}

/// Takes a manifest out of the list of a subject.
pub(super) async fn remove(client: &Client, subject: &Digest, digest: &Digest) -> Result<()> {
    let digest = Value::from(digest.to_string());
    change(client, subject, &|entries: &mut Vec<Value>| {
        let before = entries.len();
        entries.retain(|known| known["digest"] != digest);
        entries.len() != before
    })
    .await
}

/// Makes a change that is to last: `edit` says whether it has changed anything.
async fn change(
    client: &Client,
    subject: &Digest,
    edit: &(dyn Fn(&mut Vec<Value>) -> bool + Send + Sync),
) -> Result<()> {
    let lock = lock_of(&format!("{}@{subject}", client.name()));
    let _changing = lock.lock().await;
    let tag = format!("sha256-{}", subject.hex());
    let mut replaced: Option<Digest> = None;
    for _ in 0..MAX_TURNS {
        let start = Instant::now();
        let (old, mut list) = read(client, &tag).await?;
        let manifests = list
            .entry("manifests")
            .or_insert_with(|| json!([]))
            .as_array_mut()
            .ok_or_else(|| {
                Error::new(
                    Kind::Corrupt,
                    format!("{tag} of {}: manifests is no list", client.name()),
                )
            })?;
        if !edit(manifests) {
            // also the second look after a write
            if let Some(replaced) = replaced.filter(|replaced| Some(*replaced) != old) {
                forget(client, &replaced).await;
            }
            return Ok(());
        }
        let bytes = serde_json::to_vec(&list).or_kind(Kind::Io, || "a list of referrers".into())?;
        manifest::put(client, &tag, OCI_INDEX, &Bytes::from(bytes)).await?;
        replaced = old;
        let wait = start.elapsed().clamp(SHORTEST_WAIT, LONGEST_WAIT);
        tokio::time::sleep(wait).await;
    }
    Err(Error::new(
        Kind::Unavailable,
        format!(
            "{tag} of {}: others write over this list of referrers again and again",
            client.name()
        ),
    ))
}

/// The list as it is, and its digest; an empty one where there is none.
async fn read(client: &Client, tag: &str) -> Result<(Option<Digest>, Map<String, Value>)> {
    let found = match manifest::find_tag(client, tag).await? {
        Ok(found) => found,
        Err(refused) if refused.kind() == Kind::NotFound => {
            let empty = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
            let Value::Object(empty) = empty else {
                return Ok((None, Map::new())); // it is one
            };
            return Ok((None, empty));
        }
        Err(refused) => return Err(refused),
    };
    let list = serde_json::from_slice(&found.bytes).or_kind(Kind::Corrupt, || {
        format!("{tag} of {}: no list of referrers", client.name())
    })?;
    Ok((Some(found.digest), list))
}

/// Removes the list that was replaced. Registries that let nothing be removed keep it; it harms nobody.
async fn forget(client: &Client, replaced: &Digest) {
    if let Err(error) = manifest::delete(client, replaced).await {
        tracing::debug!(list = %replaced, error = error.report(), "an old list of referrers stays");
    }
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
