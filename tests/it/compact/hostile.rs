//! Compact indexes that are damaged, and such that lie.

use socinbd::{
    compact::{
        NewSpan, NewTable,
        window::{self, Window},
        write,
    },
    error::Kind,
    gzip::{inflate::SpanDecoder, references::Used},
    layer::TableBytes,
    oci::Digest,
};

use super::{CompactLab, compact_of};
use crate::layer::fixture::{Layer, read};

/// A compact index put together anew, with another window for one span, and the digest of what comes out with it.
fn lying(honest: &CompactLab, layer: Layer, span: usize, stored: &[u8]) -> CompactLab {
    let table = &honest.table;
    let mut windows = Vec::new();
    let spans: Vec<NewSpan> = table
        .spans
        .spans
        .iter()
        .enumerate()
        .map(|(number, record)| {
            let honest_window = record.window.clone().map_or(&[][..], |at| &honest.blob[at]);
            let mut new = NewSpan {
                compressed_start: record.compressed.start,
                bits: record.bits,
                length: record.uncompressed.end.get() - record.uncompressed.start.get(),
                digest: record.digest,
                window_size: honest_window.len() as u32,
            };
            if number == span {
                let window = Window::parse(stored).unwrap();
                let range =
                    record.compressed.start.get() as usize..record.compressed.end.get() as usize;
                let mut decoder = SpanDecoder::default();
                let decoded = decoder.decode(record, &layer.blob[range], Some(window.bytes()));
                new.digest = Digest::of(decoded.unwrap());
                assert_ne!(new.digest, record.digest, "the lie makes a difference");
                new.window_size = stored.len() as u32;
                windows.extend(stored);
            } else {
                windows.extend(honest_window);
            }
            new
        })
        .collect();
    let table = write(&NewTable {
        layer: layer.layer.digest,
        layer_size: layer.layer.size,
        compression: table.spans.compression,
        span_size: table.spans.span_size,
        spans: &spans,
        entries: &table.entries,
    })
    .unwrap();
    let size = table.len();
    CompactLab::of(layer, [table, windows].concat(), size)
}

/// A span of the big file, and its honest window.
fn honest() -> (CompactLab, usize, Window) {
    let lab = CompactLab::new(Layer::new(0));
    let span = lab.span_in_big();
    let at = lab.table.spans.spans[span].window.clone().unwrap();
    let window = Window::parse(&lab.blob[at]).unwrap();
    (lab, span, window)
}

/// The honest window with its last used byte changed.
fn changed(window: &Window) -> Vec<u8> {
    let mut bytes = window.bytes().to_vec();
    let last = window.used().runs().last().unwrap().end - 1;
    bytes[last] ^= 0x20;
    window::encode(&bytes, window.used()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_was_changed_on_its_way_makes_no_data() {
    let layer = Layer::new(0);
    let blob = compact_of(&layer, 64 << 10);
    let lab = CompactLab::of(layer, blob.bytes.clone(), blob.table_size);
    let span = lab.span_in_big();
    let at = lab.table.spans.spans[span].window.clone().unwrap();
    let window = Window::parse(&lab.blob[at.clone()]).unwrap();
    // of the same length, so that it is where the table says
    let mut other = changed(&window);
    let mut wrong = blob.bytes;
    other.resize(at.len(), 0);
    wrong[at].copy_from_slice(&other);
    lab.lab
        .registry
        .add_blob_as(crate::layer::fixture::REPOSITORY, lab.index.blob, wrong);
    let disk = lab.disk().await;
    let (place, _) = lab.place_in(span);
    let error = read(&disk, place.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.report());
    assert!(!disk.is_present(place));
    assert!(disk.degraded().is_some());
    // where it is not needed it does no harm
    let (place, content) = lab.place_in(span - 1);
    assert!(read(&disk, place).await.unwrap() == content);
    let (place, content) = lab.place_in(span);
    assert!(read(&disk, place).await.unwrap() == content);
    assert_eq!(disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_lies_is_found_when_the_span_before_it_comes() {
    let (honest, span, window) = honest();
    let lab = lying(&honest, Layer::new(0), span, &changed(&window));
    let disk = lab.disk().await;
    let (place, _) = lab.place_in(span);
    read(&disk, place.clone()).await.unwrap();
    let (before, _) = lab.place_in(span - 1);
    let error = read(&disk, before).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("does not end with the window"),
        "{}",
        error.report()
    );
    // neither of the two is believed now
    assert!(!disk.is_present(place.clone()));
    let error = read(&disk, place).await.unwrap_err();
    assert!(
        error.report().contains("the previous span"),
        "{}",
        error.report()
    );
    assert!(disk.degraded().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_lies_is_not_even_used_behind_the_span_before_it() {
    let (honest, span, window) = honest();
    let lab = lying(&honest, Layer::new(0), span, &changed(&window));
    let disk = lab.disk().await;
    let (before, content) = lab.place_in(span - 1);
    assert!(read(&disk, before).await.unwrap() == content);
    let (place, _) = lab.place_in(span);
    let error = read(&disk, place.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(!disk.is_present(place));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_without_bytes_that_its_span_uses_is_refused_at_once() {
    let (honest, span, window) = honest();
    // the last used run is left out: its bytes come out as zeros, and the digest says so
    let mut used = Used::default();
    let runs: Vec<_> = window.used().runs().collect();
    for run in &runs[..runs.len() - 1] {
        used.add(run.clone());
    }
    let stored = window::encode(window.bytes(), &used).unwrap();
    let lab = lying(&honest, Layer::new(0), span, &stored);
    let disk = lab.disk().await;
    let (place, _) = lab.place_in(span);
    let error = read(&disk, place.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("does not have"),
        "{}",
        error.report()
    );
    assert!(!disk.is_present(place));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_another_layer_or_another_blob_is_refused() {
    let lab = CompactLab::new(Layer::new(0));
    let other = CompactLab::new(Layer::new(1));
    let source = lab.lab.source().await;
    let table = |lab: &CompactLab| lab.blob.slice(..lab.index.table_size as usize);
    let mut index = other.index;
    let import = async |index, table| {
        let layer = &lab.lab.layer.layer;
        let result = lab
            .lab
            .store
            .compact(layer, &index, TableBytes::of(table), &source, &source);
        result.await.err().unwrap()
    };
    let error = import(index, table(&other)).await;
    assert!(
        error.report().contains("about the layer"),
        "{}",
        error.report()
    );
    // the table's digest is another
    let error = import(index, table(&lab)).await;
    assert!(
        error.report().contains("bytes have digest"),
        "{}",
        error.report()
    );
    // a blob with fewer windows
    index = lab.index;
    index.size -= 1;
    let error = import(index, table(&lab)).await;
    assert!(error.report().contains("blob of"), "{}", error.report());
    assert_eq!(lab.lab.store.list().unwrap(), []);
}
