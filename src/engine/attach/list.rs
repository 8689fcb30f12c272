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
    /// All attachments, including those of an engine that died and kept ones that are not attached, but not those that are being made.
    pub async fn list(&self) -> Result<Vec<AttachmentStatus>> {
        let (live, others, not_restored) = {
            let table = self.table();
            // Read under the lock: an attachment that is neither live nor changing belongs to an engine that died, or is kept.
            let entries = self.records.entries()?.into_iter();
            let others = entries.filter(|it| !table.live.contains_key(&it.id));
            let others: Vec<_> = others
                .filter(|it| !table.changing.contains(&it.id))
                .collect();
            let live: Vec<_> = table.live.values().map(Arc::clone).collect();
            (live, others, table.not_restored.clone())
        };
        let records = self.records.clone();
        blocking(move || {
            let mounts = info::own()?;
            let live = live.iter().map(|live| live.status(&mounts));
            let others = others.into_iter().filter_map(|entry| match entry.record {
                Some(record) => Some(AttachmentStatus::dead(record.attachment)),
                None if entry.is_kept => {
                    let why = not_restored.get(&entry.id).cloned();
                    // a damaged record was reported by `restore`
                    let record = records.kept(&entry.id).ok()?;
                    Some(AttachmentStatus::kept(record.attachment, why))
                }
                None => None,
            });
            let mut all: Vec<_> = live.chain(others.map(Ok)).collect::<Result<_>>()?;
            all.sort_by(|a, b| a.attachment.id.cmp(&b.attachment.id));
            Ok(all)
        })
        .await
    }

    /// The attachments that this process serves.
    pub(in crate::engine) fn all_live(&self) -> Vec<Arc<LiveAttachment>> {
        self.table().live.values().map(Arc::clone).collect()
    }

    /// The attachment with this ID, if this process serves it.
    pub(in crate::engine) fn live(&self, id: &str) -> Option<Arc<LiveAttachment>> {
        self.table().live.get(id).cloned()
    }

    /// Notes that the client has mounted the attachment. `Unavailable` if the engine is shutting down.
    pub fn mounted(&self, id: &str) -> Result<()> {
        let table = self.table();
        if self.is_ending() {
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
