//! Files of a disk's folder that are not what was written to them. Every byte that is read is right, no table is taken for a liar, and
//! nothing stays broken.

use std::{
    fs,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    sync::Arc,
};

use socinbd::{
    layer::{Disk, ScrubReport},
    oci::Packing,
    units::DiskOffset,
};

use super::{
    damage_matrix::{HARMS, Harm, harm},
    fixture::{
        Files, Lab, Layer, Random, assert_holds, change_state, complete, gzip, range, read, tar,
    },
};
use crate::support::until;

/// A byte of the last block that is not zero.
pub(super) fn last_metadata(disk: &[u8]) -> usize {
    let block = disk
        .chunks(4096)
        .rposition(|block| block.iter().any(|byte| *byte != 0));
    block.unwrap() * 4096 + 64
}

pub(super) fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

/// A few small files and a larger one, in spans of 16 KiB; more behind the tar's end than is kept in `rest`, where that is `padded`.
pub(super) fn layer(seed: u64, packing: Packing, padded: bool) -> Layer {
    let mut random = Random::new(seed);
    let mut files = Files::from([("data/big".to_owned(), random.text(200_000))]);
    for number in 0..12 {
        let length = 1 + random.below(6000) as usize;
        files.insert(format!("data/{number:03}"), random.text(length));
    }
    let mut bytes = tar(&files);
    if padded {
        bytes.resize(bytes.len() + (2 << 20), 0);
        *bytes.last_mut().unwrap() = 1;
    }
    let blob = match packing {
        Packing::Gzip => gzip(&bytes),
        _ => bytes,
    };
    Layer::of(files, blob, packing, 16 << 10)
}

/// Reads all files and has the layer checked: the bytes are right, and nothing is held against the table.
pub(super) async fn assert_heals(disk: &Arc<Disk>, files: &Files, what: &str) {
    complete(disk).await;
    assert_eq!(disk.degraded(), None, "{what}");
    assert_holds(disk.path(), files);
    let state = fs::read_to_string(disk.path().with_file_name("state.json")).unwrap();
    assert!(!state.contains("refuted"), "{what}: {state}");
}

/// Data that is damaged before the layer has been checked is found by the check, and fetched again.
#[tokio::test(flavor = "multi_thread")]
async fn data_damaged_before_the_check_is_fetched_again() {
    let mut lab = Lab::new(layer(210, Packing::Gzip, false));
    let disk = lab.disk().await;
    let place = lab.layer.place("data/003");
    read(&disk, place.clone()).await.unwrap();
    lab.reopen(disk).await;
    flip(&lab.folder().join("disk.ext4"), place.start.get());
    let disk = lab.disk().await;
    assert_heals(&disk, &lab.layer.files, "rotten data").await;
}

/// Files that are damaged while the disk is in use are mended from the stored table, and readers do not notice.
#[tokio::test(flavor = "multi_thread")]
async fn files_damaged_while_they_are_open_are_repaired() {
    for name in ["spans.table", "headers"] {
        let lab = Lab::new(layer(211, Packing::Gzip, false));
        let disk = lab.disk().await;
        let path = lab.folder().join(name);
        let right = fs::read(&path).unwrap();
        for at in (0..right.len()).step_by(30) {
            flip(&path, at as u64);
        }
        let big = read(&disk, lab.layer.place("data/big")).await.unwrap();
        assert!(big == lab.layer.files["data/big"], "{name}");
        assert_heals(&disk, &lab.layer.files, name).await;
        assert!(fs::read(&path).unwrap() == right, "{name}");
    }
}

