//! What is attached from one root and one run directory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    runtime::Handle,
    sync::watch,
    task::{AbortHandle, JoinError},
};
use tokio_util::task::TaskTracker;

use super::{devices::Devices, live::Table, records::Records, release};
use crate::engine::open::disks::Disks;
use crate::{
    error::{Error, Kind, Result, ResultExt},
    kernel::mount_end::MountEnds,
    layer,
    oci::Digest,
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
    pub(super) records: Records,
    pub(super) table: Mutex<Table>,
    /// Set once, with the table locked: from then on nothing is attached.
    pub(super) is_ending: watch::Sender<bool>,
    /// Work that must come to its end.
    pub(super) tasks: TaskTracker,
    /// `None`: the kernel has no watches left, and attachments wait to be detached.
    pub(super) mount_ends: Option<Arc<MountEnds>>,
    pub(super) following: Option<AbortHandle>,
    _lock: fs::File,
}

impl Engine {
    /// Opens root and run directory (made 0700 where missing), and clears away what an engine that died has left and nobody uses.
    pub async fn open(root: &Path, run_dir: &Path) -> Result<Arc<Self>> {
        Self::open_with(root, run_dir, layer::Options::default()).await
    }

    /// As [`Engine::open`], with a store that works otherwise.
    pub async fn open_with(
        root: &Path,
        run_dir: &Path,
        options: layer::Options,
    ) -> Result<Arc<Self>> {
        let (root, run_dir) = (folder(root)?, folder(run_dir)?);
        let lock_path = run_dir.join("lock");
        let lock = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path);
        let lock = lock.or_kind(Kind::Io, || format!("opening {}", lock_path.display()))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "another daemon works in {}; talk to it, or give this one a --run-dir and a --root of its own",
                    run_dir.display()
                ),
            ));
        }
        let sees_all = options.record;
        let disks = Disks::open_with(&root, options)?;
        let tag = Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..8].to_owned();
        let records = Records::open(&root, &run_dir)?;
        let mount_ends = MountEnds::new()
            .inspect_err(|error| {
                tracing::warn!(
                    "what is unmounted is given back by `socinbd detach` only: {}",
                    error.report()
                );
            })
            .ok()
            .map(Arc::new);
        let engine = Arc::new_cyclic(|engine| Self {
            devices: Arc::new(Devices::new(tag, sees_all, Handle::current())),
            root,
            run_dir,
            disks,
            records,
            table: Mutex::default(),
            is_ending: watch::Sender::new(false),
            tasks: TaskTracker::new(),
            following: mount_ends.as_ref().map(|ends| {
                let follow = release::follow(Arc::clone(ends), engine.clone());
                tokio::spawn(follow).abort_handle()
            }),
            mount_ends,
            _lock: lock,
        });
        engine.sweep()?;
        Ok(engine)
    }

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

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
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

/// What /proc/self/mountinfo shows as the source of an attachment's mount.
pub fn mount_source(id: &str) -> String {
    format!("socinbd-{id}")
}

pub(super) fn unknown(id: &str) -> Error {
    Error::new(
        Kind::NotFound,
        format!("this daemon has no attachment {id:?}"),
    )
}

/// 16 random hexadecimal digits.
pub(super) fn random_digits() -> Result<String> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .or_kind(Kind::Io, || "getting random bytes".into())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// A folder, made 0700 where missing, as an absolute path without symlinks.
pub(super) fn folder(path: &Path) -> Result<PathBuf> {
    layer::make_private(path)?;
    path.canonicalize()
        .or_kind(Kind::Io, || format!("the folder {}", path.display()))
}

/// Runs system calls that may block away from the async workers.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| broken_off("a worker thread", error))?
}

/// Work that has come to no end. A process that ends does not begin what is asked for in its last moment: another one may.
fn broken_off(what: &str, error: JoinError) -> Error {
    let kind = match error.is_cancelled() {
        true => Kind::Unavailable,
        false => Kind::Io,
    };
    Error::with_source(kind, what, error)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::engine::attach::types::tests::attachment;

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
