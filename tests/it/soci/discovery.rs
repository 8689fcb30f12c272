//! Which SOCI index counts for an image, over layouts, the state directory and registries.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use socinbd::{
    engine::{
        Image,
        make::{create, options::CreateOptions},
        open::{
            local_indexes::LocalIndexes,
            policy::{IndexChoice, IndexOrigin, IndexPolicy},
            search::{self, FoundIndexes},
        },
    },
    error::{Kind, Result},
    oci::Digest,
    source::{Access, Limits, Source},
};
use tempfile::TempDir;

use super::{
    make::{GZIP_LAYER, INDEX, MANIFEST, MadeLayout, digest, tar_of},
    open, run,
};
use crate::support::registry::{Fault, Kind as Request, On, Referrers, Registry, Times};

const SOCI_V1: &str = "application/vnd.amazon.soci.index.v1+json";
const SOCI_V2: &str = "application/vnd.amazon.soci.index.v2+json";

/// An image in a layout, and an empty state directory.
struct Fixture {
    made: MadeLayout,
    manifest: Value,
    root: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let mut made = MadeLayout::new();
        let manifest = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("a", &[7; 30_000])]))]);
        made.tag(&manifest, "x");
        Self {
            made,
            manifest,
            root: TempDir::new().unwrap(),
        }
    }

    fn local(&self) -> LocalIndexes {
        LocalIndexes::open(self.root.path()).unwrap()
    }

    async fn image(&self) -> Image {
        Image::resolve(&open(&self.made.reference("x")).await.unwrap(), None)
            .await
            .unwrap()
    }

    /// The layer of the image.
    fn layer(&self) -> Digest {
        let bytes = fs::read(self.made.blob_path(&digest(&self.manifest))).unwrap();
        let manifest: Value = serde_json::from_slice(&bytes).unwrap();
        digest(&manifest["layers"][0])
    }

    /// A SOCI index with a zTOC of these bytes (which nobody parses here).
    fn index(&self, artifact_type: &str, ztoc: &[u8], subject: Option<&Value>) -> Value {
        let mut ztoc = self.made.blob("application/octet-stream", ztoc);
        ztoc["annotations"] = json!({"com.amazon.soci.image-layer-digest": self.layer()});
        let mut index = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": self.made.blob(artifact_type, b"{}"),
            "layers": [ztoc],
        });
        if let Some(subject) = subject {
            index["subject"] = subject.clone();
        }
        let mut descriptor = self.made.blob(MANIFEST, index.to_string().as_bytes());
        descriptor["artifactType"] = json!(artifact_type);
        descriptor
    }

    /// Adds an index of version 1 for the image.
    fn add_v1(&mut self, ztoc: &[u8]) -> Digest {
        let manifest = self.manifest.clone();
        let index = self.index(SOCI_V1, ztoc, Some(&manifest));
        self.made.list(&index);
        digest(&index)
    }

    /// Replaces the image by one that names an index of version 2.
    fn annotate(&mut self, index: &str) {
        let bytes = fs::read(self.made.blob_path(&digest(&self.manifest))).unwrap();
        let mut manifest: Value = serde_json::from_slice(&bytes).unwrap();
        manifest["annotations"] = json!({"com.amazon.soci.index-digest": index});
        self.manifest = self.made.blob(MANIFEST, manifest.to_string().as_bytes());
        let mut made = MadeLayout::new(); // with a fresh index.json
        for blob in fs::read_dir(self.made.path().join("blobs/sha256")).unwrap() {
            let blob = blob.unwrap();
            fs::copy(
                blob.path(),
                made.path().join("blobs/sha256").join(blob.file_name()),
            )
            .unwrap();
        }
        made.tag(&self.manifest, "x");
        self.made = made;
    }

    async fn find(&self, given: Option<&Digest>) -> Result<FoundIndexes> {
        self.choose(given, IndexPolicy::Any).await
    }

    async fn choose(&self, given: Option<&Digest>, policy: IndexPolicy) -> Result<FoundIndexes> {
        let choice = IndexChoice {
            digest: given.copied(),
            policy,
            ..Default::default()
        };
        search::find(&self.image().await, &choice, &self.local()).await
    }

    /// What is found: digest, version, origin; and how many warnings there are.
    async fn found(&self) -> (Option<(Digest, u8, IndexOrigin)>, usize) {
        let found = self.find(None).await.unwrap();
        let index = found
            .index
            .map(|index| (index.digest, index.version, index.origin));
        (index, found.warnings.len())
    }

    /// Makes an index of the state directory.
    async fn create_local(&self) -> Digest {
        // an archive cannot be written to, so the state directory is
        let packed = self.made.packed("");
        let source = open(&format!("oci-archive:{}:x", packed.path().display()))
            .await
            .unwrap();
        let image = Image::resolve(&source, None).await.unwrap();
        let options = CreateOptions {
            min_layer_size: 0,
            ..CreateOptions::default()
        };
        create::create(&image, &options, &self.local(), &|_, _, _| {})
            .await
            .unwrap()
            .index
    }
}

