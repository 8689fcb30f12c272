//! The `push` suite.

use std::fs;

use serde_json::{Value, json};

use super::{
    super::{
        commands::{SMALL, create, json_of, multi},
        make::{GZIP_LAYER, MadeLayout, tar_of},
    },
    assert_reads,
};
use crate::{
    engine::Host,
    support::{
        docker_registry::DockerRegistry,
        noise,
        registry::{Auth, Referrers, Registry, base64},
    },
};

const AMD64: [&str; 2] = ["--platform", "linux/amd64"];

fn digests(list: &Value) -> Vec<&str> {
    let list = list.as_array().unwrap().iter();
    list.map(|index| index["digest"].as_str().unwrap())
        .collect()
}

/// push: "pull elsewhere equal content (amd64, arm64)", "OCI 1.0 and 1.1 registries".
#[test]
fn what_was_pushed_is_read_elsewhere_with_the_same_content() {
    let debian = DockerRegistry::start();
    let (with, without) = (Registry::start(), Registry::start());
    without.set_referrers(Referrers::Absent);
    let big = noise(900_000);
    let shared = noise(40_000);
    for place in [with.host(), without.host(), debian.host.clone()] {
        let (made, _) = multi();
        let from = made.reference("1");
        let host = Host::new();
        create(&host, &from, &["--all-platforms"]);
        let image = format!("{place}/app:1");
        host.run(&["index", "push", &from, &image, "--all-platforms"]);
        for architecture in ["amd64", "arm64"] {
            assert_reads(
                &image,
                &format!("linux/{architecture}"),
                &[],
                &[
                    ("/etc/os-release", architecture.as_bytes()),
                    ("/data/big", &big),
                    ("/etc/shared", &shared),
                ],
            );
        }
    }
}

/// push: "--user": name and password are Docker's.
#[test]
fn who_may_push_is_asked_of_dockers_file() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.set_auth(Auth::Basic {
        user: "me".into(),
        password: "secret".into(),
    });
    let (host, from) = (Host::new(), made.reference("1"));
    create(&host, &from, &AMD64);
    let image = registry.reference("app:1");
    let push = [&["index", "push", &from, &image][..], &AMD64].concat();
    let folder = host.mountpoint("login");
    let login = |user: &str| {
        let auths = json!({"auths": {registry.host(): {"auth": base64(user.as_bytes())}}});
        let file = folder.join("config.json");
        fs::write(&file, auths.to_string()).unwrap();
        file.to_str().unwrap().to_owned()
    };
    for (wrong, words) in [
        (None, "docker login"),
        (Some("me:wrong"), "refused the credentials"),
    ] {
        let file = wrong.map(login);
        let file: Vec<&str> = file
            .iter()
            .flat_map(|file| ["--auth-file", file.as_str()])
            .collect();
        let error = host.fail(&[&push[..], &file].concat(), 4);
        assert!(error.contains(words), "{error}");
        assert!(!error.contains("wrong") && !error.contains(&base64(b"me:wrong")));
        assert!(registry.tags("app").is_empty());
    }
    let file = login("me:secret");
    let report = json_of(&host, &[&push[..], &["--auth-file", &file]].concat());
    assert_eq!(report["images"][0]["outcome"], "pushed");
    assert!(registry.tags("app").contains_key("1"));
    // and as `docker login` leaves it
    let again = host
        .command(&push)
        .env("DOCKER_CONFIG", &folder)
        .output()
        .unwrap();
    let text = String::from_utf8(again.stdout).unwrap();
    assert!(text.ends_with(" present\n"), "{text}");
}

/// push: "newest index".
#[test]
fn of_several_indexes_the_newest_is_pushed() {
    let (made, _) = multi();
    let registry = Registry::start();
    registry.add_layout("app", made.path()).unwrap();
    let image = registry.reference("app:1");
    let host = Host::new();
    let make = |span_size: &str| {
        let options = ["--min-layer-size", "0", "--span-size", span_size];
        let report = json_of(
            &host,
            &[&["index", "create", &image][..], &options, &AMD64].concat(),
        );
        report["index"].as_str().unwrap().to_owned()
    };
    let push = || {
        let report = json_of(&host, &[&["index", "push", &image][..], &AMD64].concat());
        report["images"][0]["index"].as_str().unwrap().to_owned()
    };
    let there = || {
        json_of(
            &Host::new(),
            &[&["index", "list", &image][..], &AMD64].concat(),
        )
    };
    let (first, second) = (make("65536"), make("131072"));
    assert_ne!(first, second);
    assert_eq!(push(), second);
    assert_eq!(digests(&there()), [&second], "and no other");
    // one that is made again is the newest
    assert_eq!(make("65536"), first);
    assert_eq!(push(), first);
    assert_eq!(digests(&there()), [&second, &first]);
    let found = json_of(&Host::new(), &[&["inspect", &image][..], &AMD64].concat());
    assert_eq!(found["index"]["digest"], first.as_str());
}

