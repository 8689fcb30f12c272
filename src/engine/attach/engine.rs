//! The state of all attachments of one root and one run directory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, task::AbortHandle};
use tokio_util::task::TaskTracker;

use super::{devices::Devices, live::AttachmentTable, records::AttachmentRecords};
use crate::{
    blocking::broken_off, engine::open::disks::Disks, error::Result, kernel::mount::end::MountEnds,
    layer,
};

/// One root and one run directory, with all that is attached from them. One process has them, by locks.
///
/// What changes attachments is work of the engine's own tasks: who waits for it may go away (a client that is killed), and it goes on to
/// its end. What an attachment has is given back when its mount has ended, whoever had that.
pub struct Engine {
    pub(super) root: PathBuf,
    pub(super) run_dir: PathBuf,
    pub(super) disks: Disks,
    pub(super) devices: Arc<Devices>,
    pub(super) records: AttachmentRecords,
    pub(super) table: Mutex<AttachmentTable>,
    /// Set once, with the table locked: from then on nothing is attached.
    pub(super) is_ending: watch::Sender<bool>,
    /// Work that must come to its end.
    pub(super) tasks: TaskTracker,
    /// `None`: the kernel has no watches left, and attachments wait to be detached.
    pub(super) mount_ends: Option<Arc<MountEnds>>,
    pub(super) following: Option<AbortHandle>,
    pub(super) _lock: fs::File,
}

impl Engine {
    /// The root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What was read of which layers, in order, where the store records it.
    pub fn touches(&self) -> Vec<layer::Touch> {
        self.disks.store().touches()
    }

    /// The disks below the root.
    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// The run directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    pub(super) fn table(&self) -> MutexGuard<'_, AttachmentTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does work to its end in a task of its own, whether or not this future is polled to its end.
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

    /// A client that is killed while it waits.
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
        // a client that comes too late is told why
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
