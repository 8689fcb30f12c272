//! Power cuts: after any of them, no span counts as present whose bytes are not on the disk.
//!
//! In the VM a store works on ext4 on a device whose writes are logged. On the host the contents that the device may have after a power cut
//! are mounted one after the other, as the next boot does, and the store is opened on each.
//!
//! `SOCINBD_TEST_CUTS` is the number of power cuts for each kind of mount, beside those after each mark; 60 without it. With `all`, they are
//! at each flush, and ten after each (5 minutes).

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use socinbd::{
    layer::{Allocation, Disk, DiskLimits, Store, StoreOptions, TableBytes},
    oci::Digest,
    units::DiskOffset,
};

use super::{
    fixture::{Lab, Layer, Random, complete, open_when_free, range, read},
    full::Room,
};
use crate::{
    compact::CompactLab,
    support::{
        log_writes::{WriteLog, undo},
        read_sparse, succeeds, unmount,
        vm::in_vm_then,
    },
};

const DEVICE_MB: u64 = 96;
const NAME: &str = "power-cut";

/// The layers, each with a registry of its own.
struct Layers {
    /// Read by several readers, and complete at the end.
    lazy: Lab,
    /// Never complete; a byte of it is damaged and repaired.
    partial: Lab,
    compact: CompactLab,
    streamed: Lab,
}

impl Layers {
    fn new() -> Self {
        Self {
            lazy: Lab::new(Layer::new(0)),
            partial: Lab::new(Layer::new(1)),
            compact: CompactLab::new(Layer::new(2)),
            streamed: Lab::new(Layer::plain()),
        }
    }

    /// The file whose first byte is damaged.
    fn damaged(&self) -> std::ops::Range<DiskOffset> {
        self.partial.layer.place("data/003")
    }

    fn damaged_key(&self) -> Key {
        (self.partial.layer.layer.digest, self.partial.layer.table)
    }

    async fn streamed(&self, store: &Arc<Store>) -> Arc<Disk> {
        let (layer, source) = (&self.streamed.layer.layer, self.streamed.source().await);
        store.streamed(layer, &source, &|_| {}).await.unwrap()
    }

    /// The disks of all layers in a store.
    async fn disks(&self, store: &Arc<Store>) -> [Arc<Disk>; 4] {
        [
            indexed(&self.lazy, store).await,
            indexed(&self.partial, store).await,
            self.compact.disk_in(store).await,
            self.streamed(store).await,
        ]
    }
}

type Key = (Digest, Digest);

fn key(disk: &Disk) -> Key {
    (disk.layer().digest, *disk.table())
}

async fn indexed(lab: &Lab, store: &Arc<Store>) -> Arc<Disk> {
    let Layer {
        layer, table, ztoc, ..
    } = &lab.layer;
    let source = lab.source().await;
    let bytes = TableBytes::of(ztoc.clone());
    store.indexed(layer, table, bytes, &source).await.unwrap()
}

fn open(root: &Path) -> Arc<Store> {
    let options = StoreOptions {
        never_whole: true,
        ..StoreOptions::default()
    };
    Store::open_with(root, options).unwrap()
}

/// Reads some ranges of a disk, and syncs it now and then.
async fn read_some(disk: Arc<Disk>, seed: u64, count: u32) {
    let mut random = Random::new(seed);
    for _ in 0..count {
        let start = random.below(disk.size());
        let length = (1 + random.below(60_000)).min(disk.size() - start);
        read(&disk, range(start, length)).await.unwrap();
        if random.below(3) == 0 {
            let disk = Arc::clone(&disk);
            tokio::task::spawn_blocking(move || disk.sync().unwrap())
                .await
                .unwrap();
        }
    }
}