/// The table itself comes from where it came from: from where the layer is, or with the next attach. Until then readers get an error
/// that says so, and accuses nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_damaged_while_it_is_open_is_fetched_again() {
    let lab = Lab::new(layer(212, Packing::Gzip, false));
    let disk = lab.disk().await;
    let ztoc = lab.folder().join("ztoc");
    let harm = || {
        for at in (0..lab.layer.ztoc.len()).step_by(1000) {
            flip(&ztoc, at as u64);
        }
    };
    harm();
    let big = lab.layer.place("data/big");
    let error = read(&disk, big.clone()).await.unwrap_err();
    let report = error.report();
    assert!(report.contains("the stored table is damaged"), "{report}");
    assert!(disk.degraded().unwrap().contains("attach an image"));
    let same = lab.disk().await;
    assert!(Arc::ptr_eq(&disk, &same));
    let half = DiskOffset((big.start.get() + big.end.get()) / 2);
    let bytes = read(&disk, big.start..half).await.unwrap();
    assert!(bytes == lab.layer.files["data/big"][..bytes.len()]);

    // once more, where the layer's registry has it
    harm();
    lab.registry
        .add_blob(super::fixture::REPOSITORY, lab.layer.ztoc.clone());
    assert!(read(&disk, big).await.unwrap() == lab.layer.files["data/big"]);
    assert_heals(&disk, &lab.layer.files, "ztoc").await;
    assert!(fs::read(ztoc).unwrap() == lab.layer.ztoc);
}

/// A local disk that does not give what it has is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_error_names_the_disk() {
    let lab = Lab::new(layer(217, Packing::Gzip, false));
    let disk = lab.disk().await;
    let place = lab.layer.place("data/big");
    read(&disk, place.clone()).await.unwrap();
    let file = fs::OpenOptions::new().write(true).open(disk.path());
    file.unwrap().set_len(place.start.get()).unwrap();
    let mut bytes = [0; 100];
    assert!(disk.read_present(place.start, &mut bytes).is_err());
    let why = disk.degraded().unwrap();
    assert!(why.contains("disk.ext4 cannot be read"), "{why}");
    let state = fs::read_to_string(lab.folder().join("state.json")).unwrap();
    assert!(!state.contains("refuted"));
}

/// While nobody has the table, the data that is here is kept, and the error says what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_directory_is_kept_while_no_source_has_its_table() {
    let mut lab = Lab::new(layer(213, Packing::Gzip, false));
    let disk = lab.disk().await;
    complete(&disk).await;
    lab.reopen(disk).await;
    flip(&lab.folder().join("ztoc"), 100);
    flip(&lab.folder().join("layout"), 20);
    let away = || async {
        Err(socinbd::error::Error::new(
            socinbd::error::Kind::Unavailable,
            "the registry is away",
        ))
    };
    let (blob, table) = (&lab.layer.layer, &lab.layer.table);
    let source = lab.source().await;
    let bytes = socinbd::layer::TableBytes::new(away, false);
    let error = lab.store.indexed(blob, table, bytes, &source).await;
    let error = error.err().unwrap();
    assert_eq!(error.kind(), socinbd::error::Kind::Unavailable);
    lab.registry.reset_counters();
    let disk = lab.disk().await;
    assert!(disk.is_complete());
    assert_eq!(lab.fetched().0, 0, "its data is kept");
    assert_holds(disk.path(), &lab.layer.files);
}

/// A folder of the version before had no checks. A complete disk is used; of another the spans come again.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_the_previous_version_is_used() {
    for is_complete in [true, false] {
        let mut lab = Lab::new(layer(215, Packing::Gzip, false));
        let disk = lab.disk().await;
        read(&disk, lab.layer.place("data/003")).await.unwrap();
        if is_complete {
            complete(&disk).await;
        }
        let spans = disk.span_counts().1;
        disk.sync().unwrap();
        lab.reopen(disk).await;
        let folder = lab.folder();
        for name in ["state.json", "stacking.json", "sources.json"] {
            let text = fs::read_to_string(folder.join(name)).unwrap();
            let (body, _) = text.split_once(",\n  \"crc32\"").unwrap();
            let body = body.replace("\"version\": 2", "\"version\": 1");
            fs::write(folder.join(name), format!("{body}\n}}")).unwrap();
        }
        // records of 80 and of 32 bytes then, and one bit a span
        fs::write(folder.join("spans.table"), b"spans 2\n").unwrap();
        fs::write(folder.join("headers"), [0; 64]).unwrap();
        fs::write(
            folder.join("spans"),
            vec![0xff; spans.div_ceil(64) as usize * 8],
        )
        .unwrap();
        let sources = fs::read(folder.join("sources.json")).unwrap();
        let sources: serde_json::Value = serde_json::from_slice(&sources).unwrap();
        let list = serde_json::to_vec_pretty(&sources["sources"]).unwrap();
        fs::write(folder.join("sources.json"), list).unwrap();
        let inode = fs::metadata(folder.join("disk.ext4")).unwrap().ino();
        lab.registry.reset_counters();
        // as a daemon that starts again opens it: nobody names a source
        let disk = lab.stored().unwrap();
        assert_eq!(disk.is_complete(), is_complete);
        assert_heals(&disk, &lab.layer.files, "an old folder").await;
        assert_eq!(lab.fetched().0 == 0, is_complete);
        assert_eq!(fs::metadata(disk.path()).unwrap().ino(), inode);
        lab.reopen(disk).await;
        assert!(lab.stored().unwrap().is_complete());
    }
}

