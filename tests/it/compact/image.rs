//! Images with a compact index: which one counts, and what is fetched.

use std::fs;

use serde_json::{Value, json};
use socinbd::{
    compact::manifest::{ARTIFACT_TYPE, INDEX_DIGEST, PREFETCH_TYPE, TABLE_DIGEST},
    engine::{
        DiskBasis, Image,
        make::{
            convert, create,
            options::{ConvertOptions, CreateOptions},
            report::CreateReport,
        },
        open::{
            disks::Disks,
            local_indexes::LocalIndexes,
            opened::OpenedImage,
            policy::{IndexChoice, IndexOrigin, IndexPolicy},
            search::{self, FoundIndexes},
        },
    },
    error::{Kind, Result},
    oci::Digest,
    source::{Access, Destination, Source},
};
use tempfile::TempDir;

use crate::{
    layer::fixture::complete,
    soci::make::{GZIP_LAYER, MANIFEST, MadeLayout, PLAIN_LAYER, digest, tar_of},
    support::registry::Registry,
};

/// Text with references near and far.
fn text(length: usize) -> Vec<u8> {
    let mut random = crate::layer::fixture::Random::new(9);
    random.text(length)
}

/// An image of a gzip and a plain layer in a layout, with both kinds of index.
struct Fixture {
    made: MadeLayout,
    report: CreateReport,
    root: TempDir,
}

async fn open(reference: &str) -> Source {
    Source::open(&reference.parse().unwrap(), &Access::default())
        .await
        .unwrap()
}

impl Fixture {
    async fn new() -> Self {
        let mut made = MadeLayout::new();
        let image = made.image(
            "amd64",
            &[
                (GZIP_LAYER, tar_of(&[("etc/text", &text(1_500_000))])),
                (PLAIN_LAYER, tar_of(&[("plain", &text(300_000))])),
                (GZIP_LAYER, tar_of(&[("small", b"small")])),
            ],
        );
        made.tag(&image, "x");
        let source = open(&made.reference("x")).await;
        let image = Image::resolve(&source, None).await.unwrap();
        let root = TempDir::new().unwrap();
        let local = LocalIndexes::open(root.path()).unwrap();
        let options = CreateOptions {
            min_layer_size: 10_000,
            compact_span_size: Some(64 << 10),
            ..CreateOptions::default()
        };
        let report = create::create(&image, &options, &local, &|_, _, _| {}).await;
        Self {
            made,
            report: report.unwrap(),
            root,
        }
    }

    fn registry(&self) -> Registry {
        let registry = Registry::start();
        registry.add_layout("app", self.made.path()).unwrap();
        registry
    }

    fn compact(&self) -> Digest {
        self.report.compact_index.unwrap()
    }

    fn manifest(&self, digest: &Digest) -> Value {
        serde_json::from_slice(&fs::read(self.made.blob_path(digest)).unwrap()).unwrap()
    }
}

async fn find(reference: &str, choice: &IndexChoice, root: &TempDir) -> Result<FoundIndexes> {
    let image = Image::resolve(&open(reference).await, None).await?;
    search::find(&image, choice, &LocalIndexes::open(root.path())?).await
}

async fn open_image(reference: &str, root: &TempDir) -> OpenedImage {
    let disks = Disks::open(root.path()).unwrap();
    let reference = reference.parse().unwrap();
    let choice = IndexChoice::default();
    disks
        .open_image(&reference, &Access::default(), None, &choice, &|_| {})
        .await
        .unwrap()
}

