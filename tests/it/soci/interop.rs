//! With AWS's own `soci` command, where there is one: each reads what the other makes.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use socinbd::{
    engine::{
        Image,
        make::{
            convert, create,
            options::{ConvertOptions, CreateOptions},
        },
        open::{
            local_indexes::LocalIndexes,
            platforms::Platforms,
            policy::{IndexChoice, IndexOrigin},
            search,
            soci_index::SociIndex,
        },
        transfer::{copy, push},
    },
    layer::{Store, TableBytes},
    source::{Access, Destination},
};
use tempfile::TempDir;

use super::{
    make::{GZIP_LAYER, MadeLayout, PLAIN_LAYER},
    open, run,
};
use crate::layer::fixture::{Files, assert_holds, complete, files, tar};
use crate::support::docker_registry::DockerRegistry;

/// What AWS's tool says that its indexes are made by.
const AWS_BUILD_TOOL: &str = "AWS SOCI CLI v0.2";

const SPAN_SIZE: u64 = 64 << 10;

/// The `soci` command that the environment variable `SOCI` names. Where it names none, a test here says so and has nothing to test.
fn soci() -> Option<OsString> {
    let program = std::env::var_os("SOCI").filter(|program| !program.is_empty());
    if program.is_none() {
        eprintln!("not run: the environment variable SOCI names no `soci` command of AWS");
    }
    program
}

/// Runs a command to its end, and gives what it prints.
pub(super) fn output(command: &mut Command) -> Vec<u8> {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} does not run: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// An image of two layers, tagged `x`, and the files of each.
fn image() -> (MadeLayout, [Files; 2]) {
    let layers = [files(90), files(91)];
    let mut made = MadeLayout::new();
    let image = made.image(
        "amd64",
        &[
            (GZIP_LAYER, tar(&layers[0])),
            (PLAIN_LAYER, tar(&layers[1])),
        ],
    );
    made.tag(&image, "x");
    (made, layers)
}

async fn resolve(reference: &str) -> Image {
    let platform = "linux/amd64".parse().unwrap();
    Image::resolve(&open(reference).await.unwrap(), Some(&platform))
        .await
        .unwrap()
}

async fn find(image: &Image, root: &Path) -> SociIndex {
    let local = LocalIndexes::open(root).unwrap();
    let found = search::find(image, &IndexChoice::default(), &local)
        .await
        .unwrap();
    assert_eq!(found.warnings, [""; 0]);
    found.index.expect("an index is found")
}

/// All layers' files, fetched span by span with an index, are on the disks.
async fn assert_reads(image: &Image, reference: &str, index: &SociIndex, layers: &[Files]) {
    let root = TempDir::new().unwrap();
    let store = Store::open(root.path()).unwrap();
    let source = open(reference).await.unwrap();
    assert_eq!(image.layers.len(), layers.len());
    for (layer, files) in image.layers.iter().zip(layers) {
        let ztoc = index.fetch_ztoc(&layer.digest).await.unwrap();
        let table = index.ztoc(&layer.digest).unwrap();
        let disk = store
            .indexed(layer, &table, TableBytes::of(ztoc), &source)
            .await
            .unwrap();
        assert!(disk.span_counts().1 > 10);
        complete(&disk).await;
        assert_holds(disk.path(), files);
    }
}

async fn make(
    image: &Image,
    root: &Path,
    build_tool: &str,
) -> socinbd::engine::make::report::CreateReport {
    let options = CreateOptions {
        compact_span_size: None,
        span_size: SPAN_SIZE,
        min_layer_size: 0,
        build_tool: build_tool.to_owned(),
        ..CreateOptions::default()
    };
    let local = LocalIndexes::open(root).unwrap();
    create::create(image, &options, &local, &|_, _, _| {})
        .await
        .unwrap()
}

