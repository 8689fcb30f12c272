//! zTOCs that lie in their structure: refused with a name before anything is mounted, and nothing stays.

use std::ops::Range;

use socinbd::{
    error::Kind,
    oci::Digest,
    tar::{Entry, EntryKind},
    units::LayerOffset,
    ztoc::Ztoc,
};

use super::{
    fixture::{Lab, Layer},
    hostile::{lying, refused, with_entries},
};

/// A link of this kind behind all else.
fn link(entries: &mut Vec<Entry>, kind: EntryKind, name: &str, target: &str) {
    let last = entries.last().unwrap();
    let entry = Entry {
        name: name.as_bytes().to_vec(),
        kind,
        linkname: target.as_bytes().to_vec(),
        data_offset: LayerOffset(last.data_offset.get() + 512),
        size: 0,
        ..last.clone()
    };
    entries.push(entry);
}

/// Makes room for links behind the last entry: the data of the large file is theirs.
fn with_links(layer: &Layer, change: impl FnOnce(&mut Vec<Entry>)) -> Vec<u8> {
    with_entries(layer, |entries| {
        let big = entries
            .iter()
            .position(|it| it.name == b"data/big")
            .unwrap();
        entries.truncate(big + 1);
        entries[big].size = 1000;
        let start = entries[big].data_offset.get() + 1536;
        let mut links = vec![Entry {
            data_offset: LayerOffset(start),
            ..entries[big].clone()
        }];
        links[0].size = 0;
        links[0].name = b"data/first".to_vec();
        change(&mut links);
        entries.append(&mut links);
    })
}

fn at<'e>(entries: &'e mut [Entry], name: &str) -> &'e mut Entry {
    let found = entries.iter_mut().rfind(|it| it.name == name.as_bytes());
    found.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_structural_error_is_named() {
    type Change = fn(&mut Vec<Entry>);
    let lies: [(Kind, &str, Change); 12] = [
        (Kind::Corrupt, "its header cannot start before", |entries| {
            let big = at(entries, "data/big").data_offset.get();
            at(entries, "data/symlink").data_offset = LayerOffset(big + 1024);
        }),
        (Kind::Corrupt, "which is no block of a tar", |entries| {
            at(entries, "data/020").data_offset.0 += 1;
        }),
        (Kind::Corrupt, "bytes at", |entries| {
            at(entries, "data/hardlink").data_offset = LayerOffset(1 << 62);
        }),
        (Kind::Corrupt, "but the spans end at", |entries| {
            let is_regular = |entry: &Entry| entry.kind == EntryKind::Regular;
            let last = entries.iter().rposition(is_regular).unwrap();
            entries.truncate(last + 1);
            entries[last].size = 1 << 50;
        }),
        (Kind::Corrupt, "NUL", |entries| {
            at(entries, "data/020").name = b"data/a\0b".to_vec();
        }),
        (Kind::Corrupt, "NUL", |entries| {
            at(entries, "data/symlink").linkname = b"a\0b".to_vec();
        }),
        (Kind::Unsupported, "a name of 256 bytes", |entries| {
            at(entries, "data/020").name = vec![b'x'; 256];
        }),
        (Kind::Unsupported, "a path of", |entries| {
            at(entries, "data/020").name = b"deep/".repeat(2000);
        }),
        (Kind::Unsupported, "hard link to", |entries| {
            at(entries, "data/hardlink").linkname = b"data/hardlink".to_vec();
        }),
        (Kind::Unsupported, "which is a directory", |entries| {
            at(entries, "data/hardlink").linkname = b"data".to_vec();
        }),
        (Kind::Unsupported, "symlinks on the way", |entries| {
            at(entries, "data/symlink").linkname = b"symlink".to_vec();
            at(entries, "data/hardlink").kind = EntryKind::Fifo;
            at(entries, "data/hardlink").name = b"data/symlink/x".to_vec();
        }),
        (Kind::Unsupported, "is not a directory", |entries| {
            at(entries, "data/hardlink").kind = EntryKind::Fifo;
            at(entries, "data/hardlink").name = b"data/020/x".to_vec();
        }),
    ];
    let lab = Lab::new(Layer::new(0));
    for (kind, why, change) in lies {
        let ztoc = with_entries(&lab.layer, change);
        let error = refused(&lab, Digest::of(&ztoc), ztoc).await;
        let report = error.report();
        assert!(report.contains(why), "{why}: {report}");
        assert_eq!(error.kind(), kind, "{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hard_links_in_a_circle_are_refused() {
    let lab = Lab::new(Layer::new(0));
    for names in [&["a", "b"][..], &["a", "b", "c", "d"]] {
        let ztoc = with_links(&lab.layer, |links| {
            for (number, name) in names.iter().enumerate() {
                let next = names[(number + 1) % names.len()];
                link(links, EntryKind::Hardlink, name, next);
            }
        });
        let error = refused(&lab, Digest::of(&ztoc), ztoc).await;
        let report = error.report();
        assert!(report.contains("hard link to"), "{report}");
    }
}

/// Every place in the zTOC that has this number, in four or eight bytes.
fn places(ztoc: &[u8], number: usize) -> Vec<Range<usize>> {
    let bytes = (number as u32).to_le_bytes();
    (0..ztoc.len() - 4)
        .filter(|at| ztoc[*at..*at + 4] == bytes)
        .map(|at| at..at + 4)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn false_counts_are_refused() {
    let lab = Lab::new(Layer::new(0));
    let honest = &lab.layer.ztoc;
    let mut refusals = 0;
    for count in [lab.layer.entries.len(), lab.layer.spans.spans.len()] {
        let found = places(honest, count);
        assert!(!found.is_empty());
        for place in found {
            for lie in [0x3fff_ffff_u32, 0x7fff_ffff, u32::MAX, count as u32 + 1] {
                let mut ztoc = honest.to_vec();
                ztoc[place.clone()].copy_from_slice(&lie.to_le_bytes());
                // a byte of a window or a digest may look like the count
                if Ztoc::parse(&ztoc).is_err() {
                    refused(&lab, Digest::of(&ztoc), ztoc).await;
                    refusals += 1;
                }
            }
        }
    }
    // of the entries, of the spans' digests and of the checkpoints
    assert!(refusals >= 12, "{refusals}");
}

/// As containerd does it: `..` at the root is the root.
#[tokio::test(flavor = "multi_thread")]
async fn parent_links_end_at_the_root() {
    let ztoc = with_entries(&Layer::new(0), |entries| {
        at(entries, "data/020").name = b"../../../over/the/../top".to_vec();
        at(entries, "data/hardlink").linkname = b"/../data/../../data/021".to_vec();
    });
    let (lab, disk) = lying(Layer::new(0), ztoc).await;
    let disk = std::fs::read(disk.path()).unwrap();
    let ext4 = ext4_view::Ext4::load(Box::new(disk)).unwrap();
    assert!(ext4.exists("/over/top").unwrap());
    let length = ext4.metadata("/data/hardlink").unwrap().len();
    assert_eq!(length, lab.layer.files["data/021"].len() as u64);
    assert!(!ext4.exists("/the").unwrap());
}
