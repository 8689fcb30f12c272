//! Tests with the kernel's devices.

use std::{fs, io::Read as _, time::Instant};

use rustix::fs::{Mode, OFlags, openat};
use serde_json::json;

use super::*;
use crate::{
    engine::open::{disks::Disks, policy::IndexChoice},
    kernel::mount,
    oci::Digest,
    source::Access,
};

/// An OCI layout with an image of one layer, which has one file `f`.
fn layout(directory: &Path, content: &[u8]) {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let kind = |name: &str| format!("application/vnd.oci.image.{name}");
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    layer.append_data(&mut header, "f", content).unwrap();
    let layer = blob(&kind("layer.v1.tar"), &layer.into_inner().unwrap());
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = blob(&kind("config.v1+json"), config.to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let manifest = blob(&kind("manifest.v1+json"), manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    fs::write(
        directory.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_in_use_goes_when_it_is_idle() {
    let directory = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (image, root) = (
        directory.path().join("image"),
        directory.path().join("root"),
    );
    layout(&image, &content);
    let disks = Disks::open(&root).unwrap();
    let reference = format!("oci:{}", image.display()).parse().unwrap();
    let platform = "linux/amd64".parse().unwrap();
    let opened = disks
        .open_image(
            &reference,
            &Access::default(),
            Some(&platform),
            &IndexChoice::default(),
            &|_| {},
        )
        .await
        .unwrap();
    let tag = Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..8].to_owned();
    let devices = Arc::new(Devices::new(tag, true, Arc::default(), Handle::current()));
    let device = devices.get(&opened.layers[0].disk, DeviceChoice::Fuse);
    let device = device.await.unwrap();
    let there = || {
        let all = loopdev::attached().unwrap().into_iter();
        let prefix = devices.identifier_prefix();
        all.filter(|device| device.name.starts_with(&prefix))
            .count()
    };
    let mount = mount::ext4(device.path()).unwrap();
    drop(device);
    assert_eq!(there(), 1, "the mount keeps it");
    let file = openat(&mount, "f", OFlags::RDONLY, Mode::empty()).unwrap();
    let mut read = Vec::new();
    fs::File::from(file).read_to_end(&mut read).unwrap();
    assert!(read == content);
    drop(mount);
    let deadline = Instant::now() + Duration::from_secs(10);
    while there() > 0 {
        assert!(Instant::now() < deadline, "it stays");
        tokio::time::sleep(IDLE_POLL_INTERVAL).await;
    }
}
