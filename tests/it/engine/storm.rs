//! Many attaches and reads at once, at a registry that is slow to answer: what they cost is bounded.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use super::{Host, lifecycle::indexed};
use crate::support::{
    registry::{Fault, On, Registry, Times},
    seeded_noise,
    tars::Layer,
};

const IMAGES: u64 = 20;
/// Layers of each image, which no other image has.
const LAYERS: u64 = 5;
/// The time in which the registry answers a request.
const ANSWER: Duration = Duration::from_secs(2);

/// Requests at one registry, as documented.
const REQUESTS: u64 = 64;
/// Connections that are closed on one side and not yet on the other.
const CLOSING: u64 = 8;

/// What attaches may cost beside what their layers have while they are idle: threads that block on files and devices, connections, answers.
const MORE_THREADS: u64 = 60;
const MORE_DESCRIPTORS: u64 = REQUESTS + 100;
const MORE_KB: u64 = 60 << 10;

/// What a process has.
#[derive(Clone, Copy, Debug, Default)]
struct Has {
    threads: u64,
    descriptors: u64,
    anonymous_kb: u64,
}

impl Has {
    fn of(process: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.unwrap_or_default()
        };
        let descriptors = fs::read_dir(format!("/proc/{process}/fd"));
        Self {
            threads: field("Threads:"),
            descriptors: descriptors.map_or(0, Iterator::count) as u64,
            anonymous_kb: field("RssAnon:"),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            threads: self.threads.max(other.threads),
            descriptors: self.descriptors.max(other.descriptors),
            anonymous_kb: self.anonymous_kb.max(other.anonymous_kb),
        }
    }
}

/// The most that a process has at one time while this works.
fn most_during<T>(process: u32, work: impl FnOnce() -> T) -> (T, Has) {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut most = Has::of(process);
            while !ended.load(Ordering::Relaxed) {
                most = most.max(Has::of(process));
                thread::sleep(Duration::from_millis(20));
            }
            most
        });
        let worked = work();
        ended.store(true, Ordering::Relaxed);
        (worked, watching.join().unwrap())
    })
}

#[test]
fn many_attaches_and_reads_at_a_slow_registry_cost_a_bounded_number_of_everything() {
    let host = Host::new();
    let registry = Registry::start();
    let content = |image: u64, layer: u64| seeded_noise(150_000, image * LAYERS + layer + 1);
    for image in 0..=IMAGES {
        let layer = |layer| Layer::new().file(&format!("file-{layer}"), &content(image, layer));
        let layout = indexed(&host, (0..LAYERS).map(layer).collect());
        let name = format!("app-{image}");
        registry.add_layout(&name, layout.path()).unwrap();
    }
    let mountpoint = |image: u64| host.mountpoint(&format!("mnt-{image}"));
    let reference = |image: u64| registry.reference(&format!("app-{image}"));
    // the daemon, and what an image costs
    host.attach(&reference(0), &mountpoint(0), &["--device", "fuse"]);
    let daemon = host.daemon().unwrap();
    let before = Has::of(daemon);

    registry.fail(On::Any, Fault::Delay(ANSWER), Times::UntilHealed);
    let attach_all = || {
        let attaches: Vec<Child> = (1..=IMAGES)
            .map(|image| {
                let mountpoint = mountpoint(image);
                let attach = ["attach", "--device", "fuse", &reference(image)];
                let mut command = host.command(&attach);
                command.arg(mountpoint).stdout(Stdio::null());
                command.stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for attach in attaches {
            let output = attach.wait_with_output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{error}{}", host.log());
        }
    };
    let ((), attaching) = most_during(daemon, attach_all);
    let read_all = || {
        thread::scope(|scope| {
            for image in 1..=IMAGES {
                for layer in 0..LAYERS {
                    let file: PathBuf = mountpoint(image).join(format!("file-{layer}"));
                    let content = content(image, layer);
                    scope.spawn(move || assert!(fs::read(&file).unwrap() == content, "{file:?}"));
                }
            }
        });
    };
    let idle = Has::of(daemon);
    let ((), reading) = most_during(daemon, read_all);
    let connections = registry.most_connections();
    println!("{connections} connections; {before:?}, {attaching:?}, {idle:?}, {reading:?}");
    assert!(connections <= REQUESTS + CLOSING, "{connections}");
    // as many at a time as may be, or it is no test
    assert!(connections > REQUESTS / 2, "{connections}");
    for most in [attaching, reading] {
        let threads = before.threads.max(idle.threads) + MORE_THREADS;
        assert!(most.threads <= threads, "{most:?}, {threads}");
        let descriptors = before.descriptors.max(idle.descriptors) + MORE_DESCRIPTORS;
        assert!(most.descriptors <= descriptors, "{most:?}, {descriptors}");
        let kb = before.anonymous_kb.max(idle.anonymous_kb) + MORE_KB;
        assert!(most.anonymous_kb <= kb, "{most:?}, {kb} KB");
    }
    registry.heal();
    for image in 0..=IMAGES {
        host.detach(&mountpoint(image));
    }
}
