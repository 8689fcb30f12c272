//! A daemon that is killed while a thread of it waits for an answer of this same daemon: the kernel cannot end it before the next one answers.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::{fd::AsFd as _, unix::fs::FileExt as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use futures_util::future::BoxFuture;
use socinbd::{
    error::Error,
    keeper::{Plan, Service, Times, keep},
    kernel::{
        fuse,
        loopdev::{self, LoopOptions},
    },
    layer::{Allocation, DirectoryLock, ServedDisk},
    units::DiskOffset,
};

use super::{own_program, signals};
use crate::support::wait;

const FOLDER: &str = "socinbd-test-sleeping-";

/// A disk of zeros: all is there, or nothing ever comes.
struct Zeros {
    folder: PathBuf,
    is_present: bool,
}

impl ServedDisk for Zeros {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn is_present(&self, _: Range<DiskOffset>) -> bool {
        self.is_present
    }

    fn read_present(&self, _: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn make_present(
        self: Arc<Self>,
        _: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        fs::write(self.folder.join("reads"), "").unwrap();
        Box::pin(std::future::pending())
    }

    fn allocation(&self, _: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        unreachable!("FUSE does not ask")
    }
}

fn states(pid: &str) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let stats = threads.filter_map(|it| fs::read_to_string(it.path().join("stat")).ok());
    let state = |stat: String| Some(stat.rsplit_once(") ")?.1[..1].to_owned());
    let mut states: Vec<String> = stats.filter_map(state).collect();
    states.sort();
    states
}

/// No test by itself: a daemon that a keeper starts twice.
#[test]
fn is_a_daemon() {
    let mut arguments = std::env::args().map(PathBuf::from);
    let of_test = |it: &PathBuf| it.to_string_lossy().contains(FOLDER);
    let Some(folder) = arguments.find(of_test) else {
        return;
    };
    let mut service = Service::take().unwrap().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let disk = |is_present| {
        let folder = folder.clone();
        Arc::new(Zeros { folder, is_present })
    };
    let lock = DirectoryLock::take(&folder, service.take_inherited("lock")).unwrap();
    let kept: Vec<_> = service.take_inherited_with("fuse").collect();
    if kept.is_empty() {
        let name = "socinbd-test:sleeping";
        let file = fuse::serve(disk(false), name, runtime.handle(), |_| ()).unwrap();
        let options = LoopOptions {
            name: name.into(),
            ..LoopOptions::default()
        };
        let device = loopdev::attach(file.file(), &options).unwrap();
        let store = service.store();
        store.put("lock", &[lock.as_fd()]).unwrap();
        for (number, descriptor) in file.descriptors().into_iter().enumerate() {
            store.put(&format!("fuse{number}"), &[descriptor]).unwrap();
        }
        fs::write(folder.join("pid"), std::process::id().to_string()).unwrap();
        service.notify().ready();
        thread::spawn(move || {
            let mut options = File::options();
            options.read(true).custom_flags(0o40000); // O_DIRECT: not to be interrupted
            let mut space = vec![1; 8192];
            let aligned = space.as_ptr().align_offset(4096);
            let file = options.open(device.path()).unwrap();
            let _ = file.read_exact_at(&mut space[aligned..][..4096], 0);
        });
        wait("it reads", || folder.join("reads").exists());
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
    }
    // the one before has the lock too, and has not ended
    assert!(lock.is_inherited());
    let killed = fs::read_to_string(folder.join("pid")).unwrap();
    assert_eq!(states(&killed), ["D", "Z"]);
    let kept = kept.into_iter().map(|(_, descriptor)| descriptor).collect();
    let server = fuse::resume(kept, disk(true), runtime.handle()).unwrap();
    service.notify().ready();
    wait("the keeper has reaped it", || {
        !Path::new(&format!("/proc/{killed}")).exists()
    });
    wait("nothing uses the file any more", || server.is_finished());
    fs::write(folder.join("served"), "").unwrap();
}

#[test]
fn a_daemon_that_waits_for_itself_is_followed_by_another_one() {
    let folder = tempfile::TempDir::with_prefix(FOLDER).unwrap();
    // as a filter this selects nothing
    let place = folder.path().as_os_str().to_owned();
    let test = "keeper::sleeping::is_a_daemon".into();
    let plan = Plan {
        program: own_program(),
        own: own_program(),
        arguments: vec!["it".into(), "--exact".into(), test, place],
        run_dir: folder.path().join("run"),
        times: Times::default(),
    };
    let (receiver, _sender) = signals();
    let keeper = thread::spawn(move || keep(&plan, &receiver, || ()).unwrap());
    wait("the next daemon has served", || keeper.is_finished());
    assert_eq!(keeper.join().unwrap(), 0);
    assert!(folder.path().join("served").exists());
}
