//! Images attached on the kernel's nbd driver, in the VM.

use std::{
    fs,
    net::Shutdown,
    os::unix::{fs::FileExt, net::UnixDatagram},
    path::Path,
    process::Child,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::Value;
use socinbd::kernel::{blockdev, dm, loopdev, nbd};

use super::{Host, images};
use crate::{
    kernel::eventually,
    soci::make::{GZIP_LAYER, MadeLayout, tar_of},
    support::{
        registry::{Fault, On, Registry, Times},
        unmount,
        vm::{in_vm, in_vm_asleep, in_vm_together},
    },
};

/// An image of layers with a file each, indexed with small spans, and served.
pub(super) fn served(host: &Host, files: &[(&str, Vec<u8>)]) -> (MadeLayout, Registry) {
    let mut layout = MadeLayout::new();
    let layers: Vec<_> = files
        .iter()
        .map(|(name, content)| (GZIP_LAYER, tar_of(&[(name, content)])))
        .collect();
    let image = layout.image("amd64", &layers);
    layout.tag(&image, "latest");
    let reference = layout.reference("");
    host.run(&[
        "index",
        "create",
        &reference,
        "--span-size",
        "65536",
        "--min-layer-size",
        "0",
    ]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    (layout, registry)
}

fn every_layer_is_on_nbd(attachment: &Value) {
    for layer in attachment["layers"].as_array().unwrap() {
        assert_eq!(layer["device"], "nbd", "{layer}");
        assert!(backing(layer).starts_with("nbd"), "{layer}");
    }
}

/// The name of the device that the daemon answers: below the mapped one, where there is one.
fn backing(layer: &Value) -> &str {
    let path = layer["backing"].as_str();
    let path = path.or(layer["device_path"].as_str()).unwrap();
    path.strip_prefix("/dev/").unwrap()
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// No mount, device or record, whoever's: the VM is this test's alone.
fn nothing_left(host: &Host) {
    assert_eq!(host.left_over(), [""; 0]);
    nothing_left_soon(host);
}

/// As [`nothing_left`], after a daemon died: what it left the kernel takes down by itself, on a thread of its own.
fn nothing_left_soon(host: &Host) {
    eventually(|| host.left_over().is_empty());
    eventually(|| nbd::connected().unwrap().is_empty());
    eventually(|| dm::mapped().unwrap().is_empty());
    eventually(|| loopdev::attached().unwrap().is_empty());
}

/// Tests that take a few seconds each.
const SHORT: [&str; 6] = [
    "a_complete_image_is_read_without_its_daemon",
    "a_device_that_was_asked_for_stays",
    "a_killed_daemon_is_cleaned_up_after",
    "devices_of_a_killed_daemon_are_served_by_the_one_that_its_keeper_starts",
    "twenty_layers_at_once",
    "without_nbd_a_fuse_file_is_left_for_the_disk_as_well",
];

#[test]
fn small_on_the_kernels_nbd() {
    let made = images::indexed_small();
    in_vm(|| {
        images::small(made);
        eventually(|| nbd::connected().unwrap().is_empty());
    });
}

#[test]
fn members_on_the_kernels_nbd() {
    let made = images::indexed_members();
    in_vm(|| {
        images::members(made);
        eventually(|| nbd::connected().unwrap().is_empty());
    });
}

#[test]
fn python_on_the_kernels_nbd() {
    let image = images::indexed_python().image;
    in_vm(|| {
        let host = Host::new();
        let registry = image.serve();
        let mountpoint = host.mountpoint("mnt");
        let reference = registry.reference("app");
        let attachment = host.attach(&reference, &mountpoint, &["--device", "nbd"]);
        every_layer_is_on_nbd(&attachment);
        // all metadata is there without a byte of the layers
        let content = Path::new("usr/lib/python3/dist-packages/numpy/core");
        let entries = image.check_entries(&mountpoint, None);
        assert!(entries > 10_000, "{entries} entries");
        let layers = image.layers();
        let fetched = || {
            layers
                .iter()
                .map(|layer| registry.counters().blob(&layer.digest).bytes)
                .sum::<u64>()
        };
        assert_eq!(fetched(), 0);
        assert!(image.check_entries(&mountpoint, Some(content)) > 50);
        let size: u64 = layers.iter().map(|layer| layer.size).sum();
        assert!(
            (1..size / 4).contains(&fetched()),
            "{} of {size}",
            fetched()
        );
        host.detach(&mountpoint);
        let output = host.run(&["run", &reference]);
        assert!(output.starts_with("hello from numpy"), "{output}");
        let command = "import numpy; print(numpy.arange(4).sum())";
        let output = host.run(&["run", &reference, "--", "python3", "-c", command]);
        assert_eq!(output, "6\n");
        nothing_left(&host);
    });
}

#[test]
fn twenty_layers_at_once() {
    in_vm_together(&SHORT, || {
        let host = Host::new();
        let content = |number: usize| format!("{number}").repeat(20_000).into_bytes();
        let names: Vec<String> = (0..20).map(|number| format!("file-{number}")).collect();
        let files: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(number, name)| (name.as_str(), content(number)))
            .collect();
        let (_layout, registry) = served(&host, &files);
        let mountpoint = host.mountpoint("mnt");
        let attachment = host.attach(&registry.reference("app"), &mountpoint, &[]);
        every_layer_is_on_nbd(&attachment);
        assert_eq!(nbd::connected().unwrap().len(), 20);
        for (name, content) in &files {
            assert!(
                fs::read(mountpoint.join(name)).unwrap() == *content,
                "{name}"
            );
        }
        host.detach(&mountpoint);
        nothing_left(&host);
    });
}

/// The reads of all files have brought all of the image, and it has been checked: its devices have moved to loop devices.
fn has_moved(host: &Host, mountpoint: &Path, kind: &str) {
    host.wait_complete(mountpoint);
    let layers = || host.list()[0]["layers"].as_array().unwrap().clone();
    eventually(|| layers().iter().all(|layer| layer["device"] == "loop"));
    are_said_to_have_moved(host, mountpoint, kind);
    assert_eq!(nbd::connected().unwrap(), []);
}

/// What `list` and `why` say, whether a daemon lives or not.
fn are_said_to_have_moved(host: &Host, mountpoint: &Path, kind: &str) {
    let why = host.run(&["--json", "why", mountpoint.to_str().unwrap()]);
    let why: Value = serde_json::from_str(&why).unwrap();
    for said in [&host.list()[0], &why[0]] {
        for layer in said["layers"].as_array().unwrap() {
            let device = layer["device_path"].as_str().unwrap();
            assert!(device.starts_with("/dev/dm-"), "{layer}");
            assert_eq!(layer["device"], "loop", "{layer}");
            let why = layer["why"].as_str().unwrap();
            assert!(why.starts_with("the disk became complete"), "{layer}");
            assert!(why.contains(kind), "{layer}");
        }
    }
}

#[test]
fn a_complete_image_is_read_without_its_daemon() {
    in_vm_together(&SHORT, || {
        let host = Host::new();
        let content = |byte: u8| vec![byte; 300_000];
        let files = [("one", content(b'1')), ("two", content(b'2'))];
        let (_layout, registry) = served(&host, &files);
        let mountpoint = host.mountpoint("mnt");
        let reference = registry.reference("app");
        let check = || {
            drop_caches();
            for (name, content) in &files {
                assert!(
                    fs::read(mountpoint.join(name)).unwrap() == *content,
                    "{name}"
                );
            }
        };
        every_layer_is_on_nbd(&host.attach(&reference, &mountpoint, &[]));
        // a reader that holds a file while its device moves
        let open = fs::File::open(mountpoint.join("one")).unwrap();
        check();
        has_moved(&host, &mountpoint, "nbd");
        check();
        let read_ahead = blockdev::read_ahead(&dm::mapped().unwrap()[0].name);
        assert_eq!(read_ahead.unwrap(), 128);
        drop_caches();
        let mut block = [0; 4096];
        open.read_exact_at(&mut block, 200_000).unwrap();
        assert!(block == [b'1'; 4096]);
        drop(open);
        // who comes now has the same devices, and so the same pages in memory
        let again = host.mountpoint("again");
        let attachment = host.attach(&reference, &again, &[]);
        assert_eq!(dm::mapped().unwrap().len(), 2);
        for layer in attachment["layers"].as_array().unwrap() {
            let device = layer["device_path"].as_str().unwrap();
            assert!(device.starts_with("/dev/dm-"), "{layer}");
        }
        host.detach(&again);
        check();

        host.kill_daemon();
        assert_eq!(host.list()[0]["state"], "dead");
        are_said_to_have_moved(&host, &mountpoint, "nbd");
        check();
        // another daemon takes nothing away from it, and serves the same layers beside it
        let other = host.mountpoint("other");
        host.attach(&reference, &other, &[]);
        check();
        host.detach(&other);
        check();
        host.detach(&mountpoint);
        nothing_left_soon(&host);
    });
}

#[test]
fn without_nbd_a_fuse_file_is_left_for_the_disk_as_well() {
    in_vm_together(&SHORT, || {
        let output = std::process::Command::new("rmmod").arg("nbd").output();
        assert!(output.unwrap().status.success());
        let host = Host::new();
        let content = b"content".repeat(50_000);
        let (_layout, registry) = served(&host, &[("file", content.clone())]);
        let mountpoint = host.mountpoint("mnt");
        let attachment = host.attach(&registry.reference("app"), &mountpoint, &[]);
        assert_eq!(attachment["layers"][0]["device"], "fuse");
        assert!(fs::read(mountpoint.join("file")).unwrap() == content);
        has_moved(&host, &mountpoint, "no nbd");
        host.kill_daemon();
        drop_caches();
        assert!(fs::read(mountpoint.join("file")).unwrap() == content);
        host.detach(&mountpoint);
        nothing_left_soon(&host);
    });
}

#[test]
fn a_device_that_was_asked_for_stays() {
    in_vm_together(&SHORT, || {
        for kind in ["nbd", "fuse"] {
            let host = Host::new();
            let content = b"content".repeat(50_000);
            let (_layout, registry) = served(&host, &[("file", content.clone())]);
            let mountpoint = host.mountpoint("mnt");
            let reference = registry.reference("app");
            let asked = host.attach(&reference, &mountpoint, &["--device", kind]);
            assert_eq!(dm::mapped().unwrap(), []);
            // one of the same disk that may move is another one
            let beside = host.mountpoint("beside");
            let auto = host.attach(&reference, &beside, &[]);
            let path = |attachment: &Value| attachment["layers"][0]["device_path"].clone();
            assert_ne!(path(&asked), path(&auto));
            assert!(fs::read(mountpoint.join("file")).unwrap() == content);
            host.wait_complete(&mountpoint);
            let kinds = || -> Vec<(Value, Value)> {
                let layers = host.list().into_iter().map(|it| it["layers"][0].clone());
                let mut kinds: Vec<_> = layers
                    .map(|layer| (layer["device_path"].clone(), layer["device"].clone()))
                    .collect();
                kinds.sort_by_key(|(path, _)| *path != asked["layers"][0]["device_path"]);
                kinds
            };
            eventually(|| kinds()[1] == (path(&auto), "loop".into()));
            assert_eq!(kinds()[0], (path(&asked), kind.into()));
            host.detach(&beside);
            host.detach(&mountpoint);
            nothing_left(&host);
        }
    });
}

/// A daemon whose service manager keeps no descriptors, until this is dropped: the kernel's timeout is short.
struct Unkept {
    daemon: Child,
    manager: UnixDatagram,
}

impl Unkept {
    fn start(host: &Host) -> Self {
        fs::create_dir_all(host.run_dir()).unwrap();
        let path = host.mountpoint("manager").join("socket");
        let manager = UnixDatagram::bind(&path).unwrap();
        let mut daemon = host.command(&["--log", "info", "daemon", "--log-file"]);
        daemon.arg(host.run_dir().join("daemon.log"));
        let daemon = daemon.env("NOTIFY_SOCKET", &path).spawn().unwrap();
        let unkept = Self { daemon, manager };
        let receiver = unkept.manager.try_clone().unwrap();
        std::thread::spawn(move || while receiver.recv(&mut [0; 4096]).is_ok_and(|it| it > 0) {});
        eventually(|| host.run_dir().join("socinbd.sock").exists());
        unkept
    }
}

impl Drop for Unkept {
    fn drop(&mut self) {
        self.manager.shutdown(Shutdown::Both).unwrap();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// The kernel drops a connection whose answer takes longer than its timeout, and asks again on a new one.
#[test]
fn a_fetch_that_takes_longer_than_the_kernels_timeout() {
    in_vm_asleep(|| {
        let host = Host::new();
        let _daemon = Unkept::start(&host);
        let content: Vec<u8> = (0..400_000_u32)
            .flat_map(|number| number.to_le_bytes())
            .collect();
        let (_layout, registry) = served(&host, &[("file", content.clone())]);
        let mountpoint = host.mountpoint("mnt");
        let attachment = host.attach(&registry.reference("app"), &mountpoint, &[]);
        every_layer_is_on_nbd(&attachment);
        let name = backing(&attachment["layers"][0]);
        let read_ahead = || blockdev::read_ahead(name).unwrap();
        let usual = read_ahead();
        assert!((16..128).contains(&usual), "the disk is not complete");
        blockdev::set_read_ahead(name, None, 20).unwrap();
        registry.fail(
            On::Data,
            Fault::Delay(Duration::from_secs(14)),
            Times::Next(1),
        );
        let began = Instant::now();
        let mut block = [0; 4096];
        let file = fs::File::open(mountpoint.join("file")).unwrap();
        file.read_exact_at(&mut block, 40_960).unwrap();
        assert!(block[..] == content[40_960..45_056]);
        assert!(
            began.elapsed() >= Duration::from_secs(10),
            "the fault was not met"
        );
        eventually(|| read_ahead() == usual);
        drop(file);
        assert!(
            fs::read(mountpoint.join("file")).unwrap() == content,
            "the device still works"
        );
        let log = fs::read_to_string(host.run_dir().join("daemon.log")).unwrap();
        assert!(
            log.contains("replaced an nbd connection that the kernel had dropped"),
            "{log}"
        );
        host.detach(&mountpoint);
        nothing_left(&host);
    });
}

#[test]
fn a_killed_daemon_is_cleaned_up_after() {
    in_vm_together(&SHORT, || {
        let host = Host::new();
        let content = b"what is read".repeat(40_000);
        let (_layout, registry) = served(&host, &[("file", content.clone())]);
        let mountpoint = host.mountpoint("mnt");
        let reference = registry.reference("app");
        every_layer_is_on_nbd(&host.attach(&reference, &mountpoint, &[]));
        host.kill_daemon();
        assert_eq!(host.list()[0]["state"], "dead");
        host.detach(&mountpoint);
        nothing_left_soon(&host);
        host.attach(&reference, &mountpoint, &[]);
        assert!(fs::read(mountpoint.join("file")).unwrap() == content);
        // and when nobody detaches what is dead
        host.kill_daemon();
        let other = host.mountpoint("other");
        host.attach(&reference, &other, &[]);
        assert!(fs::read(other.join("file")).unwrap() == content);
        host.detach(&mountpoint);
        host.detach(&other);
        nothing_left_soon(&host);
    });
}

/// A daemon that is killed after the kernel has connected a device, and before anything else knows it, leaves a device that nobody can
/// serve. The next daemon must not open it.
#[test]
fn a_device_that_lost_its_connections_before_it_had_a_record_holds_nothing_up() {
    in_vm(|| {
        let host = Host::new();
        let (_layout, registry) = served(&host, &[("file", vec![3; 50_000])]);
        let mountpoint = host.mountpoint("mnt");
        let reference = registry.reference("app");
        host.attach(&reference, &mountpoint, &["--device", "nbd"]);
        let device = nbd::connected().unwrap().remove(0);
        host.detach(&mountpoint);
        eventually(|| nbd::connected().unwrap().is_empty());
        let (kernel_end, server) = nbd::socket_pair().unwrap();
        drop(server);
        let options = nbd::NbdOptions {
            timeout: Duration::from_secs(10),
            dead: Duration::from_secs(600),
            backend_id: device.backend_id.unwrap(),
        };
        nbd::connect(1 << 20, &[kernel_end], &options)
            .unwrap()
            .keep();
        host.kill_daemon();
        host.attach(&reference, &mountpoint, &["--device", "nbd"]);
        assert_eq!(fs::read(mountpoint.join("file")).unwrap(), [3; 50_000]);
        host.detach(&mountpoint);
        nothing_left_soon(&host);
    });
}

/// The kernel holds requests back when their connections are gone; the next daemon gives the devices new ones.
#[test]
fn readers_of_a_killed_daemon_go_on_when_the_next_one_starts() {
    in_vm_asleep(|| {
        let host = Host::new();
        let content: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();
        let (_layout, registry) = served(
            &host,
            &[("file", content.clone()), ("two", vec![2; 50_000])],
        );
        let mountpoint = host.mountpoint("mnt");
        let reference = registry.reference("app");
        every_layer_is_on_nbd(&host.attach(&reference, &mountpoint, &[]));
        let id = host.list()[0]["id"].clone();
        for round in 0..3_u64 {
            registry.fail(On::Data, Fault::Hang, Times::UntilHealed);
            let before = registry.counters().total().requests;
            // the first only: it waits for the kernel's timeout
            let waits = (round == 0).then(|| reader(&mountpoint.join("file"), 40_960));
            if waits.is_some() {
                eventually(|| registry.counters().total().requests > before);
            }
            host.kill_daemon();
            registry.heal();
            let comes_later = reader(&mountpoint.join("file"), 200_704 + round * 300_000);
            // it starts a daemon
            let other = host.mountpoint("other");
            host.attach(&reference, &other, &[]);
            for reader in waits.into_iter().chain([comes_later]) {
                let (read, time) = reader.join().unwrap();
                println!("a reader waited {time:?}");
                read.unwrap();
            }
            let rows = host.list();
            assert_eq!(rows.len(), 2);
            assert!(rows.iter().all(|row| row["state"] != "dead"), "{rows:?}");
            assert!(rows.iter().any(|row| row["id"] == id), "{rows:?}");
            host.detach(&other);
            drop_caches();
        }
        assert!(fs::read(mountpoint.join("file")).unwrap() == content);
        // complete layers as well, whose devices have moved
        assert!(fs::read(mountpoint.join("two")).unwrap() == [2; 50_000]);
        has_moved(&host, &mountpoint, "nbd");
        host.kill_daemon();
        let other = host.mountpoint("other");
        host.attach(&reference, &other, &[]);
        let rows = host.list();
        assert!(
            rows.iter().all(|row| row["state"] == "complete"),
            "{rows:?}"
        );
        assert_eq!(
            dm::mapped().unwrap().len(),
            2,
            "the layers are shared: {:?}, {rows:?}, {}",
            dm::mapped(),
            host.log()
        );
        // unmounted while no daemon ran
        host.kill_daemon();
        unmount(&mountpoint);
        host.attach(&reference, &mountpoint, &[]);
        assert_eq!(host.list().len(), 2);
        assert!(host.list().iter().all(|row| row["id"] != id));
        host.detach(&mountpoint);
        host.detach(&other);
        nothing_left(&host);
    });
}

/// Reads a block past what is in memory, in a thread of its own: how that ended and how long it took.
fn reader(path: &Path, offset: u64) -> JoinHandle<(std::io::Result<()>, Duration)> {
    let file = fs::File::open(path).unwrap();
    std::thread::spawn(move || {
        let began = Instant::now();
        let read = file.read_exact_at(&mut [0; 4096], offset);
        (read, began.elapsed())
    })
}

/// Nobody has to start the next daemon where a keeper does.
#[test]
fn devices_of_a_killed_daemon_are_served_by_the_one_that_its_keeper_starts() {
    in_vm_together(&SHORT, || {
        let host = Host::new();
        let content: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();
        let (_layout, registry) = served(&host, &[("file", content.clone())]);
        let mountpoint = host.mountpoint("mnt");
        every_layer_is_on_nbd(&host.attach(&registry.reference("app"), &mountpoint, &[]));
        for round in 0..3_u64 {
            registry.fail(On::Data, Fault::Hang, Times::UntilHealed);
            let before = registry.counters().total().requests;
            let waits = reader(&mountpoint.join("file"), 40_960 + round * 300_000);
            eventually(|| registry.counters().total().requests > before);
            host.kill_served_by_keeper();
            registry.heal();
            let (read, time) = waits.join().unwrap();
            println!("a reader waited {time:?}");
            read.unwrap();
            assert_eq!(host.list()[0]["state"], "lazy");
        }
        drop_caches();
        assert!(fs::read(mountpoint.join("file")).unwrap() == content);
        // the kernel has noticed nothing: the connections are those of the first daemon
        let log = host.log();
        assert!(!log.contains("replaced an nbd connection"), "{log}");
        assert!(!log.contains("cannot be resumed"), "{log}");
        host.detach(&mountpoint);
        nothing_left_soon(&host);
    });
}

/// The bound that docs/nbd.md names.
#[test]
fn readers_of_a_killed_daemon_wait_no_longer_than_is_documented() {
    in_vm_asleep(|| {
        let host = Host::new();
        let _daemon = Unkept::start(&host);
        let content: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();
        let (_layout, registry) = served(&host, &[("file", content)]);
        let mountpoint = host.mountpoint("mnt");
        every_layer_is_on_nbd(&host.attach(&registry.reference("app"), &mountpoint, &[]));
        registry.fail(On::Data, Fault::Hang, Times::UntilHealed);
        let before = registry.counters().total().requests;
        let path = mountpoint.join("file");
        // one that waits when the daemon is killed, and one that comes afterwards
        let waits = reader(&path, 40_960);
        eventually(|| registry.counters().total().requests > before);
        host.kill_daemon();
        for reader in [waits, reader(&path, 1_000_000)] {
            let (read, time) = reader.join().unwrap();
            println!("a reader waited {time:?}: {read:?}");
            assert!(read.is_err());
            // 72 s, and what a machine under load takes to notice
            assert!(time < Duration::from_secs(82), "{time:?}");
        }
        // from then on nobody waits
        let (read, time) = reader(&path, 500_000).join().unwrap();
        assert!(read.is_err() && time < Duration::from_secs(5), "{time:?}");
        host.detach(&mountpoint);
        nothing_left_soon(&host);
    });
}
