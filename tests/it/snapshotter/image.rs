//! An image in a registry, with an index, and its pull as containerd does it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use socinbd::{
    oci::Digest,
    snapshotter::{labels, proto::types::Mount},
};
use tonic::Code;

use super::{
    Snapshotter,
    client::{Client, Mounted},
};
use crate::{
    engine::Host,
    soci::make::{GZIP_LAYER, MANIFEST, MadeLayout, digest, gzip},
    support::{registry::Registry, tars::Layer},
};

/// The size of the spans of an index.
const SPAN_SIZE: u64 = 65_536;

/// An image of a registry.
pub struct Image {
    /// The reference, with a tag.
    pub reference: String,
    pub manifest: Digest,
    /// Blobs, lowest first.
    pub blobs: Vec<Digest>,
    /// Chain IDs.
    pub chain: Vec<Digest>,
    /// The SOCI index.
    pub index: Option<Digest>,
    /// Whether the labels name it.
    pub names_index: bool,
    tars: Vec<Vec<u8>>,
}

/// How the snapshotter has answered the extraction of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// Without an extraction.
    Lazy,
    /// By the mounts that containerd extracts to.
    Extracted,
    /// By a read-only mount.
    Staged,
}

impl Image {
    /// Pushes an image of these layers, lowest first, with an index or without.
    pub fn push(registry: &Registry, name: &str, layers: Vec<Layer>, indexed: bool) -> Self {
        let mut pushed = Self::push_alone(registry, name, layers);
        if indexed {
            pushed.make_index(0, SPAN_SIZE);
        }
        pushed
    }

    /// Pushes an image with an index whose spans have this size.
    pub fn push_with_span_size(
        registry: &Registry,
        name: &str,
        layers: Vec<Layer>,
        span_size: u64,
    ) -> Self {
        let mut pushed = Self::push_alone(registry, name, layers);
        pushed.make_index(0, span_size);
        pushed
    }

    /// Pushes an image whose index has the layers of this size and more, in bytes.
    pub fn push_with_smallest_layer(
        registry: &Registry,
        name: &str,
        layers: Vec<Layer>,
        smallest: u64,
    ) -> Self {
        let mut pushed = Self::push_alone(registry, name, layers);
        pushed.make_index(smallest, SPAN_SIZE);
        pushed
    }

    fn push_alone(registry: &Registry, name: &str, layers: Vec<Layer>) -> Self {
        let tars: Vec<Vec<u8>> = layers.into_iter().map(Layer::tar).collect();
        let mut made = MadeLayout::new();
        let packed: Vec<_> = tars.iter().map(|tar| (GZIP_LAYER, tar.clone())).collect();
        let image = made.image("amd64", &packed);
        made.tag(&image, "1");
        let reference = registry.reference(&format!("{name}:1"));
        registry.add_layout(name, made.path()).unwrap();
        Self::of(&made, &image, reference, tars)
    }

