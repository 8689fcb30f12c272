//! Lists the attachments of an engine with their states.

use std::sync::Arc;

use super::{
    engine::Engine,
    live::{AttachmentPhase, LiveAttachment, ending},
    names::unknown,
    types::AttachmentStatus,
};
use crate::{blocking::blocking, error::Result, kernel::mount::info};

impl Engine {
    /// All attachments, those of an engine that died among them. What is just being made is left out.
    pub async fn list(&self) -> Result<Vec<AttachmentStatus>> {
        let (live, dead) = {
            let table = self.table();
            // read under the lock: what is neither live nor changing belongs to an engine that died
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

    /// How an attachment that this process serves is; `None` where it serves none of this id.
    pub(super) fn live(&self, id: &str) -> Option<Arc<LiveAttachment>> {
        self.table().live.get(id).cloned()
    }

    /// The caller has mounted it. `Unavailable` when the engine has begun to end.
    pub fn mounted(&self, id: &str) -> Result<()> {
        let table = self.table();
        if *self.is_ending.borrow() {
            return Err(ending());
        }
        let live = table.live.get(id).ok_or_else(|| unknown(id))?;
        live.phase.send_modify(|phase| phase.is_mounted = true);
        Ok(())
    }

    /// Returns when [`Engine::mounted`] has been called, or the attachment is gone.
    pub async fn wait_mounted(&self, id: &str) {
        self.wait_for(id, |phase| phase.is_mounted || phase.has_ended)
            .await;
    }

    /// Returns when the attachment's mount has ended, or the attachment is gone: nobody uses it any more. Where the kernel had no watch
    /// left, it never does.
    pub async fn wait_ended(&self, id: &str) {
        self.wait_for(id, |phase| phase.has_ended).await;
    }

    async fn wait_for(&self, id: &str, is_it: impl FnMut(&AttachmentPhase) -> bool) {
        let phase = self.live(id).map(|live| live.phase.subscribe());
        if let Some(mut phase) = phase {
            // an error: it is gone
            let _ = phase.wait_for(is_it).await;
        }
    }
}
