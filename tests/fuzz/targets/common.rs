//! What several fuzzers use.

use socinbd::{
    ext4::{Layout, RegionTable, Regions},
    tar::Entry,
    tree::Tree,
    units::DiskOffset,
};

/// A tree and its disk from entries that a table or a tar has. What they may refuse they refuse with words.
pub fn lay_out(entries: &[Entry]) -> Option<(Tree, Layout)> {
    let tree = Tree::build(entries)
        .inspect_err(|error| assert!(!error.to_string().is_empty()))
        .ok()?;
    let layout = Layout::new(&tree, entries, &[7; 32])
        .inspect_err(|error| assert!(!error.to_string().is_empty()))
        .ok()?;
    let mut end = 0;
    for (offset, bytes) in &layout.metadata {
        assert!(offset.get() >= end, "metadata overlaps");
        end = offset.get() + bytes.len() as u64;
    }
    assert!(end <= layout.size);
    let regions = Regions::new(layout.size, layout.regions.clone()).expect("its own regions");
    let decoded = RegionTable::decode(&regions.encode()).expect("its own bytes");
    let all = DiskOffset(0)..DiskOffset(u64::MAX);
    assert!(decoded.in_disk(&all).eq(regions.data().iter().cloned()));
    Some((tree, layout))
}
