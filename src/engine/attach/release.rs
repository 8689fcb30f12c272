//! Releases attachments: on request, when their mounts end, and when the engine ends.
//!
//! Each release runs in a task of the engine and completes even if its client disconnects. An attachment stays in the table until its
//! devices are idle.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures_util::future::join_all;

use super::{
    engine::{Engine, EnginePhase},
    live::LiveAttachment,
    mount_place::{self, unmount},
    names::unknown,
};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
    kernel::mount::end::{MountEnds, Watch},
};

/// Interval for polling whether another task has finished its change of an attachment.
const CHANGE_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Maximum time for devices to become idle after the unmount.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// Interval for polling whether devices are idle.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Time for which an engine that ends tries to unmount attachments that are in use: a program may look into a mount for a moment.
const END_TIME: Duration = Duration::from_millis(500);
/// Interval of these attempts.
const END_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Time that an attachment is kept for a `detach` after it was unmounted by hand.
const UNMOUNTED_TIME: Duration = Duration::from_secs(60);

impl Engine {
    /// Releases the devices of an attachment, which must not be mounted any more, and forgets it if it is kept. `Busy` while it is in use.
    /// Also removes a dead attachment. Succeeds if the attachment does not exist.
    pub async fn release(self: &Arc<Self>, id: &str) -> Result<()> {
        self.release_as(id, Ending::Forget).await
    }

    /// As [`Self::release`], but a kept attachment stays kept.
    pub async fn release_for_now(self: &Arc<Self>, id: &str) -> Result<()> {
        self.release_as(id, Ending::Keep).await
    }

    async fn release_as(self: &Arc<Self>, id: &str, ending: Ending) -> Result<()> {
        let (engine, id) = (Arc::clone(self), id.to_owned());
        self.finish(async move { engine.release_now(&id, ending).await })
            .await
    }

    /// Unmounts an attachment in this mount namespace, and releases it. A kept attachment stays kept.
    pub async fn detach(self: &Arc<Self>, id: &str) -> Result<()> {
        let live = self.live(id).ok_or_else(|| unknown(id))?;
        let attachment = live.attachment.clone();
        drop(live);
        blocking(move || unmount(&[attachment])).await?;
        self.release_for_now(id).await
    }

