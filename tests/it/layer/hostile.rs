//! zTOCs that are wrong, and zTOCs that lie.

use std::{ops::Range, os::unix::fs::FileExt as _, sync::Arc};

use bytes::Bytes;
use socinbd::{
    error::{Error, Kind},
    gzip::inflate::SpanDecoder,
    layer::{Disk, TableBytes},
    oci::Digest,
    tar::{Entry, EntryKind, Timestamp},
    units::DiskOffset,
    ztoc::{self, Ztoc},
};

use super::fixture::{Lab, Layer, assert_holds, complete, read};
use crate::support::ztocs;

/// The error that the import of this zTOC gives; nothing stays of it.
pub async fn refused(lab: &Lab, table: Digest, ztoc: Vec<u8>) -> Error {
    let source = lab.source().await;
    let result = lab
        .store
        .indexed(
            &lab.layer.layer,
            &table,
            TableBytes::of(ztoc.into()),
            &source,
        )
        .await;
    let layers = lab.root.path().join("layers");
    assert_eq!(lab.store.list().unwrap(), [], "{:?}", result.err());
    assert_eq!(std::fs::read_dir(layers.join("new")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(layers.join("sha256")).unwrap().count(), 0);
    let error = result.err().unwrap();
    assert!(
        error.report().contains(&lab.layer.layer.digest.to_string()),
        "{}",
        error.report()
    );
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_of_another_digest_or_another_layer_is_refused() {
    let mut lab = Lab::new(Layer::new(0));
    let other = Layer::new(1);
    let error = refused(&lab, lab.layer.table, other.ztoc.to_vec()).await;
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.report().contains("bytes have digest"));

    let error = refused(&lab, other.table, other.ztoc.to_vec()).await;
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("is for a blob of"),
        "{}",
        error.report()
    );

    lab.layer.layer.size += 1;
    let error = refused(&lab, lab.layer.table, lab.layer.ztoc.to_vec()).await;
    assert_eq!(error.kind(), Kind::Corrupt);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_cut_anywhere_is_refused() {
    let lab = Lab::new(Layer::new(0));
    let ztoc = &lab.layer.ztoc;
    for length in [0, 1, 8, 100, ztoc.len() / 2, ztoc.len() - 100] {
        let cut = ztoc[..length].to_vec();
        refused(&lab, Digest::of(&cut), cut).await;
    }
}

/// The number of a checkpoint's field, changed: `at` bytes before its window.
fn with_checkpoint(layer: &Layer, span: usize, at: usize, change: impl Fn(i64) -> i64) -> Vec<u8> {
    let window = layer.spans.spans[span].window.clone().unwrap();
    let field = window.start - at..window.start - at + 8;
    let mut ztoc = layer.ztoc.to_vec();
    let number = i64::from_le_bytes(ztoc[field.clone()].try_into().unwrap());
    ztoc[field].copy_from_slice(&change(number).to_le_bytes());
    ztoc
}

const OUT: usize = 9;
const IN: usize = 17;

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_claim_too_much_are_refused() {
    let lab = Lab::new(Layer::new(0));
    for (at, to) in [
        (OUT, i64::MAX),
        (OUT, -1),
        (OUT, 0),
        (IN, i64::MAX),
        (IN, -1),
        (IN, 0),
    ] {
        let ztoc = with_checkpoint(&lab.layer, 3, at, |_| to);
        refused(&lab, Digest::of(&ztoc), ztoc).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_false_checkpoint_is_found_when_its_span_is_decoded() {
    let mut lab = Lab::new(Layer::new(0));
    // the span before has so many bytes more than it decodes to
    let ztoc = with_checkpoint(&lab.layer, 3, OUT, |out| out + 100);
    assert_ne!(
        Ztoc::parse(&ztoc).unwrap().spans.spans,
        lab.layer.spans.spans
    );
    lab.layer.table = Digest::of(&ztoc);
    lab.layer.ztoc = Bytes::from(ztoc);
    let disk = lab.disk().await;
    let lying = lab.layer.spans.spans[2].uncompressed.start;
    let region = lab
        .layer
        .regions
        .iter()
        .find(|region| region.layer.start > lying)
        .unwrap();
    let error = read(&disk, region.disk.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.report().contains("span 2"), "{}", error.report());
    assert!(error.report().contains(&lab.layer.table.to_string()));
    assert_eq!(
        lab.fetched().0,
        1,
        "the bytes were right: no other source would help"
    );
    assert_eq!(disk.degraded(), Some(error.report()));
}

/// A lab with a zTOC in place of the true one, and its disk.
pub async fn lying(layer: Layer, ztoc: Vec<u8>) -> (Lab, Arc<Disk>) {
    let mut lab = Lab::new(layer);
    lab.layer.table = Digest::of(&ztoc);
    lab.layer.ztoc = ztoc.into();
    let disk = lab.disk().await;
    (lab, disk)
}

/// The part of the large file on the disk that needs this span and no other; the span lies in the file whole.
fn inside(layer: &Layer, span: usize) -> Range<DiskOffset> {
    let place = layer.place("data/big");
    let region = layer.regions.iter().find(|region| region.disk == place);
    let bytes = &layer.spans.spans[span].uncompressed;
    let part = region.unwrap().clip_layer(bytes).unwrap();
    assert_eq!(part.layer, *bytes, "span {span} is not in the large file");
    part.disk
}

/// A read of this range fails, because of this span and for this reason; nothing of it is on the disk.
async fn assert_lie(lab: &Lab, disk: &Arc<Disk>, range: Range<DiskOffset>, span: usize, why: &str) {
    let error = read(disk, range.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let report = error.report();
    for part in [
        format!("span {span} of layer {} ", lab.layer.layer.digest),
        lab.layer.table.to_string(),
        why.to_owned(),
    ] {
        assert!(report.contains(&part), "{part} is missing in: {report}");
    }
    let degraded = disk.degraded().unwrap();
    assert!(degraded.contains("contradicts "), "{degraded}");
    assert!(!disk.is_present(range));
}

/// Whether these bytes of the disk file have never been written.
fn is_blank(disk: &Disk, range: &Range<DiskOffset>) -> bool {
    let mut bytes = vec![1; (range.end.get() - range.start.get()) as usize];
    disk.file()
        .read_exact_at(&mut bytes, range.start.get())
        .unwrap();
    bytes.iter().all(|byte| *byte == 0)
}

/// The true table gives the true files, in the same store.
pub async fn assert_honest(lab: &Lab, honest: &Layer) {
    let source = lab.source().await;
    let disk = lab
        .store
        .indexed(
            &honest.layer,
            &honest.table,
            TableBytes::of(honest.ztoc.clone()),
            &source,
        )
        .await
        .unwrap();
    complete(&disk).await;
    assert_eq!(disk.degraded(), None);
    assert_holds(disk.path(), &honest.files);
}

/// The first span that lies in the large file whole, and has two such before it.
fn middle(layer: &Layer) -> usize {
    let entry = layer
        .entries
        .iter()
        .find(|entry| entry.name == b"data/big")
        .unwrap();
    let first = layer
        .spans
        .spans
        .partition_point(|span| span.uncompressed.start < entry.data_offset);
    first + 2
}

/// The layer's zTOC with one byte of a window changed: the span decodes to other bytes, with the right end.
fn with_window(layer: &Layer, span: usize) -> Vec<u8> {
    let record = &layer.spans.spans[span];
    let window = record.window.clone().unwrap();
    let compressed = record.compressed.start.get() as usize..record.compressed.end.get() as usize;
    let mut decoder = SpanDecoder::default();
    let mut decode = |ztoc: &[u8]| {
        let window = Some(&ztoc[window.clone()]);
        decoder
            .decode(record, &layer.blob[compressed.clone()], window)
            .unwrap()
            .to_vec()
    };
    let truth = decode(&layer.ztoc);
    let mut ztoc = layer.ztoc.to_vec();
    for at in window.clone().rev() {
        ztoc[at] ^= 1;
        let bytes = decode(&ztoc);
        let end = bytes.len() - ztoc::WINDOW_SIZE;
        if bytes != truth && bytes[end..] == truth[end..] {
            return ztoc;
        }
        ztoc[at] ^= 1;
    }
    panic!("no byte of the window is used");
}

const NOT_THE_END: &str = "does not end with the window that the table has for span";
const NOT_THE_START: &str = "the previous span does not end with the window";

#[tokio::test(flavor = "multi_thread")]
async fn a_false_window_is_found_by_the_previous_span() {
    let honest = Layer::new(0);
    let span = middle(&honest);
    let ztoc = with_window(&honest, span);
    let (lab, disk) = lying(Layer::new(0), ztoc).await;
    let (before, range) = (inside(&honest, span - 1), inside(&honest, span));
    assert_lie(&lab, &disk, before.clone(), span - 1, NOT_THE_END).await;
    assert_lie(&lab, &disk, range.clone(), span, NOT_THE_START).await;
    // its neighbours are what the table says
    for right in [span - 2, span + 1] {
        read(&disk, inside(&honest, right)).await.unwrap();
    }
    assert!(is_blank(&disk, &before) && is_blank(&disk, &range));
    assert_honest(&lab, &honest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_is_revoked_when_the_previous_one_shows_that_its_window_is_false() {
    let honest = Layer::new(0);
    let span = middle(&honest);
    let ztoc = with_window(&honest, span);
    let (mut lab, disk) = lying(Layer::new(0), ztoc).await;
    let (before, range) = (inside(&honest, span - 1), inside(&honest, span));
    // alone it shows nothing
    read(&disk, range.clone()).await.unwrap();
    disk.sync().unwrap();
    assert_eq!(disk.degraded(), None);
    let record = span * 16..span * 16 + 16;
    let spans = lab.folder().join("spans");
    let noted = std::fs::read(&spans).unwrap()[record.clone()].to_vec();
    assert_ne!(noted, [0; 16]);
    assert_lie(&lab, &disk, before, span - 1, NOT_THE_END).await;
    assert_lie(&lab, &disk, range.clone(), span, NOT_THE_START).await;
    disk.sync().unwrap();
    // nor in the file
    let mut records = std::fs::read(&spans).unwrap();
    assert_eq!(records[record.clone()], [0; 16]);
    // nor after a restart, also when that came before the record was cleared
    lab.reopen(disk).await;
    records[record].copy_from_slice(&noted);
    std::fs::write(&spans, records).unwrap();
    let disk = lab.stored().unwrap();
    assert!(disk.degraded().unwrap().contains(NOT_THE_START));
    assert_lie(&lab, &disk, range, span, NOT_THE_START).await;
    assert_honest(&lab, &honest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_longer_than_the_table_states_is_refused() {
    let honest = Layer::new(0);
    let span = middle(&honest);
    let ztoc = with_checkpoint(&honest, span, OUT, |out| out - 100);
    let (lab, disk) = lying(Layer::new(0), ztoc).await;
    let mut range = inside(&honest, span - 1);
    range.end.0 -= 100;
    assert_lie(&lab, &disk, range.clone(), span - 1, "decodes to more than").await;
    assert!(is_blank(&disk, &range));
    assert_honest(&lab, &honest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shifted_offsets_are_found_by_the_headers() {
    let honest = Layer::new(0);
    let mut ztoc = honest.ztoc.to_vec();
    // each span from the second on decodes well by itself, and says of its data that they stand one block further on
    for span in &honest.spans.spans[1..] {
        let out = span.window.as_ref().unwrap().start - OUT;
        let moved = span.uncompressed.start.get() + 512;
        ztoc[out..out + 8].copy_from_slice(&moved.to_le_bytes());
    }
    let (lab, disk) = lying(Layer::new(0), ztoc).await;
    let entry = honest.entries.iter().find(|entry| {
        let second = &honest.spans.spans[1].uncompressed;
        entry.kind == EntryKind::Regular
            && entry.size > 1000
            && entry.data_offset.get() > second.start.get() + 20_000
    });
    let name = std::str::from_utf8(&entry.unwrap().name).unwrap();
    let range = lab.layer.place(name);
    assert_lie(&lab, &disk, range.clone(), 1, "no tar header stands before").await;
    assert!(is_blank(&disk, &range));
    assert_honest(&lab, &honest).await;
}

/// The layer's zTOC with other entries.
pub fn with_entries(layer: &Layer, change: impl FnOnce(&mut Vec<Entry>)) -> Vec<u8> {
    ztocs::with_entries(&layer.ztoc, change)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_header_differs_from_the_table_is_refused() {
    /// What differs, the entry, and how.
    type Lie = (&'static str, &'static str, fn(&mut Entry));
    const LIES: [Lie; 9] = [
        ("name", "data/020", |entry| entry.name[5] = b'x'),
        ("type", "data/020", |entry| entry.kind = EntryKind::Fifo),
        ("size", "data/020", |entry| entry.size -= 1),
        ("mode", "data/020", |entry| entry.mode |= 0o4000),
        ("owner", "data/020", |entry| entry.uid = 1000),
        ("group", "data/020", |entry| entry.gid = 1000),
        ("modification time", "data/020", |entry| {
            entry.mtime = Some(Timestamp {
                seconds: 1,
                nanoseconds: 0,
            });
        }),
        ("set of xattrs", "data/020", |entry| {
            entry.pax = vec![(b"SCHILY.xattr.user.x".to_vec(), b"1".to_vec())];
        }),
        ("link", "data/symlink", |entry| {
            entry.linkname = b"/etc/shadow".to_vec();
        }),
    ];
    for plain in [false, true] {
        let make = || match plain {
            true => Layer::plain(),
            false => Layer::new(0),
        };
        let honest = make();
        assert!(honest.files["data/020"].len() > 1);
        for (field, name, change) in LIES {
            let ztoc = with_entries(&honest, |entries| {
                let entry = entries
                    .iter_mut()
                    .find(|entry| entry.name == name.as_bytes());
                change(entry.unwrap());
            });
            let header = honest
                .entries
                .iter()
                .find(|entry| entry.name == name.as_bytes())
                .unwrap()
                .data_offset
                .get()
                - 512;
            let span = honest
                .spans
                .spans
                .iter()
                .position(|span| header < span.uncompressed.end.get())
                .unwrap();
            let spans = &honest.spans.spans[span].uncompressed;
            assert!(spans.start.get() <= header && header + 512 <= spans.end.get());
            let (lab, disk) = lying(make(), ztoc).await;
            // the disk of the lie is laid out otherwise: whatever needs the span
            let whole = DiskOffset(0)..DiskOffset(disk.size());
            let why = format!("has another {field} than the zTOC");
            assert_lie(&lab, &disk, whole, span, &why).await;
            if field == "mode" {
                assert_honest(&lab, &honest).await;
            }
        }
    }
}
