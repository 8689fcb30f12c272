//! What a start reads is recorded, and fetched ahead of the next one.

use std::fs;

use serde_json::Value;
use socinbd::{
    compact::Table,
    engine::{
        Image,
        open::{
            local_indexes::LocalIndexes,
            policy::{IndexChoice, IndexPolicy},
            search,
        },
    },
    oci::Digest,
    soci::prefetch::Prefetch,
    source::{Access, Source},
    tar::Entry,
    units::LayerOffset,
    ztoc::{SpanTable, Ztoc},
};

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout, digest},
    support::{registry::Registry, tars::Layer, wait},
};

/// Bytes that do not compress.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// An image of one layer with a busybox and three files, in its layout.
fn layout() -> (MadeLayout, Digest) {
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    let tar = Layer::new()
        .program("bin/busybox", &busybox)
        .file("data/early", &noise(500_000, 1))
        .file("data/late", &noise(500_000, 2))
        .file("data/never", &noise(900_000, 3))
        .tar();
    let mut layout = MadeLayout::new();
    let image = layout.image("amd64", &[(GZIP_LAYER, tar)]);
    layout.tag(&image, "latest");
    let manifest: Value =
        serde_json::from_slice(&fs::read(layout.blob_path(&digest(&image))).unwrap()).unwrap();
    (layout, digest(&manifest["layers"][0]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_start_is_fetched_ahead_of_the_next_one() {
    let host = Host::new();
    let (layout, layer) = layout();
    let image = layout.reference("latest");
    let create = [
        "index",
        "create",
        &image,
        "--span-size",
        "65536",
        "--min-layer-size",
        "0",
    ];
    host.run(&create);
    let record = [
        "record",
        &image,
        "--",
        "/bin/busybox",
        "md5sum",
        "/data/late",
        "/data/early",
    ];
    host.run(&record);
    assert_eq!(host.left_over(), [""; 0]);
    let folders = fs::read_dir(host.root()).unwrap();
    let left = folders.filter(|entry| {
        entry
            .as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with("recording")
    });
    assert_eq!(left.count(), 0, "its disks are gone");

    // the newest index lists the spans, those of the file that was read first first, and none of the file that was not read
    let source = Source::open(&image.parse().unwrap(), &Access::default())
        .await
        .unwrap();
    let resolved = Image::resolve(&source, None).await.unwrap();
    let local = LocalIndexes::open(&host.root()).unwrap();
    let found = search::find(&resolved, &IndexChoice::default(), &local)
        .await
        .unwrap();
    let index = found.index.unwrap();
    let list = index
        .manifest
        .prefetch_of(&layer)
        .unwrap()
        .expect("a prefetch artifact");
    let list = source.blob(&list.digest, list.size, 1 << 20).await.unwrap();
    let list = Prefetch::parse(&list).unwrap();
    let ztoc = Ztoc::parse(&index.fetch_ztoc(&layer).await.unwrap()).unwrap();
    let count = ztoc.spans.spans.len() as u32;
    let listed = listed_as_read(&list, &ztoc.entries, &ztoc.spans);
    assert!(listed > 10, "{listed} of {count}");

    // elsewhere, they come before anything is read
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    is_fetched_ahead(&registry, "app", &layer, listed);
}

/// Asserts that a list has the spans of the files that were read, in the order of their use, and not those of the one that was not. Gives
/// how many it has.
fn listed_as_read(list: &Prefetch, entries: &[Entry], spans: &SpanTable) -> u32 {
    let count = spans.spans.len() as u32;
    let place = |name: &str| {
        let entry = entries
            .iter()
            .find(|entry| entry.name == name.as_bytes())
            .unwrap();
        let start = entry.data_offset.get();
        let spans = spans.covering(LayerOffset(start)..LayerOffset(start + entry.size));
        let middle = spans.start.get().midpoint(spans.end.get());
        let order = list.in_order(count);
        order
            .iter()
            .position(|(_, run)| (run.start.get()..run.end.get()).contains(&middle))
    };
    assert!(place("data/late").unwrap() <= place("data/early").unwrap());
    assert!(place("bin/busybox").unwrap() <= place("data/late").unwrap());
    assert_eq!(place("data/never"), None);
    let runs = list.runs(count);
    let listed: u32 = runs.iter().map(|run| run.end.get() - run.start.get()).sum();
    assert!(listed < count, "{listed} of {count}");
    listed
}

/// Attaches the image on a host that has nothing: so many spans come by themselves, and then the program's files cost no request.
fn is_fetched_ahead(registry: &Registry, image: &str, layer: &Digest, listed: u32) {
    let other = Host::new();
    let mountpoint = other.mountpoint("mnt");
    other.attach(&registry.reference(image), &mountpoint, &[]);
    let present = || other.list()[0]["spans"][0].as_u64().unwrap();
    wait("the listed spans are there", || {
        present() >= u64::from(listed)
    });
    assert_eq!(present(), u64::from(listed));
    let requests = registry.counters().blob(layer).requests;
    assert_eq!(
        fs::read(mountpoint.join("data/late")).unwrap(),
        noise(500_000, 2)
    );
    assert_eq!(
        fs::read(mountpoint.join("data/early")).unwrap(),
        noise(500_000, 1)
    );
    assert_eq!(
        registry.counters().blob(layer).requests,
        requests,
        "nothing more is fetched"
    );
    other.detach(&mountpoint);
    assert_eq!(other.left_over(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_lists_the_compact_index_s_own_spans() {
    let host = Host::new();
    let (layout, layer) = layout();
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let image = registry.reference("app");
    let create = [
        "--compact",
        "--compact-span-size",
        "65536",
        "--min-layer-size",
        "0",
    ];
    host.run(&[&["index", "create", &image][..], &create].concat());
    host.run(&["index", "push", &image]);
    let program = ["--", "/bin/busybox", "md5sum", "/data/late", "/data/early"];
    let find = async |reference: &str, policy| {
        let source = Source::open(&reference.parse().unwrap(), &Access::default())
            .await
            .unwrap();
        let resolved = Image::resolve(&source, None).await.unwrap();
        let nothing = LocalIndexes::open(&Host::new().root()).unwrap();
        let choice = IndexChoice {
            policy,
            ..IndexChoice::default()
        };
        let found = search::find(&resolved, &choice, &nothing).await.unwrap();
        (resolved.digest, found)
    };
    let (digest, before) = find(&image, IndexPolicy::Any).await;
    let before = before.compact.unwrap();

    // version 1: another referrer, and the same image; version 2: another image
    host.run(&[&["record", &image, "--push"][..], &program].concat());
    let fast = registry.reference("app:fast");
    host.run(&[&["record", &image, "--to", &fast][..], &program].concat());
    assert_eq!(host.left_over(), [""; 0]);
    for (tag, policy) in [("app", IndexPolicy::Any), ("app:fast", IndexPolicy::V2)] {
        let (found_digest, found) = find(&registry.reference(tag), policy).await;
        assert_eq!(found_digest == digest, policy == IndexPolicy::Any);
        let compact = found.compact.unwrap();
        assert_ne!(compact.digest, before.digest);
        // the same tables, and so the same disks
        assert_eq!(compact.manifest.layers, before.manifest.layers);
        let part = compact.layer(&layer).unwrap();
        let list = compact.manifest.prefetch_of(part).expect("a list");
        let bytes = compact
            .source
            .blob(&list.blob, list.size, 1 << 20)
            .await
            .unwrap();
        let list = Prefetch::parse(&bytes).unwrap();
        let table = Table::parse(&compact.fetch_table(part).await.unwrap()).unwrap();
        let listed = listed_as_read(&list, &table.entries, &table.spans);
        assert!(listed > 10, "{tag}: {listed}");
        // the SOCI index has a list of its own spans, for AWS's daemon
        let soci = found.index.unwrap().manifest.prefetch_of(&layer).unwrap();
        assert_ne!(
            soci.expect("a prefetch artifact").digest,
            Digest::of(&bytes)
        );
        is_fetched_ahead(&registry, tag, &layer, listed);
    }

    // what is made again keeps the lists, unless it is forced to be new
    let convert = |tag: &str, more: &[&str]| {
        let to = registry.reference(&format!("app:{tag}"));
        host.run(&[&["convert", &fast, &to][..], &create, more].concat());
        to
    };
    let (recorded, _) = find(&fast, IndexPolicy::V2).await;
    let (again, _) = find(&convert("again", &[]), IndexPolicy::V2).await;
    assert_eq!(again, recorded, "converting twice changes nothing");
    let (forced, found) = find(&convert("forced", &["--force"]), IndexPolicy::V2).await;
    assert_ne!(forced, recorded);
    let soci = found.index.unwrap().manifest.prefetch_of(&layer).unwrap();
    assert!(soci.is_none() && found.compact.unwrap().manifest.prefetch.is_empty());
}

#[test]
fn a_record_needs_an_index() {
    let host = Host::new();
    let (layout, _) = layout();
    let error = host.fail(
        &[
            "record",
            &layout.reference("latest"),
            "--",
            "/bin/busybox",
            "true",
        ],
        3,
    );
    assert!(error.contains("socinbd index create"), "{error}");
    assert_eq!(host.left_over(), [""; 0]);
}