/// Needs AWS's `soci` command, and is not one of the tests that may never be skipped: without it, it says so and returns.
#[test]
fn an_image_that_aws_converted_is_read() {
    let Some(soci) = soci() else { return };
    let (made, layers) = image();
    let folder = TempDir::new().unwrap();
    let converted = folder.path().join("converted");
    output(
        Command::new(soci)
            .args(["convert", "--standalone", "--format", "oci-dir"])
            .args(["--platform", "linux/amd64", "--min-layer-size", "0"])
            .args(["--span-size", &SPAN_SIZE.to_string()])
            .args([made.path(), &converted]),
    );
    let reference = format!("oci:{}", converted.display());
    run(async {
        let image = resolve(&reference).await;
        let index = find(&image, folder.path()).await;
        assert_eq!((index.version, index.origin), (2, IndexOrigin::Annotation));
        assert_reads(&image, &reference, &index, &layers).await;
    });
}

/// As [`an_image_that_aws_converted_is_read`]: AWS's tool takes an image that has a compact index besides for what it is.
#[test]
fn an_image_with_a_compact_index_is_one_for_aws_too() {
    let Some(soci) = soci() else { return };
    let (made, layers) = image();
    let folder = TempDir::new().unwrap();
    let ours = folder.path().join("ours");
    let theirs = folder.path().join("theirs");
    let options = ConvertOptions {
        create: CreateOptions {
            span_size: SPAN_SIZE,
            min_layer_size: 0,
            compact_span_size: Some(SPAN_SIZE),
            ..CreateOptions::default()
        },
        platforms: Platforms::All,
        ..ConvertOptions::default()
    };
    run(async {
        let source = open(&made.reference("x")).await.unwrap();
        let to = format!("oci:{}:x", ours.display()).parse().unwrap();
        let to = Destination::open(&to, &Access::default()).await.unwrap();
        let local = LocalIndexes::open(folder.path()).unwrap();
        let report = convert::convert(&source, &to, &options, &local, &|_, _, _| {}).await;
        assert!(report.unwrap().images[0].compact_index.is_some());
    });
    output(
        Command::new(soci)
            .args(["convert", "--standalone", "--format", "oci-dir"])
            .args(["--platform", "linux/amd64", "--min-layer-size", "0"])
            .args(["--span-size", &(2 * SPAN_SIZE).to_string()])
            .args([&ours, &theirs]),
    );
    let reference = format!("oci:{}", theirs.display());
    run(async {
        let image = resolve(&reference).await;
        let index = find(&image, folder.path()).await;
        assert_eq!((index.version, index.origin), (2, IndexOrigin::Annotation));
        assert_reads(&image, &reference, &index, &layers).await;
    });
}

/// A containerd of our own, for `soci` finds layers there; stopped when it is dropped.
pub(super) struct Containerd {
    folder: TempDir,
    daemon: Child,
}

impl Containerd {
    fn start() -> Self {
        Self::start_with("")
    }

