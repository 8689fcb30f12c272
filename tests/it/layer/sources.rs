//! Layers that several sources have, of which some fail: reads go on at the others, and soon do not ask those first that are down.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use socinbd::{
    layer::{Disk, StoreOptions, TableBytes},
    source::{Access, Source},
    units::DiskOffset,
};

use super::fixture::{Lab, Layer, REPOSITORY, assert_holds, complete, read, source};
use crate::support::{
    registry::{Fault, Link, On, Registry, Times},
    until,
};

/// What a read may take while it is not known yet that a source is down, on a machine with much else to do.
const SOON: Duration = Duration::from_secs(15);

/// A disk with two sources: the lab's own registry, and before it another one.
struct Two {
    lab: Lab,
    first: Registry,
    disk: Arc<Disk>,
}

impl Two {
    async fn new() -> Self {
        let options = StoreOptions {
            never_whole: true,
            io_timeout: Some(Duration::from_secs(60)),
            ..StoreOptions::default()
        };
        let lab = Lab::with_options(Layer::new(0), options);
        let disk = lab.disk().await;
        let first = Registry::start();
        first.add_blob(REPOSITORY, lab.layer.blob.clone());
        add(&lab, &source(&first).await).await;
        Self { lab, first, disk }
    }

    /// Reads one of fifteen parts of the large file, in an order that looks like no sequence; how long that took.
    async fn read(&self, part: u64) -> Duration {
        let place = self.lab.layer.place("data/big");
        let start = part * 4 % 15 * 200_000;
        let range =
            DiskOffset(place.start.get() + start)..DiskOffset(place.start.get() + start + 1000);
        let began = Instant::now();
        let bytes = read(&self.disk, range).await.unwrap();
        let right = &self.lab.layer.files["data/big"][start as usize..][..1000];
        assert!(bytes == right);
        began.elapsed()
    }

    fn asked_first(&self) -> u64 {
        self.first
            .counters()
            .blob(&self.lab.layer.layer.digest)
            .requests
    }
}

async fn add(lab: &Lab, source: &Source) {
    lab.store
        .indexed(
            &lab.layer.layer,
            &lab.layer.table,
            TableBytes::of(lab.layer.ztoc.clone()),
            source,
        )
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_costs_its_readers_little_and_is_soon_not_asked_first() {
    let drip = Fault::Drip {
        bytes: 1,
        pause: Duration::from_secs(1),
    };
    for (name, fault) in [
        ("says nothing", Fault::Hang),
        ("sends a byte a second", drip),
        ("stops in the middle", Fault::Stall { after: 5000 }),
        ("closes", Fault::Close),
        ("resets in the middle", Fault::Cut { after: 5000 }),
        ("503", Fault::status(503)),
        (
            "429",
            Fault::Status {
                code: 429,
                retry_after: Some("30".to_owned()),
            },
        ),
    ] {
        let two = Two::new().await;
        two.first.fail(On::Data, fault, Times::UntilHealed);
        for part in [0, 1] {
            let took = two.read(part).await;
            assert!(took < SOON, "{name}: {took:?}");
        }
        let down = two.disk.sources_down();
        assert_eq!(down.len(), 1, "{name}");
        assert!(down[0].source.contains(&two.first.host()), "{name}");
        let degraded = two.disk.degraded().unwrap_or_default();
        assert!(degraded.contains(&two.first.host()), "{name}: {degraded}");
        // the others know it: no reader waits for it any more, and it is tried again by nobody but the trial after each pause
        let asked = two.asked_first();
        let began = Instant::now();
        for part in 2..14 {
            two.read(part).await;
        }
        let trials = 2 + began.elapsed().as_secs();
        assert!(two.asked_first() - asked <= trials, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_does_not_exist_is_skipped() {
    let two = Two::new().await;
    let Two { lab, first, disk } = two;
    drop(first);
    complete(&disk).await;
    assert_holds(disk.path(), &lab.layer.files);

    // nor is one whose name does not resolve
    let lab = Lab::new(Layer::new(0));
    let disk = lab.disk().await;
    let nowhere = "nowhere.invalid/app:1".parse().unwrap();
    add(
        &lab,
        &Source::open(&nowhere, &Access::default()).await.unwrap(),
    )
    .await;
    let began = Instant::now();
    complete(&disk).await;
    assert!(began.elapsed() < 2 * SOON);
}

/// What a source says of one blob is not said of its others.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_without_the_blob_is_not_down() {
    for status in [404, 403, 401] {
        let two = Two::new().await;
        two.first
            .fail(On::Data, Fault::status(status), Times::UntilHealed);
        for part in 0..7 {
            two.read(part).await;
        }
        assert_eq!(two.disk.sources_down(), []);
        assert_eq!(two.disk.degraded(), None, "{status}");
        let asked = two.first.counters().log;
        let asked = asked.iter().filter(|it| it.status == status).count();
        assert!(asked < 7, "{status}: asked {asked} times");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_up_again_is_found_without_a_waiting_reader() {
    let two = Two::new().await;
    // the misses take longer than the first pause together, and none, by what is usual then, so long that another source is asked for it
    two.lab.registry.set_link(Link {
        round_trip: Duration::from_millis(200),
        ..Link::default()
    });
    two.first
        .fail(On::Data, Fault::status(503), Times::UntilHealed);
    for part in [0, 1, 2] {
        two.read(part).await;
    }
    assert_eq!(two.disk.sources_down().len(), 1);
    two.first.heal();
    for part in 3..14 {
        two.read(part).await;
    }
    until("it is up again", || two.disk.sources_down().is_empty()).await;
    assert_eq!(two.disk.degraded(), None);
    assert!(two.asked_first() > 0);
}

/// Other disks of the daemon know at once what one has learned of a host.
#[tokio::test(flavor = "multi_thread")]
async fn disks_share_the_health_of_a_host() {
    let two = Two::new().await;
    two.first.fail(On::Data, Fault::Hang, Times::UntilHealed);
    for part in [0, 1] {
        two.read(part).await;
    }
    let other = Layer::new(1);
    for registry in [&two.lab.registry, &two.first] {
        registry.add_blob(REPOSITORY, other.blob.clone());
    }
    let mut disk = None;
    for registry in [&two.lab.registry, &two.first] {
        let (table, source) = (TableBytes::of(other.ztoc.clone()), source(registry).await);
        let indexed = two
            .lab
            .store
            .indexed(&other.layer, &other.table, table, &source);
        disk = Some(indexed.await.unwrap());
    }
    let disk = disk.unwrap();
    assert_eq!(disk.sources_down().len(), 1);
    read(&disk, other.place("data/big")).await.unwrap();
    let asked = two.first.counters().blob(&other.layer.digest);
    assert_eq!(asked.bytes, 0);
}

/// A fetch that nobody waits for does not hold up who joins it.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_joins_a_background_fetch_does_not_wait_for_a_hanging_source() {
    let two = Two::new().await;
    two.first.fail(On::Data, Fault::Hang, Times::UntilHealed);
    let spans = two.lab.layer.spans.spans.len() as u32;
    two.lab.store.prefetch(vec![socinbd::layer::ListedSpans {
        disk: Arc::clone(&two.disk),
        spans: socinbd::units::SpanId(0)..socinbd::units::SpanId(spans),
    }]);
    until("the background has asked", || two.asked_first() > 0).await;
    assert!(two.read(3).await < SOON);
}
