//! The three real images of `scripts/test-images`, attached lazily from a registry that counts, and streamed without an index: what is
//! seen is what GNU tar and umoci make of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use socinbd::{kernel::nbd, oci::Digest, tar::EntryKind};

use super::{
    Host,
    real::{Indexed, RealImage, entry_path},
};
use crate::support::{
    compare::{Options, assert_same},
    made_once,
    registry::Registry,
    succeeds,
};

/// An image that is indexed, served, and attached on a host of its own.
struct Attached {
    host: Host,
    image: RealImage,
    registry: Registry,
    /// Layers and their zTOCs, the lowest first; `None`: not indexed.
    layers: Vec<(Digest, Option<Digest>)>,
}

impl Attached {
    fn new(indexed: Indexed) -> Self {
        let (host, Indexed { image, ztocs }) = (Host::new(), indexed);
        let layers = image.layers().into_iter().map(|layer| layer.digest);
        let layers = layers.zip(ztocs).collect();
        let registry = image.serve();
        let attached = Self {
            host,
            image,
            registry,
            layers,
        };
        let mountpoint = attached.mountpoint();
        let reference = attached.registry.reference("app");
        let attachment = attached.host.attach(&reference, &mountpoint, &[]);
        assert!(attachment["index"].is_object(), "{attachment}");
        attached.nothing_was_fetched(&attachment);
        attached
    }

    fn mountpoint(&self) -> std::path::PathBuf {
        self.host.mountpoint("mnt")
    }

    /// Of indexed layers no byte, also after what looks at new devices has looked.
    fn nothing_was_fetched(&self, attachment: &Value) {
        let lazy = if nbd::is_available() { "nbd" } else { "fuse" };
        for layer in attachment["layers"].as_array().unwrap() {
            let digest = layer["digest"].as_str().unwrap().parse::<Digest>().unwrap();
            let is_indexed = self
                .layers
                .iter()
                .any(|(layer, ztoc)| *layer == digest && ztoc.is_some());
            assert_eq!(
                layer["device"],
                if is_indexed { lazy } else { "loop" },
                "{layer}"
            );
            let device = layer["device_path"].as_str().unwrap();
            Command::new("blkid")
                .args(["-p", device])
                .output()
                .expect("this test needs blkid (util-linux)");
        }
        Command::new("udevadm")
            .arg("settle")
            .status()
            .expect("this test needs udevadm (udev)");
        for (layer, _) in self.layers.iter().filter(|(_, ztoc)| ztoc.is_some()) {
            let count = self.registry.counters().blob(layer);
            assert_eq!(
                count.requests,
                0,
                "{layer}: {:?}",
                self.registry.counters().ranges(layer)
            );
        }
    }

    fn spans(&self) -> u64 {
        self.host.list()[0]["spans"][0].as_u64().unwrap()
    }

    /// Reads the longest file of an indexed layer that is still seen: exactly the spans that its bytes are in arrive.
    fn a_file_is_its_spans(&self, layer: usize, path: &Path) {
        let (digest, ztoc) = &self.layers[layer];
        let ztoc = self.image.ztoc(&ztoc.expect("the layer is indexed"));
        let entry = ztoc
            .entries
            .iter()
            .find(|entry| entry_path(&entry.name) == path)
            .unwrap();
        assert_eq!(entry.kind, EntryKind::Regular);
        let range = entry.data_offset.get()..entry.data_offset.get() + entry.size;
        let spans = ztoc.spans.spans.iter();
        let needed = spans.filter(|span| {
            span.uncompressed.start.get() < range.end && range.start < span.uncompressed.end.get()
        });
        let needed: Vec<_> = needed.collect();
        let bytes: u64 = needed
            .iter()
            .map(|span| span.compressed.end.get() - span.compressed.start.get())
            .sum();
        let before = self.spans();
        self.registry.reset_counters();
        let content = fs::read(self.mountpoint().join(path)).unwrap();
        assert_eq!(content.len() as u64, entry.size);
        assert_eq!(
            self.spans() - before,
            needed.len() as u64,
            "spans of {path:?}"
        );
        let count = self.registry.counters().blob(digest);
        // spans that touch within a byte are asked for together
        assert!(
            count.bytes <= bytes && count.bytes + needed.len() as u64 > bytes,
            "{count:?}, {bytes} of {} spans",
            needed.len()
        );
        assert_eq!(
            self.registry.counters().blobs(),
            count,
            "only this layer was asked"
        );
    }

    fn end(self) {
        self.host.detach(&self.mountpoint());
        assert_eq!(self.host.left_over(), [""; 0]);
    }
}

/// Links counted on an overlay are those of the lower layer, whatever whiteouts remove: plain unpacks are compared without them.
fn without_links() -> Options {
    Options {
        links: false,
        ..Options::default()
    }
}

/// umoci drops parts of a second, and xattrs without a value (Go's tar reads an empty PAX record as none).
fn as_umoci() -> Options {
    Options {
        nanoseconds: false,
        directory_times: false,
        ignored_xattrs: vec![b"user.empty".to_vec()],
        ..without_links()
    }
}

