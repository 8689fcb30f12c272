//! A zTOC of 100,000 entries becomes a disk: parsed, checked, laid out, its metadata written. Time and memory of one thread.
//!
//!     cargo bench --bench import

mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use socinbd::{
    layer::{LayerBlob, Store, TableBytes},
    oci::{Digest, Packing, Reference},
    soci::build::{LayerIndexer, NoSink, Options},
    source::{Access, Source},
};

const DIRECTORIES: usize = 9_091;
const FILES: usize = 10;
const ROUNDS: usize = 9;

fn main() {
    support::print_machine();
    let layer = layer();
    let mut indexer = LayerIndexer::new(Packing::Plain, Options::default(), NoSink);
    indexer.write(&layer).expect("a sound layer");
    let made = indexer.finish().expect("a whole layer").0;
    let ztoc = Bytes::from(
        made.ztoc
            .expect("one was asked for")
            .expect("the layer can have one"),
    );
    let blob = LayerBlob {
        digest: made.digest,
        size: made.size,
        packing: Packing::Plain,
        diff_id: made.diff_id.expect("it was wanted"),
    };
    println!(
        "{} entries, a zTOC of {:.1} MB",
        made.entries.len(),
        ztoc.len() as f64 / 1e6
    );
    drop((layer, made.entries));

    let folder = tempfile::tempdir().expect("a temporary folder");
    let layout = folder.path().join("layout");
    std::fs::create_dir(&layout).expect("a folder");
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .expect("a file");
    std::fs::write(
        layout.join("index.json"),
        r#"{"schemaVersion":2,"manifests":[]}"#,
    )
    .expect("a file");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let reference = Reference::Layout {
        path: layout,
        tag: None,
    };
    let source = runtime
        .block_on(Source::open(&reference, &Access::default()))
        .expect("a layout");

    let table = Digest::of(&ztoc);
    let (mut times, mut cpu_times) = (Vec::new(), Vec::new());
    let mut most = 0;
    for round in 0..ROUNDS {
        let store = Store::open(&folder.path().join(format!("root{round}"))).expect("a new root");
        support::reset_peak();
        let before = support::peak();
        let (begun, cpu) = (Instant::now(), cpu_time());
        let disk = runtime
            .block_on(store.indexed(&blob, &table, TableBytes::of(ztoc.clone()), &source))
            .expect("a disk");
        times.push(begun.elapsed());
        cpu_times.push(cpu_time() - cpu);
        most = most.max(support::peak().saturating_sub(before));
        assert_eq!(Arc::strong_count(&disk), 1);
    }
    times.sort();
    cpu_times.sort();
    println!(
        "import of {} entries: {} ms, {} ms of it on the processor (medians of {ROUNDS}; {} to {} ms), {:.0} MB of memory at most",
        DIRECTORIES * (FILES + 1),
        times[ROUNDS / 2].as_millis(),
        cpu_times[ROUNDS / 2].as_millis(),
        times[0].as_millis(),
        times[ROUNDS - 1].as_millis(),
        most as f64 / 1e6
    );
}

/// What this process has taken of the processors.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// As packages of a script language unpack: ten files a directory, four levels deep.
fn layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(bytes.len() as u64);
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        tar.append_data(&mut header, path, bytes)
            .expect("memory does not fail");
    };
    for dir in 0..DIRECTORIES {
        let parent = format!("usr/lib/node_modules/{}/lib{dir}", dir % 500);
        add(&format!("{parent}/"), tar::EntryType::Directory, b"");
        for file in 0..FILES {
            add(
                &format!("{parent}/some-file-name-{file}.js"),
                tar::EntryType::Regular,
                b"x",
            );
        }
    }
    tar.into_inner().expect("memory does not fail")
}
