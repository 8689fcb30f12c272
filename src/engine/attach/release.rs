//! Releases attachments: on request, when their mounts end, and when the engine ends.
//!
//! Each release runs in a task of the engine and completes even if its client disconnects. An attachment stays in the table until its
//! devices
//! are idle.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures_util::future::join_all;

use super::{
    engine::Engine,
    live::LiveAttachment,
    mount_place::{self, unmount},
    names::unknown,
};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
    kernel::mount::end::{MountEnds, Watch},
};

/// How often a caller looks whether another one is done with an attachment.
const CHANGE_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// How long devices may take to become idle after the unmount.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// How often they are looked at meanwhile.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// How long an attachment that was unmounted by hand waits for its `detach`.
const UNMOUNTED_TIME: Duration = Duration::from_secs(60);

impl Engine {
    /// Gives an attachment's devices back. It must not be mounted any more: `Busy` while it is in use. What an engine that died has left
    /// of it is cleared away. What is gone already is fine.
    pub async fn release(self: &Arc<Self>, id: &str) -> Result<()> {
        let (engine, id) = (Arc::clone(self), id.to_owned());
        self.finish(async move { engine.release_now(&id).await })
            .await
    }

    /// Unmounts an attachment where this mount namespace has it, and releases it.
    pub async fn detach(self: &Arc<Self>, id: &str) -> Result<()> {
        let live = self.live(id).ok_or_else(|| unknown(id))?;
        let attachment = live.attachment.clone();
        drop(live);
        blocking(move || unmount(&[attachment])).await?;
        self.release(id).await
    }

    /// Ends the engine: nothing is attached from now on, what is not in use is unmounted and released, and work that has begun comes to its
    /// end. What is in use loses its daemon; it is logged.
    pub async fn end(self: &Arc<Self>) {
        let ids: Vec<String> = {
            let table = self.table();
            self.is_ending.send_replace(true);
            table.live.keys().cloned().collect()
        };
        join_all(ids.iter().map(|id| async move {
            if let Err(error) = self.detach(id).await
                && error.kind() != Kind::NotFound
            {
                tracing::error!(id, error = error.report(), "not detached");
            }
        }))
        .await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Whether nothing is attached here, or about to be.
    pub fn is_idle(&self) -> bool {
        let table = self.table();
        table.live.is_empty() && table.changing.is_empty()
    }

    /// Releases what was unmounted, and is used by nobody, without waiting for its `detach`.
    pub async fn release_unmounted(self: &Arc<Self>) {
        let ended: Vec<String> = {
            let table = self.table();
            let ended = table.live.iter().filter(|it| it.1.phase.borrow().has_ended);
            ended.map(|(id, _)| id.clone()).collect()
        };
        for id in ended {
            if let Err(error) = self.release(&id).await {
                tracing::debug!(id, error = error.report(), "not released");
            }
        }
    }

    /// Whether [`Engine::end`] has been called.
    pub fn is_ending(&self) -> bool {
        *self.is_ending.borrow()
    }

    /// Returns when [`Engine::end`] has been called.
    pub async fn wait_ending(&self) {
        // an error: the engine is gone
        let _ = self.is_ending.subscribe().wait_for(|is| *is).await;
    }

    /// On a task of its own.
    async fn release_now(self: &Arc<Self>, id: &str) -> Result<()> {
        let _changing = loop {
            match self.change(id) {
                Some(changing) => break changing,
                // another caller's turn: what it leaves is what there is to say
                None => tokio::time::sleep(CHANGE_POLL_INTERVAL).await,
            }
        };
        let (engine, live, id) = (Arc::clone(self), self.live(id), id.to_owned());
        blocking(move || match live {
            Some(live) => engine.release_live(&id, live),
            None => match engine.records.find(&id)? {
                Some(record) => engine.clear(&record),
                None => Ok(()),
            },
        })
        .await
    }

    fn release_live(&self, id: &str, live: Arc<LiveAttachment>) -> Result<()> {
        // what a program leaves when it ends, its mount namespace above all, the kernel takes down a moment later
        if let Some(what) = wait_while(|| live.in_use()) {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{}: {} is still in use {}",
                    live.attachment.reference,
                    what.display(),
                    mount_place::who_uses(id, Some(live.mount_device))
                ),
            ));
        }
        self.table().live.remove(id);
        // `list` may be looking at it
        wait_while(|| (Arc::strong_count(&live) > 1).then_some(()));
        drop(live);
        self.records.remove(id)
    }

    /// Marks an attachment as changing until the guard is dropped; `None` if it is already.
    pub(crate) fn change(self: &Arc<Self>, id: &str) -> Option<ChangeGuard> {
        self.table()
            .changing
            .insert(id.to_owned())
            .then(|| ChangeGuard {
                engine: Arc::clone(self),
                id: id.to_owned(),
            })
    }

    /// The file system of an attachment has ended: whoever had it (a `run`, a client that was to mount it) has gone, or it was unmounted.
    /// What it has is given back: after a while, in which who has unmounted it by hand may say `detach`, or else at once.
    fn has_ended(self: &Arc<Self>, watch: Watch) {
        let table = self.table();
        let Some(live) = table.live.values().find(|live| live.watch == Some(watch)) else {
            return; // its attach has failed
        };
        live.phase.send_modify(|phase| phase.has_ended = true);
        let attachment = &live.attachment;
        let waits = attachment.mountpoint.is_some() && live.phase.borrow().is_mounted;
        let (id, engine) = (attachment.id.clone(), Arc::downgrade(self));
        drop(table);
        tokio::spawn(async move {
            if waits {
                tokio::time::sleep(UNMOUNTED_TIME).await;
            }
            if let Some(engine) = engine.upgrade()
                && let Err(error) = engine.release(&id).await
            {
                tracing::warn!(id, error = error.report(), "giving back what was unmounted");
            }
        });
    }
}

/// Tells the engine which mounts have ended, as long as it is there.
pub(super) async fn follow(ends: Arc<MountEnds>, engine: Weak<Engine>) {
    loop {
        let ended = ends.next().await;
        let Some(engine) = engine.upgrade() else {
            return;
        };
        match ended {
            Ok(ended) => ended.into_iter().for_each(|watch| engine.has_ended(watch)),
            Err(error) => {
                tracing::error!(
                    "what is unmounted is given back by `socinbd detach` only: {}",
                    error.report()
                );
                return;
            }
        }
    }
}

/// An attachment that is changing, until this is dropped.
pub(crate) struct ChangeGuard {
    engine: Arc<Engine>,
    id: String,
}

impl Drop for ChangeGuard {
    fn drop(&mut self) {
        self.engine.table().changing.remove(&self.id);
    }
}

/// Waits a while for what is in use to become idle; what is in use at the end. Blocks.
pub(super) fn wait_while<T>(in_use: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + IDLE_TIME;
    loop {
        match in_use() {
            Some(_) if Instant::now() < deadline => std::thread::sleep(IDLE_POLL_INTERVAL),
            what => return what,
        }
    }
}