/// A version that is not known is no damage to mend: the folder goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_a_later_version_is_made_again() {
    let mut lab = Lab::new(layer(216, Packing::Gzip, false));
    let disk = lab.disk().await;
    lab.reopen(disk).await;
    change_state(&lab.folder(), |state| {
        state.replace("\"version\": 2", "\"version\": 3")
    });
    let disk = lab.disk().await;
    assert_heals(&disk, &lab.layer.files, "another version").await;
    until("it is of this version", || {
        fs::read_to_string(lab.folder().join("state.json"))
            .unwrap()
            .contains("\"version\": 2")
    })
    .await;
}

async fn scrub(disk: &Arc<Disk>) -> ScrubReport {
    let (read, _) = tokio::sync::watch::channel(0);
    disk.scrub(read).await.unwrap()
}

/// Rotten data, rotten padding of a file's last block, rotten metadata and rotten tables of a disk in use: all is found and right again.
#[tokio::test(flavor = "multi_thread")]
async fn damage_of_a_complete_disk_is_repaired_in_place() {
    let lab = Lab::new(layer(220, Packing::Gzip, false));
    let disk = lab.disk().await;
    complete(&disk).await;
    assert!(scrub(&disk).await.is_sound());
    let right = fs::read(disk.path()).unwrap();
    let inode = fs::metadata(disk.path()).unwrap().ino();
    let small = lab.layer.place("data/003");
    let places = [
        small.start.get(),
        lab.layer.place("data/big").end.get() - 1,
        small.end.get(),
        last_metadata(&right) as u64,
        right.len() as u64 - 100,
    ];
    for at in places {
        flip(disk.path(), at);
        let report = scrub(&disk).await;
        assert!(
            !report.repaired.is_empty() && report.wrong.is_empty(),
            "{at}: {report:?}"
        );
        assert!(fs::read(disk.path()).unwrap() == right, "{at}");
        assert!(disk.is_complete());
        assert!(scrub(&disk).await.is_sound());
    }
    for name in [
        "ztoc",
        "spans.table",
        "headers",
        "layout",
        "stacking.json",
        "spans",
    ] {
        let path = lab.folder().join(name);
        let whole = fs::read(&path).unwrap();
        flip(&path, 3);
        // what the registry has of the table too
        lab.registry
            .add_blob(super::fixture::REPOSITORY, lab.layer.ztoc.clone());
        let report = scrub(&disk).await;
        assert!(
            !report.repaired.is_empty() && report.wrong.is_empty(),
            "{name}: {report:?}"
        );
        assert!(fs::read(&path).unwrap() == whole, "{name}");
        assert!(scrub(&disk).await.is_sound(), "{name}");
    }
    assert_eq!(fs::metadata(disk.path()).unwrap().ino(), inode);
}

/// While the registry is away a rotten span stays absent, and is fetched when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn damage_that_cannot_be_repaired_now_is_reported_and_repaired_later() {
    let mut lab = Lab::new(layer(221, Packing::Gzip, false));
    let disk = lab.disk().await;
    complete(&disk).await;
    let place = lab.layer.place("data/003");
    flip(disk.path(), place.start.get());
    lab.registry
        .remove(super::fixture::REPOSITORY, &lab.layer.layer.digest);
    let report = scrub(&disk).await;
    assert_eq!(report.wrong.len(), 1, "{report:?}");
    assert!(report.wrong[0].contains("disk.ext4"), "{report:?}");
    assert!(!disk.is_complete());
    lab.registry
        .add_blob(super::fixture::REPOSITORY, lab.layer.blob.clone());
    lab.reopen(disk).await;
    let disk = lab.disk().await;
    assert!(!disk.is_complete(), "it is not forgotten");
    assert!(read(&disk, place).await.unwrap() == lab.layer.files["data/003"]);
    assert_heals(&disk, &lab.layer.files, "later").await;
}

