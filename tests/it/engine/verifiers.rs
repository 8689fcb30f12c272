//! Images that are mounted only if a verifier accepts them.

use std::fs;

use super::Host;
use crate::{
    snapshotter::image::Image,
    support::{registry::Registry, tars::Layer, verifier::TestVerifier, wait},
};

/// The exit statuses: refused, and unavailable.
const REFUSED: i32 = 4;
const UNAVAILABLE: i32 = 5;

fn layers() -> Vec<Layer> {
    vec![Layer::new().file("hello", b"hello\n")]
}

#[test]
fn an_image_is_mounted_only_if_its_verifier_accepts_it() {
    let host = Host::new();
    let registry = Registry::start();
    let image = Image::push(&registry, "team/app", layers(), true);
    let other = Image::push(&registry, "other/app", layers(), false);
    let verifier = TestVerifier::new(&format!("{}/team/*", registry.host()));
    let config = verifier.config();
    let mountpoint = host.mountpoint("mnt");
    let place = mountpoint.to_str().unwrap();
    let reference = image.reference.as_str();
    let attach = ["--config", &config, "attach", reference, place];
    let serve = [
        "--config",
        &config,
        "serve",
        reference,
        "--listen",
        "127.0.0.1:0",
    ];
    // it has no daemon, which has the lock of the root
    for arguments in [
        &serve[..],
        &attach,
        &["--config", &config, "run", reference, "--", "/hello"],
    ] {
        registry.reset_counters();
        let error = host.fail(arguments, REFUSED);
        let reason = format!("no signature for {}", image.manifest);
        assert!(
            error.contains(&reason) && error.contains(reference),
            "{error}"
        );
        assert_eq!(registry.counters().blobs().requests, 0, "{arguments:?}");
        assert_eq!(host.list().len(), 0);
    }
    // other images are not verified
    let free = host.mountpoint("free");
    host.attach(&other.reference, &free, &["--config", &config]);
    host.detach(&free);
    // the image is accepted, and its index is not: it is not used
    verifier.accept(&image.manifest);
    let attached = host.attach(reference, &mountpoint, &["--config", &config]);
    assert_eq!(attached["index"], serde_json::Value::Null, "{attached:#}");
    let warnings = attached["warnings"].to_string();
    let index = image.index.unwrap();
    assert!(
        warnings.contains(&format!("no signature for {index}")),
        "{warnings}"
    );
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    host.detach(&mountpoint);
    let required = [&attach[..], &["--require-index"]].concat();
    let error = host.fail(&required, 3);
    assert!(error.contains("no signature for"), "{error}");
    // the index is accepted too
    verifier.accept(&index);
    let attached = host.attach(reference, &mountpoint, &["--config", &config]);
    assert_eq!(attached["index"]["digest"], index.to_string());
    host.detach(&mountpoint);
    let (app, place) = (image.manifest, registry.reference("team/app"));
    let mut expected = [
        format!("{reference} {app}"),
        format!("{place}@{index} {index}"),
    ];
    expected.sort();
    assert_eq!(verifier.asked(), expected);
    // somebody gives the tag to another image
    let tampered = vec![Layer::new().file("hello", b"evil\n")];
    let tampered = Image::push(&registry, "team/app", tampered, true);
    let error = host.fail(&attach, REFUSED);
    let reason = format!("no signature for {}", tampered.manifest);
    assert!(error.contains(&reason), "{error}");
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_verifier_that_hangs_prints_too_much_or_is_missing_refuses() {
    let host = Host::new();
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), false);
    let verifier = TestVerifier::new("*");
    verifier.configure("*", "time-limit = 1");
    let config = verifier.config();
    let mountpoint = host.mountpoint("mnt");
    let place = mountpoint.to_str().unwrap();
    let attach = ["--config", &config, "attach", &image.reference, place];
    let started = verifier.file("started");
    for (script, status, text) in [
        (
            format!("echo $$ > {}; sleep 1000", started.display()),
            UNAVAILABLE,
            "did not answer within 1 s",
        ),
        (
            "head -c 1000000000 /dev/zero".to_owned(),
            UNAVAILABLE,
            "more than 65536 bytes",
        ),
        ("exit 255".to_owned(), REFUSED, "exit status: 255"),
        ("kill -9 $$".to_owned(), REFUSED, "signal: 9"),
    ] {
        verifier.set_script(&script);
        let error = host.fail(&attach, status);
        assert!(error.contains(text) && error.len() < 2000, "{error}");
    }
    let pid = fs::read_to_string(started).unwrap();
    let process = format!("/proc/{}", pid.trim());
    wait("what hangs is ended", || !fs::exists(&process).unwrap());
    fs::remove_file(verifier.file("verifier")).unwrap();
    let error = host.fail(&attach, REFUSED);
    assert!(error.contains("No such file"), "{error}");
    // a policy may be to warn; it counts after a reload
    verifier.configure("*", "on-failure = \"warn\"");
    host.run(&["--config", &config, "config", "reload"]);
    host.attach(&image.reference, &mountpoint, &["--config", &config]);
    wait("it is in the log", || {
        host.log().contains("is not verified")
    });
    host.detach(&mountpoint);
}
