//! A local disk that accepts writes and loses them: its syncs fail. In the VM, on a device whose writes can be made to fail.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use socinbd::layer::{Disk, Store};

use super::fixture::{Lab, Layer, assert_holds, range};
use crate::support::{succeeds, unmount, until, vm::in_vm};

const NAME: &str = "failing";
const SECTORS: u64 = 64 << 11;

/// A file system without a journal, whose failure would make all of it read-only.
struct FailingDisk {
    below: String,
    folder: tempfile::TempDir,
}

impl FailingDisk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(SECTORS * 512).unwrap();
        let mkfs = ["-q", "-F", "-b", "4096", "-O", "^has_journal"];
        succeeds(Command::new("mkfs.ext4").args(mkfs).arg(&image));
        let disk = Self {
            below: super::power_cut::loop_device(&image),
            folder,
        };
        let create = [
            "create",
            NAME,
            "--noudevsync",
            "--table",
            &disk.table(false),
        ];
        succeeds(Command::new("dmsetup").args(create));
        std::fs::create_dir(disk.path()).unwrap();
        let mount = ["-t", "ext4", "-o", "errors=continue", "/dev/dm-0"];
        succeeds(Command::new("mount").args(mount).arg(disk.path()));
        disk
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn table(&self, fails: bool) -> String {
        match fails {
            false => format!("0 {SECTORS} linear {} 0", self.below),
            true => format!("0 {SECTORS} flakey {} 0 0 1 1 error_writes", self.below),
        }
    }

    /// From now on writes fail, or succeed.
    fn set_fails(&self, fails: bool) {
        for arguments in [
            &["suspend", "--noudevsync", "--noflush", "--nolockfs", NAME][..],
            &["load", NAME, "--table", &self.table(fails)],
            &["resume", "--noudevsync", NAME],
        ] {
            succeeds(Command::new("dmsetup").args(arguments));
        }
    }
}

fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Reads a file as a server does: once more if a span of it was lost before it was read.
async fn read_file(lab: &Lab, disk: &Arc<Disk>, path: &str) {
    let (place, content) = (lab.layer.place(path), &lab.layer.files[path]);
    let mut bytes = vec![0; content.len()];
    loop {
        disk.make_present(place.clone()).await.unwrap();
        match disk.read_present(place.start, &mut bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            read => break read.unwrap(),
        }
    }
    assert!(bytes == *content, "{path}");
}

async fn suffer(local: &FailingDisk, root: &Path) {
    let mut lab = Lab::new(Layer::new(0));
    lab.store = Store::open(root).unwrap();
    let disk = lab.disk().await;
    read_file(&lab, &disk, "data/000").await;
    disk.sync().unwrap();
    local.set_fails(true);
    let files = lab.layer.files.iter();
    for (path, _) in files.filter(|(_, content)| !content.is_empty()) {
        read_file(&lab, &disk, path).await;
    }
    let fails = || {
        disk.degraded()
            .is_some_and(|why| why.contains("cannot sync"))
    };
    until("a sync has failed", fails).await;
    drop_caches();

    // each span is lost a moment after it has come; it is fetched for its readers, and nothing else is
    let before = disk.counters().fetched_bytes;
    for _ in 0..50 {
        read_file(&lab, &disk, "data/200").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(fails(), "{:?}", disk.degraded());
    assert!(!disk.is_complete());
    let fetched = disk.counters().fetched_bytes - before;
    let size = lab.layer.layer.size;
    assert!(fetched > 0 && fetched < size / 2, "{fetched} of {size}");

    local.set_fails(false);
    until("it is well again", || disk.degraded().is_none()).await;
    // the file system may report an error of before with the next sync only
    let whole = async {
        while !disk.is_complete() {
            disk.make_present(range(0, disk.size())).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), whole)
        .await
        .expect("it becomes complete");
    until("it is well again", || disk.degraded().is_none()).await;
    disk.sync().unwrap();
    drop_caches();
    assert_holds(disk.path(), &lab.layer.files);
    lab.reopen(disk).await;
}

#[test]
fn spans_that_could_not_be_synced_are_fetched_again_when_they_are_read() {
    in_vm(|| {
        let local = FailingDisk::new();
        let root = local.path();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(suffer(&local, &root));
        drop(runtime);
        unmount(&root);
        succeeds(Command::new("dmsetup").args(["remove", "--noudevsync", NAME]));
    });
}
