//! Layers of a registry with mirrors, as `hosts.toml` of a node names them: spans come from the first host that sends them.

use std::{sync::Arc, time::Duration};

use socinbd::{
    layer::{Disk, StoreOptions, TableBytes},
    oci::Reference,
    source::{Access, Source},
    units::DiskOffset,
};

use super::fixture::{Lab, Layer, REPOSITORY, read};
use crate::support::{
    registry::{Fault, On, Registry, Times},
    until,
};

/// A registry that is reached by the hosts of its file only.
const REGISTRY: &str = "registry.test:5000";

/// A disk of a registry that has a mirror and a server: the lab's own registry.
struct Mirrored {
    lab: Lab,
    mirror: Registry,
    certs: tempfile::TempDir,
    disk: Arc<Disk>,
}

impl Mirrored {
    async fn new() -> Self {
        let options = StoreOptions {
            never_whole: true,
            io_timeout: Some(Duration::from_secs(60)),
            ..StoreOptions::default()
        };
        let lab = Lab::with_options(Layer::new(0), options);
        let mirror = mirror_of(&lab);
        let certs = tempfile::tempdir().unwrap();
        write_hosts(&certs, &mirror, &lab);
        let disk = attach(&lab, &certs).await;
        Self {
            lab,
            mirror,
            certs,
            disk,
        }
    }

    /// Reads one of fifteen parts of the large file, in an order that looks like no sequence.
    async fn read(&self, part: u64) {
        let place = self.lab.layer.place("data/big");
        let start = part * 4 % 15 * 200_000;
        let range =
            DiskOffset(place.start.get() + start)..DiskOffset(place.start.get() + start + 1000);
        let bytes = read(&self.disk, range).await.unwrap();
        assert!(bytes == self.lab.layer.files["data/big"][start as usize..][..1000]);
    }

    fn asked(&self, registry: &Registry) -> u64 {
        let digest = &self.lab.layer.layer.digest;
        registry.counters().blob(digest).requests
    }
}

fn mirror_of(lab: &Lab) -> Registry {
    let mirror = Registry::start();
    mirror.add_blob(REPOSITORY, lab.layer.blob.clone());
    mirror
}

fn write_hosts(certs: &tempfile::TempDir, mirror: &Registry, lab: &Lab) {
    let directory = certs.path().join(REGISTRY);
    std::fs::create_dir_all(&directory).unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{host}\"]\ncapabilities = [\"pull\"]\n[host.\"http://{host}\".header]\nx-key = \"secret-word\"\n",
        lab.registry.host(),
        host = mirror.host(),
    );
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
}

async fn attach(lab: &Lab, certs: &tempfile::TempDir) -> Arc<Disk> {
    let reference: Reference = format!("{REGISTRY}/{REPOSITORY}:1").parse().unwrap();
    let access = Access {
        hosts_dirs: vec![certs.path().to_owned()],
        ..Access::default()
    };
    let source = Source::open(&reference, &access).await.unwrap();
    let table = TableBytes::of(lab.layer.ztoc.clone());
    lab.store
        .indexed(&lab.layer.layer, &lab.layer.table, table, &source)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_stops_in_the_middle_is_followed_by_the_registry_and_is_down() {
    for fault in [Fault::Hang, Fault::status(503), Fault::Cut { after: 5000 }] {
        let it = Mirrored::new().await;
        it.read(0).await;
        assert_eq!(it.asked(&it.lab.registry), 0);
        assert!(it.asked(&it.mirror) > 0);
        it.mirror.fail(On::Data, fault, Times::UntilHealed);
        for part in [1, 2, 3] {
            it.read(part).await;
        }
        assert!(it.asked(&it.lab.registry) >= 3);
        let down = it.disk.sources_down();
        assert_eq!(down.len(), 1, "{down:?}");
        assert!(down[0].source.contains(&it.mirror.host()), "{down:?}");
        assert!(down[0].source.contains(REGISTRY), "{down:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_a_mirror_are_not_used_and_it_is_soon_not_asked() {
    let it = Mirrored::new().await;
    it.mirror
        .fail(On::Data, Fault::WrongByte { at: 1 }, Times::UntilHealed);
    for part in 0..7 {
        it.read(part).await;
    }
    assert!(it.asked(&it.lab.registry) >= 7);
    assert!(it.asked(&it.mirror) < 7, "{}", it.asked(&it.mirror));
    assert_eq!(it.disk.degraded(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_finds_the_mirror_by_its_file_and_no_secret_is_stored() {
    let mut it = Mirrored::new().await;
    it.read(0).await;
    let stored = std::fs::read_to_string(it.lab.folder().join("sources.json")).unwrap();
    assert!(stored.contains(it.certs.path().to_str().unwrap()));
    assert!(!stored.contains("secret-word") && !stored.contains(&it.mirror.host()));
    let lab = &mut it.lab;
    lab.reopen(it.disk).await;
    it.disk = lab.stored().unwrap();
    it.mirror.reset_counters();
    it.read(1).await;
    let asked = it.mirror.counters().log;
    assert!(!asked.is_empty());
    assert!(
        asked
            .iter()
            .all(|entry| entry.headers["x-key"] == "secret-word")
    );
    assert_eq!(it.asked(&it.lab.registry), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_file_counts_for_disks_that_are_open() {
    let it = Mirrored::new().await;
    it.read(0).await;
    let other = mirror_of(&it.lab);
    // what is malformed changes nothing
    let file = it.certs.path().join(REGISTRY).join("hosts.toml");
    std::fs::write(&file, "server = 1").unwrap();
    it.read(1).await;
    write_hosts(&it.certs, &other, &it.lab);
    let (mut part, it) = (2, &it);
    while it.asked(&other) == 0 && part < 15 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        it.read(part).await;
        part += 1;
    }
    assert!(it.asked(&other) > 0);
    assert_eq!(it.asked(&it.lab.registry), 0);
    until("nothing is down", || it.disk.sources_down().is_empty()).await;
}
