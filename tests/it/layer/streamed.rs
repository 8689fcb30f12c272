//! Layers without a zTOC.

use std::{
    io::Write as _,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use socinbd::{
    error::{Kind, Result},
    layer::{Disk, LayerBlob, Store},
    oci::{Digest, Packing},
};

use super::fixture::{
    Files, REPOSITORY, Random, assert_holds, files, gzip, open_when_free, read, source, tar,
};
use crate::support::{
    registry::{Fault, On, Registry, Times},
    until,
};

struct Lab {
    registry: Registry,
    root: tempfile::TempDir,
    store: Arc<Store>,
}

impl Lab {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self {
            registry: Registry::start(),
            store: Store::open(root.path()).unwrap(),
            root,
        }
    }

    fn add(&self, blob: Vec<u8>, packing: Packing, tar: &[u8]) -> LayerBlob {
        LayerBlob {
            size: blob.len() as u64,
            digest: self.registry.add_blob(REPOSITORY, blob),
            packing,
            diff_id: Digest::of(tar),
        }
    }

    async fn stream(&self, layer: &LayerBlob) -> Result<Arc<Disk>> {
        let source = source(&self.registry).await;
        self.store.streamed(layer, &source, &|_| {}).await
    }

    /// Nothing is left of what failed.
    fn assert_empty(&self) {
        let layers = self.root.path().join("layers");
        assert_eq!(std::fs::read_dir(layers.join("new")).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(layers.join("sha256")).unwrap().count(), 0);
    }
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// Three gzip members, cut where they please.
fn members(bytes: &[u8]) -> Vec<u8> {
    let (first, rest) = bytes.split_at(bytes.len() / 3 + 77);
    let (second, third) = rest.split_at(rest.len() / 2);
    [gzip(first), gzip(second), gzip(third)].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_packing_ends_as_the_same_complete_disk() {
    let files = files(0);
    let tar = tar(&files);
    let mut disks: Vec<Vec<u8>> = Vec::new();
    for (blob, packing) in [
        (gzip(&tar), Packing::Gzip),
        (members(&tar), Packing::Gzip),
        (zstd(&tar), Packing::Zstd),
        (tar.clone(), Packing::Plain),
    ] {
        let lab = Lab::new();
        let layer = lab.add(blob, packing, &tar);
        let seen = AtomicU64::new(0);
        let source = source(&lab.registry).await;
        let progress = |bytes| assert!(seen.fetch_max(bytes, Ordering::Relaxed) <= bytes);
        let disk = lab
            .store
            .streamed(&layer, &source, &progress)
            .await
            .unwrap();
        assert!(seen.load(Ordering::Relaxed) <= layer.size);
        assert!(disk.is_complete() && disk.is_verified());
        assert_eq!(disk.span_counts(), (0, 0));
        assert_holds(disk.path(), &files);
        assert_eq!(disk.degraded(), None);
        let whole = socinbd::units::DiskOffset(0)..socinbd::units::DiskOffset(disk.size());
        assert!(disk.is_present(whole.clone()));
        disks.push(read(&disk, whole).await.unwrap());

        let again = lab.store.verified(&layer).unwrap().unwrap();
        assert!(Arc::ptr_eq(&again, &disk));
        let count = lab.registry.counters().blob(&layer.digest);
        assert_eq!(count.bytes, layer.size);
        assert!(Arc::ptr_eq(&lab.stream(&layer).await.unwrap(), &disk));
        assert_eq!(lab.registry.counters().blob(&layer.digest), count);
    }
    assert!(disks.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_was_replaced_leaves_nothing_behind() {
    let lab = Lab::new();
    let files = Files::from([("data/only".to_owned(), Random::new(1).text(100))]);
    let tar = tar(&files);
    assert!(
        tar.windows(1000).any(|bytes| bytes == [0x55; 1000]),
        "the replaced entry"
    );
    let layer = lab.add(gzip(&tar), Packing::Gzip, &tar);
    let disk = lab.stream(&layer).await.unwrap();
    assert_holds(disk.path(), &files);
    let bytes = std::fs::read(disk.path()).unwrap();
    assert!(!bytes.windows(1000).any(|bytes| bytes == [0x55; 1000]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_file_keeps_its_holes() {
    let folder = tempfile::tempdir().unwrap();
    let mut content = vec![0; 8 << 20];
    for (at, byte) in [(100, 1), (3 << 20, 2), ((7 << 20) + 5, 3)] {
        content[at..at + 5000].fill(byte);
    }
    let file = folder.path().join("sparse");
    let mut sparse = std::fs::File::create(&file).unwrap();
    sparse.write_all(&[]).unwrap();
    sparse.set_len(8 << 20).unwrap();
    for at in [100, 3 << 20, (7 << 20) + 5] {
        use std::os::unix::fs::FileExt as _;
        sparse
            .write_all_at(&content[at..at + 5000], at as u64)
            .unwrap();
    }
    for format in ["gnu", "posix"] {
        let tar = Command::new("tar")
            .args(["--sparse", "--format", format, "-C"])
            .arg(folder.path())
            .args(["-c", "sparse"])
            .output()
            .expect("tar runs (package tar)");
        assert!(tar.status.success());
        assert!(tar.stdout.len() < 1 << 20, "tar has seen the holes");
        let lab = Lab::new();
        let layer = lab.add(gzip(&tar.stdout), Packing::Gzip, &tar.stdout);
        let disk = lab.stream(&layer).await.unwrap();
        let files = Files::from([("sparse".to_owned(), content.clone())]);
        assert_holds(disk.path(), &files);
        assert!(allocated(disk.path()) < 1 << 20);
    }
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_callers_share_one_stream() {
    let lab = Lab::new();
    let files = files(0);
    let tar = tar(&files);
    let layer = lab.add(gzip(&tar), Packing::Gzip, &tar);
    let disks = futures_util::future::join_all((0..8).map(|_| lab.stream(&layer))).await;
    let disks: Vec<_> = disks.into_iter().map(Result::unwrap).collect();
    assert!(disks.iter().all(|disk| Arc::ptr_eq(disk, &disks[0])));
    assert_eq!(
        lab.registry.counters().blob(&layer.digest).bytes,
        layer.size
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_not_the_layer_leaves_nothing() {
    let files = files(0);
    let tar = tar(&files);
    let lab = Lab::new();
    let good = lab.add(gzip(&tar), Packing::Gzip, &tar);

    let mut layer = good.clone();
    layer.diff_id = Digest::of(b"another");
    let error = lab.stream(&layer).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("its diff ID is"),
        "{}",
        error.report()
    );
    lab.assert_empty();

    // a byte of the tar, in a blob that unpacks well
    let mut other = tar.clone();
    other[1500] ^= 1;
    let mut layer = lab.add(other.clone(), Packing::Plain, &other);
    layer.digest = Digest::of(b"another");
    lab.registry.add_blob_as(REPOSITORY, layer.digest, other);
    let error = lab.stream(&layer).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("its digest is"),
        "{}",
        error.report()
    );
    lab.assert_empty();

    let noise = Random::new(9).text(100_000);
    let layer = lab.add(gzip(&noise), Packing::Gzip, &noise);
    let error = lab.stream(&layer).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Corrupt);
    lab.assert_empty();

    assert_holds(lab.stream(&good).await.unwrap().path(), &files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_cut_is_resumed() {
    let files = files(0);
    let tar = tar(&files);
    let lab = Lab::new();
    let layer = lab.add(gzip(&tar), Packing::Gzip, &tar);
    lab.registry
        .fail(On::Data, Fault::Cut { after: 100_000 }, Times::Next(2));
    assert_holds(lab.stream(&layer).await.unwrap().path(), &files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_waiters_is_cancelled() {
    let files = files(0);
    let tar = tar(&files);
    let lab = Lab::new();
    let layer = lab.add(gzip(&tar), Packing::Gzip, &tar);
    lab.registry
        .fail(On::Data, Fault::Stall { after: 1000 }, Times::UntilHealed);
    let asked = lab.registry.counters().total().requests;
    {
        let stream = lab.stream(&layer);
        tokio::pin!(stream);
        while lab.registry.counters().total().requests == asked {
            tokio::select! {
                _ = &mut stream => panic!("it cannot end"),
                () = tokio::time::sleep(std::time::Duration::from_millis(1)) => {}
            }
        }
    }
    let new = lab.root.path().join("layers/new");
    let is_empty = || std::fs::read_dir(&new).unwrap().count() == 0;
    until("the draft goes", is_empty).await;
    lab.registry.heal();
    assert_holds(lab.stream(&layer).await.unwrap().path(), &files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_disk_is_there_after_a_restart() {
    let files = files(0);
    let tar = tar(&files);
    let lab = Lab::new();
    let layer = lab.add(zstd(&tar), Packing::Zstd, &tar);
    drop(lab.stream(&layer).await.unwrap());
    drop(lab.store);
    let store = open_when_free(lab.root.path()).await;
    let disk = store.verified(&layer).unwrap().unwrap();
    assert_holds(disk.path(), &files);
    let listed = store.list().unwrap();
    assert!(listed[0].complete && listed[0].verified);
}

/// A streamed layer has no table to mend its folder with: what is damaged is streamed again.
#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_disk_that_is_damaged_is_streamed_again() {
    let files = files(0);
    let tar = tar(&files);
    let names = [
        "layout",
        "stacking.json",
        "state.json",
        "disk.ext4",
        "sources.json",
        "spans",
    ];
    let mut lab = Lab::new();
    let layer = lab.add(gzip(&tar), Packing::Gzip, &tar);
    for name in names {
        let disk = lab.stream(&layer).await.unwrap();
        disk.sync().unwrap();
        let path = disk.path().with_file_name(name);
        let is_metadata = disk.metadata().start.get();
        drop(disk);
        let other = tempfile::tempdir().unwrap();
        drop(std::mem::replace(
            &mut lab.store,
            Store::open(other.path()).unwrap(),
        ));
        lab.store = open_when_free(lab.root.path()).await;
        let mut bytes = std::fs::read(&path).unwrap();
        match (name, bytes.len()) {
            ("disk.ext4", _) => bytes[is_metadata as usize + 77] ^= 1,
            (_, 0) => bytes.push(1),
            (_, length) => bytes[length / 2] ^= 1,
        }
        std::fs::write(&path, bytes).unwrap();
        let disk = lab.stream(&layer).await.unwrap();
        assert!(disk.is_complete(), "{name}");
        assert_holds(disk.path(), &files);
    }
}

/// The checks of a streamed disk's pieces find what rots, and the layer makes it right, in place.
#[tokio::test(flavor = "multi_thread")]
async fn damage_of_a_streamed_disk_is_repaired_in_place() {
    let files = files(0);
    let tar = tar(&files);
    let lab = Lab::new();
    let layer = lab.add(gzip(&tar), Packing::Gzip, &tar);
    let disk = lab.stream(&layer).await.unwrap();
    let scrub = async || {
        let (read, _) = tokio::sync::watch::channel(0);
        disk.scrub(read).await.unwrap()
    };
    assert!(scrub().await.is_sound());
    let right = std::fs::read(disk.path()).unwrap();
    for at in [5_000_000, disk.metadata().start.get() as usize + 70] {
        let mut rotten = right.clone();
        rotten[at] ^= 1;
        std::fs::write(disk.path(), rotten).unwrap();
        let report = scrub().await;
        assert!(
            report.repaired.len() == 1 && report.wrong.is_empty(),
            "{report:?}"
        );
        assert!(std::fs::read(disk.path()).unwrap() == right);
        assert!(scrub().await.is_sound());
    }
    std::fs::remove_file(disk.path().with_file_name("pieces")).unwrap();
    assert_eq!(scrub().await.repaired.len(), 1);
    assert!(scrub().await.is_sound());
}
