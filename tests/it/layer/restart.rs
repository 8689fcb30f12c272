//! A store that is opened again.

use std::{fs, os::unix::fs::FileExt as _, sync::Arc};

use super::fixture::{Lab, Layer, assert_holds, change_state, complete, range, read};
use crate::support::until;

/// A disk whose folder was moved away, and has another one in its place, serves those who have it, and nobody else; and changes nothing
/// of the other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_in_the_place_of_an_open_disks_directory_is_another_disk() {
    let lab = Lab::new(Layer::new(0));
    let first = lab.disk().await;
    first.sync().unwrap();
    let folder = lab.folder();
    fs::rename(&folder, folder.with_extension("moved")).unwrap();
    fs::create_dir(&folder).unwrap();
    for file in fs::read_dir(folder.with_extension("moved")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    let second = lab.disk().await;
    assert!(!Arc::ptr_eq(&first, &second));
    let state = fs::read(folder.join("state.json")).unwrap();
    let files = lab.layer.files.iter();
    for (path, content) in files.filter(|(_, content)| !content.is_empty()) {
        let bytes = read(&first, lab.layer.place(path)).await.unwrap();
        assert!(bytes == *content, "{path}");
    }
    until("its check cannot be noted", || {
        first.check_error().is_some()
    })
    .await;
    assert!(first.check_error().unwrap().contains("removed while"));
    assert!(fs::read(folder.join("state.json")).unwrap() == state);
    complete(&second).await;
    assert_holds(second.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_disk_needs_no_registry() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    complete(&disk).await;
    lab.reopen(disk).await;
    lab.registry
        .remove(super::fixture::REPOSITORY, &lab.layer.layer.digest);
    lab.registry.reset_counters();
    let disk = lab.stored().unwrap();
    assert!(disk.is_complete());
    let bytes = read(&disk, lab.layer.place("data/big")).await.unwrap();
    assert!(bytes == lab.layer.files["data/big"]);
    assert_holds(disk.path(), &lab.layer.files);
    assert_eq!(lab.registry.counters().total().requests, 0);
    assert!(lab.store.list().unwrap()[0].complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn present_spans_stay_and_others_come_from_the_stored_source() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let big = lab.layer.place("data/big");
    read(&disk, big.clone()).await.unwrap();
    let counts = disk.span_counts();
    lab.reopen(disk).await;
    lab.registry.reset_counters();
    let disk = lab.stored().unwrap();
    assert_eq!(disk.span_counts(), counts);
    read(&disk, big).await.unwrap();
    assert_eq!(lab.fetched().0, 0);
    complete(&disk).await;
    assert!(lab.fetched().0 > 0);
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn data_without_its_record_is_fetched_again() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    complete(&disk).await;
    lab.reopen(disk).await;
    // as a kill between the data and its bit leaves it: the bits are behind, and the state says nothing yet
    let spans = std::fs::OpenOptions::new()
        .write(true)
        .open(lab.folder().join("spans"))
        .unwrap();
    spans.write_all_at(&[0; 8 * 16], 0).unwrap();
    change_state(&lab.folder(), |state| {
        state.replace("\"complete\": true", "\"complete\": false")
    });

    lab.registry.reset_counters();
    let disk = lab.stored().unwrap();
    assert!(!disk.is_complete());
    complete(&disk).await;
    let (requests, bytes) = lab.fetched();
    assert!(
        requests > 0 && bytes < lab.layer.layer.size / 2,
        "only what lost its bit"
    );
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn leftovers_are_removed() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let left = lab.root.path().join("layers/new/1-1");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("disk.ext4"), "half").unwrap();
    lab.reopen(disk).await;
    assert!(!left.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_not_synced_before_a_reboot_is_not_served() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    disk.sync().unwrap();
    lab.reopen(disk).await;
    change_state(&lab.folder(), |state| {
        assert!(!state.contains("boot"), "synced");
        state.replacen('{', "{\n  \"unsynced_since_boot\": \"another\",", 1)
    });
    assert!(lab.stored().is_none());
    assert!(lab.store.list().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_table_gives_the_same_bytes() {
    let one = Lab::new(Layer::new(0));
    let two = Lab::new(Layer::new(0));
    let (one_disk, two_disk) = (one.disk().await, two.disk().await);
    read(&two_disk, range(0, two_disk.size() / 2))
        .await
        .unwrap();
    complete(&one_disk).await;
    complete(&two_disk).await;
    assert!(std::fs::read(one_disk.path()).unwrap() == std::fs::read(two_disk.path()).unwrap());
}

/// After a restart readers wait: the windows of their spans are checked when they are read, and a damaged table comes again.
#[tokio::test(flavor = "multi_thread")]
async fn windows_are_not_read_before_a_disk_is_served_again() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    lab.reopen(disk).await;
    let ztoc = lab.folder().join("ztoc");
    let right = fs::read(&ztoc).unwrap();
    let damaged: Vec<u8> = right.iter().map(|byte| byte ^ 1).collect();
    fs::write(&ztoc, &damaged).unwrap();
    lab.registry
        .add_blob(super::fixture::REPOSITORY, lab.layer.ztoc.clone());
    lab.registry.reset_counters();
    let (layer, table) = (&lab.layer.layer.digest, &lab.layer.table);
    let disk = lab.store.stored_after_restart(layer, table).unwrap();
    let disk = disk.unwrap();
    assert_eq!(lab.registry.counters().total().requests, 0);
    assert!(fs::read(&ztoc).unwrap() == damaged);
    let bytes = read(&disk, lab.layer.place("data/big")).await.unwrap();
    assert!(bytes == lab.layer.files["data/big"]);
    assert!(fs::read(&ztoc).unwrap() == right);
}
