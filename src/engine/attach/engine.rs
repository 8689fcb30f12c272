//! The engine: state of all attachments of one root and one runtime directory.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use tokio::{sync::watch, task::AbortHandle};
use tokio_util::task::TaskTracker;

use super::{
    devices::Devices,
    layer_mounts::{record::LayerMountRecords, table::LayerMounts},
    live::AttachmentTable,
    records::AttachmentRecords,
};
use crate::{
    blocking::broken_off,
    engine::open::disks::Disks,
    error::Result,
    kernel::mount::end::MountEnds,
    layer::{self, DirectoryLock},
};

/// All attachments of one root and one runtime directory. Locks make sure that only one process uses the directories.
///
/// Every change of an attachment runs in a task of the engine and completes even if its client disconnects or is killed. The devices of an
/// attachment are released when its mount has ended, whichever process held the mount.
pub struct Engine {
    pub(super) root: PathBuf,
    pub(super) run_dir: PathBuf,
    pub(super) disks: Disks,
    pub(super) devices: Arc<Devices>,
    pub(super) records: AttachmentRecords,
    pub(super) table: Mutex<AttachmentTable>,
    pub(super) layer_mounts: LayerMounts,
    pub(super) layer_mount_records: LayerMountRecords,
    /// Whether the metrics have the names of AWS's soci-snapshotter too.
    pub(in crate::engine) exposes_soci_names: AtomicBool,
    /// Held while kept attachments are restored, and while one gets its number.
    pub(super) restoring: tokio::sync::Mutex<()>,
    /// Changed while the table is locked. In another phase than the first nothing can be attached.
    pub(super) phase: watch::Sender<EnginePhase>,
    /// Whether the devices of an engine that died were taken over. Until then nothing may be mounted or unmounted.
    pub(super) taken_over: watch::Sender<bool>,
    /// Tasks that must complete before the engine ends.
    pub(super) tasks: TaskTracker,
    /// `None` if the kernel has no inotify watches left. Attachments are then released only by `detach`.
    pub(super) mount_ends: Option<Arc<MountEnds>>,
    /// The task that follows `mount_ends`.
    pub(super) following: Option<AbortHandle>,
    pub(super) _lock: DirectoryLock,
}

/// What an engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EnginePhase {
    /// It attaches and serves.
    Serving,
    /// It completes what has begun. The engine of another process follows.
    HandingOver,
    /// It serves until its process ends, and changes no attachment.
    HandedOver,
    /// It ends, with all attachments that are not in use.
    Ending,
}

impl Engine {
    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The recorded reads of layers in order, if the store records reads.
    pub fn touches(&self) -> Vec<layer::Touch> {
        self.disks.store().touches()
    }

    /// The disks in the root.
    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// The records of the attachments of the root.
    pub fn records(&self) -> &AttachmentRecords {
        &self.records
    }

    /// An error if a thread that answers for a device has stood still for this long.
    pub fn check_servers(&self, limit: Duration) -> Result<()> {
        self.devices.servers().check(limit)
    }

    /// Waits for [`Engine::take_over`].
    pub(crate) async fn wait_taken_over(&self) {
        // an error: the sender is gone with the engine, which this borrows
        let _ = self.taken_over.subscribe().wait_for(|is| *is).await;
    }

    /// The runtime directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    pub(super) fn table(&self) -> MutexGuard<'_, AttachmentTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs work in a task that completes even if this future is dropped.
    pub(super) async fn finish<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let done = self.tasks.spawn(work).await;
        done.map_err(|error| broken_off("a task of the daemon", error))?
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(following) = &self.following {
            following.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::{blocking::blocking, engine::attach::types::tests::attachment, error::Kind};

    async fn engine(root: &Path) -> Arc<Engine> {
        Engine::open(&root.join("root"), &root.join("run"))
            .await
            .unwrap()
    }

    /// Polls a client once and drops it, as when the client is killed.
    fn kill_at_first_wait<T>(client: impl Future<Output = T>) {
        assert!(futures_util::FutureExt::now_or_never(pin!(client)).is_none());
    }

    #[tokio::test]
    async fn what_has_begun_comes_to_its_end_though_nobody_waits() {
        let root = tempfile::tempdir().unwrap();
        let engine = engine(root.path()).await;
        let (go, told) = tokio::sync::oneshot::channel();
        let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let is_done = Arc::clone(&done);
        kill_at_first_wait(engine.finish(async move {
            told.await.unwrap();
            is_done.store(true, std::sync::atomic::Ordering::Release);
            Ok(())
        }));
        go.send(()).unwrap();
        engine.end().await;
        // a later client gets the reason
        let error = engine.mounted("a").unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
        assert!(done.load(std::sync::atomic::Ordering::Acquire));
    }

    #[tokio::test]
    async fn a_release_whose_client_is_killed_before_its_turn_is_done() {
        let root = tempfile::tempdir().unwrap();
        let engine = engine(root.path()).await;
        engine.records.write(&attachment("a"), None).unwrap();
        let changing = engine.change("a").unwrap();
        kill_at_first_wait(engine.release("a"));
        drop(changing);
        engine.end().await;
        assert_eq!(engine.records.entries().unwrap().len(), 0);
    }

    #[test]
    fn what_is_asked_of_a_process_in_its_last_moment_may_be_asked_again() {
        let root = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let engine = runtime.block_on(engine(root.path()));
        let handle = runtime.handle().clone();
        runtime.shutdown_background();
        let error = handle.block_on(blocking(|| Ok(()))).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
        let error = handle
            .block_on(engine.finish(async { Ok(()) }))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
    }
}
