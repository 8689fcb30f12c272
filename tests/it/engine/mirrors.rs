//! Mirrors of a node's `hosts.toml` that send wrong bytes: the bytes of the registry count, at the first try.

use std::{fs, path::PathBuf};

use tempfile::TempDir;

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout, digest, gzip},
    support::{noise, registry::Registry, tars::Layer},
};

/// An image of one layer, whose bytes a mirror has wrong.
struct Lie {
    server: Registry,
    mirror: Registry,
    certs: TempDir,
    reference: String,
    blob: socinbd::oci::Digest,
    big: Vec<u8>,
}

impl Lie {
    /// `options`: of `index create`; none: the image has no index. `lie` changes the bytes of the layer.
    fn new(options: Option<&[&str]>, lie: impl Fn(&mut [u8])) -> Self {
        let big = noise(900_000);
        let tar = Layer::new().file("etc/tag", b"tag").file("big", &big).tar();
        let mut made = MadeLayout::new();
        let image = made.image("amd64", &[(GZIP_LAYER, tar.clone())]);
        made.tag(&image, "1");
        let manifest = fs::read(made.blob_path(&digest(&image))).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let blob = digest(&manifest["layers"][0]);
        let (server, mirror) = (Registry::start(), Registry::start());
        server.add_layout("app", made.path()).unwrap();
        let reference = server.reference("app:1");
        if let Some(options) = options {
            let create = [
                "index",
                "create",
                &reference,
                "--push",
                "--min-layer-size",
                "0",
            ];
            Host::new().run(&[&create[..], options].concat());
        }
        let mut bytes = gzip(&tar);
        lie(&mut bytes);
        mirror.add_blob_as("app", blob, bytes);
        let certs = tempfile::tempdir().unwrap();
        let directory = certs.path().join(server.host());
        fs::create_dir_all(&directory).unwrap();
        let hosts = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
            server.host(),
            mirror.host()
        );
        fs::write(directory.join("hosts.toml"), hosts).unwrap();
        Self {
            server,
            mirror,
            certs,
            reference,
            blob,
            big,
        }
    }

    fn hosts_dir(&self) -> PathBuf {
        self.certs.path().to_owned()
    }

    /// Both hosts were asked for the layer.
    fn check(&self) {
        assert!(self.mirror.counters().blob(&self.blob).requests > 0);
        assert!(self.server.counters().blob(&self.blob).requests > 0);
    }
}

fn noise_instead(bytes: &mut [u8]) {
    bytes.copy_from_slice(&noise(bytes.len()));
}

/// So that it is found at the end.
fn another_end(bytes: &mut [u8]) {
    *bytes.last_mut().unwrap() ^= 1;
}

const FINE: [&str; 2] = ["--span-size", "65536"];
const COMPACT: [&str; 3] = ["--compact", "--compact-span-size", "65536"];

#[test]
fn a_streamed_layer_of_a_lying_mirror_is_right_at_the_first_try() {
    for lie in [noise_instead, another_end] {
        let it = Lie::new(None, lie);
        let host = Host::new();
        let mountpoint = host.mountpoint("streamed");
        let hosts_dir = it.hosts_dir();
        host.attach(
            &it.reference,
            &mountpoint,
            &["--hosts-dir", hosts_dir.to_str().unwrap()],
        );
        assert!(fs::read(mountpoint.join("big")).unwrap() == it.big);
        host.detach(&mountpoint);
        it.check();
    }
}

#[test]
fn cat_with_a_lying_mirror_is_right_at_the_first_try() {
    for (number, options) in [None, Some(&FINE[..]), Some(&COMPACT[..])]
        .into_iter()
        .enumerate()
    {
        let it = Lie::new(options, noise_instead);
        let hosts_dir = it.hosts_dir();
        let arguments = ["cat", &it.reference, "/big"];
        let options = ["--hosts-dir", hosts_dir.to_str().unwrap()];
        let output = Host::new().output(&[&arguments[..], &options].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{number}: {error}");
        assert!(output.stdout == it.big, "{number}");
        it.check();
    }
}