    /// Ends the engine: refuses new attachments, unmounts and releases attachments that are not in use, and waits for running tasks.
    /// Attachments in use lose their daemon, which is logged.
    pub async fn end(self: &Arc<Self>) {
        let mut ids: Vec<String> = {
            let table = self.table();
            self.phase.send_replace(EnginePhase::Ending);
            table.live.keys().cloned().collect()
        };
        let deadline = Instant::now() + END_TIME;
        // one that is mounted within another holds that one: both end, in two rounds
        while !ids.is_empty() {
            let detached = join_all(ids.iter().map(|id| self.detach(id))).await;
            let failed: Vec<(String, Error)> = ids
                .iter()
                .zip(detached)
                .filter_map(|(id, detached)| Some((id.clone(), detached.err()?)))
                .filter(|(_, error)| error.kind() != Kind::NotFound)
                .collect();
            if failed.len() == ids.len() {
                if Instant::now() < deadline {
                    tokio::time::sleep(END_POLL_INTERVAL).await;
                    continue;
                }
                for (id, error) in failed {
                    tracing::error!(id, error = error.report(), "cannot detach an image");
                }
                break;
            }
            ids = failed.into_iter().map(|(id, _)| id).collect();
        }
        self.unmount_layers().await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Whether there is no attachment and no layer mount, and none is being made or released.
    pub fn is_idle(&self) -> bool {
        let table = self.table();
        table.live.is_empty() && table.changing.is_empty() && self.layer_mounts.is_empty()
    }

    /// Releases attachments whose mount has ended, without waiting for a `detach`.
    pub async fn release_unmounted(self: &Arc<Self>) {
        let ended: Vec<String> = {
            let table = self.table();
            let ended = table.live.iter().filter(|it| it.1.phase.borrow().has_ended);
            ended.map(|(id, _)| id.clone()).collect()
        };
        for id in ended {
            if let Err(error) = self.release_for_now(&id).await {
                tracing::debug!(id, error = error.report(), "cannot release an attachment");
            }
        }
    }

    /// Whether [`Engine::end`] has been called.
    pub fn is_ending(&self) -> bool {
        *self.phase.borrow() == EnginePhase::Ending
    }

    /// Waits until [`Engine::end`] is called.
    pub async fn wait_ending(&self) {
        self.wait_phase(|phase| phase == EnginePhase::Ending).await;
    }

    /// Whether it refuses attachments: it ends or is handed over.
    pub fn is_refusing(&self) -> bool {
        *self.phase.borrow() != EnginePhase::Serving
    }

    /// Waits until it refuses attachments.
    pub(super) async fn wait_refusing(&self) {
        self.wait_phase(|phase| phase != EnginePhase::Serving).await;
    }

    async fn wait_phase(&self, is_it: impl Fn(EnginePhase) -> bool) {
        // an error means that the engine was dropped
        let _ = self.phase.subscribe().wait_for(|phase| is_it(*phase)).await;
    }

    /// Runs in a task of its own.
    async fn release_now(self: &Arc<Self>, id: &str, ending: Ending) -> Result<()> {
        let _changing = self.wait_to_change(id).await;
        let (engine, live, id) = (Arc::clone(self), self.live(id), id.to_owned());
        blocking(move || match live {
            Some(live) => engine.release_live(&id, live, ending),
            None => match engine.records.find(&id)? {
                Some(record) => engine.remove_dead(&record, ending),
                None if engine.records.is_kept(&id) => engine.end_record(&id, ending),
                None => Ok(()),
            },
        })
        .await
    }

    /// Removes what is left of an attachment in the state directory.
    pub(super) fn end_record(&self, id: &str, ending: Ending) -> Result<()> {
        match ending {
            Ending::Forget => {
                self.table().not_restored.remove(id);
                self.records.remove(id)
            }
            Ending::Keep => self.records.put_away(id),
        }
    }

    fn release_live(&self, id: &str, live: Arc<LiveAttachment>, ending: Ending) -> Result<()> {
        // the kernel removes the mount namespace of a program a moment after the program has exited
        if let Some(what) = wait_until_idle(|| live.in_use()) {
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
        // `list` may hold a reference
        wait_until_idle(|| (Arc::strong_count(&live) > 1).then_some(()));
        let attachment = &live.attachment;
        self.disks
            .images()
            .used(&attachment.reference, &attachment.manifest);
        drop(live);
        self.end_record(id, ending)
    }

    /// As [`Self::change`], when no other task changes the attachment.
    pub(super) async fn wait_to_change(self: &Arc<Self>, id: &str) -> ChangeGuard {
        loop {
            match self.change(id) {
                Some(changing) => return changing,
                None => tokio::time::sleep(CHANGE_POLL_INTERVAL).await,
            }
        }
    }

    /// Marks an attachment as changing until the guard is dropped; `None` if it is changing already, or all are handed over.
    pub(crate) fn change(self: &Arc<Self>, id: &str) -> Option<ChangeGuard> {
        let mut table = self.table();
        let may_change = *self.phase.borrow() != EnginePhase::HandedOver;
        (may_change && table.changing.insert(id.to_owned())).then(|| ChangeGuard {
            engine: Arc::clone(self),
            id: id.to_owned(),
        })
    }

    /// Handles the end of an attachment's file system: a process that held the mount has exited, or the mount was unmounted. Releases the
    /// attachment at once, or, if a user has unmounted it by hand, after a time in which the user may call `detach`.
    fn has_ended(self: &Arc<Self>, watch: Watch) {
        let table = self.table();
        let Some(live) = table.live.values().find(|live| live.watch == Some(watch)) else {
            return; // the attach of this mount has failed
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
                && let Err(error) = engine.release_for_now(&id).await
            {
                tracing::warn!(
                    id,
                    error = error.report(),
                    "cannot release an unmounted attachment"
                );
            }
        });
    }
}

/// What becomes of a kept attachment that is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It is not attached again.
    Forget,
    /// It is attached again by the next daemon, or by `restore`.
    Keep,
}

/// Reports ended mounts to the engine as long as the engine exists.
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
                    "cannot watch for unmounts any more, so only `socinbd detach` releases devices: {}",
                    error.report()
                );
                return;
            }
        }
    }
}

/// Marks an attachment as changing until it is dropped.
pub(crate) struct ChangeGuard {
    engine: Arc<Engine>,
    id: String,
}

impl Drop for ChangeGuard {
    fn drop(&mut self) {
        self.engine.table().changing.remove(&self.id);
    }
}

/// Waits up to [`IDLE_TIME`] until nothing is in use. Returns what is still in use at the end. Blocks.
pub(super) fn wait_until_idle<T>(in_use: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + IDLE_TIME;
    loop {
        match in_use() {
            Some(_) if Instant::now() < deadline => std::thread::sleep(IDLE_POLL_INTERVAL),
            what => return what,
        }
    }
}
