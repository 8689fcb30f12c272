use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::future::BoxFuture;
use socinbd::{
    error::{Error, Kind},
    kernel::{
        fuse,
        loopdev::{self, LoopOptions},
        mount,
    },
    layer::{Allocation, ServedDisk},
    units::DiskOffset,
};
use tokio::{runtime::Runtime, sync::watch};

use super::{eventually, image_of};

/// A disk in memory. What is at or above a mark is absent until the mark moves up; a mark of `u64::MAX` fails the fetch instead.
struct MemoryDisk {
    data: Vec<u8>,
    mark: watch::Sender<u64>,
    waiting: AtomicU64,
    /// How many reads still find that their data has gone again.
    evictions: AtomicU64,
}

const FAIL: u64 = u64::MAX;

impl MemoryDisk {
    fn new(data: Vec<u8>, present: u64) -> Arc<Self> {
        Arc::new(Self {
            data,
            mark: watch::Sender::new(present),
            waiting: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        })
    }
}

impl ServedDisk for MemoryDisk {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        let mark = *self.mark.borrow();
        mark != FAIL && range.end.get() <= mark
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        let fewer = |left: u64| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if self.evictions.fetch_update(order, order, fewer).is_ok() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let start = offset.get() as usize;
        buffer.copy_from_slice(&self.data[start..start + buffer.len()]);
        Ok(())
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async move {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let mut mark = self.mark.subscribe();
            let reached = *mark
                .wait_for(|&mark| mark >= range.end.get())
                .await
                .unwrap();
            if reached == FAIL {
                return Err(Arc::new(Error::new(Kind::Unavailable, "no registry")));
            }
            Ok(())
        })
    }

    fn allocation(&self, _: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        unreachable!("FUSE does not ask")
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index / 7 + index / 4096) as u8)
        .collect()
}

#[test]
fn an_ext4_on_a_loop_device_on_the_file() {
    let runtime = Runtime::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let content = "0123456789".repeat(100_000);
    let image = image_of(folder.path(), "a.ext4", &[("big", &content)]);
    let disk = MemoryDisk::new(std::fs::read(image).unwrap(), FAIL - 1);
    let served = fuse::serve(disk.clone(), "socinbd-test", runtime.handle(), |_| ()).unwrap();
    let device = loopdev::attach(
        served.file(),
        &LoopOptions {
            name: "socinbd-test:fuse".into(),
            ..LoopOptions::default()
        },
    )
    .unwrap();
    assert!(device.direct_io().unwrap());
    assert_eq!(std::fs::read(device.path()).unwrap(), disk.data);
    let server = served.into_server();
    let mount = mount::ext4(device.path()).unwrap();
    drop(device);
    let path = format!("/proc/self/fd/{}/big", mount.as_raw_fd());
    assert_eq!(std::fs::read_to_string(path).unwrap(), content);

    // the mount was the last user: everything below it ends by itself
    assert!(!server.is_finished());
    drop(mount);
    eventually(|| server.is_finished());
    let attached = loopdev::attached().unwrap();
    assert!(
        attached
            .iter()
            .all(|device| device.name != "socinbd-test:fuse")
    );
}

#[test]
fn reads_at_any_offset_and_length() {
    let runtime = Runtime::new().unwrap();
    let disk = MemoryDisk::new(pattern(3 << 20), 3 << 20);
    let served = fuse::serve(disk.clone(), "socinbd-test", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    assert_eq!(file.metadata().unwrap().len(), 3 << 20);
    for (offset, length) in [
        (0, 1),
        (1, 4095),
        (4095, 8192),
        (777, 2 << 20),
        ((3 << 20) - 1, 1),
    ] {
        let mut buffer = vec![0; length];
        file.read_exact_at(&mut buffer, offset as u64).unwrap();
        assert!(
            buffer == disk.data[offset..offset + length],
            "{length} bytes at {offset}"
        );
    }
    assert_eq!(file.read_at(&mut [0; 10], 3 << 20).unwrap(), 0);
    assert_eq!(file.read_at(&mut [0; 10], (3 << 20) - 4).unwrap(), 4);
}

/// Other readers may have a range evicted again and again before this one comes to it.
#[test]
fn a_range_that_is_evicted_many_times_is_read_in_the_end() {
    let runtime = Runtime::new().unwrap();
    let disk = MemoryDisk::new(pattern(1 << 20), 1 << 20);
    let served = fuse::serve(disk.clone(), "socinbd-test", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    disk.evictions.store(20, Ordering::SeqCst);
    let mut buffer = [0; 4096];
    file.read_exact_at(&mut buffer, 40_960).unwrap();
    assert!(buffer == disk.data[40_960..][..4096]);
    assert_eq!(disk.evictions.load(Ordering::SeqCst), 0);
}

#[test]
fn absent_reads_do_not_hold_up_present_ones() {
    let runtime = Runtime::new().unwrap();
    let disk = MemoryDisk::new(pattern(1 << 20), 4096);
    let served = fuse::serve(disk.clone(), "socinbd-test", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    std::thread::scope(|scope| {
        // more than there are threads to answer
        let readers: Vec<_> = (1..=16)
            .map(|block: usize| {
                let (file, disk) = (&file, &disk);
                scope.spawn(move || {
                    let mut buffer = [0; 4096];
                    file.read_exact_at(&mut buffer, block as u64 * 4096)
                        .unwrap();
                    assert!(buffer == disk.data[block * 4096..][..4096]);
                })
            })
            .collect();
        eventually(|| disk.waiting.load(Ordering::SeqCst) == 16);
        let mut buffer = [0; 4096];
        file.read_exact_at(&mut buffer, 0).unwrap();
        assert!(buffer == disk.data[..4096]);
        assert!(readers.iter().all(|reader| !reader.is_finished()));
        disk.mark.send_replace(1 << 20);
    });
}

#[test]
fn a_fetch_that_fails_is_an_error_of_that_read() {
    let runtime = Runtime::new().unwrap();
    let disk = MemoryDisk::new(pattern(1 << 20), FAIL);
    let served = fuse::serve(disk.clone(), "socinbd-test", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    let error = file.read_at(&mut [0; 4096], 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "EIO");
    disk.mark.send_replace(1 << 20);
    assert_eq!(file.read_at(&mut [0; 4096], 4096).unwrap(), 4096);
}

#[test]
fn readers_get_an_error_when_the_server_ends() {
    let runtime = Runtime::new().unwrap();
    let disk = MemoryDisk::new(pattern(1 << 20), 0);
    let served = fuse::serve(disk.clone(), "socinbd-test", runtime.handle(), |_| ()).unwrap();
    let file = File::from(served.file().try_clone_to_owned().unwrap());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_at(&mut [0; 4096], 0));
        eventually(|| disk.waiting.load(Ordering::SeqCst) == 1);
        drop(served);
        // its task, too, goes with its runtime
        drop(runtime);
        reader.join().unwrap().unwrap_err();
    });
    file.read_at(&mut [0; 4096], 0).unwrap_err();
}
