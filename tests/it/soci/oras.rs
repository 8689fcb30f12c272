//! With `oras`, where there is one: what it lists of an image made here, and what it copies.

use std::{ffi::OsString, fs, process::Command};

use serde_json::Value;

use super::make::{GZIP_LAYER, MadeLayout, tar_of};
use crate::{
    engine::Host,
    support::{docker_registry::DockerRegistry, noise, registry::Registry},
};

/// The `oras` command that the environment variable `ORAS` names. Where it names none, a test here says so and has nothing to test.
fn oras() -> Option<OsString> {
    let program = std::env::var_os("ORAS").filter(|program| !program.is_empty());
    if program.is_none() {
        eprintln!("not run: the environment variable ORAS names no `oras` command");
    }
    program
}

/// Needs `oras`, and is not one of the tests that may never be skipped: without it, it says so and returns.
#[test]
fn what_oras_copies_is_lazy_and_its_list_has_the_indexes() {
    let Some(program) = oras() else { return };
    let oras = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        let output = command.args(arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "oras {arguments:?}: {error}");
        output.stdout
    };
    let content = noise(900_000);
    let mut made = MadeLayout::new();
    let image = made.image("amd64", &[(GZIP_LAYER, tar_of(&[("data/big", &content)]))]);
    made.tag(&image, "1");
    let (with, without) = (Registry::start(), DockerRegistry::start());
    let small = ["--min-layer-size", "0", "--span-size", "65536", "--compact"];
    let host = Host::new();
    for (from, to) in [
        (with.host(), without.host.clone()),
        (without.host.clone(), with.host()),
    ] {
        let v1 = format!("{from}/app:1");
        let v2 = format!("{from}/app:2");
        host.run(&["copy", &made.reference("1"), &v1]);
        host.run(&[&["index", "create", &v1, "--push"][..], &small].concat());
        host.run(&[&["convert", &v1, &v2][..], &small].concat());

        let listed = oras(&["discover", "--plain-http", "--format", "json", &v1]);
        let listed: Value = serde_json::from_slice(&listed).unwrap();
        // its key from 1.3 on, and before
        let all = listed.get("referrers").unwrap_or(&listed["manifests"]);
        let all = all.as_array().unwrap().iter();
        let mut types: Vec<&str> = all
            .map(|one| one["artifactType"].as_str().unwrap())
            .collect();
        types.sort_unstable();
        assert_eq!(
            types,
            [
                "application/vnd.amazon.soci.index.v1+json",
                "application/vnd.socinbd.compact-index.v1+json"
            ]
        );

        let folder = tempfile::tempdir().unwrap();
        let layout = folder.path().to_str().unwrap();
        for (image, version) in [(&v1, 1), (&v2, 2)] {
            let tag = version.to_string();
            let moved = format!("{to}/moved:{tag}");
            let kept = format!("{layout}:{tag}");
            let copy = ["cp", "-r", "--from-plain-http"];
            oras(&[&copy[..], &["--to-plain-http", image, &moved]].concat());
            oras(&[&copy[..], &["--to-oci-layout", image, &kept]].concat());
            for copied in [moved, format!("oci:{kept}")] {
                let host = Host::new();
                let mountpoint = host.mountpoint("mnt");
                let attached = host.attach(&copied, &mountpoint, &["--require-index"]);
                assert_eq!(attached["index"]["version"], version, "{attached}");
                assert!(attached["compact_index"].is_string(), "{attached}");
                let spans = &host.list()[0]["spans"];
                assert_eq!(spans[0], 0, "no span is fetched before it is read");
                assert!(spans[1].as_u64().unwrap() > 5, "{spans}");
                assert!(fs::read(mountpoint.join("data/big")).unwrap() == content);
                host.detach(&mountpoint);
                assert_eq!(host.left_over(), [""; 0]);
            }
        }
    }
}