/// push: "existing-index warn/skip/allow counts".
#[test]
fn another_index_is_told_of_left_alone_or_taken_as_it_is() {
    for referrers in [Referrers::default(), Referrers::Absent] {
        let registry = Registry::start();
        registry.set_referrers(referrers);
        let mut made = MadeLayout::new();
        let layer = tar_of(&[("a", &noise(300_000))]);
        let one = made.image("amd64", &[(GZIP_LAYER, layer)]);
        made.tag(&one, "1");
        for (what, outcome, count, warnings) in [
            (None, "pushed", 2, 1), // warn is the default
            (Some("warn"), "pushed", 2, 1),
            (Some("skip"), "skipped", 1, 0),
            (Some("allow"), "pushed", 2, 0),
        ] {
            let repository = format!("for-{}", what.unwrap_or("nothing"));
            registry.add_layout(&repository, made.path()).unwrap();
            let image = registry.reference(&format!("{repository}:1"));
            create(&Host::new(), &image, &["--push"]);
            let host = Host::new();
            let options = ["--min-layer-size", "0", "--span-size", "131072", "--force"];
            let index = json_of(
                &host,
                &[&["index", "create", &image][..], &options].concat(),
            );
            let push = match what {
                None => vec!["index", "push", &image],
                Some(what) => vec!["index", "push", &image, "--existing-index", what],
            };
            let report = json_of(&host, &push);
            assert_eq!(report["images"][0]["outcome"], outcome, "{what:?}");
            let told = report["warnings"].as_array().unwrap();
            assert_eq!(told.len(), warnings, "{what:?}: {told:?}");
            let list = json_of(&Host::new(), &["index", "list", &image]);
            let list = digests(&list);
            assert_eq!(list.len(), count, "{what:?}");
            let is_there = list.contains(&index["index"].as_str().unwrap());
            assert_eq!(is_there, outcome == "pushed", "{what:?}");
            // one's own is no other
            let again = json_of(&host, &push);
            let expected = if is_there { "present" } else { "skipped" };
            assert_eq!(again["images"][0]["outcome"], expected, "{what:?}");
            assert_eq!(again["warnings"], json!([]), "{what:?}");
        }
        let image = registry.reference("for-warn:1");
        Host::new().fail(&["index", "push", &image, "--existing-index", "never"], 2);
    }
}

/// push: an index (v2) that is part of its image is not pushed as one of version 1.
#[test]
fn an_image_with_its_index_in_it_has_none_to_push() {
    let (made, _) = multi();
    let registry = Registry::start();
    let image = registry.reference("app:1");
    let host = Host::new();
    let convert = ["convert", &made.reference("1"), &image].map(str::to_owned);
    let convert: Vec<&str> = convert.iter().map(String::as_str).collect();
    // one of two platforms has its index in itself
    host.run(&[&convert[..], &SMALL, &AMD64].concat());
    let error = host.fail(&[&["index", "push", &image][..], &AMD64].concat(), 3);
    assert!(error.contains("(v2)"), "{error}");
    create(&host, &image, &["--platform", "linux/arm64"]);
    let report = json_of(&host, &["index", "push", &image, "--all-platforms"]);
    let outcomes: Vec<&Value> = report["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| &image["outcome"])
        .collect();
    assert_eq!(outcomes, ["skipped", "pushed"], "{report}");
    assert_eq!(report["warnings"].as_array().unwrap().len(), 1, "{report}");
    // `nerdctl push` makes one of version 1 of each image, and pushes it
    create(&host, &image, &AMD64);
    let report = json_of(&host, &[&["index", "push", &image][..], &AMD64].concat());
    assert_eq!(report["images"][0]["outcome"], "pushed", "{report}");
    assert_eq!(report["warnings"].as_array().unwrap().len(), 1, "{report}");
}
