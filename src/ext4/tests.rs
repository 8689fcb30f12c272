//! What a disk cannot hold. What it holds is shown by the integration tests, with e2fsck, the kernel and another reader.

use super::{DataRegion, Error, Layout, RegionError};
use crate::{
    tar::{Entry, EntryKind, Segment},
    tree::Tree,
    units::LayerOffset,
};

fn file(name: &str, data_offset: u64, size: u64) -> Entry {
    Entry {
        data_offset: LayerOffset(data_offset),
        size,
        ..Entry::bare(EntryKind::Regular, name)
    }
}

/// What a layout of these entries has.
#[derive(Debug)]
struct Laid {
    size: u64,
    regions: Vec<DataRegion>,
    metadata: Vec<(u64, Vec<u8>)>,
}

fn layout(entries: &[Entry]) -> Result<Laid, Error> {
    let tree = Tree::build(entries).unwrap();
    let layout = Layout::new(&tree, entries, &[3; 32])?;
    let mut metadata = vec![];
    let taken = layout.write_metadata(|offset, bytes| {
        metadata.push((offset.get(), bytes.to_vec()));
        Ok::<_, ()>(())
    });
    taken.unwrap();
    Ok(Laid {
        size: layout.size,
        regions: layout.regions,
        metadata,
    })
}

#[test]
fn a_file_with_too_many_names_is_refused() {
    let mut entries = vec![file("d/first", 0, 0)];
    for n in 1..65_001 {
        entries.push(Entry {
            linkname: b"d/first".into(),
            ..Entry::bare(EntryKind::Hardlink, &format!("d/{n}"))
        });
    }
    assert!(layout(&entries[..65_000]).is_ok());
    assert_eq!(
        layout(&entries).unwrap_err(),
        Error::TooManyLinks {
            path: "d/1".into(),
            links: 65_001,
            limit: 65_000
        }
    );
}

#[test]
fn long_symlinks_and_large_devices_are_refused() {
    let symlink = |length| Entry {
        linkname: vec![b'x'; length],
        ..Entry::bare(EntryKind::Symlink, "l")
    };
    assert!(layout(&[symlink(4095)]).is_ok());
    assert_eq!(
        layout(&[symlink(4096)]).unwrap_err(),
        Error::SymlinkTooLong {
            path: "l".into(),
            length: 4096,
            limit: 4095
        }
    );
    let device = Entry {
        devmajor: 4096,
        ..Entry::bare(EntryKind::Block, "d/b")
    };
    assert_eq!(
        layout(&[device]).unwrap_err(),
        Error::DeviceNumber {
            path: "d/b".into(),
            major: 4096,
            minor: 0
        }
    );
}

#[test]
fn xattrs_that_do_not_fit_and_bad_acls_are_refused() {
    let with = |name: &str, bytes| Entry {
        pax: vec![(format!("SCHILY.xattr.{name}").into(), vec![1; bytes])],
        ..file("f", 0, 0)
    };
    assert!(layout(&[with("user.a", 4000)]).is_ok());
    assert!(matches!(
        layout(&[with("user.a", 5000)]),
        Err(Error::XattrsTooLarge { path, .. }) if path == "f"
    ));
    assert!(matches!(
        layout(&[with(&format!("user.{}", "a".repeat(251)), 1)]),
        Err(Error::XattrNameTooLong { limit: 255, .. })
    ));
    assert!(matches!(
        layout(&[with("system.posix_acl_access", 5)]),
        Err(Error::Acl { .. })
    ));
}

#[test]
fn sizes_that_a_table_may_state_are_refused_before_memory_is_taken() {
    for size in [4 << 40, 1 << 62, u64::MAX] {
        assert_eq!(
            layout(&[file("f", 512, size)]).unwrap_err(),
            Error::DiskTooLarge { limit: 4 << 40 }
        );
    }
    let beyond = file("f", u64::MAX - 5, 10);
    assert!(matches!(
        layout(&[beyond]),
        Err(Error::DataBeyondLayer { .. })
    ));
}

