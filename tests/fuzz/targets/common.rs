//! What several fuzzers use.

use socinbd::{
    ext4::{Layout, RegionTable, Regions},
    tar::Entry,
    tree::Tree,
    units::DiskOffset,
};

/// A tree and its disk, for `then`, from entries that a table or a tar has. What they may refuse they refuse with words.
pub fn lay_out(entries: &[Entry], then: impl FnOnce(&Tree<'_>, &Layout<'_>)) {
    let tree = match Tree::build(entries) {
        Ok(tree) => tree,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let layout = match Layout::new(&tree, entries, &[7; 32]) {
        Ok(layout) => layout,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let mut end = 0;
    let written = layout.write_metadata(|offset, bytes| {
        assert!(offset.get() >= end, "metadata overlaps");
        end = offset.get() + bytes.len() as u64;
        Ok::<_, std::convert::Infallible>(())
    });
    written.expect("nothing refuses it");
    assert!(end <= layout.size);
    let regions = Regions::new(layout.size, layout.regions.clone()).expect("its own regions");
    let decoded = RegionTable::decode(&regions.encode()).expect("its own bytes");
    let all = DiskOffset(0)..DiskOffset(u64::MAX);
    assert!(decoded.in_disk(&all).eq(regions.data().iter().cloned()));
    then(&tree, &layout);
}