/// A rotten span of a lazy disk is absent again, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_span_of_a_lazy_disk_becomes_absent() {
    let lab = Lab::new(layer(222, Packing::Gzip, false));
    let disk = lab.disk().await;
    let place = lab.layer.place("data/003");
    read(&disk, place.clone()).await.unwrap();
    let present = disk.span_counts().0;
    assert!(scrub(&disk).await.is_sound());
    flip(disk.path(), place.start.get());
    let report = scrub(&disk).await;
    assert!(report.repaired[0].contains("when it is read"), "{report:?}");
    assert_eq!(disk.span_counts().0, present - 1);
    assert!(read(&disk, place).await.unwrap() == lab.layer.files["data/003"]);
    assert_heals(&disk, &lab.layer.files, "lazy").await;
}

/// A span that comes while the disk is checked is no damage.
#[tokio::test(flavor = "multi_thread")]
async fn spans_that_arrive_during_a_check_are_not_lost() {
    let lab = Lab::new(layer(223, Packing::Gzip, false));
    let disk = lab.disk().await;
    let big = lab.layer.place("data/big");
    let (reading, end) = (Arc::clone(&disk), big.end.get());
    let reader = tokio::spawn(async move {
        for start in (big.start.get()..end).step_by(4 << 10) {
            let bytes = DiskOffset(start)..DiskOffset(end.min(start + 100));
            read(&reading, bytes).await.unwrap();
        }
    });
    while !reader.is_finished() {
        let report = scrub(&disk).await;
        assert!(report.is_sound(), "{report:?}");
    }
    reader.await.unwrap();
    assert!(scrub(&disk).await.is_sound());
}

/// One that comes between a check's sync and its turn has no record in the file yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_span_that_arrives_after_the_sync_of_a_check_is_not_lost() {
    let lab = Lab::new(layer(224, Packing::Gzip, false));
    let disk = lab.disk().await;
    read(&disk, lab.layer.place("data/000")).await.unwrap();
    let (sender, receiver) = tokio::sync::watch::channel(0);
    // while somebody looks at how far it is, it goes no further than its first span
    let held = receiver.borrow();
    let checked = Arc::clone(&disk);
    let checking = tokio::spawn(async move { checked.scrub(sender).await.unwrap() });
    let records = lab.folder().join("spans");
    until("it has synced what there was", || {
        fs::read(&records).unwrap()[..16] != [0; 16]
    })
    .await;
    let end = lab.layer.place("data/big").end.get();
    read(&disk, range(end - 100, 100)).await.unwrap();
    drop(held);
    let report = checking.await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}

/// A complete disk is complete without the records of its spans, and needs no source.
#[tokio::test(flavor = "multi_thread")]
async fn a_complete_disk_needs_no_records_of_its_spans() {
    let mut lab = Lab::new(layer(225, Packing::Gzip, false));
    let mut disk = lab.disk().await;
    complete(&disk).await;
    lab.registry
        .remove(super::fixture::REPOSITORY, &lab.layer.layer.digest);
    for how in HARMS {
        lab.reopen(disk).await;
        assert!(harm(&lab.folder().join("spans"), how), "{how:?}");
        disk = lab.stored().unwrap();
        assert!(disk.is_complete(), "{how:?}");
        assert_holds(disk.path(), &lab.layer.files);
    }
}

/// What was mended when a disk was opened is told by its check, once.
#[tokio::test(flavor = "multi_thread")]
async fn repairs_at_opening_are_reported_by_the_next_check() {
    let mut lab = Lab::new(layer(226, Packing::Gzip, false));
    let disk = lab.disk().await;
    lab.reopen(disk).await;
    assert!(harm(&lab.folder().join("layout"), Harm::Flipped(8)));
    let disk = lab.stored().unwrap();
    let report = scrub(&disk).await;
    assert!(report.repaired[0].contains("layout"), "{report:?}");
    assert!(scrub(&disk).await.is_sound());
}