#[test]
fn data_out_of_order_is_refused() {
    let overlapping = [file("a", 512, 1000), file("b", 1024, 1)];
    assert_eq!(
        layout(&overlapping).unwrap_err(),
        Error::Regions(RegionError::Region { index: 1 })
    );
    let segment = |file_offset, length| Segment {
        file_offset,
        layer_offset: LayerOffset(0),
        length,
    };
    for bad in [
        vec![segment(90, 11)],
        vec![segment(0, 10), segment(9, 1)],
        vec![segment(u64::MAX, 2)],
    ] {
        let sparse = Entry {
            sparse: Some(bad),
            ..file("s", 0, 100)
        };
        assert!(matches!(
            layout(&[sparse]),
            Err(Error::SparseSegment { .. })
        ));
    }
}

#[test]
fn replaced_data_keeps_its_place_and_region() {
    let entries = [file("a", 512, 4097), file("a", 8192, 1), file("b", 9216, 1)];
    let layout = layout(&entries).unwrap();
    let starts: Vec<u64> = layout.regions.iter().map(|r| r.disk.start.get()).collect();
    assert_eq!(starts[1] - starts[0], 8192);
    assert_eq!(starts[2] - starts[1], 4096);
}

#[test]
fn the_first_and_last_mebibytes_that_probes_read_have_no_data() {
    let layout = layout(&[file("a", 512, 1)]).unwrap();
    assert!(layout.regions[0].disk.start.get() >= 4 << 20);
    let (last, bytes) = layout.metadata.last().unwrap();
    assert!(last + bytes.len() as u64 + (2 << 20) <= layout.size);
    let mut end = 0;
    for (start, bytes) in &layout.metadata {
        assert!(*start >= end && start % 4096 == 0);
        end = start + bytes.len() as u64;
    }
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    fn path() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("a"),
            Just("b"),
            Just(".."),
            Just("."),
            Just(""),
            Just(".wh.a"),
            Just(".wh..wh..opq"),
            Just(".wh..wh.x"),
            Just("\u{fe}"),
        ];
        prop::collection::vec(part, 0..5).prop_map(|parts| parts.join("/"))
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        use EntryKind::{Block, Char, Directory, Fifo, Hardlink, Regular, Symlink};
        let kind = prop::sample::select(vec![
            Regular, Directory, Symlink, Hardlink, Char, Block, Fifo,
        ]);
        let number = prop_oneof![0i64..300, any::<i64>()];
        let size = prop_oneof![4 => 0u64..9000, 1 => any::<u64>()];
        let name = prop::sample::select(vec!["user.a", "trusted.b", "system.posix_acl_access"]);
        let xattr = (name, prop::collection::vec(any::<u8>(), 0..50));
        (
            (kind, path(), path(), number.clone(), number),
            (
                size,
                any::<i64>(),
                any::<i64>(),
                prop::collection::vec(xattr, 0..2),
            ),
        )
            .prop_map(|((kind, name, linkname, devmajor, devminor), rest)| {
                let (size, mode, seconds, xattrs) = rest;
                Entry {
                    linkname: linkname.into(),
                    size: if kind == Regular { size } else { 0 },
                    mode,
                    mtime: Some(crate::tar::Timestamp {
                        seconds,
                        nanoseconds: u32::MAX,
                    }),
                    devmajor,
                    devminor,
                    pax: xattrs
                        .into_iter()
                        .map(|(name, value)| (format!("SCHILY.xattr.{name}").into(), value))
                        .collect(),
                    ..Entry::bare(kind, &name)
                }
            })
    }

    proptest! {
        #[test]
        fn any_entries_give_an_error_or_a_sound_layout(
            mut entries in prop::collection::vec(any_entry(), 0..40),
        ) {
            let mut end = 0u64;
            for entry in &mut entries {
                entry.data_offset = LayerOffset(end);
                end = end.saturating_add(entry.size);
            }
            let Ok(tree) = Tree::build(&entries) else {
                return Ok(());
            };
            if let Ok(layout) = Layout::new(&tree, &entries, &[0; 32]) {
                prop_assert_eq!(layout.size % 4096, 0);
                let table = layout.table();
                let decoded = crate::ext4::RegionTable::decode(&table.encode()).unwrap();
                let all = decoded.in_layer(&(LayerOffset(0)..LayerOffset(u64::MAX)));
                prop_assert_eq!(all.collect::<Vec<_>>(), table.into_data());
            }
        }
    }
}