    /// With more of a configuration (TOML).
    pub(super) fn start_with(more: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().display();
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{path}/socket\"\n{more}"
        );
        std::fs::write(folder.path().join("config.toml"), config).unwrap();
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(folder.path().join("config.toml"))
            .stderr(Stdio::null())
            .spawn()
            .expect("containerd runs (package containerd)");
        let started = Self { folder, daemon };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !started.ctr(&["version"]).output().unwrap().status.success() {
            assert!(Instant::now() < deadline, "containerd does not answer");
        }
        started
    }

    /// The client, with these arguments.
    pub(super) fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.socket()).args(arguments);
        command
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// `soci` with its content below `root`, and these arguments.
    fn soci(&self, root: &Path, arguments: &[&str]) -> Vec<u8> {
        let mut command = Command::new(soci().unwrap());
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--content-store", "soci", "--root"])
            .arg(root)
            .args(arguments);
        output(&mut command)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // it may have ended
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Needs AWS's `soci` command and containerd, and is not one of the tests that may never be skipped: without the first it says so and
/// returns.
#[test]
fn each_reads_the_other_s_index_in_the_local_root() {
    if soci().is_none() {
        return;
    }
    let (made, layers) = image();
    let archive = made.packed("");
    let reference = format!("oci-archive:{}:x", archive.path().display());
    let containerd = Containerd::start();
    let path = archive.path().to_str().unwrap();
    output(&mut containerd.ctr(&[
        "images",
        "import",
        "--no-unpack",
        "--base-name",
        "lab/x",
        path,
    ]));
    let [ours, theirs, again] = [(); 3].map(|()| TempDir::new().unwrap());
    let image = run(resolve(&reference));

    // ours, read by theirs
    let report = run(make(&image, ours.path(), "socinbd"));
    containerd.soci(ours.path(), &["rebuild-db"]);
    let info = containerd.soci(ours.path(), &["index", "info", &report.index.to_string()]);
    let info: Value = serde_json::from_slice(&info).unwrap();
    let entries = info["layers"].as_array().unwrap();
    assert_eq!(entries.len(), layers.len());
    for ((entry, layer), files) in entries.iter().zip(&image.layers).zip(&layers) {
        let annotation = &entry["annotations"]["com.amazon.soci.image-layer-digest"];
        assert_eq!(*annotation, layer.digest.to_string());
        let ztoc = entry["digest"].as_str().unwrap();
        let info = containerd.soci(ours.path(), &["ztoc", "info", ztoc]);
        let info: Value = serde_json::from_slice(&info).unwrap();
        assert_eq!(info["build_tool"], "socinbd");
        let regular = info["files"].as_array().unwrap();
        let regular = regular.iter().filter(|file| file["type"] == "reg");
        assert_eq!(regular.count(), files.len() + 1, "one is there twice");
        for name in ["data/big", "data/100-block", "data/299"] {
            let to = ours.path().join("extracted");
            let to = to.to_str().unwrap();
            containerd.soci(
                ours.path(),
                &["ztoc", "get-file", "--output", to, ztoc, name],
            );
            assert!(std::fs::read(to).unwrap() == files[name], "{name}");
            std::fs::remove_file(to).unwrap();
        }
    }

    // theirs, read by ours
    let span_size = SPAN_SIZE.to_string();
    containerd.soci(
        theirs.path(),
        &[
            "create",
            "--platform",
            "linux/amd64",
            "--min-layer-size",
            "0",
            "--span-size",
            &span_size,
            "lab/x:x",
        ],
    );
    run(async {
        let index = find(&image, theirs.path()).await;
        assert_eq!((index.version, index.origin), (1, IndexOrigin::Local));
        assert_reads(&image, &reference, &index, &layers).await;
        // and it is the one that ours writes under its name
        let same = make(&image, again.path(), AWS_BUILD_TOOL).await;
        assert_eq!(same.index, index.digest);
    });
}

/// Two conversions of one layout, theirs and ours, and each converted again by the other.
#[test]
fn each_converts_as_the_other_and_takes_the_others_for_converted() {
    let Some(soci) = soci() else {
        return;
    };
    let (made, _) = image();
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let theirs = |from: &Path, to: &str| -> Value {
        output(
            Command::new(&soci)
                .env("TZ", "UTC")
                .args(["--root"])
                .arg(at(&format!("{to}.root")))
                .args(["convert", "--standalone", "--format", "oci-dir"])
                .args(["--min-layer-size", "0", "--span-size"])
                .arg(SPAN_SIZE.to_string())
                .args(["--platform", "linux/amd64"])
                .arg(from)
                .arg(at(to)),
        );
        let index = std::fs::read(at(to).join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        index["manifests"][0]["digest"].clone()
    };
    let ours = |from: &Path, to: &str| -> Value {
        let options = ConvertOptions {
            create: CreateOptions {
                span_size: SPAN_SIZE,
                min_layer_size: 0,
                build_tool: AWS_BUILD_TOOL.to_owned(),
                ..CreateOptions::default()
            },
            platforms: Platforms::These(vec!["linux/amd64".parse().unwrap()]),
            ..ConvertOptions::default()
        };
        let (from, to) = (
            format!("oci:{}", from.display()),
            format!("oci:{}", at(to).display()),
        );
        let report = run(async {
            let source = open(&from).await.unwrap();
            let to = Destination::open(&to.parse().unwrap(), &Access::default())
                .await
                .unwrap();
            let local = LocalIndexes::open(&at("ours.root")).unwrap();
            convert::convert(&source, &to, &options, &local, &|_, _, _| {})
                .await
                .unwrap()
        });
        report.digest.to_string().into()
    };
    let one = theirs(made.path(), "theirs");
    assert_eq!(ours(made.path(), "ours"), one);
    assert_eq!(theirs(&at("ours"), "again-theirs"), one);
    assert_eq!(ours(&at("theirs"), "again-ours"), one);
}

/// Their `push` sends an index that ours made to a registry without the referrers API, and ours finds it there; and the reverse.
#[test]
fn each_pushes_what_the_other_made() {
    if soci().is_none() {
        return;
    }
    let (made, layers) = image();
    let registry = DockerRegistry::start();
    let containerd = Containerd::start();
    let archive = made.packed("");
    let path = archive.path().to_str().unwrap().to_owned();
    let name = format!("{}/lab/x", registry.host);
    output(&mut containerd.ctr(&[
        "images",
        "import",
        "--no-unpack",
        "--base-name",
        &name,
        &path,
    ]));
    let tagged = format!("{name}:x");
    // the image itself
    run(async {
        let source = open(&made.reference("x")).await.unwrap();
        let to = Destination::open(&tagged.parse().unwrap(), &Access::default())
            .await
            .unwrap();
        copy::copy(&source, &to, &Default::default()).await.unwrap();
    });
    let [ours, theirs] = [(); 2].map(|()| TempDir::new().unwrap());
    let platform = ["--platform", "linux/amd64"];

    // made by ours, pushed by theirs
    let reference = format!("oci-archive:{path}:x");
    let image = run(resolve(&reference));
    let report = run(make(&image, ours.path(), "socinbd"));
    containerd.soci(ours.path(), &["rebuild-db"]);
    containerd.soci(
        ours.path(),
        &[&["push", "--plain-http"][..], &platform, &[&tagged]].concat(),
    );
    run(async {
        let image = resolve(&tagged).await;
        let index = find(&image, theirs.path()).await;
        assert_eq!(
            (index.digest, index.origin),
            (report.index, IndexOrigin::Referrer)
        );
        assert_reads(&image, &tagged, &index, &layers).await;
    });

    // made by theirs, pushed by ours: their content store is a layout as the state directory's is
    let span_size = SPAN_SIZE.to_string();
    containerd.soci(
        theirs.path(),
        &[
            &[
                "create",
                "--force",
                "--min-layer-size",
                "0",
                "--span-size",
                &span_size,
            ][..],
            &platform,
            &[&tagged],
        ]
        .concat(),
    );
    run(async {
        let image = resolve(&tagged).await;
        let source = open(&tagged).await.unwrap();
        let to = Destination::open(&tagged.parse().unwrap(), &Access::default())
            .await
            .unwrap();
        let local = LocalIndexes::open(theirs.path()).unwrap();
        let options = push::PushOptions {
            platforms: Platforms::These(vec!["linux/amd64".parse().unwrap()]),
            ..Default::default()
        };
        let report = push::push(&source, &to, &options, &local).await.unwrap();
        assert_eq!(report.images[0].outcome, "pushed");
        assert_eq!(
            report.warnings.len(),
            1,
            "ours is there: {:?}",
            report.warnings
        );
        let index = find(&image, ours.path()).await;
        assert_eq!(
            Some(index.digest),
            report.images[0].index,
            "the newest counts"
        );
        assert_reads(&image, &tagged, &index, &layers).await;
    });
}
