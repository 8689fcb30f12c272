//! A disk without room.

use std::{path::Path, process::Command};

use socinbd::{
    error::Kind,
    layer::Store,
    oci::{Digest, Packing},
};

use super::fixture::{Lab, Layer, REPOSITORY, assert_holds, complete, read};
use crate::support::until;

/// A small file system of its own; unmounted when dropped.
pub(super) struct Room(tempfile::TempDir);

impl Room {
    pub(super) fn new(megabytes: u32) -> Self {
        let room = Self(tempfile::tempdir().unwrap());
        room.mount(&format!("size={megabytes}m"));
        room
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    fn grow(&self, megabytes: u32) {
        self.mount(&format!("remount,size={megabytes}m"));
    }

    fn mount(&self, options: &str) {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(self.path())
            .status()
            .expect("mount runs (package mount)");
        assert!(mount.success(), "mounting needs root");
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_no_error_and_no_second_fetch() {
    let room = Room::new(2);
    let mut lab = Lab::new(Layer::new(0));
    lab.store = Store::open(room.path()).unwrap();
    let disk = lab.disk().await;
    // three times over: what found no room is read from memory
    for _ in 0..3 {
        for (path, bytes) in lab
            .layer
            .files
            .iter()
            .filter(|(_, bytes)| !bytes.is_empty())
        {
            let found = read(&disk, lab.layer.place(path)).await.unwrap();
            assert!(found == *bytes, "{path}");
        }
    }
    let fetched = disk.counters().fetched_bytes;
    let size = lab.layer.layer.size;
    assert!(fetched <= size + size / 10, "{fetched} of {size}");
    let why = disk.degraded().unwrap();
    for part in [
        "No space left",
        &lab.layer.layer.digest.to_string(),
        "disk.ext4",
    ] {
        assert!(why.contains(part), "{part} is missing in: {why}");
    }
    assert_eq!(disk.reasons().len(), 1);
    let (present, count) = disk.span_counts();
    assert!(0 < present && present < count, "{present} of {count}");

    room.grow(64);
    until("it is well again", || disk.degraded().is_none()).await;
    complete(&disk).await;
    assert_eq!(disk.counters().fetched_bytes, fetched);
    disk.sync().unwrap();
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_without_free_space_leaves_nothing() {
    let room = Room::new(1);
    let mut lab = Lab::new(Layer::new(0));
    lab.store = Store::open(room.path()).unwrap();
    let new = room.path().join("layers/new");

    let source = lab.source().await;
    let layer = &lab.layer.layer;
    let error = lab
        .store
        .streamed(layer, &source, &|_| {})
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::Io, "{}", error.report());
    assert_eq!(std::fs::read_dir(&new).unwrap().count(), 0);

    let filler = room.path().join("filler");
    let _ = std::fs::write(&filler, vec![1; 1 << 20]); // as much as fits
    let error = lab.try_disk().await.err().unwrap();
    assert_eq!(error.kind(), Kind::Io, "{}", error.report());
    assert_eq!(std::fs::read_dir(&new).unwrap().count(), 0);
    assert_eq!(lab.store.list().unwrap(), []);

    room.grow(64);
    let disk = lab.store.streamed(layer, &source, &|_| {}).await.unwrap();
    assert_holds(disk.path(), &lab.layer.files);
    assert!(!lab.disk().await.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_zeros_uses_no_space() {
    let room = Room::new(4);
    let mut lab = Lab::new(Layer::new(0));
    lab.store = Store::open(room.path()).unwrap();
    let files = super::fixture::Files::from([
        ("data/zeros".to_owned(), vec![0; 32 << 20]),
        ("data/text".to_owned(), b"text".to_vec()),
    ]);
    let tar = super::fixture::tar(&files);
    let blob = super::fixture::gzip(&tar);
    let layer = socinbd::layer::LayerBlob {
        size: blob.len() as u64,
        digest: lab.registry.add_blob(REPOSITORY, blob),
        packing: Packing::Gzip,
        diff_id: Digest::of(&tar),
    };
    let source = lab.source().await;
    let disk = lab.store.streamed(&layer, &source, &|_| {}).await.unwrap();
    assert_holds(disk.path(), &files);
}
