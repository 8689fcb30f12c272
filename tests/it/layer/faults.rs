//! What a registry may do wrong, one by one: a read gets the right bytes, or EIO in the time that reads may wait, and the next one after
//! the fault is right. And spans that arrive in any order.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use socinbd::{
    layer::StoreOptions,
    nbd::{errno_of, protocol::NBD_EIO},
};

use super::fixture::{Lab, Layer, Random, assert_holds, complete, range, read};
use crate::support::{
    registry::{Fault, On, Registry, Times},
    until,
};

/// How long a read may wait that is going to fail.
const IO_TIMEOUT: Duration = Duration::from_secs(4);

/// What is said between giving up and the reader's hearing of it, on a machine with much else to do.
const MARGIN: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Bytes,
    Eio,
}

fn faults(other: &Registry) -> Vec<(&'static str, Fault, Times, Outcome)> {
    use Outcome::{Bytes, Eio};
    use Times::{Next, UntilHealed};
    let redirect = |location: String| Fault::Redirect { location };
    vec![
        (
            "delay",
            Fault::Delay(Duration::from_millis(50)),
            UntilHealed,
            Bytes,
        ),
        ("no answer", Fault::Hang, UntilHealed, Eio),
        ("closed twice", Fault::Close, Next(2), Bytes),
        ("closed", Fault::Close, UntilHealed, Eio),
        ("cut", Fault::Cut { after: 10_000 }, Next(3), Bytes),
        ("cut at once", Fault::Cut { after: 0 }, UntilHealed, Eio),
        ("truncated", Fault::Truncate { to: 3000 }, Next(2), Bytes),
        ("too long", Fault::TooLong { by: 5000 }, UntilHealed, Bytes),
        (
            "wrong range",
            Fault::WrongRange { shift: 512 },
            Next(1),
            Bytes,
        ),
        (
            "wrong range for ever",
            Fault::WrongRange { shift: 512 },
            UntilHealed,
            Bytes,
        ),
        ("wrong byte", Fault::WrongByte { at: 77 }, Next(1), Bytes),
        (
            "wrong byte for ever",
            Fault::WrongByte { at: 77 },
            UntilHealed,
            Eio,
        ),
        (
            "slow drip",
            Fault::Drip {
                bytes: 40_000,
                pause: Duration::from_millis(5),
            },
            UntilHealed,
            Bytes,
        ),
        ("stalled", Fault::Stall { after: 2000 }, UntilHealed, Eio),
        ("401", Fault::status(401), UntilHealed, Eio),
        ("403", Fault::status(403), UntilHealed, Eio),
        ("404", Fault::status(404), UntilHealed, Eio),
        ("429", Fault::status(429), Next(2), Bytes),
        ("500", Fault::status(500), Next(2), Bytes),
        ("503 for ever", Fault::status(503), UntilHealed, Eio),
        ("no ranges", Fault::IgnoreRange, UntilHealed, Bytes),
        (
            "redirect loop",
            redirect("{self}".to_owned()),
            UntilHealed,
            Eio,
        ),
        (
            "redirect to who has nothing",
            redirect(format!("http://{}/v2/none", other.host())),
            UntilHealed,
            Eio,
        ),
    ]
}