/// What umoci makes of an image, as a tar. umoci does so many system calls that it takes half a minute in the VM.
fn umoci(image: &RealImage) -> PathBuf {
    let made = made_once("umoci", |folder| {
        let bundle = folder.join("bundle");
        succeeds(
            Command::new("umoci")
                .args(["--log=error", "unpack", "--image"])
                .arg(format!("{}:latest", image.path().display()))
                .arg(&bundle),
        );
        tar("-c", &folder.join("tar"), &bundle.join("rootfs"));
        fs::remove_dir_all(bundle).unwrap();
    });
    made.join("tar")
}

/// Packs (`-c`) a folder, or unpacks (`-x`) into it, with all that there is.
fn tar(what: &str, tar: &Path, folder: &Path) {
    let usual = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-p"];
    succeeds(
        Command::new("tar")
            .arg(what)
            .args(["--format=posix", "-f"])
            .arg(tar)
            .args(usual)
            .arg("-C")
            .args([folder, Path::new(".")]),
    );
}

/// Attaches an image without an index: every layer is streamed, and complete.
fn streamed(name: &str, tree: &Path, options: &Options) {
    let (host, image) = (Host::new(), RealImage::of(name));
    let registry = image.serve();
    let mountpoint = host.mountpoint("mnt");
    let attachment = host.attach(&registry.reference("app"), &mountpoint, &[]);
    for layer in attachment["layers"].as_array().unwrap() {
        assert_eq!(layer["device"], "loop", "{layer}");
    }
    assert_eq!(host.list()[0]["state"], "complete");
    let fetched = registry.counters().blobs();
    assert_same(tree, &mountpoint, options);
    assert_eq!(
        registry.counters().blobs(),
        fetched,
        "a complete disk needs no source"
    );
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn small_with_every_odd_kind_of_file() {
    small(indexed_small());
}

const FINE: [&str; 4] = ["--min-layer-size", "0", "--span-size", "65536"];

/// The image, and what umoci makes of it.
pub fn indexed_small() -> (Indexed, PathBuf) {
    let indexed = RealImage::indexed("small", &FINE);
    let umoci = umoci(&indexed.image);
    (indexed, umoci)
}

/// As on this kernel, so in the VM.
pub fn small((indexed, umoci): (Indexed, PathBuf)) {
    let attached = Attached::new(indexed);
    // no zTOC can describe a file with holes
    let indexed: Vec<bool> = attached
        .layers
        .iter()
        .map(|(_, ztoc)| ztoc.is_some())
        .collect();
    assert_eq!(indexed, [true, true, false, true]);
    attached.a_file_is_its_spans(1, Path::new("srv/odd/big1"));
    let unpacked = attached.host.mountpoint("unpacked");
    attached.image.unpack(&unpacked);
    assert_same(&unpacked, &attached.mountpoint(), &without_links());
    let overlay = attached.image.overlay(&attached.host.mountpoint("plain"));
    assert_same(&overlay.0, &attached.mountpoint(), &Options::default());
    let as_umoci_unpacks = attached.host.mountpoint("umoci");
    tar("-x", &umoci, &as_umoci_unpacks);
    assert_same(&as_umoci_unpacks, &attached.mountpoint(), &as_umoci());
    drop(overlay);
    streamed("small", &unpacked, &without_links());
    attached.end();
}

#[test]
fn members_packed_in_every_way() {
    members(indexed_members());
}

pub fn indexed_members() -> Indexed {
    RealImage::indexed("members", &FINE)
}

/// As on this kernel, so in the VM.
pub fn members(indexed: Indexed) {
    let attached = Attached::new(indexed);
    let indexed: Vec<bool> = attached
        .layers
        .iter()
        .map(|(_, ztoc)| ztoc.is_some())
        .collect();
    assert_eq!(
        indexed,
        [true, true, true, false],
        "pigz, members, plain, zstd"
    );
    attached.a_file_is_its_spans(0, Path::new("usr/bin/perl"));
    attached.a_file_is_its_spans(1, Path::new("srv/data/text/299"));
    attached.a_file_is_its_spans(2, Path::new("srv/plain/noise"));
    let unpacked = attached.host.mountpoint("unpacked");
    // GNU tar only: umoci 0.4 does not know zstd
    attached.image.unpack(&unpacked);
    assert_same(&unpacked, &attached.mountpoint(), &without_links());
    streamed("members", &unpacked, &without_links());
    attached.end();
}

/// For this and the VM, as it takes long.
pub fn indexed_python() -> Indexed {
    RealImage::indexed("python", &["--min-layer-size", "0"])
}

#[test]
fn python_of_hundreds_of_megabytes() {
    let attached = Attached::new(indexed_python());
    attached.a_file_is_its_spans(0, Path::new("usr/bin/perl"));
    let unpacked = attached.host.mountpoint("unpacked");
    attached.image.unpack(&unpacked);
    assert_same(&unpacked, &attached.mountpoint(), &without_links());
    let metadata = Options {
        content: false,
        ..without_links()
    };
    streamed("python", &unpacked, &metadata);
    attached.end();
}