/// What is done on the device.
async fn work(root: &Path, mark: impl Fn(&str)) {
    let layers = Layers::new();
    let store = open(root);
    let lazy = indexed(&layers.lazy, &store).await;
    let readers = (0..3).map(|seed| tokio::spawn(read_some(Arc::clone(&lazy), seed, 15)));
    let readers: Vec<_> = readers.collect();
    let partial = indexed(&layers.partial, &store).await;
    read_some(Arc::clone(&partial), 10, 10).await;
    let compact = layers.compact.disk_in(&store).await;
    read_some(Arc::clone(&compact), 11, 10).await;
    let streamed = layers.streamed(&store).await;
    for reader in readers {
        reader.await.unwrap();
    }
    drop((lazy, partial, compact, streamed, store));

    let store = open_when_free(root).await;
    let [lazy, partial, compact, streamed] = layers.disks(&store).await;
    complete(&lazy).await;
    complete(&compact).await;
    for disk in [&lazy, &compact, &streamed] {
        disk.sync().unwrap();
        mark(&complete_mark(&key(disk)));
    }

    // damage, and its repair
    let place = layers.damaged();
    read(&partial, place.clone()).await.unwrap();
    partial.sync().unwrap();
    mark("damage");
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(partial.path())
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, place.start.get()).unwrap();
    file.write_all_at(&[!byte[0]], place.start.get()).unwrap();
    file.sync_all().unwrap();
    let (bytes, _) = tokio::sync::watch::channel(0);
    let report = partial.scrub(bytes).await.unwrap();
    assert_eq!(report.repaired.len(), 1, "{report:?}");
    mark("repair");
    // the device is flushed again before the span is written again
    file.sync_all().unwrap();
    fs::File::create(root.join("flush"))
        .unwrap()
        .sync_all()
        .unwrap();
    read(&partial, place).await.unwrap();
    read_some(Arc::clone(&partial), 12, 10).await;

    // spans are evicted while others are read, and fetched again; the disks that were promised to be complete stay so
    let _held = [&lazy, &compact, &streamed].map(Disk::hold_spans);
    let directories = store.directories().unwrap();
    let sizes = directories
        .iter()
        .map(|(layer, table)| store.bytes_of(layer, table));
    let limits = DiskLimits {
        limit: Some(sizes.sum()),
        reserve: None,
    };
    store.set_disk_limits(limits).unwrap();
    // how many reads it takes depends on what was read ahead before
    for turn in 0..60 {
        mark(&format!("evict-{turn}"));
        read_some(Arc::clone(&partial), 20 + turn, 12).await;
        if turn >= 5 && store.space_status().evicted_spans > 30 {
            break;
        }
    }
    let status = store.space_status();
    assert!(status.evicted_spans > 30, "{status:?}");
}

fn complete_mark((layer, table): &Key) -> String {
    format!("complete-{}-{}", &layer.hex()[..12], &table.hex()[..12])
}

