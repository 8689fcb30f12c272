//! What a large layer costs. Figures are printed: `cargo test --release --test it ext4::scale -- --nocapture`.

use rustix::time::{ClockId, clock_gettime};
use socinbd::{ext4::Layout, tree::Tree};

use super::fixture::{Layer, SEED};

/// Milliseconds of CPU that this thread has taken: the machine's load is no matter.
fn cpu_ms() -> i64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}

#[test]
fn a_hundred_thousand_entries_take_little_time_and_memory() {
    // as packages of a script language unpack: ten files a directory, four levels deep
    let mut layer = Layer::default();
    for dir in 0..9_000 {
        let parent = format!("usr/lib/node_modules/{}/lib{dir}", dir % 500);
        layer.dir(&parent);
        for file in 0..10 {
            layer.file(format!("{parent}/some-file-name-{file}.js"), "x");
        }
    }
    let start = cpu_ms();
    let tree = Tree::build(&layer.entries).unwrap();
    let built = cpu_ms();
    let layout = Layout::new(&tree, &layer.entries, &SEED).unwrap();
    let laid_out = cpu_ms();
    let metadata: usize = layout.metadata.iter().map(|(_, bytes)| bytes.len()).sum();
    println!(
        "{} entries: tree {} ms, layout {} ms, metadata {metadata} bytes in {} runs",
        layer.entries.len(),
        built - start,
        laid_out - built,
        layout.metadata.len()
    );
    // 256 bytes an inode, and names; wide bounds for time, as the test is not built for speed
    assert!(metadata < 35_000_000, "{metadata}");
    assert!(laid_out - start < 2_000, "{} ms", laid_out - start);
}
