//! Disks mounted by the kernel, and compared with an unpack by plain system calls.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt},
    },
};

use super::{
    fixture::{Disk, Layer, SEED},
    odd,
    reference::Reference,
};
use crate::support::compare::{Options, assert_same};
use socinbd::{ext4::Layout, tree::Tree};

#[test]
fn an_empty_layer_is_an_empty_file_system() {
    let disk = Layer::default().disk();
    disk.check();
    let mount = disk.mount();
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
}

#[test]
fn a_layer_of_one_file_has_that_file() {
    let mut layer = Layer::default();
    layer.file("hello", "world\n");
    let disk = layer.disk();
    disk.check();
    let mount = disk.mount();
    let text = fs::read_to_string(mount.path().join("hello")).unwrap();
    assert_eq!(text, "world\n");
}

#[test]
fn every_odd_kind_of_file_is_as_an_unpack_makes_it() {
    let layer = odd::layer();
    let disk = layer.disk();
    disk.check();
    let mount = disk.mount();
    let reference = Reference::unpack(&layer);
    assert_same(reference.path(), mount.path(), &Options::default());
}

#[test]
fn a_hundred_thousand_names_in_one_directory_are_found() {
    let mut layer = Layer::default();
    let names: Vec<Vec<u8>> = (0..100_000u32)
        .map(|n| [format!("name {n} ").as_bytes(), &[0x80 | n as u8, 0xff]].concat())
        .collect();
    for name in &names {
        layer.file([b"all/", &name[..]].concat(), "");
    }
    let disk = layer.disk();
    disk.check();
    let tree = disk.debugfs("htree_dump /all");
    assert!(tree.contains("Indirect levels: 1"), "{}", &tree[..300]);
    let mount = disk.mount();
    let all = mount.path().join("all");
    assert_eq!(fs::read_dir(&all).unwrap().count(), names.len());
    for name in &names {
        let found = fs::symlink_metadata(all.join(OsStr::from_bytes(name)));
        assert!(found.is_ok(), "{name:?}");
    }
    assert!(fs::symlink_metadata(all.join("name 100000")).is_err());
}

#[test]
fn a_file_over_512_mib_is_read_through_extent_blocks() {
    const SIZE: u64 = 700 << 20;
    let mut layer = Layer::default();
    layer.file("small", "before");
    layer.file("large", "").size = SIZE;
    layer.file("after", "after");
    // its bytes are not made: it is zero but for marks that are written straight to their places
    layer.entries[2].data_offset.0 += SIZE;
    let tree = layer.tree();
    let layout = Layout::new(&tree, &layer.entries, &SEED).unwrap();
    let large = &layout.regions[1];
    assert_eq!(large.length(), SIZE);
    let disk = Disk::of_metadata(&layout);
    let marks = [0, 128 << 20, (512 << 20) - 4096, 512 << 20, SIZE - 5];
    let device = File::options().write(true).open(&disk.path).unwrap();
    for at in marks {
        let place = large.disk.start.get() + at;
        device.write_all_at(b"mark!", place).unwrap();
    }
    disk.check();
    let extents = disk.debugfs("dump_extents /large");
    assert!(extents.contains(" 1/ 1 "), "{extents}");
    let mount = disk.mount();
    let file = File::open(mount.path().join("large")).unwrap();
    assert_eq!(file.metadata().unwrap().size(), SIZE);
    for at in marks {
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"mark!", "at {at}");
    }
}

#[test]
fn a_directory_with_more_subdirectories_than_links_are_counted_has_one_link() {
    let mut layer = Layer::default();
    for n in 0..65_000 {
        layer.dir(format!("many/{n}"));
    }
    layer.dir("fewer");
    let disk = layer.disk();
    disk.check();
    let mount = disk.mount();
    let links = |name| fs::metadata(mount.path().join(name)).unwrap().nlink();
    assert_eq!(links("many"), 1);
    assert_eq!(links("fewer"), 2);
}

#[test]
fn inodes_of_many_groups_are_found() {
    // more inodes than a group's bitmap has bits, next to no data
    let mut layer = Layer::default();
    for n in 0..70_000 {
        layer.file(format!("{}/{n}", n % 100), "").uid = n;
    }
    let disk = layer.disk();
    disk.check();
    let mount = disk.mount();
    for n in [0, 32_000, 32_767, 32_768, 69_999] {
        let file = fs::metadata(mount.path().join(format!("{}/{n}", n % 100))).unwrap();
        assert_eq!(file.uid(), n);
    }
}

#[test]
fn the_same_entries_give_the_same_bytes() {
    let laid_out = |seed| {
        let layer = odd::layer();
        let tree = Tree::build(&layer.entries).unwrap();
        let layout = Layout::new(&tree, &layer.entries, seed).unwrap();
        let mut metadata = Vec::new();
        let written = layout.write_metadata(|offset, bytes| {
            metadata.push((offset, bytes.to_vec()));
            Ok::<_, std::convert::Infallible>(())
        });
        written.unwrap();
        (metadata, layout.table())
    };
    let (one, two, other) = (laid_out(&SEED), laid_out(&SEED), laid_out(&[1; 32]));
    assert_eq!(one, two);
    assert_ne!(one.0, other.0);
    // a table of another digest moves no data
    assert_eq!(one.1, other.1);
}