/// A file system on a device whose writes are logged, in the VM.
fn record(out: &Path, options: &str) {
    let folder = tempfile::tempdir().unwrap();
    let [device, log] = ["device", "log"].map(|name| folder.path().join(name));
    let new_file = |path: &Path, megabytes: u64| {
        let file = fs::File::create(path).unwrap();
        file.set_len(megabytes << 20).unwrap();
    };
    new_file(&device, DEVICE_MB);
    new_file(&log, 8 * DEVICE_MB);
    let mkfs = ["-q", "-F", "-b", "4096", "-J", "size=4", "-E"];
    succeeds(
        Command::new("mkfs.ext4")
            .args(mkfs)
            .arg("nodiscard,lazy_itable_init=0,lazy_journal_init=0")
            .arg(&device),
    );
    copy_sparse(&device, &out.join("device"));
    let table = format!(
        "0 {} log-writes {} {}",
        DEVICE_MB << 11,
        loop_device(&device),
        loop_device(&log)
    );
    let create = ["create", NAME, "--noudevsync", "--table", &table];
    succeeds(Command::new("dmsetup").args(create));
    let root = folder.path().join("root");
    fs::create_dir(&root).unwrap();
    let mount = ["-t", "ext4", "-o", options, "/dev/dm-0"];
    succeeds(Command::new("mount").args(mount).arg(&root));
    let mark = |text: &str| {
        succeeds(Command::new("dmsetup").args(["message", NAME, "0", "mark", text]));
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(work(&root, mark));
    drop(runtime);
    unmount(&root);
    succeeds(Command::new("dmsetup").args(["remove", "--noudevsync", NAME]));
    copy_sparse(&log, &out.join("log"));
}

pub(super) fn loop_device(file: &Path) -> String {
    let output = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(file)
        .output()
        .expect("losetup runs (package mount)");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn copy_sparse(from: &Path, to: &Path) {
    succeeds(Command::new("cp").arg("--sparse=always").arg(from).arg(to));
}

/// The complete disks, by layer and table.
async fn complete_disks(layers: &Layers) -> BTreeMap<Key, Vec<u8>> {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let mut right = BTreeMap::new();
    for disk in layers.disks(&store).await {
        if !disk.is_complete() {
            complete(&disk).await;
        }
        right.insert(key(&disk), read_sparse(disk.path()));
    }
    right
}

/// Looks at the contents that a device may have after a power cut.
struct Cuts {
    layers: Layers,
    right: BTreeMap<Key, Vec<u8>>,
    room: Room,
    options: &'static str,
    log: WriteLog,
    /// Power cuts so far.
    looked: usize,
    /// Spans that counted as present, over all power cuts.
    present: u64,
    /// Directories that counted as valid, and as lost.
    valid: u64,
    lost: u64,
}

impl Cuts {
    fn mountpoint(&self) -> PathBuf {
        self.room.path().join("mnt")
    }

    /// Mounts the content of a device, which had its last flush at entry `last` of the log, and opens the store. `is_used`: the layers are
    /// read to their end then.
    async fn look(&mut self, device: &[u8], last: usize, is_used: bool, what: &str) {
        // a file of its own: a loop device of the one before may not be gone yet
        self.looked += 1;
        let image = self.room.path().join(format!("image-{}", self.looked));
        write_sparse(device, &image);
        let mountpoint = self.mountpoint();
        let options = format!("loop,{}", self.options);
        let mount = ["-t", "ext4", "-o", &options];
        succeeds(
            Command::new("mount")
                .args(mount)
                .arg(&image)
                .arg(&mountpoint),
        );
        let has = |last, text: &str| self.log.marks(last).any(|mark| mark == text);
        let may_be_damaged = has(self.log.end_of_epoch(last), "damage") && !has(last, "repair");
        let store = open(&mountpoint);
        for key in self.right.keys() {
            let disk = store
                .stored(&key.0, &key.1)
                .unwrap_or_else(|error| panic!("{what}: {}", error.report()));
            let must_be_complete = has(last, &complete_mark(key));
            let Some(disk) = disk else {
                assert!(!must_be_complete, "{what}: a complete disk is lost");
                self.lost += 1;
                continue;
            };
            assert!(disk.is_complete() || !must_be_complete, "{what}");
            self.valid += 1;
            self.present += u64::from(disk.span_counts().0);
            let is_damaged = may_be_damaged && *key == self.layers.damaged_key();
            let spared = is_damaged.then(|| self.layers.damaged().start.get() as usize);
            assert_present_is_right(&disk, &self.right[key], spared, what);
        }
        if is_used {
            for disk in self.layers.disks(&store).await {
                if !disk.is_complete() {
                    complete(&disk).await;
                }
                let found = fs::read(disk.path()).unwrap();
                assert!(found == self.right[&key(&disk)], "{what}: {:?}", key(&disk));
            }
        }
        drop(store);
        unmount(&mountpoint);
        fs::remove_file(image).unwrap();
    }
}

/// All bytes that are served without a fetch are those of the complete disk; `spared` may be another one.
fn assert_present_is_right(disk: &Disk, right: &[u8], spared: Option<usize>, what: &str) {
    let mut found = fs::read(disk.path()).unwrap();
    assert_eq!(found.len(), right.len(), "{what}");
    if let Some(at) = spared {
        found[at] = right[at];
    }
    let mut start = 0;
    for (length, kind) in disk.allocation(range(0, disk.size())) {
        let end = start + length as usize;
        if kind != Allocation::Absent && found[start..end] != right[start..end] {
            let wrong = (start..end).find(|at| found[*at] != right[*at]);
            panic!(
                "{what}: layer {}: byte {wrong:?} of a {kind:?} range is wrong",
                disk.layer().digest
            );
        }
        start = end;
    }
}

/// Writes a file that has holes where the bytes are zero.
fn write_sparse(bytes: &[u8], path: &Path) {
    const CHUNK: usize = 64 << 10;
    let file = fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (number, chunk) in bytes.chunks(CHUNK).enumerate() {
        if *chunk != [0; CHUNK][..chunk.len()] {
            file.write_all_at(chunk, (number * CHUNK) as u64).unwrap();
        }
    }
}

/// Looks at power cuts: half of them when a flush or a write with FUA has just ended, and half between two flushes.
async fn replay(out: &Path, options: &'static str) {
    let layers = Layers::new();
    let right = complete_disks(&layers).await;
    let mut device = read_sparse(&out.join("device"));
    let mut cuts = Cuts {
        layers,
        right,
        room: Room::new(8 * DEVICE_MB as u32),
        options,
        log: WriteLog::parse(read_sparse(&out.join("log"))),
        looked: 0,
        present: 0,
        valid: 0,
        lost: 0,
    };
    fs::create_dir(cuts.mountpoint()).unwrap();
    let points = cuts.log.durable_points();
    assert!(points.len() > 100, "{} flushes", points.len());
    let (step, parts) = match std::env::var("SOCINBD_TEST_CUTS").as_deref() {
        Ok("all") => (1, 10),
        Ok(count) => (points.len() / (count.parse::<usize>().unwrap() / 2) + 1, 1),
        Err(_) => (points.len() / 30 + 1, 1),
    };
    let mut applied = 0;
    let mut random = Random::new(step as u64);
    // and what follows after each mark, where something else was promised
    let after_marks = cuts.log.mark_places();
    let is_near = |point: usize| {
        let mut before = after_marks.iter().filter(|mark| **mark < point);
        before.next_back().is_some_and(|mark| {
            let between = points.iter().filter(|it| *mark < **it && **it < point);
            between.count() < 2
        })
    };
    let chosen: Vec<_> = (0..)
        .zip(&points)
        .filter(|(number, point)| number % step == step / 2 || is_near(**point))
        .map(|(_, point)| *point)
        .collect();
    for last in chosen {
        cuts.log.apply(applied..last + 1, &mut device);
        applied = last + 1;
        let is_used = cuts.looked.is_multiple_of(8);
        cuts.look(&device, last, is_used, &format!("{options}, flush {last}"))
            .await;
        for part in 0..parts {
            let kept = [10, 50, 90, 98][cuts.looked / 2 % 4];
            let before = cuts
                .log
                .apply_some(last, || random.below(100) < kept, &mut device);
            let what = format!("{options}, flush {last} and part {part} of the later writes");
            let is_used = cuts.looked % 8 == 5;
            cuts.look(&device, last, is_used, &what).await;
            undo(before, &mut device);
        }
    }
    println!(
        "{options}: {} power cuts; {} spans present, {} disks valid, {} lost",
        cuts.looked, cuts.present, cuts.valid, cuts.lost
    );
    assert!(cuts.present > 0 && cuts.lost > 0);
}

fn replay_all(out: &Path, options: &'static str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(replay(out, options));
}

#[test]
fn a_power_cut_leaves_no_span_present_whose_bytes_are_lost() {
    let options = "data=ordered";
    in_vm_then(|out| record(out, options), |out| replay_all(out, options));
}

#[test]
fn a_power_cut_without_ordered_data_leaves_no_span_present_whose_bytes_are_lost() {
    let options = "data=writeback";
    in_vm_then(|out| record(out, options), |out| replay_all(out, options));
}
