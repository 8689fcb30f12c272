//! Limits of the local disk: what is evicted, in which order, and what readers get meanwhile.

use std::{
    io::ErrorKind,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use socinbd::{
    layer::{Disk, DiskLimits, DiskReserve, Store, StoreOptions},
    units::DiskOffset,
};

use super::{
    fixture::{Lab, Layer, Random, assert_holds, complete, source},
    full::Room,
};
use crate::support::until;

fn limit(bytes: u64) -> DiskLimits {
    DiskLimits {
        limit: Some(bytes),
        reserve: None,
    }
}

/// Reads a range as a server does: what was evicted meanwhile is made present again.
async fn read(disk: &Arc<Disk>, range: Range<DiskOffset>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end.get() - range.start.get()) as usize];
    loop {
        disk.make_present(range.clone()).await.unwrap();
        match disk.read_present(range.start, &mut bytes) {
            Ok(()) => return bytes,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}"),
        }
    }
}

/// Reads files of a layer in a random order.
async fn read_files(disk: Arc<Disk>, layer: Layer, seed: u64, count: u32) {
    let files: Vec<_> = layer.files.iter().filter(|it| !it.1.is_empty()).collect();
    let mut random = Random::new(seed);
    for _ in 0..count {
        let (path, bytes) = files[random.below(files.len() as u64) as usize];
        let place = layer.place(path);
        let length = bytes.len().min(128 << 10);
        let start = random.below((bytes.len() - length + 1) as u64);
        let range = DiskOffset(place.start.get() + start)
            ..DiskOffset(place.start.get() + start + length as u64);
        let found = read(&disk, range).await;
        let start = start as usize;
        assert!(found == bytes[start..start + length], "{path}");
    }
}

/// The bytes of a layer's directory.
fn size(lab: &Lab) -> u64 {
    lab.store
        .bytes_of(&lab.layer.layer.digest, &lab.layer.table)
}