#[test]
fn an_image_without_an_index_has_none() {
    run(async {
        assert_eq!(Fixture::new().found().await, (None, 0));
    });
}

#[test]
fn of_version_1_the_newest_that_can_be_read_counts() {
    let mut fixture = Fixture::new();
    let old = fixture.add_v1(b"old");
    let new = fixture.add_v1(b"new");
    run(async {
        let found = fixture.find(None).await.unwrap().index.unwrap();
        assert_eq!(
            (found.digest, found.version, found.origin),
            (new, 1, IndexOrigin::Referrer)
        );
        let layer = fixture.layer();
        assert_eq!(found.ztoc(&layer), Some(Digest::of(b"new")));
        assert_eq!(found.fetch_ztoc(&layer).await.unwrap(), &b"new"[..]);
        assert_eq!(
            found.fetch_ztoc(&new).await.unwrap_err().kind(),
            Kind::NotFound
        );
    });
    // the newest is gone: a layout leaves it out by itself
    fs::remove_file(fixture.made.blob_path(&new)).unwrap();
    run(async {
        assert_eq!(
            fixture.found().await,
            (Some((old, 1, IndexOrigin::Referrer)), 0)
        );
    });
    // one for no layer of this image
    let manifest = fixture.manifest.clone();
    let mut empty = fixture.made.blob(
        MANIFEST,
        json!({"schemaVersion": 2, "config": {"mediaType": SOCI_V1}, "layers": [], "subject": manifest})
            .to_string()
            .as_bytes(),
    );
    empty["artifactType"] = json!(SOCI_V1);
    fixture.made.list(&empty);
    run(async {
        assert_eq!(
            fixture.found().await,
            (Some((old, 1, IndexOrigin::Referrer)), 1)
        );
    });
}

