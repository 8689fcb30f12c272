//! What an attach fetches, and what a read fetches.

use std::{fs, io::Read, process::Command};

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout, digest, tar_of},
    support::{registry::Registry, seeded_noise as noise, tars::Layer},
};

#[test]
fn an_attach_fetches_tables_and_a_read_fetches_its_spans() {
    let host = Host::new();
    let (first, second) = (noise(900_000, 1), noise(700_000, 2));
    let mut layout = MadeLayout::new();
    let tar = tar_of(&[
        ("etc/first", &first),
        ("etc/second", &second),
        ("small", b"small\n"),
    ]);
    let image = layout.image("amd64", &[(GZIP_LAYER, tar)]);
    layout.tag(&image, "latest");
    host.run(&[
        "index",
        "create",
        &layout.reference(""),
        "--span-size",
        "65536",
        "--min-layer-size",
        "0",
    ]);

    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(layout.blob_path(&digest(&image))).unwrap()).unwrap();
    let layer = digest(&manifest["layers"][0]);

    let mountpoint = host.mountpoint("mnt");
    let attachment = host.attach(&registry.reference("app"), &mountpoint, &[]);
    let device = attachment["layers"][0]["device_path"].as_str().unwrap();
    Command::new("blkid")
        .args(["-p", device])
        .output()
        .expect("this test needs blkid (util-linux)");
    Command::new("udevadm")
        .arg("settle")
        .status()
        .expect("this test needs udevadm (udev)");
    assert_eq!(
        registry.counters().blob(&layer).requests,
        0,
        "{:?}",
        registry.counters().ranges(&layer)
    );

    let spans = |host: &Host| host.list()[0]["spans"][0].as_u64().unwrap();
    assert_eq!(spans(&host), 0);
    // one block in the middle of a file
    let mut block = [0; 4096];
    let file = fs::File::open(mountpoint.join("etc/first")).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, 409_600).unwrap();
    assert_eq!(block, first[409_600..413_696]);
    assert!((1..=2).contains(&spans(&host)), "{} spans", spans(&host));
    drop(file);
    assert_eq!(registry.counters().blob(&layer).requests, 1);

    assert_eq!(fs::read(mountpoint.join("etc/second")).unwrap(), second);
    assert_eq!(fs::read(mountpoint.join("small")).unwrap(), b"small\n");
    let mut whole = Vec::new();
    fs::File::open(mountpoint.join("etc/first"))
        .unwrap()
        .read_to_end(&mut whole)
        .unwrap();
    assert_eq!(whole, first);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_walk_over_many_directories_is_a_few_large_requests() {
    const DIRECTORIES: u64 = 2000;
    let host = Host::new();
    let mut layer = Layer::new();
    for number in 0..DIRECTORIES {
        let directory = format!("directory-{number}");
        layer = layer.directory(&directory, 0o755);
        layer = layer.file(&format!("{directory}/file"), b"");
    }
    // or the disk would be complete, and its device a loop device with nothing of ours in between
    layer = layer.file("file", &noise(100_000, 1));
    let mut layout = MadeLayout::new();
    let image = layout.image("amd64", &[(GZIP_LAYER, layer.tar())]);
    layout.tag(&image, "latest");
    let image = layout.reference("latest");
    host.run(&["index", "create", &image, "--min-layer-size", "0"]);
    let mountpoint = host.mountpoint("mnt");
    let attachment = host.attach(&image, &mountpoint, &[]);
    let device = attachment["layers"][0]["device_path"].as_str().unwrap();
    let stat = format!("/sys/block/{}/stat", device.trim_start_matches("/dev/"));
    let requests = || -> u64 {
        let stat = fs::read_to_string(&stat).unwrap();
        stat.split_whitespace().next().unwrap().parse().unwrap()
    };
    let before = requests();
    for directory in fs::read_dir(&mountpoint).unwrap() {
        let directory = directory.unwrap();
        if directory.file_type().unwrap().is_dir() {
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        }
    }
    let requests = requests() - before;
    assert!(requests < DIRECTORIES / 2, "{requests} requests");
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}
