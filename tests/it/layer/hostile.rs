//! zTOCs that are wrong, and zTOCs that lie.

use bytes::Bytes;
use socinbd::{
    error::{Error, Kind},
    oci::Digest,
    ztoc::Ztoc,
};

use super::fixture::{Lab, Layer, read};

/// The error that the import of this zTOC gives; nothing stays of it.
async fn refused(lab: &Lab, table: Digest, ztoc: Vec<u8>) -> Error {
    let source = lab.source().await;
    let result = lab
        .store
        .indexed(&lab.layer.layer, &table, ztoc.into(), &source)
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
    let mut lab = Lab::new(Layer::new(60));
    let other = Layer::new(61);
    let error = refused(&lab, lab.layer.table, other.ztoc.to_vec()).await;
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.report().contains("bytes have digest"));

    let error = refused(&lab, other.table, other.ztoc.to_vec()).await;
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.report().contains("is about a blob of"),
        "{}",
        error.report()
    );

    lab.layer.layer.size += 1;
    let error = refused(&lab, lab.layer.table, lab.layer.ztoc.to_vec()).await;
    assert_eq!(error.kind(), Kind::Corrupt);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_cut_anywhere_is_refused() {
    let lab = Lab::new(Layer::new(62));
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
    let lab = Lab::new(Layer::new(63));
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
async fn a_checkpoint_that_lies_is_found_when_its_span_is_decoded() {
    let mut lab = Lab::new(Layer::new(64));
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