/// One fault, from the first read to recovery.
async fn suffer(layer: Layer, name: &str, fault: Fault, times: Times, outcome: Outcome) {
    // what is to come may take its time on a machine with much else to do
    let timeout = match outcome {
        Outcome::Bytes => MARGIN,
        Outcome::Eio => IO_TIMEOUT,
    };
    let options = StoreOptions {
        io_timeout: Some(timeout),
        ..StoreOptions::default()
    };
    let lab = Lab::with_options(layer, options);
    let disk = lab.disk().await;
    let place = lab.layer.place("data/big");
    let part = place.start..socinbd::units::DiskOffset(place.start.get() + 500_000);
    lab.registry.fail(On::Data, fault, times);
    let started = Instant::now();
    let result = read(&disk, part.clone()).await;
    let elapsed = started.elapsed();
    assert!(elapsed < timeout + MARGIN, "{name}: {elapsed:?}");
    let right = &lab.layer.files["data/big"][..500_000];
    match (result, outcome) {
        (Ok(bytes), Outcome::Bytes) => assert!(bytes == right, "{name}"),
        (Err(error), Outcome::Eio) => {
            assert_eq!(errno_of(&error), NBD_EIO, "{name}: {}", error.report());
            let degraded = disk.degraded().unwrap_or_default();
            assert!(degraded.contains("span"), "{name}: {degraded}");
        }
        (Ok(_), Outcome::Eio) => panic!("{name}: bytes"),
        (Err(error), Outcome::Bytes) => panic!("{name}: {}", error.report()),
    }
    lab.registry.heal();
    // a read may join a fetch that began before, and hear how that ended
    let healed = Instant::now();
    let bytes = loop {
        match read(&disk, place.clone()).await {
            Ok(bytes) => break bytes,
            Err(error) => assert!(healed.elapsed() < MARGIN, "{name}: {}", error.report()),
        }
    };
    assert!(bytes == lab.layer.files["data/big"], "{name}");
    until(name, || disk.degraded().is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_gives_right_bytes_or_eio_and_is_recovered_from() {
    let (other, layer) = (Registry::start(), Layer::new(0));
    let suffering = faults(&other)
        .into_iter()
        .map(|(name, fault, times, outcome)| {
            let one = tokio::spawn(suffer(layer.clone(), name, fault, times, outcome));
            async move { one.await.err().map(|_| name) }
        });
    let failed = futures_util::future::join_all(suffering).await;
    let failed: Vec<_> = failed.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{failed:?}");
    // the one that redirected was believed
    assert!(other.counters().total().requests > 0);
}

/// Readers of any ranges at once, while each answer takes its own time and some have to be asked for again: what each reads is what the
/// whole has there.
#[tokio::test(flavor = "multi_thread")]
async fn any_reads_are_right_while_spans_arrive_in_any_order() {
    for seed in 0..3 {
        let lab = Arc::new(Lab::new(Layer::new(0)));
        let disk = lab.disk().await;
        let mut random = Random::new(seed + 31);
        let mut wrong = 0;
        for _ in 0..40 {
            let delay = Duration::from_millis(random.below(25));
            let fault = match random.below(8) {
                // who gets wrong bytes three times believes it
                2 if wrong == 2 => Fault::Close,
                0 => Fault::Close,
                1 => Fault::Cut {
                    after: random.below(60_000),
                },
                2 => {
                    wrong += 1;
                    Fault::WrongByte {
                        at: random.below(20_000),
                    }
                }
                _ => Fault::Delay(delay),
            };
            lab.registry.fail(On::Data, fault, Times::Next(1));
        }
        let readers = (0..6).map(|reader| {
            let (disk, mut random) = (Arc::clone(&disk), Random::new(seed * 100 + reader));
            tokio::spawn(async move {
                let mut found = Vec::new();
                for _ in 0..15 {
                    let start = random.below(disk.size());
                    let limit = [1, 700, 5000, 300_000][random.below(4) as usize];
                    let length = (random.below(limit) + 1).min(disk.size() - start);
                    let bytes = read(&disk, range(start, length)).await.unwrap();
                    found.push((start as usize, bytes));
                }
                found
            })
        });
        let read = futures_util::future::join_all(readers).await;
        lab.registry.heal();
        complete(&disk).await;
        assert_holds(disk.path(), &lab.layer.files);
        let whole = std::fs::read(disk.path()).unwrap();
        for (start, bytes) in read.into_iter().flat_map(Result::unwrap) {
            assert!(bytes == whole[start..start + bytes.len()], "{start}");
        }
    }
}
