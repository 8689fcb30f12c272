//! Images attached on the kernel's nbd driver, in the VM.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::Value;
use socinbd::kernel::{blockdev, nbd};

use super::{Host, images, real::RealImage};
use crate::{
    kernel::eventually,
    soci::make::{GZIP_LAYER, MadeLayout, tar_of},
    support::{
        registry::{Fault, On, Registry, Times},
        vm::in_vm,
    },
};

/// An image of layers with a file each, indexed with small spans, and served.
fn served(host: &Host, files: &[(&str, Vec<u8>)]) -> (MadeLayout, Registry) {
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
        assert!(
            layer["device_path"]
                .as_str()
                .unwrap()
                .starts_with("/dev/nbd"),
            "{layer}"
        );
    }
}

/// No mount, device or record, whoever's: the VM is this test's alone.
fn nothing_left(host: &Host) {
    assert_eq!(host.left_over(), [""; 0]);
    eventually(|| nbd::connected().unwrap().is_empty());
}

#[test]
fn small_on_the_kernels_nbd() {
    in_vm(|| {
        images::small();
        eventually(|| nbd::connected().unwrap().is_empty());
    });
}

#[test]
fn members_on_the_kernels_nbd() {
    in_vm(|| {
        images::members();
        eventually(|| nbd::connected().unwrap().is_empty());
    });
}

#[test]
fn python_on_the_kernels_nbd() {
    in_vm(|| {
        let (host, image) = (Host::new(), RealImage::of("python"));
        image.create_index(&host, &["--min-layer-size", "0"]);
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
    in_vm(|| {
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

/// The kernel drops a connection whose answer takes longer than its timeout, and asks again on a new one.
#[test]
fn a_fetch_that_takes_longer_than_the_kernels_timeout() {
    in_vm(|| {
        let host = Host::new();
        let content: Vec<u8> = (0..400_000_u32)
            .flat_map(|number| number.to_le_bytes())
            .collect();
        let (_layout, registry) = served(&host, &[("file", content.clone())]);
        let mountpoint = host.mountpoint("mnt");
        let attachment = host.attach(&registry.reference("app"), &mountpoint, &[]);
        every_layer_is_on_nbd(&attachment);
        let device = attachment["layers"][0]["device_path"].as_str().unwrap();
        let name = device.trim_start_matches("/dev/");
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
            log.contains("an nbd connection was dropped and is replaced"),
            "{log}"
        );
        host.detach(&mountpoint);
        nothing_left(&host);
    });
}

#[test]
fn a_killed_daemon_is_cleaned_up_after() {
    in_vm(|| {
        let host = Host::new();
        let content = b"what is read".repeat(40_000);
        let (_layout, registry) = served(&host, &[("file", content.clone())]);
        let mountpoint = host.mountpoint("mnt");
        let reference = registry.reference("app");
        every_layer_is_on_nbd(&host.attach(&reference, &mountpoint, &[]));
        host.kill_daemon();
        assert_eq!(host.list()[0]["state"], "dead");
        host.detach(&mountpoint);
        nothing_left(&host);
        host.attach(&reference, &mountpoint, &[]);
        assert!(fs::read(mountpoint.join("file")).unwrap() == content);
        // and when nobody detaches what is dead
        host.kill_daemon();
        let other = host.mountpoint("other");
        host.attach(&reference, &other, &[]);
        assert!(fs::read(other.join("file")).unwrap() == content);
        host.detach(&mountpoint);
        host.detach(&other);
        nothing_left(&host);
    });
}
