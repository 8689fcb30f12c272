//! The `convert --standalone` suite: `convert --format`, from path to path.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    super::{
        commands::{SMALL, json_of, multi},
        make::{digest, tar_of},
    },
    assert_reads, digest_of, entries,
};
use crate::{engine::Host, support::noise};

/// How each form is written as a reference.
fn reference(form: &str, path: &Path) -> String {
    match form {
        "oci-dir" => format!("oci:{}", path.display()),
        _ => format!("oci-archive:{}", path.display()),
    }
}

fn convert(host: &Host, from: &Path, to: &Path, form: &str, options: &[&str]) -> Value {
    let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
    let arguments = [
        &["convert"],
        &paths[..],
        &["--format", form],
        &SMALL,
        options,
    ];
    json_of(host, &arguments.concat())
}

/// standalone: "dir/tar in x dir/tar out", "idempotent", "all platforms".
#[test]
fn folders_and_tars_become_folders_and_tars() {
    let (made, _) = multi();
    let packed = made.packed("");
    let old = digest_of(&made.reference(""));
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new();
    let all = ["--all-platforms"];
    let mut digests = Vec::new();
    for (number, from) in [made.path(), packed.path()].into_iter().enumerate() {
        for form in ["oci-dir", "oci-archive"] {
            let to = folder.path().join(format!("{number}-{form}"));
            let report = convert(&host, from, &to, form, &all);
            let image = reference(form, &to);
            let new = digest_of(&image);
            assert_eq!(report["digest"], json!(new), "{image}");
            assert_eq!(to.is_dir(), form == "oci-dir");
            assert_eq!(entries(&image).len(), 4, "{image}");
            digests.push(new);
            for architecture in ["amd64", "arm64"] {
                let files: [(&str, &[u8]); 2] = [
                    ("/etc/os-release", architecture.as_bytes()),
                    ("/data/big", &noise(900_000)),
                ];
                let platform = format!("linux/{architecture}");
                assert_reads(&image, &platform, &["--index-policy", "v2"], &files);
            }
            // onto the same path once more, and what was made converted again into each form
            convert(&host, from, &to, form, &all);
            digests.push(digest_of(&image));
            for again in ["oci-dir", "oci-archive"] {
                let twice = folder.path().join(format!("{number}-{form}-{again}"));
                convert(&host, &to, &twice, again, &all);
                digests.push(digest_of(&reference(again, &twice)));
            }
        }
        assert_eq!(
            digest_of(&reference(["oci-dir", "oci-archive"][number], from)),
            old
        );
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
}

/// standalone: "given platform".
#[test]
fn the_given_platform_is_converted() {
    let (made, images) = multi();
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new();
    for (at, platform) in ["linux/amd64", "linux/arm64"].into_iter().enumerate() {
        for form in ["oci-dir", "oci-archive"] {
            let to = folder.path().join(format!("{at}-{form}"));
            let report = convert(&host, made.path(), &to, form, &["--platform", platform]);
            assert_eq!(report["images"].as_array().unwrap().len(), 1);
            assert_eq!(report["images"][0]["platform"], platform);
            assert_eq!(report["images"][0]["old"], json!(images[at]));
            let listed = entries(&reference(form, &to));
            assert_eq!(listed.len(), 3, "{platform}");
            assert_eq!(json!(digest(&listed[at])), report["images"][0]["manifest"]);
            assert_eq!(digest(&listed[1 - at]), images[1 - at], "{platform}");
        }
    }
    let to = folder.path().join("none");
    let (from, to) = (made.path().to_str().unwrap(), to.to_str().unwrap());
    let other = ["--format", "oci-archive", "--platform", "linux/s390x"];
    host.fail(&[&["convert", from, to][..], &other].concat(), 3);
    assert!(!Path::new(to).exists());
}

/// standalone: "invalid input".
#[test]
fn what_is_no_layout_is_an_error_and_makes_no_image() {
    let (mut made, _) = multi();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for name in ["empty", "half", "other"] {
        fs::create_dir(at(name)).unwrap();
    }
    fs::write(at("half/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(at("other/oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    fs::write(at("nothing"), "").unwrap();
    fs::write(at("text"), "no tar at all\n".repeat(100)).unwrap();
    fs::write(at("files.tar"), tar_of(&[("a", b"1")])).unwrap();
    let packed = fs::read(made.packed("").path()).unwrap();
    fs::write(at("cut.tar"), &packed[..packed.len() / 2]).unwrap();
    fs::write(at("packed.tar.gz"), super::make::gzip(&packed)).unwrap();
    let (one, _) = multi();
    let again = entries(&one.reference(""))[0].clone();
    made.tag(&again, "2");
    fs::rename(made.path(), at("two-tags")).unwrap();
    let host = Host::new();
    for (from, status, words) in [
        ("none", 3, "no such directory or tar file"),
        ("none.tar", 3, "no such directory or tar file"),
        ("empty", 3, "is not an OCI image layout"),
        ("half", 3, "index.json"),
        ("other", 8, "2.0.0"),
        ("nothing", 3, "is not an OCI image layout"),
        ("text", 7, "text at byte"),
        ("files.tar", 3, "has no oci-layout"),
        ("cut.tar", 7, "cut"),
        ("packed.tar.gz", 8, "compressed with gzip"),
        ("two-tags", 2, "2"),
    ] {
        for form in ["oci-dir", "oci-archive"] {
            for from in [at(from), from.to_owned()] {
                let to = at("out");
                let output = host
                    .command(&["convert", &from, &to, "--format", form])
                    .args(SMALL)
                    .current_dir(folder.path())
                    .output()
                    .unwrap();
                let error = String::from_utf8(output.stderr).unwrap();
                assert_eq!(output.status.code(), Some(status), "{from}: {error}");
                assert!(error.contains(words), "{from}: {error}");
                let made = fs::read(at("out/index.json")).unwrap_or_default();
                assert!(
                    !String::from_utf8(made).unwrap().contains("sha256"),
                    "{from}"
                );
                assert!(!Path::new(&at("out")).is_file(), "{from}");
                let _ = fs::remove_dir_all(at("out"));
            }
        }
    }
    let (from, to) = (at("two-tags"), at("out"));
    host.fail(&["convert", &from, &to, "--format", "docker"], 2);
    host.fail(&["convert", &from, "--format", "oci-dir"], 2);
    host.fail(&["convert", "oci:two-tags", &to, "--format", "oci-dir"], 3);
    let inside = at("text/out");
    host.fail(
        &[
            "convert",
            one.path().to_str().unwrap(),
            &inside,
            "--format",
            "oci-dir",
        ],
        1,
    );
}
