//! What an attach fetches, and what a read fetches.

use std::{fs, io::Read, process::Command};

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout, digest, tar_of},
    support::{registry::Registry, seeded_noise as noise},
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