#[test]
fn a_changed_ztoc_is_refused() {
    let mut fixture = Fixture::new();
    fixture.add_v1(b"ztoc");
    fs::write(fixture.made.blob_path(&Digest::of(b"ztoc")), b"zzzz").unwrap();
    run(async {
        let found = fixture.find(None).await.unwrap().index.unwrap();
        let error = found.fetch_ztoc(&fixture.layer()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(
            error.report().contains("its content has the digest"),
            "{}",
            error.report()
        );
    });
}

#[test]
fn version_2_counts_before_version_1() {
    let mut fixture = Fixture::new();
    let v2 = digest(&fixture.index(SOCI_V2, b"two", None));
    fixture.annotate(&v2.to_string());
    fixture.add_v1(b"one");
    run(async {
        assert_eq!(
            fixture.found().await,
            (Some((v2, 2, IndexOrigin::Annotation)), 0)
        );
    });
}

#[test]
fn an_annotation_that_leads_nowhere_leads_not_to_version_1() {
    for annotation in ["nonsense".to_owned(), Digest::of(b"not there").to_string()] {
        let mut fixture = Fixture::new();
        fixture.annotate(&annotation);
        fixture.add_v1(b"one");
        run(async {
            let found = fixture.find(None).await.unwrap();
            assert!(found.index.is_none());
            assert_eq!(found.warnings.len(), 1);
            assert!(
                found.warnings[0].contains(&annotation),
                "{}",
                found.warnings[0]
            );
            // the operator's own word counts all the same
            let local = fixture.create_local().await;
            let index = fixture.find(None).await.unwrap().index.unwrap();
            assert_eq!((index.digest, index.origin), (local, IndexOrigin::Local));
        });
    }
}

#[test]
fn the_local_root_comes_last() {
    let mut fixture = Fixture::new();
    run(async {
        let local = fixture.create_local().await;
        assert_eq!(
            fixture.found().await,
            (Some((local, 1, IndexOrigin::Local)), 0)
        );
        let index = fixture.find(None).await.unwrap().index.unwrap();
        let ztoc = index.fetch_ztoc(&fixture.layer()).await.unwrap();
        assert_eq!(Some(Digest::of(&ztoc)), index.ztoc(&fixture.layer()));
    });
    let pushed = fixture.add_v1(b"one");
    run(async {
        assert_eq!(
            fixture.found().await,
            (Some((pushed, 1, IndexOrigin::Referrer)), 0)
        );
    });
}

#[test]
fn the_index_that_is_named_counts_or_fails() {
    let mut fixture = Fixture::new();
    let first = fixture.add_v1(b"first");
    fixture.add_v1(b"second");
    let foreign = digest(&fixture.index(
        SOCI_V1,
        b"third",
        Some(&json!({"digest": Digest::of(b"another image")})),
    ));
    run(async {
        let local = fixture.create_local().await;
        for (given, warnings) in [(first, 0), (local, 0), (foreign, 1)] {
            let found = fixture.find(Some(&given)).await.unwrap();
            let index = found.index.unwrap();
            assert_eq!((index.digest, index.origin), (given, IndexOrigin::Given));
            assert_eq!(found.warnings.len(), warnings, "{:?}", found.warnings);
            index.fetch_ztoc(&fixture.layer()).await.unwrap();
        }
        for (given, kind) in [
            (Digest::of(b"not there"), Kind::NotFound),
            (digest(&fixture.manifest), Kind::Corrupt), // the image itself
        ] {
            let Err(error) = fixture.find(Some(&given)).await else {
                panic!("{given} was found");
            };
            assert_eq!(error.kind(), kind, "{}", error.report());
        }
    });
}

#[test]
fn a_policy_says_whose_index_counts() {
    let mut fixture = Fixture::new();
    let pushed = fixture.add_v1(b"pushed");
    let of = async |fixture: &Fixture, given: Option<&Digest>, policy| {
        let found = fixture.choose(given, policy).await.unwrap();
        assert_eq!(found.warnings, [""; 0]);
        found.index.map(|index| (index.digest, index.origin))
    };
    run(async {
        let referrer = Some((pushed, IndexOrigin::Referrer));
        assert_eq!(of(&fixture, None, IndexPolicy::Any).await, referrer);
        assert_eq!(of(&fixture, None, IndexPolicy::V2).await, None);
        assert_eq!(of(&fixture, None, IndexPolicy::None).await, None);
        // the caller's own word, and the operator's
        let given = Some((pushed, IndexOrigin::Given));
        assert_eq!(of(&fixture, Some(&pushed), IndexPolicy::V2).await, given);
        let local = fixture.create_local().await;
        let of_this_host = Some((local, IndexOrigin::Local));
        assert_eq!(of(&fixture, None, IndexPolicy::V2).await, of_this_host);
        assert_eq!(of(&fixture, None, IndexPolicy::None).await, None);
        let both = fixture.choose(Some(&pushed), IndexPolicy::None).await;
        let error = both.err().unwrap();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.report().contains("--index-policy"), "{error}");
    });
    let v2 = digest(&fixture.index(SOCI_V2, b"two", None));
    fixture.annotate(&v2.to_string());
    run(async {
        let bound = Some((v2, IndexOrigin::Annotation));
        assert_eq!(of(&fixture, None, IndexPolicy::V2).await, bound);
        assert_eq!(of(&fixture, None, IndexPolicy::None).await, None);
    });
}

/// An index that does not count is not asked for either.
#[test]
fn a_policy_keeps_the_registry_out_of_it() {
    let mut fixture = Fixture::new();
    fixture.add_v1(b"pushed");
    let registry = Registry::start();
    registry.add_layout("app", fixture.made.path()).unwrap();
    run(async {
        let source = open(&registry.reference("app:x")).await.unwrap();
        let image = Image::resolve(&source, None).await.unwrap();
        let asked = || registry.counters().kind(Request::Referrers).requests;
        for (policy, requests) in [
            (IndexPolicy::V2, 0),
            (IndexPolicy::None, 0),
            (IndexPolicy::Any, 2), // for SOCI indexes, and for compact ones
        ] {
            let choice = IndexChoice {
                digest: None,
                policy,
                ..Default::default()
            };
            let found = search::find(&image, &choice, &fixture.local()).await;
            assert_eq!(found.unwrap().index.is_some(), requests > 0);
            assert_eq!(asked(), requests);
        }
    });
}

