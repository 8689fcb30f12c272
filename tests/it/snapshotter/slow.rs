//! Registries that are too slow for a pull into disks: containerd is not held up. The snapshotter is in this process, with limits of its own.

use std::{fs, path::PathBuf, time::Duration};

use socinbd::{
    engine::Engine,
    snapshotter::{Pull, PullLimits, Rule, Server, SnapshotterOptions},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::Code;

use super::{
    client::{Answer, Client},
    image::Image,
};
use crate::support::{
    noise,
    registry::{Fault, On, Registry, Times},
    tars::Layer,
    wait,
};

/// Bytes of the layer's one file.
const SIZE: usize = 3_000_000;

struct Served {
    client: Client,
    _runtime: Runtime,
    folder: TempDir,
}

impl Served {
    fn start(pull_limits: PullLimits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [root, run_dir, socket] =
            ["root", "run", "snapshotter.sock"].map(|name| folder.path().join(name));
        let rule = Rule {
            pull: Pull::Disks,
            image: None,
            max_image_size: None,
            max_layer_size: None,
        };
        let options = SnapshotterOptions {
            rules: vec![rule],
            pull_limits,
            ..SnapshotterOptions::default()
        };
        let runtime = Runtime::new().unwrap();
        runtime.block_on(async {
            let engine = Engine::open(&root, &run_dir).await.unwrap();
            let addresses = [socket.clone()];
            let server = Server::bind(&engine, &addresses, options, None).await;
            tokio::spawn(server.unwrap().run());
        });
        Self {
            client: Client::connect(&socket).expect("it listens"),
            _runtime: runtime,
            folder,
        }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Asks for the extraction of the image's layer, and gives the options of its mount.
    fn prepare(&self, image: &Image, key: &str) -> Answer<Vec<String>> {
        let labels = image.labels(0);
        let labels: Vec<(&str, &str)> = labels
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let mut mounts = self.client.prepare(key, "", &labels)?;
        assert_eq!(mounts.len(), 1);
        Ok(mounts.remove(0).options)
    }
}

/// A registry that sends 100 kB a second of a layer, and a snapshotter with these limits: containerd pulls the layer, for this reason.
fn is_given_up(limits: PullLimits, reason: &str) {
    let registry = Registry::start();
    let layer = Layer::new().file("big", &noise(SIZE));
    let image = Image::push(&registry, "app", vec![layer], false);
    let drip = Fault::Drip {
        bytes: 1000,
        pause: Duration::from_millis(10),
    };
    registry.fail(On::DataOf(image.blobs[0]), drip, Times::UntilHealed);
    registry.reset_counters();
    let served = Served::start(limits);
    let options = served.prepare(&image, "slow").unwrap();
    assert!(options.contains(&"rw".to_owned()), "{options:?}");
    let record = served.root().join("snapshots/snapshotter/1/record.json");
    let record = fs::read_to_string(record).unwrap();
    assert!(record.contains(reason), "{record}");
    // it is not fetched to its end for nobody
    let drafts = served.root().join("layers/new");
    wait("the pull has ended", || {
        fs::read_dir(&drafts).unwrap().count() == 0
    });
    let fetched = registry.counters().blob(&image.blobs[0]).bytes;
    assert!(fetched < SIZE as u64, "{fetched}");
    // a registry that is fast again is soon used again
    registry.heal();
    let mut number = 0;
    wait("the layer is pulled into a disk", || {
        number += 1;
        let again = served.prepare(&image, &format!("again-{number}"));
        again.is_err_and(|(code, _)| code == Code::AlreadyExists)
    });
}

#[test]
fn containerd_pulls_a_layer_that_drips() {
    let limits = PullLimits {
        progress_time: Duration::from_millis(500),
        progress: 1 << 20,
        ..PullLimits::default()
    };
    is_given_up(limits, "bytes of layer sha256:");
}

#[test]
fn containerd_pulls_a_layer_that_takes_too_long() {
    let limits = PullLimits {
        time: Duration::from_millis(500),
        ..PullLimits::default()
    };
    is_given_up(limits, "it was not opened within 0.5 s");
}
