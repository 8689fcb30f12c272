//! The check of a whole layer: what it takes for complete, and what it finds.

use std::sync::Arc;

use socinbd::{
    error::Kind,
    layer::Disk,
    oci::{Digest, Packing},
    tar::{Entry, EntryKind},
    units::DiskOffset,
};

use super::{
    fixture::{
        Files, Lab, Layer, assert_holds, change_state, complete, files, gzip, open_when_free,
        range, read, tar,
    },
    hostile::{assert_honest, lying, with_entries},
};
use crate::support::until;

fn rest(disk: &Disk) -> std::path::PathBuf {
    disk.path().with_file_name("rest")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_complete_once_its_layer_has_been_checked() {
    for layer in [Layer::new(0), Layer::plain()] {
        let lab = Lab::new(layer);
        let disk = lab.disk().await;
        read(&disk, lab.layer.place("data/big")).await.unwrap();
        assert!(!disk.is_full() && !disk.is_verified() && rest(&disk).exists());
        complete(&disk).await;
        assert!(disk.is_verified());
        until("what is in no file is removed", || !rest(&disk).exists()).await;
        let listed = lab.store.list().unwrap();
        assert!(listed[0].complete && listed[0].verified);
        let shared = lab.store.verified(&lab.layer.layer).unwrap().unwrap();
        assert!(Arc::ptr_eq(&shared, &disk));
        // not for an image that says that the blob unpacks to something else
        let mut other = lab.layer.layer.clone();
        other.diff_id = Digest::of(b"another");
        assert!(lab.store.verified(&other).unwrap().is_none());
        assert_holds(disk.path(), &lab.layer.files);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_fetched_before_a_restart_count_for_the_check() {
    let mut lab = Lab::new(Layer::new(0));
    for part in ["data/005", "data/100-block", "data/big"] {
        let disk = lab.disk().await;
        read(&disk, lab.layer.place(part)).await.unwrap();
        disk.sync().unwrap();
        drop((disk, lab.store));
        lab.store = open_when_free(lab.root.path()).await;
    }
    let disk = lab.disk().await;
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_checked_when_it_is_opened_again() {
    let mut lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    complete(&disk).await;
    let folder = disk.path().parent().unwrap().to_owned();
    drop((disk, lab.store));
    // as if the daemon had died before the check
    change_state(&folder, |state| {
        state
            .replace("\"complete\": true", "\"complete\": false")
            .replace("\"verified\": true", "\"verified\": false")
    });
    std::fs::write(folder.join("rest"), kept(&lab.layer)).unwrap();
    lab.store = open_when_free(lab.root.path()).await;
    let disk = lab.disk().await;
    assert!(disk.is_full());
    complete(&disk).await;
}

/// What of a layer is in no file.
fn kept(layer: &Layer) -> Vec<u8> {
    let bytes = tar(&layer.files);
    let used: Vec<_> = layer
        .entries
        .iter()
        .enumerate()
        .filter(|(number, entry)| {
            let later = &layer.entries[number + 1..];
            entry.kind == EntryKind::Regular && !later.iter().any(|it| it.name == entry.name)
        })
        .map(|(_, entry)| entry.data_offset.get()..entry.data_offset.get() + entry.size)
        .collect();
    let mut kept = Vec::new();
    let mut position = 0;
    for range in used {
        kept.extend_from_slice(&bytes[position..range.start as usize]);
        position = range.end as usize;
    }
    kept.extend_from_slice(&bytes[position..]);
    kept
}

/// Spans of nothing but headers are asked for by nobody but the check.
#[tokio::test(flavor = "multi_thread")]
async fn spans_without_a_file_are_fetched_for_the_check() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    let text = |length: usize| {
        (0..length)
            .map(|at| (at * at / 7) as u8)
            .collect::<Vec<_>>()
    };
    let files = Files::from([
        ("a".to_owned(), text(100_000)),
        ("z".to_owned(), text(90_000)),
    ]);
    header.set_size(100_000);
    builder
        .append_data(&mut header, "a", &files["a"][..])
        .unwrap();
    for number in 0..2000 {
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        builder
            .append_link(&mut link, format!("link/{number}"), "../a")
            .unwrap();
    }
    header.set_size(90_000);
    builder
        .append_data(&mut header, "z", &files["z"][..])
        .unwrap();
    let bytes = builder.into_inner().unwrap();
    let lab = Lab::new(Layer::of(files, bytes, Packing::Plain, 100_000));
    let disk = lab.disk().await;
    let data = lab.layer.spans_of(range(0, disk.size()));
    assert!(data.len() + 5 < lab.layer.spans.spans.len());
    disk.make_present(range(0, disk.size())).await.unwrap();
    complete(&disk).await;
    assert_eq!(lab.fetched().1, lab.layer.layer.size);
    assert_holds(disk.path(), &lab.layer.files);
}

/// A layer with so many bytes behind the tar's end, of which one is not zero.
fn padded(packing: Packing, padding: usize) -> Layer {
    let mut bytes = tar(&files(0));
    bytes.resize(bytes.len() + padding, 0);
    *bytes.last_mut().unwrap() = 1;
    let blob = match packing {
        Packing::Gzip => gzip(&bytes),
        _ => bytes,
    };
    Layer::of(files(0), blob, packing, 100_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn padding_after_the_tar_is_part_of_the_layer() {
    for packing in [Packing::Gzip, Packing::Plain] {
        for padding in [9 << 10, 300 << 10] {
            let lab = Lab::new(padded(packing, padding));
            let disk = lab.disk().await;
            complete(&disk).await;
        }
    }
}

/// More than is kept in `rest`; and of what is kept instead nothing stays.
#[tokio::test(flavor = "multi_thread")]
async fn padding_of_any_length_is_part_of_the_layer() {
    for (packing, padding) in [(Packing::Gzip, 20 << 20), (Packing::Plain, 3 << 20)] {
        let mut lab = Lab::new(padded(packing, padding));
        let disk = lab.disk().await;
        let last = disk.path().with_file_name("last");
        // with a restart before the check, or after it
        disk.make_present(range(0, disk.size())).await.unwrap();
        lab.reopen(disk).await;
        let disk = lab.disk().await;
        complete(&disk).await;
        until("nothing more is kept", || !last.exists()).await;
        assert_holds(disk.path(), &lab.layer.files);
    }
}

/// What the image says of padding is held against it, however much that is.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_in_long_padding_are_found() {
    let mut lab = Lab::new(padded(Packing::Gzip, 20 << 20));
    lab.layer.layer.diff_id = padded(Packing::Gzip, (20 << 20) + 1).layer.diff_id;
    let disk = lab.disk().await;
    found_by_the_check(&lab, &disk, &lab.layer.layer.diff_id.to_string()).await;
}

/// Everything is read without an error, and only then the check finds the lie.
async fn found_by_the_check(lab: &Lab, disk: &Arc<Disk>, why: &str) {
    disk.make_present(range(0, disk.size())).await.unwrap();
    until("the check finds it", || disk.degraded().is_some()).await;
    let degraded = disk.degraded().unwrap();
    assert!(degraded.contains(why), "{degraded}");
    assert!(
        degraded.contains(&lab.layer.table.to_string()),
        "{degraded}"
    );
    until("it has been taken back", || !disk.is_full()).await;
    assert!(!disk.is_verified() && !disk.is_complete());
    assert!(lab.store.verified(&lab.layer.layer).unwrap().is_none());
    let error = disk.make_present(range(0, disk.size())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.report().contains(why), "{}", error.report());
    // nobody else gets it
    let again = lab.store.stored_for(&lab.layer.layer, &lab.layer.table);
    let error = again.err().unwrap();
    assert_eq!(error.kind(), Kind::Corrupt);
    let report = error.report();
    assert!(report.contains("was shown to be false"), "{report}");
}

/// An entry whose header a span's end cuts.
fn cut(layer: &Layer) -> &Entry {
    let is_cut = |entry: &&Entry| {
        let data = entry.data_offset.get();
        layer.spans.spans.iter().any(|span| {
            let end = span.uncompressed.end.get();
            data - 512 < end && end < data
        })
    };
    let mut regular = layer
        .entries
        .iter()
        .filter(|it| it.kind == EntryKind::Regular);
    regular
        .find(is_cut)
        .expect("no header is cut by a span's end")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_across_two_spans_is_compared_with_the_table_by_the_check() {
    let honest = Layer::plain();
    let name = cut(&honest).name.clone();
    let ztoc = with_entries(&honest, |entries| {
        let entry = entries.iter_mut().find(|entry| entry.name == name);
        entry.unwrap().mode = 0o4755;
    });
    let (lab, disk) = lying(Layer::plain(), ztoc).await;
    found_by_the_check(&lab, &disk, "has another mode than the zTOC").await;
    let reasons = disk.reasons();
    assert_eq!(reasons.len(), 2, "both of its spans: {reasons:?}");
    assert!(reasons.iter().all(|reason| reason.span.is_some()));
    // spans that have nothing to do with it
    let file = lab.layer.place("data/big");
    let inside = DiskOffset(file.start.get() + 1_000_000);
    read(&disk, inside..DiskOffset(inside.get() + 4096))
        .await
        .unwrap();
    assert_honest(&lab, &honest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_the_table_leaves_out_is_found() {
    let honest = Layer::new(0);
    // the last one: nothing behind it shows that it is missing
    let ztoc = with_entries(&honest, |entries| drop(entries.pop()));
    let (lab, disk) = lying(Layer::new(0), ztoc).await;
    found_by_the_check(&lab, &disk, "the tar goes on at").await;
    assert_honest(&lab, &honest).await;
    // one in the middle: when the header behind it passes
    let ztoc = with_entries(&honest, |entries| {
        let place = entries.iter().position(|it| it.name == b"data/100-empty");
        entries.remove(place.unwrap());
    });
    let (_lab, disk) = lying(Layer::new(0), ztoc).await;
    let error = disk.make_present(range(0, disk.size())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("leaves out an entry"),
        "{}",
        error.report()
    );
}

/// An image may lie about what its layer unpacks to. The table is innocent, and so is an honest image with both.
#[tokio::test(flavor = "multi_thread")]
async fn a_false_diff_id_concerns_its_image_only() {
    let mut lab = Lab::new(Layer::new(0));
    let honest = lab.layer.layer.clone();
    lab.layer.layer.diff_id = Digest::of(b"another");
    let disk = lab.disk().await;
    found_by_the_check(&lab, &disk, &honest.diff_id.to_string()).await;
    assert_eq!(disk.reasons()[0].span, None);
    until("all has been taken back", || disk.span_counts().0 == 0).await;
    assert!(read(&disk, lab.layer.place("data/big")).await.is_err());
    // while the other one is in use, nothing is shared with it
    let table = lab.layer.table;
    let error = lab.store.stored_for(&honest, &table).err().unwrap();
    assert!(
        error.report().contains("an attached image states"),
        "{}",
        error.report()
    );
    // after a restart it is still not served
    drop((disk, lab.store));
    lab.store = open_when_free(lab.root.path()).await;
    let disk = lab.store.stored(&honest.digest, &table).unwrap().unwrap();
    assert!(read(&disk, lab.layer.place("data/big")).await.is_err());
    drop(disk);
    let is_free = || lab.store.stored_for(&honest, &table).is_ok();
    until("the last fetch lets go of it", is_free).await;
    lab.layer.layer = honest;
    let disk = lab.disk().await;
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);
}