#[test]
fn what_a_local_root_holds_is_listed_and_removed() {
    let fixture = Fixture::new();
    run(async {
        let local = fixture.local();
        assert!(local.list().await.unwrap().is_empty());
        assert_eq!(local.remove(&Digest::of(b"x")).await.unwrap(), None);
        let index = fixture.create_local().await;
        let list = local.list().await.unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!((list[0].digest, list[0].ztocs), (index, 1));
        assert_eq!(list[0].image, Some(digest(&fixture.manifest)));
        assert!(list[0].size > 1000);
        let collected = local.remove(&index).await.unwrap().unwrap();
        assert_eq!(collected.blobs, 3); // index, configuration, zTOC
        assert!(local.list().await.unwrap().is_empty());
        assert_eq!(fixture.found().await, (None, 0));
    });
}

#[test]
fn a_registry_is_asked_by_the_api_and_by_the_tag() {
    let mut fixture = Fixture::new();
    let old = fixture.add_v1(b"old");
    let new = fixture.add_v1(b"new");
    let entries = [old, new].map(|digest| {
        let size = fs::metadata(fixture.made.blob_path(&digest)).unwrap().len();
        json!({"mediaType": MANIFEST, "digest": digest, "size": size, "artifactType": SOCI_V1})
    });
    let list = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
    let image_digest = digest(&fixture.manifest);
    for api in [
        Referrers::Absent,
        Referrers::default(),
        Referrers::Present {
            per_answer: 1,
            filters: false,
        },
    ] {
        let registry = Registry::start();
        registry.add_layout("app", fixture.made.path()).unwrap();
        registry.set_referrers(api);
        let tag = format!("sha256-{}", image_digest.hex());
        let list = registry.add_manifest("app", Some(&tag), INDEX, list.to_string());
        run(async {
            let source = open(&registry.reference("app:x")).await.unwrap();
            let image = Image::resolve(&source, None).await.unwrap();
            assert_eq!(image.digest, image_digest);
            let find = async || {
                search::find(&image, &IndexChoice::default(), &fixture.local())
                    .await
                    .unwrap()
            };
            let index = find().await.index.unwrap();
            assert_eq!(
                (index.digest, index.origin),
                (new, IndexOrigin::Referrer),
                "{api:?}"
            );
            assert_eq!(
                index.fetch_ztoc(&fixture.layer()).await.unwrap(),
                &b"new"[..]
            );

            if api == Referrers::Absent {
                registry.remove("app", &new); // still listed
                let found = find().await;
                assert_eq!(found.index.unwrap().digest, old);
                assert_eq!(found.warnings.len(), 1);
                registry.remove("app", &list);
            } else {
                registry.remove("app", &new);
                assert_eq!(find().await.index.unwrap().digest, old);
            }
        });
    }
}

#[test]
fn a_registry_that_fails_is_an_error_and_not_no_index() {
    let mut fixture = Fixture::new();
    fixture.add_v1(b"one");
    let registry = Registry::start();
    registry.add_layout("app", fixture.made.path()).unwrap();
    let limits = Limits {
        control_patience: Duration::from_millis(300),
        ..Limits::default()
    };
    run(async {
        let reference = registry.reference("app:x").parse().unwrap();
        let source = Source::open_with(&reference, &Access::default(), limits)
            .await
            .unwrap();
        let image = Image::resolve(&source, None).await.unwrap();
        registry.fail(
            On::Kind(Request::Referrers),
            Fault::status(503),
            Times::UntilHealed,
        );
        let find = async || search::find(&image, &IndexChoice::default(), &fixture.local()).await;
        let Err(error) = find().await else {
            panic!("an index was found");
        };
        assert_eq!(error.kind(), Kind::Unavailable, "{}", error.report());
        registry.heal();
        assert!(
            find().await.unwrap().index.is_some(),
            "the failure is not remembered"
        );

        // not allowed to ask: then there is none, and the person is told
        registry.fail(
            On::Kind(Request::Referrers),
            Fault::status(403),
            Times::UntilHealed,
        );
        let found = find().await.unwrap();
        assert!(found.index.is_none());
        // of either kind of index
        assert_eq!(found.warnings.len(), 2, "{:?}", found.warnings);
    });
}