fn longest_span(layer: &Layer) -> u64 {
    let spans = layer.spans.spans.iter();
    let lengths = spans.map(|span| span.uncompressed.end.get() - span.uncompressed.start.get());
    lengths.max().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_readers_get_the_right_bytes_within_the_limit() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let most = size(&lab) + (3 << 19);
    lab.store.set_disk_limits(limit(most)).unwrap();
    let largest = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicBool::new(false));
    let measuring = {
        let (store, largest, ended) = (
            Arc::clone(&lab.store),
            Arc::clone(&largest),
            Arc::clone(&ended),
        );
        let (layer, table) = (lab.layer.layer.digest, lab.layer.table);
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                largest.fetch_max(store.bytes_of(&layer, &table), Ordering::Relaxed);
            }
        })
    };
    let readers =
        (0..8).map(|seed| tokio::spawn(read_files(Arc::clone(&disk), lab.layer.clone(), seed, 60)));
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    ended.store(true, Ordering::Relaxed);
    measuring.join().unwrap();
    let largest = largest.load(Ordering::Relaxed);
    let allowed = most + longest_span(&lab.layer);
    assert!(largest <= allowed, "{largest} of {allowed}");
    let status = lab.store.space_status();
    assert!(status.evicted_spans > 20, "{status:?}");
    assert!(
        status.used_bytes <= most && status.used_bytes > most / 2,
        "{status:?}"
    );
    // what was read ahead may still be evicted
    let is_exact = || lab.store.space_status().used_bytes == size(&lab);
    crate::support::until("the count is what the disk has", is_exact).await;
    // without a limit it becomes complete; an eviction that began before ends first, or finds that the spans are held
    lab.store.set_disk_limits(DiskLimits::default()).unwrap();
    let _held = disk.hold_spans();
    complete(&disk).await;
    disk.sync().unwrap();
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_last_is_evicted_last() {
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let empty = size(&lab);
    let big = lab.layer.place("data/big");
    let at = |start: u64| {
        DiskOffset(big.start.get() + start)..DiskOffset(big.start.get() + start + 4096)
    };
    lab.store.set_disk_limits(limit(empty + (2 << 20))).unwrap();
    // a span that is read all the time, and many others
    for number in 0..40 {
        assert!(number == 0 || disk.is_present(at(0)), "{number}");
        read(&disk, at(0)).await;
        read(&disk, at(number * 17 % 40 * 70_000)).await;
    }
    assert!(lab.store.space_status().evicted_spans > 5);
    let present = (0..40).filter(|number| disk.is_present(at(number * 70_000)));
    assert!(present.count() < 38);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_nobody_uses_go_before_spans_of_those_in_use() {
    let lab = Lab::new(Layer::new(0));
    let other = Lab::new(Layer::new(1));
    let mut removed = lab.disk().await;
    complete(&removed).await;
    removed.sync().unwrap();
    drop(std::mem::replace(&mut removed, {
        let layer = &other.layer;
        let bytes = socinbd::layer::TableBytes::of(layer.ztoc.clone());
        let source = source(&other.registry).await;
        let disk = lab
            .store
            .indexed(&layer.layer, &layer.table, bytes, &source)
            .await;
        disk.unwrap()
    }));
    let disk = removed;
    // a task may have the other disk for a moment longer
    let name = (lab.layer.layer.digest, lab.layer.table);
    until("the disk is closed", || {
        lab.store.removable(&name.0, &name.1).is_some()
    })
    .await;
    let store = Arc::downgrade(&lab.store);
    lab.store.set_remove_unused(move |_| {
        let store = store.upgrade().unwrap();
        store.remove(&name.0, &name.1).unwrap().unwrap_or(0)
    });
    let used = lab
        .store
        .bytes_of(&other.layer.layer.digest, &other.layer.table)
        + size(&lab);
    lab.store.set_disk_limits(limit(used + 50_000)).unwrap();
    read_files(Arc::clone(&disk), other.layer.clone(), 1, 40).await;
    let status = lab.store.space_status();
    assert_eq!(status.evicted_spans, 0, "{status:?}");
    assert_eq!(size(&lab), 0);
    assert!(
        lab.store
            .remove(&other.layer.layer.digest, &other.layer.table)
            .unwrap()
            .is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_with_a_loop_device_is_not_punched_and_readers_get_the_rest_from_memory() {
    let lab = Lab::new(Layer::new(0));
    let other = Lab::new(Layer::new(1));
    let held = lab.disk().await;
    assert!(held.hold_for_loop().is_none(), "it is not complete");
    complete(&held).await;
    let hold = held.hold_for_loop().unwrap();
    let before = size(&lab);
    let layer = &other.layer;
    let bytes = socinbd::layer::TableBytes::of(layer.ztoc.clone());
    let source = source(&other.registry).await;
    let disk = lab
        .store
        .indexed(&layer.layer, &layer.table, bytes, &source)
        .await
        .unwrap();
    let tight = before + lab.store.bytes_of(&layer.layer.digest, &layer.table);
    lab.store.set_disk_limits(limit(tight)).unwrap();
    for _ in 0..2 {
        for (path, bytes) in layer.files.iter().filter(|it| !it.1.is_empty()) {
            assert!(read(&disk, layer.place(path)).await == *bytes, "{path}");
        }
    }
    assert_eq!(size(&lab), before);
    let why = disk.degraded().unwrap();
    assert!(why.contains("--disk-limit"), "{why}");
    assert!(lab.store.space_status().is_full);
    let fetched = disk.counters().fetched_bytes;
    assert!(
        fetched <= layer.layer.size + layer.layer.size / 10,
        "{fetched}"
    );
    // the other one has half of the limit
    assert!(held.hold_for_loop().is_none());
    lab.store.set_disk_limits(limit(tight * 4)).unwrap();
    until("it is well again", || disk.degraded().is_none()).await;
    assert!(!lab.store.space_status().is_full);
    assert_eq!(disk.counters().fetched_bytes, fetched);
    drop(hold);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_disk_that_loses_spans_becomes_complete_again() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    complete(&disk).await;
    disk.sync().unwrap();
    let full = size(&lab);
    lab.store.set_disk_limits(limit(full / 2)).unwrap();
    until("spans are evicted", || size(&lab) <= full / 2).await;
    assert!(!disk.is_complete() && disk.is_verified());
    assert!(disk.hold_for_loop().is_none());
    read_files(Arc::clone(&disk), lab.layer.clone(), 3, 30).await;
    lab.reopen(disk).await;
    let disk = lab.stored().unwrap();
    let (present, count) = disk.span_counts();
    assert!(
        present < count && !disk.is_complete(),
        "{present} of {count}"
    );
    assert!(!lab.store.list().unwrap()[0].complete);
    complete(&disk).await;
    assert!(disk.hold_for_loop().is_some());
    disk.sync().unwrap();
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_that_fills_the_disk_takes_the_space_of_spans() {
    let room = Room::new(12);
    let mut lab = Lab::new(Layer::new(0));
    lab.store = Store::open_with(
        room.path(),
        StoreOptions {
            disk_limits: DiskLimits {
                limit: None,
                reserve: Some(DiskReserve::Bytes(2 << 20)),
            },
            ..StoreOptions::default()
        },
    )
    .unwrap();
    let disk = lab.disk().await;
    complete(&disk).await;
    read(&disk, DiskOffset(0)..DiskOffset(disk.size())).await;
    let full = size(&lab);
    let available = || {
        let stat = rustix::fs::statvfs(room.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let filler = available() - (1 << 20);
    std::fs::write(room.path().join("filler"), vec![1; filler as usize]).unwrap();
    until("the reserve is free", || available() >= 2 << 20).await;
    assert!(size(&lab) < full);
    read_files(Arc::clone(&disk), lab.layer.clone(), 4, 60).await;
    until("the reserve is free", || available() >= 2 << 20).await;
    // the whole file system is taken: readers get the spans from memory
    let rest = available();
    let _ = std::fs::write(room.path().join("filler-2"), vec![1; rest as usize]);
    read_files(Arc::clone(&disk), lab.layer.clone(), 5, 60).await;
    std::fs::remove_file(room.path().join("filler")).unwrap();
    std::fs::remove_file(room.path().join("filler-2")).unwrap();
    until("it is well again", || disk.degraded().is_none()).await;
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);
}