    /// Pushes an image with the diff IDs of another one, and layers of its own. It has no index; the labels name that of an image with the
    /// same layers.
    pub fn push_liar(registry: &Registry, name: &str, honest: &Self, layers: Vec<Layer>) -> Self {
        let own = Self::push(registry, name, layers, true);
        let made = MadeLayout::new();
        let diff_ids: Vec<Digest> = honest.tars.iter().map(|tar| Digest::of(tar)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = made.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let packed = own.tars.iter().map(|tar| made.blob(GZIP_LAYER, &gzip(tar)));
        let image = made.manifest(&config, &packed.collect::<Vec<_>>());
        for blob in [&config, &image] {
            let bytes = fs::read(made.blob_path(&digest(blob))).unwrap();
            registry.add_blob(name, bytes.clone());
            if blob == &image {
                registry.add_manifest(name, Some("liar"), MANIFEST, bytes);
            }
        }
        let reference = registry.reference(&format!("{name}:liar"));
        Self {
            index: own.index,
            names_index: true,
            ..Self::of(&made, &image, reference, own.tars)
        }
    }

    fn make_index(&mut self, smallest: u64, span_size: u64) {
        let [smallest, span_size] = [smallest, span_size].map(|size| size.to_string());
        let sizes = ["--min-layer-size", &smallest, "--span-size", &span_size];
        let create = ["--json", "index", "create", &self.reference, "--push"];
        let report = Host::new().run(&[&create[..], &sizes].concat());
        let report: Value = serde_json::from_str(&report).unwrap();
        self.index = Some(report["index"].as_str().unwrap().parse().unwrap());
    }

    /// The image of a descriptor.
    pub fn of(made: &MadeLayout, image: &Value, reference: String, tars: Vec<Vec<u8>>) -> Self {
        let json = |digest: &Digest| -> Value {
            serde_json::from_slice(&fs::read(made.blob_path(digest)).unwrap()).unwrap()
        };
        let manifest = json(&digest(image));
        let config = json(&digest(&manifest["config"]));
        let mut chain: Vec<Digest> = Vec::new();
        for diff_id in config["rootfs"]["diff_ids"].as_array().unwrap() {
            let diff_id = diff_id.as_str().unwrap();
            chain.push(match chain.last() {
                None => diff_id.parse().unwrap(),
                Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
            });
        }
        let blobs = manifest["layers"].as_array().unwrap().iter().map(digest);
        Self {
            reference,
            manifest: digest(image),
            blobs: blobs.collect(),
            chain,
            index: None,
            names_index: false,
            tars,
        }
    }

    /// The labels that containerd gives to the extraction of a layer.
    pub fn labels(&self, layer: usize) -> Vec<(String, String)> {
        let mut found = vec![
            (labels::TARGET, self.chain[layer].to_string()),
            (labels::IMAGE, self.reference.clone()),
            (labels::MANIFEST, self.manifest.to_string()),
            (labels::LAYER, self.blobs[layer].to_string()),
        ];
        if layer > 0 {
            found.push((labels::PARENT_CHAIN, self.chain[layer - 1].to_string()));
        }
        if let Some(index) = self.index.filter(|_| self.names_index) {
            found.push((labels::INDEX, index.to_string()));
        }
        found
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// Pulls the image as containerd does it for one of its namespaces, and gives how each layer was pulled, and the name of the topmost
    /// snapshot in the snapshotter.
    pub fn pull(&self, snapshotter: &Snapshotter, namespace: &str) -> (Vec<Pulled>, String) {
        let client = snapshotter.client();
        let (mut parent, mut pulled) = (String::new(), Vec::new());
        for layer in 0..self.blobs.len() {
            let how = self.pull_layer(snapshotter, &client, namespace, layer, &parent);
            (parent, pulled) = (how.1, {
                pulled.push(how.0);
                pulled
            });
        }
        (pulled, parent)
    }

    /// The same for one layer on the snapshot of those below it.
    pub fn pull_layer(
        &self,
        snapshotter: &Snapshotter,
        client: &Client,
        namespace: &str,
        layer: usize,
        parent: &str,
    ) -> (Pulled, String) {
        let labels = self.labels(layer);
        let labels: Vec<(&str, &str)> = labels
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let chain = &self.chain[layer];
        let key = format!("{namespace}/{layer}/extract-1-a {chain}");
        match client.prepare(&key, parent, &labels) {
            Ok(mounts) => {
                let name = format!("{namespace}/{layer}/{chain}");
                let how = if mounts[0].options.iter().any(|option| option == "ro") {
                    Pulled::Staged
                } else {
                    self.extract(snapshotter, layer, &mounts);
                    Pulled::Extracted
                };
                client.commit(&name, &key, "", &labels).unwrap();
                (how, name)
            }
            Err((Code::AlreadyExists, _)) => {
                let filter = format!("labels.\"{}\"=={chain},parent=={parent:?}", labels::TARGET);
                let found = client.names(&[&filter]);
                assert_eq!(found.len(), 1, "{found:?}");
                (Pulled::Lazy, found.into_iter().next().unwrap())
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Unpacks a layer as containerd does.
    pub fn extract(&self, snapshotter: &Snapshotter, layer: usize, mounts: &[Mount]) {
        let place = snapshotter.host.mountpoint("extract");
        let mounted = Mounted::at(place, mounts);
        let tar = tempfile::NamedTempFile::new().unwrap();
        fs::write(tar.path(), &self.tars[layer]).unwrap();
        let status = std::process::Command::new("tar")
            .args(["--extract", "--same-owner", "--file"])
            .arg(tar.path())
            .arg("--directory")
            .arg(mounted.path())
            .status();
        assert!(status.unwrap().success());
    }
}

/// The root of a container on a snapshot, until this is dropped.
pub struct Container {
    pub root: Mounted,
    socket: PathBuf,
    key: String,
}

impl Container {
    pub fn start(snapshotter: &Snapshotter, name: &str, parent: &str) -> Self {
        let client = snapshotter.client();
        let key = format!("default/9/{name}");
        let mounts = client.prepare(&key, parent, &[]);
        let mounts = mounts.unwrap_or_else(|error| panic!("{error:?}\n{}", snapshotter.host.log()));
        Self {
            root: Mounted::at(snapshotter.host.mountpoint(name), &mounts),
            socket: snapshotter.socket(),
            key,
        }
    }

    /// Unmounts the root and removes the snapshot.
    pub fn end(self) {
        let Self { root, socket, key } = self;
        drop(root);
        let client = Client::connect(&socket).expect("it listens");
        client.remove(&key).unwrap();
    }
}

/// The mounts of lazy layers.
pub fn layer_mounts(host: &Host) -> Vec<PathBuf> {
    let below = host.root().join("snapshots");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let places = places.map(PathBuf::from);
    places
        .filter(|place| place.starts_with(&below) && place != Path::new(""))
        .collect()
}
