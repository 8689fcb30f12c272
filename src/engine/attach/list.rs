//! Lists the attachments of an engine with their states, and waits for changes of one.

use std::sync::Arc;

use super::{
    engine::Engine,
    live::{AttachmentPhase, LiveAttachment, ending},
    names::unknown,
    types::AttachmentStatus,
};
use crate::{blocking::blocking, error::Result, kernel::mount::info};

impl Engine {
    /// All attachments, including those of an engine that died, but not those that are being made.
    pub async fn list(&self) -> Result<Vec<AttachmentStatus>> {
        let (live, dead) = {
            let table = self.table();
            // Read under the lock: an attachment that is neither live nor changing belongs to an engine that died.
            let entries = self.records.entries()?.into_iter();
            let dead = entries.filter(|it| !table.live.contains_key(&it.id));
            let dead: Vec<_> = dead
                .filter(|it| !table.changing.contains(&it.id))
                .filter_map(|entry| Some(entry.record?.attachment))
                .collect();
            let live: Vec<_> = table.live.values().map(Arc::clone).collect();
            (live, dead)
        };
        blocking(move || {
            let mounts = info::own()?;
            let live = live.iter().map(|live| live.status(&mounts));
            let dead = dead.into_iter().map(AttachmentStatus::dead).map(Ok);
            let mut all: Vec<_> = live.chain(dead).collect::<Result<_>>()?;
            all.sort_by(|a, b| a.attachment.id.cmp(&b.attachment.id));
            Ok(all)
        })
        .await
    }

    /// The attachment with this ID, if this process serves it.
    pub(super) fn live(&self, id: &str) -> Option<Arc<LiveAttachment>> {
        self.table().live.get(id).cloned()
    }

    /// Notes that the client has mounted the attachment. `Unavailable` if the engine is shutting down.
    pub fn mounted(&self, id: &str) -> Result<()> {
        let table = self.table();
        if *self.is_ending.borrow() {
            return Err(ending());
        }
        let live = table.live.get(id).ok_or_else(|| unknown(id))?;
        live.phase.send_modify(|phase| phase.is_mounted = true);
        Ok(())
    }

    /// Waits until [`Engine::mounted`] is called or the attachment is released.
    pub async fn wait_mounted(&self, id: &str) {
        self.wait_for(id, |phase| phase.is_mounted || phase.has_ended)
            .await;
    }

    /// Waits until the mount of the attachment has ended or the attachment is released. Never returns if the kernel had no watch left for
    /// it.
    pub async fn wait_ended(&self, id: &str) {
        self.wait_for(id, |phase| phase.has_ended).await;
    }

    async fn wait_for(&self, id: &str, is_it: impl FnMut(&AttachmentPhase) -> bool) {
        let phase = self.live(id).map(|live| live.phase.subscribe());
        if let Some(mut phase) = phase {
            // an error means that the attachment was released
            let _ = phase.wait_for(is_it).await;
        }
    }
}