fn bases(opened: &OpenedImage) -> Vec<&DiskBasis> {
    opened.layers.iter().map(|layer| &layer.basis).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_made_beside_the_soci_index_and_goes_before_it() {
    let fixture = Fixture::new().await;
    let manifest = fixture.manifest(&fixture.compact());
    assert_eq!(manifest["artifactType"], ARTIFACT_TYPE);
    assert_eq!(manifest["subject"]["digest"], json!(fixture.report.image));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 2);
    let report = json!(fixture.report);
    assert!(report["layers"][0]["compact"]["table_size"].is_u64());
    assert!(report["layers"][2].get("compact").is_none());
    let text = fixture.report.to_string();
    assert!(
        text.contains(&format!("compact index {}", fixture.compact())),
        "{text}"
    );
    // nothing of it is in the SOCI index
    let soci = fixture.manifest(&fixture.report.index).to_string();
    assert!(!soci.contains("socinbd.compact") && !soci.contains(&fixture.compact().hex()));

    let registry = fixture.registry();
    let reference = registry.reference("app:x");
    let found = find(&reference, &IndexChoice::default(), &fixture.root)
        .await
        .unwrap();
    let compact = found.compact.unwrap();
    assert_eq!(
        (compact.digest, compact.origin),
        (fixture.compact(), IndexOrigin::Referrer)
    );
    assert_eq!(found.index.unwrap().digest, fixture.report.index);
    assert_eq!(found.warnings, [""; 0]);

    registry.reset_counters();
    let opened = open_image(&reference, &fixture.root).await;
    assert_eq!(opened.compact.as_ref().unwrap().digest, fixture.compact());
    let small = |basis: &DiskBasis| matches!(basis, DiskBasis::Whole { .. });
    assert!(small(bases(&opened)[0]), "{:?}", bases(&opened));
    assert_eq!(
        bases(&opened)[1..],
        [&DiskBasis::Compact, &DiskBasis::Compact]
    );
    assert_eq!(opened.warnings, [""; 0]);
    // of the compact index the tables, by range, and of the zTOCs nothing
    for layer in &fixture.report.layers[..2] {
        let layer = json!(layer);
        let digest: Digest = layer["ztoc"].as_str().unwrap().parse().unwrap();
        assert_eq!(registry.counters().blob(&digest).requests, 0);
    }
    for blob in manifest["layers"].as_array().unwrap() {
        let size = &blob["annotations"]["vnd.socinbd.table-size"];
        let fetched = registry.counters().blob(&digest(blob));
        assert_eq!(fetched.bytes.to_string(), size.as_str().unwrap());
        assert_eq!(fetched.requests, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn its_spans_hold_the_files() {
    let fixture = Fixture::new().await;
    let registry = fixture.registry();
    let opened = open_image(&registry.reference("app:x"), &fixture.root).await;
    for layer in &opened.layers {
        complete(&layer.disk).await;
    }
    let disk = opened.layers.last().unwrap().disk.path();
    let ext4 = ext4_view::Ext4::load(Box::new(fs::read(disk).unwrap())).unwrap();
    assert!(ext4.read("/etc/text").unwrap() == text(1_500_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_be_used_gives_way_to_the_ztoc() {
    let fixture = Fixture::new().await;
    let manifest = fixture.manifest(&fixture.compact());
    let first = digest(&manifest["layers"][0]);
    // a bit of the table flipped, and the other table's blob gone
    let mut blob = fs::read(fixture.made.blob_path(&first)).unwrap();
    blob[100] ^= 1;
    let registry = fixture.registry();
    registry.add_blob_as("app", first, blob);
    registry.remove("app", &digest(&manifest["layers"][1]));
    let opened = open_image(&registry.reference("app:x"), &fixture.root).await;
    assert_eq!(bases(&opened)[1..], [&DiskBasis::Ztoc, &DiskBasis::Ztoc]);
    assert_eq!(opened.warnings.len(), 2, "{:?}", opened.warnings);
    for warning in &opened.warnings {
        assert!(
            warning.contains("cannot use the compact index"),
            "{warning}"
        );
    }
    assert!(
        opened.warnings[1].contains("has the digest"),
        "{:?}",
        opened.warnings
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_cannot_be_used_gives_way_to_the_soci_index() {
    let fixture = Fixture::new().await;
    // an artifact of the type, newer, that is no compact index of this image
    let mut made = MadeLayout::new();
    let config = made.blob("application/vnd.oci.empty.v1+json", b"{}");
    let other = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT_TYPE, "config": config, "layers": [],
        "subject": {"mediaType": MANIFEST, "digest": fixture.report.image, "size": 1},
    });
    let mut other = made.blob(MANIFEST, other.to_string().as_bytes());
    other["artifactType"] = json!(ARTIFACT_TYPE);
    made.list(&other);
    let registry = fixture.registry();
    registry.add_layout("app", made.path()).unwrap();
    let reference = registry.reference("app:x");
    let found = find(&reference, &IndexChoice::default(), &fixture.root)
        .await
        .unwrap();
    // the one before it counts
    assert_eq!(found.compact.unwrap().digest, fixture.compact());
    assert_eq!(found.warnings.len(), 1, "{:?}", found.warnings);
    assert!(
        found.warnings[0].contains("for any layer"),
        "{:?}",
        found.warnings
    );

    registry.remove("app", &fixture.compact());
    let found = find(&reference, &IndexChoice::default(), &fixture.root)
        .await
        .unwrap();
    assert!(found.compact.is_none());
    assert!(found.index.is_some());
    assert!(!found.warnings.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_word_counts_is_asked_as_for_the_soci_index() {
    let fixture = Fixture::new().await;
    let registry = fixture.registry();
    let reference = registry.reference("app:x");
    let choose = async |digest, policy| {
        let choice = IndexChoice {
            digest,
            policy,
            ..Default::default()
        };
        find(&reference, &choice, &fixture.root).await
    };
    for policy in [IndexPolicy::V2, IndexPolicy::None] {
        assert!(choose(None, policy).await.unwrap().compact.is_none());
    }
    // by its digest, and then nothing else
    let found = choose(Some(fixture.compact()), IndexPolicy::V2)
        .await
        .unwrap();
    assert_eq!(found.compact.unwrap().origin, IndexOrigin::Given);
    assert!(found.index.is_none());
    let found = choose(Some(fixture.report.index), IndexPolicy::Any)
        .await
        .unwrap();
    assert!(found.compact.is_none() && found.index.is_some());
    let refused = choose(Some(fixture.compact()), IndexPolicy::None).await;
    assert_eq!(refused.err().unwrap().kind(), Kind::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_names_an_index_has_no_use_for_referrers() {
    for name in [INDEX_DIGEST, "com.amazon.soci.index-digest"] {
        let fixture = Fixture::new().await;
        // the same image, which names an index; whoever can push puts another beside it
        let mut manifest = fixture.manifest(&fixture.report.image);
        manifest["annotations"] = json!({name: fixture.compact()});
        let mut made = MadeLayout::new();
        let image = made.blob(MANIFEST, manifest.to_string().as_bytes());
        made.tag(&image, "y");
        let mut pushed = fixture.manifest(&fixture.compact());
        pushed["subject"] = image;
        let mut pushed = made.blob(MANIFEST, pushed.to_string().as_bytes());
        pushed["artifactType"] = json!(ARTIFACT_TYPE);
        made.list(&pushed);
        let registry = fixture.registry();
        registry.add_layout("app", made.path()).unwrap();
        let reference = registry.reference("app:y");
        let found = find(&reference, &IndexChoice::default(), &fixture.root)
            .await
            .unwrap();
        match name {
            INDEX_DIGEST => {
                let compact = found.compact.unwrap();
                assert_eq!(compact.digest, fixture.compact());
                assert_eq!(compact.origin, IndexOrigin::Annotation);
            }
            _ => assert!(found.compact.is_none()),
        }
        // and where the name leads nowhere, that is said
        registry.remove("app", &fixture.compact());
        let found = find(&reference, &IndexChoice::default(), &fixture.root)
            .await
            .unwrap();
        assert!(found.compact.is_none());
        assert!(!found.warnings.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_in_the_local_root_is_read_from_there() {
    let fixture = Fixture::new().await;
    // an archive cannot be written to, so the state directory is
    let packed = fixture.made.packed("");
    let source = open(&format!("oci-archive:{}:x", packed.path().display())).await;
    let image = Image::resolve(&source, None).await.unwrap();
    let root = TempDir::new().unwrap();
    let local = LocalIndexes::open(root.path()).unwrap();
    let options = CreateOptions {
        min_layer_size: 10_000,
        compact_span_size: Some(64 << 10),
        ..CreateOptions::default()
    };
    let report = create::create(&image, &options, &local, &|_, _, _| {})
        .await
        .unwrap();
    // a registry that has the image and no index
    let registry = fixture.registry();
    registry.remove("app", &fixture.compact());
    registry.remove("app", &fixture.report.index);
    let opened = open_image(&registry.reference("app:x"), &root).await;
    assert_eq!(
        opened.compact.as_ref().unwrap().digest,
        report.compact_index.unwrap()
    );
    assert_eq!(opened.compact.as_ref().unwrap().origin, IndexOrigin::Local);
    let disk = &opened.layers.last().unwrap().disk;
    // from the end on, until a span has to be fetched: its window comes from the state directory
    let mut end = disk.size();
    while disk.span_counts().0 == 0 {
        let start = end - 4096;
        let block = socinbd::units::DiskOffset(start)..socinbd::units::DiskOffset(end);
        disk.make_present(block).await.unwrap();
        end = start;
    }
    let (present, all) = disk.span_counts();
    assert!(present < all, "{present} of {all}");
    // one of the layer, one of the window
    assert_eq!(disk.counters().fetches, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn attaching_the_index_itself_says_what_it_is() {
    let fixture = Fixture::new().await;
    let registry = fixture.registry();
    let reference = registry.reference(&format!("app@{}", fixture.compact()));
    let error = Image::resolve(&open(&reference).await, None)
        .await
        .err()
        .unwrap();
    assert!(
        error.report().contains("a compact index"),
        "{}",
        error.report()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_converted_image_names_it_and_twice_is_once() {
    let fixture = Fixture::new().await;
    let registry = Registry::start();
    let options = ConvertOptions {
        create: CreateOptions {
            min_layer_size: 10_000,
            compact_span_size: Some(64 << 10),
            ..CreateOptions::default()
        },
        ..ConvertOptions::default()
    };
    let convert = async |from: &str, to: &str, options: &ConvertOptions| {
        let destination = to.parse().unwrap();
        let destination = Destination::open(&destination, &Access::default())
            .await
            .unwrap();
        let root = TempDir::new().unwrap();
        let local = LocalIndexes::open(root.path()).unwrap();
        convert::convert(
            &open(from).await,
            &destination,
            options,
            &local,
            &|_, _, _| {},
        )
        .await
        .unwrap()
    };
    let to = registry.reference("app:v2");
    let first = convert(&fixture.made.reference("x"), &to, &options).await;
    let compact = first.images[0].compact_index.unwrap();
    assert!(
        first
            .to_string()
            .contains(&format!("compact index {compact}"))
    );
    let again = convert(&to, &registry.reference("app:again"), &options).await;
    assert_eq!(again.digest, first.digest);

    let source = open(&to).await;
    let index = source.root_manifest().await.unwrap();
    let index: Value = serde_json::from_slice(&index.bytes).unwrap();
    let entries = index["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    assert_eq!(entries[2]["digest"], json!(compact));
    assert_eq!(entries[2]["artifactType"], ARTIFACT_TYPE);
    let manifest = source.manifest(&compact).await.unwrap();
    let manifest: Value = serde_json::from_slice(&manifest.bytes).unwrap();
    assert!(manifest.get("subject").is_none());

    // bound to the image's digest, so the policy v2 takes it; no referrer is asked for
    registry.reset_counters();
    let root = TempDir::new().unwrap();
    let choice = IndexChoice {
        policy: IndexPolicy::V2,
        ..IndexChoice::default()
    };
    let found = find(&to, &choice, &root).await.unwrap();
    let index = found.compact.unwrap();
    assert_eq!(
        (index.digest, index.origin),
        (compact, IndexOrigin::Annotation)
    );
    assert_eq!(found.index.unwrap().version, 2);
    let asked = registry
        .counters()
        .kind(crate::support::registry::Kind::Referrers);
    assert_eq!(asked.requests, 0);
    let opened = open_image(&to, &root).await;
    assert_eq!(
        bases(&opened)[1..],
        [&DiskBasis::Compact, &DiskBasis::Compact]
    );

    // converted once more without it, the image keeps it: the layers are the same
    let options = ConvertOptions {
        create: CreateOptions {
            compact_span_size: None,
            span_size: 1 << 20,
            force: true,
            ..options.create
        },
        ..options
    };
    let to = registry.reference("app:other");
    let other = convert(&registry.reference("app:v2"), &to, &options).await;
    assert_ne!(other.digest, first.digest);
    let found = find(&to, &choice, &root).await.unwrap();
    assert_eq!(found.compact.unwrap().digest, compact);
    assert_ne!(found.index.unwrap().digest, first.images[0].index);
}

/// The bytes of the layers that a registry has sent.
fn layer_bytes(registry: &Registry, report: &CreateReport) -> Vec<u64> {
    let layers = report.layers.iter();
    layers
        .map(|layer| registry.counters().blob(&layer.layer).bytes)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_compact_index_has_of_a_layer_is_used_again() {
    let fixture = Fixture::new().await;
    let registry = fixture.registry();
    let reference = registry.reference("app:x");
    let local = TempDir::new().unwrap();
    let local = LocalIndexes::open(local.path()).unwrap();
    let options = |span_size, compact_span_size, force| CreateOptions {
        min_layer_size: 10_000,
        span_size,
        compact_span_size: Some(compact_span_size),
        force,
        ..CreateOptions::default()
    };
    let default = CreateOptions::default().span_size;
    let sizes: Vec<u64> = fixture.report.layers.iter().map(|it| it.size).collect();
    let small = sizes[2];
    let convert = async |to: &str, create: CreateOptions| {
        let to = match to.contains("127.0.0.1") {
            true => to.to_owned(),
            false => registry.reference(to),
        };
        let destination = to.parse().unwrap();
        let destination = Destination::open(&destination, &Access::default())
            .await
            .unwrap();
        registry.reset_counters();
        let options = ConvertOptions {
            create,
            ..ConvertOptions::default()
        };
        let source = open(&reference).await;
        let report = convert::convert(&source, &destination, &options, &local, &|_, _, _| {}).await;
        (report.unwrap(), layer_bytes(&registry, &fixture.report))
    };
    // both are there: no byte of a layer, and within the repository none of the compact blobs but their tables
    let (both, sent) = convert("app:both", options(default, 64 << 10, false)).await;
    assert_eq!(sent, [0, 0, 0]);
    let parts: Vec<_> = json!(both.images[0].layers)
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["compact"]["reused"].clone())
        .collect();
    assert_eq!(parts, [json!(true), json!(true), json!(null)]);
    let blobs = fixture.manifest(&fixture.compact());
    for blob in blobs["layers"].as_array().unwrap() {
        let size = &blob["annotations"]["vnd.socinbd.table-size"];
        let fetched = registry.counters().blob(&digest(blob));
        assert_eq!(fetched.bytes.to_string(), size.as_str().unwrap());
    }
    // into another repository they are mounted, and what is made is the same
    let (other, sent) = convert("other:both", options(default, 64 << 10, false)).await;
    assert_eq!(sent, [0, 0, 0]);
    assert_eq!(other.digest, both.digest);
    // to another registry they are copied, each once
    let elsewhere = Registry::start();
    let (there, sent) = convert(
        &elsewhere.reference("app:both"),
        options(default, 64 << 10, false),
    )
    .await;
    assert_eq!(there.digest, both.digest);
    assert_eq!(sent, sizes, "copied");
    // one of the two is there: each layer passes once, and only the other is made
    let (_, sent) = convert("app:finer", options(default, 128 << 10, false)).await;
    assert_eq!(sent, [sizes[0], sizes[1], 0]);
    let (_, sent) = convert("app:other", options(1 << 20, 64 << 10, false)).await;
    assert_eq!(sent, [sizes[0], sizes[1], 0]);
    // made anew, both in one pass, they are the same
    let (forced, sent) = convert("app:forced", options(default, 64 << 10, true)).await;
    assert_eq!(sent, [sizes[0], sizes[1], 0]);
    assert_eq!(forced.digest, both.digest);
    assert!(small < 10_000);

    // `index create` for the registry, and for this host
    let image = Image::resolve(&open(&reference).await, None).await.unwrap();
    registry.reset_counters();
    let destination = reference.parse().unwrap();
    let destination = Destination::open(&destination, &Access::default())
        .await
        .unwrap();
    let create = options(default, 64 << 10, false);
    let at = create::create_at(&image, &create, &local, &destination, 3, &|_, _, _| {})
        .await
        .unwrap();
    let here = create::create(&image, &create, &local, &|_, _, _| {})
        .await
        .unwrap();
    assert_eq!(at.compact_index, Some(fixture.compact()));
    assert_eq!(here.compact_index, Some(fixture.compact()));
    assert_eq!(layer_bytes(&registry, &fixture.report), [0, 0, 0]);
    // all of it is here now: nothing is fetched of what the registry has
    registry.remove("app", &fixture.compact());
    registry.reset_counters();
    let again = create::create(&image, &create, &local, &|_, _, _| {})
        .await
        .unwrap();
    assert_eq!(again.compact_index, here.compact_index);
    assert_eq!(layer_bytes(&registry, &fixture.report), [0, 0, 0]);
}

/// A registry whose newest compact index of the image has one more blob among its layers: a list of spans of the first layer.
fn with_list(fixture: &Fixture, list: &[u8], table: Option<Digest>) -> Registry {
    let mut made = MadeLayout::new();
    let mut index = fixture.manifest(&fixture.compact());
    let layers = index["layers"].as_array_mut().unwrap();
    let mut blob = made.blob(PREFETCH_TYPE, list);
    let mut noted = layers[0]["annotations"].clone();
    if let Some(table) = table {
        noted[TABLE_DIGEST] = json!(table);
    }
    blob["annotations"] = noted;
    layers.push(blob);
    let mut index = made.blob(MANIFEST, index.to_string().as_bytes());
    index["artifactType"] = json!(ARTIFACT_TYPE);
    made.list(&index);
    let registry = fixture.registry();
    registry.add_layout("app", made.path()).unwrap();
    registry
}

#[tokio::test(flavor = "multi_thread")]
async fn listed_spans_come_and_a_list_that_lies_is_bounded() {
    let fixture = Fixture::new().await;
    let list = |spans: &[(i64, i64, i64)]| {
        let spans: Vec<Value> = spans
            .iter()
            .map(|(start, end, order)| json!({"start_span": start, "end_span": end, "priority": order}))
            .collect();
        json!({"version": "1.0", "prefetch_spans": spans}).to_string()
    };
    let present = |opened: &OpenedImage| {
        let (present, all) = opened.layers.last().unwrap().disk.span_counts();
        assert!(all > 6, "{all}");
        present
    };
    // in the table's numbers; those that it does not have, or that end before they start, are none
    let odd = list(&[
        (4, 5, 1),
        (-5, 0, 2),
        (5, 3, 0),
        (1000, 2_000_000_000, 0),
        (4, 4, 9),
    ]);
    let registry = with_list(&fixture, odd.as_bytes(), None);
    let root = TempDir::new().unwrap();
    let opened = open_image(&registry.reference("app:x"), &root).await;
    assert_eq!(
        bases(&opened)[1..],
        [&DiskBasis::Compact, &DiskBasis::Compact]
    );
    crate::support::wait("the listed spans", || present(&opened) == 3);
    let layer = fixture.report.layers[0].layer;
    assert_eq!(
        registry.counters().blob(&layer).requests,
        2,
        "4 and 5, and 0"
    );

    // what is no list, or too long a one, or of another table, costs its fetch and no span
    let many = list(&vec![(0, i64::from(i32::MAX), 0); 60_000]);
    let other = Digest::of(b"another table");
    for (document, table) in [
        ("{}", None),
        ("no JSON", None),
        (&many, None),
        (&list(&[(0, 9, 1)]), Some(other)),
    ] {
        let registry = with_list(&fixture, document.as_bytes(), table);
        let root = TempDir::new().unwrap();
        let opened = open_image(&registry.reference("app:x"), &root).await;
        assert_eq!(
            bases(&opened)[1..],
            [&DiskBasis::Compact, &DiskBasis::Compact]
        );
        let disk = &opened.layers.last().unwrap().disk;
        complete(disk).await;
        let ext4 = ext4_view::Ext4::load(Box::new(fs::read(disk.path()).unwrap())).unwrap();
        assert!(ext4.read("/etc/text").unwrap() == text(1_500_000));
    }
}
