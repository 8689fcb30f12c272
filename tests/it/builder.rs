//! The builder: events in, indexes out, through kills.

mod outcomes;

use std::{
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use socinbd::{
    oci::Digest,
    soci::index::{INDEX_DIGEST, V1_TYPE, V2_TYPE},
    source::{Access, Source},
};

use crate::{
    soci::make::{GZIP_LAYER, INDEX, MANIFEST, MadeLayout},
    support::{docker_registry::DockerRegistry, registry::Registry, succeeds, tars::Layer},
};

const SECRET: &str = "let me in";

/// The builder as a process, killed with this.
struct Builder {
    child: Child,
    url: String,
}

impl Builder {
    /// On this port (0: any), with its queue and its log in a folder. Each layer gets an index, of images for amd64.
    fn start(registry: &str, port: u16, folder: &Path, more: &[&str]) -> Self {
        let common = ["--min-layer-size", "0", "--platform", "linux/amd64"];
        Self::start_with(registry, port, folder, &[&common, more].concat())
    }

    fn start_with(registry: &str, port: u16, folder: &Path, more: &[&str]) -> Self {
        // for the client of these tests; another test may have done it
        let _ = rustls::crypto::ring::default_provider().install_default();
        let secret = folder.join("secret");
        std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(folder.join("log"))
            .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_socinbd"))
            .args(["builder", "--registry", registry])
            .args(["--listen", &format!("127.0.0.1:{port}"), "--secret-file"])
            .arg(&secret)
            .args(more)
            .env("SOCINBD_ROOT", folder.join("root"))
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap();
        Self {
            child,
            url: url.trim_end_matches("/events").to_owned(),
        }
    }

    async fn get(&self, path: &str) -> String {
        let answer = reqwest::get(format!("{}{path}", self.url)).await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
        answer.text().await.unwrap()
    }

    async fn counts(&self) -> Value {
        serde_json::from_str(&self.get("/healthz").await).unwrap()
    }

    /// Posts a body with the secret: the status and the answer.
    async fn post(&self, body: impl ToString) -> (u16, Value) {
        let request = reqwest::Client::new()
            .post(format!("{}/events", self.url))
            .header("authorization", format!("Bearer {SECRET}"));
        let answer = request.body(body.to_string()).send().await.unwrap();
        let status = answer.status().as_u16();
        (
            status,
            serde_json::from_str(&answer.text().await.unwrap()).unwrap(),
        )
    }

    /// Waits until nothing waits or runs.
    async fn idle(&self) {
        until("the queue is empty", async || {
            let counts = self.counts().await;
            counts["waiting"] == 0 && counts["running"] == 0
        })
        .await;
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        let _ = self.child.kill(); // SIGKILL; it may have ended by itself
        let _ = self.child.wait();
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting)
        .await
        .unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// A layout with images under tags, each different.
fn images(tags: impl Iterator<Item = String>) -> MadeLayout {
    let mut layout = MadeLayout::new();
    for tag in tags {
        let tar = Layer::new().file("name", tag.as_bytes()).tar();
        let image = layout.image("amd64", &[(GZIP_LAYER, tar)]);
        layout.tag(&image, &tag);
    }
    layout
}

fn push_event(repository: &str, tag: &str) -> Value {
    json!({"events": [one_event(repository, tag)]})
}

fn one_event(repository: &str, tag: &str) -> Value {
    json!({"id": "1", "action": "push", "target": {
        "mediaType": MANIFEST, "size": 2, "digest": Digest::of(b"any"), "repository": repository, "tag": tag,
    }})
}

async fn open(registry: &str, rest: &str) -> Source {
    let reference = format!("{registry}/{rest}").parse().unwrap();
    Source::open(&reference, &Access::default()).await.unwrap()
}

/// Asserts that a tag is an image with just one SOCI index, and that the image names it.
async fn assert_converted(registry: &str, rest: &str) {
    let source = open(registry, rest).await;
    let root = source.root_manifest().await.unwrap();
    assert_eq!(root.media_type, INDEX);
    let index: Value = serde_json::from_slice(&root.bytes).unwrap();
    let [image, soci] = index["manifests"].as_array().unwrap().as_slice() else {
        panic!("{index}");
    };
    assert_eq!(soci["artifactType"], V2_TYPE);
    let image = image["digest"].as_str().unwrap().parse().unwrap();
    let image = source.manifest(&image).await.unwrap();
    let image: Value = serde_json::from_slice(&image.bytes).unwrap();
    assert_eq!(image["annotations"][INDEX_DIGEST], soci["digest"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_judged_and_bad_ones_refused() {
    let registry = Registry::start();
    let folder = tempfile::tempdir().unwrap();
    let layout = images(["v1", "dev"].map(str::to_owned).into_iter());
    registry.add_layout("team/app", layout.path()).unwrap();
    let host = registry.host();
    let builder = Builder::start(
        &host,
        0,
        folder.path(),
        &["--tag", "v*", "--repository", "team/*"],
    );

    let plain = reqwest::Client::new().post(format!("{}/events", builder.url));
    for request in [
        plain.try_clone().unwrap(),
        plain.header("authorization", "Bearer something else"),
    ] {
        let answer = request
            .body(push_event("team/app", "v1").to_string())
            .send()
            .await;
        assert_eq!(answer.unwrap().status(), 401);
    }
    for (body, status) in [
        ("{".to_owned(), 400),
        ("{}".to_owned(), 400),
        (push_event("../../etc", "v1").to_string(), 422),
        (" ".repeat(2 << 20), 413),
        (
            json!({"type": "PUSH_ARTIFACT", "event_data": {
                "resources": [{"tag": "v1", "resource_url": "elsewhere.example/team/app:v1"}],
                "repository": {"repo_full_name": "team/app"},
            }})
            .to_string(),
            403,
        ),
    ] {
        let (found, answer) = builder.post(body).await;
        assert_eq!(found, status, "{answer}");
        assert!(answer["error"].is_string(), "{answer}");
    }
    let ignored = [
        ("team/app", "dev"),
        ("other/app", "v1"),
        ("team/app", "v1-soci"),
    ];
    for (repository, tag) in ignored {
        let (status, answer) = builder.post(push_event(repository, tag)).await;
        assert_eq!((status, &answer["queued"]), (202, &json!([])), "{answer}");
    }
    let (status, answer) = builder.post(push_event("team/app", "v1")).await;
    assert_eq!(
        (status, answer["queued"].as_array().unwrap().len()),
        (202, 1),
        "{answer}"
    );
    builder.idle().await;
    assert_converted(&host, "team/app:v1-soci").await;

    let metrics = builder.get("/metrics").await;
    for line in [
        r#"socinbd_builder_events_total{outcome="accepted"} 1"#,
        r#"socinbd_builder_events_total{outcome="ignored"} 3"#,
        r#"socinbd_builder_events_total{outcome="refused"} 7"#,
        r#"socinbd_builder_images_total{outcome="made"} 1"#,
        r#"socinbd_builder_queue{state="waiting"} 0"#,
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}:\n{metrics}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_comes_twice_makes_one_index() {
    let registry = Registry::start();
    let folder = tempfile::tempdir().unwrap();
    let layout = images(["v1".to_owned()].into_iter());
    registry.add_layout("team/app", layout.path()).unwrap();
    let host = registry.host();
    let builder = Builder::start(&host, 0, folder.path(), &["--index-version", "v1"]);
    let image = open(&host, "team/app:v1")
        .await
        .root_manifest()
        .await
        .unwrap()
        .digest;
    for _ in 0..2 {
        let (status, _) = builder.post(push_event("team/app", "v1")).await;
        assert_eq!(status, 202);
        builder.idle().await;
        let found = open(&host, "team/app:v1")
            .await
            .referrers(&image, V1_TYPE)
            .await;
        assert_eq!(found.unwrap().len(), 1);
    }
    let now = open(&host, "team/app:v1")
        .await
        .root_manifest()
        .await
        .unwrap()
        .digest;
    assert_eq!(now, image, "version 1 leaves the image as it is");

    // what is no image any more is looked for a few times, and is not kept as a failure
    drop(builder);
    let replace = Builder::start(
        &host,
        0,
        folder.path(),
        &["--replace", "--backfill", "team/app"],
    );
    until("the tag of before is converted", async || {
        let found = open(&host, "team/app:v1").await.root_manifest().await;
        found.unwrap().media_type == INDEX
    })
    .await;
    replace.idle().await;
    assert_converted(&host, "team/app:v1").await;
    let converted = open(&host, "team/app:v1")
        .await
        .root_manifest()
        .await
        .unwrap()
        .digest;
    // its own push, told by the registry, changes nothing
    replace.post(push_event("team/app", "v1")).await;
    replace.idle().await;
    let now = open(&host, "team/app:v1")
        .await
        .root_manifest()
        .await
        .unwrap()
        .digest;
    assert_eq!(now, converted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_event_in_a_batch_does_not_refuse_the_others() {
    let registry = Registry::start();
    let folder = tempfile::tempdir().unwrap();
    let layout = images(["v1", "v2"].map(str::to_owned).into_iter());
    registry.add_layout("team/app", layout.path()).unwrap();
    let host = registry.host();
    let builder = Builder::start(&host, 0, folder.path(), &[]);
    let bad = [
        json!({}),
        json!({"action": "push", "target": {"mediaType": MANIFEST, "tag": "v1"}}),
        one_event("../../etc", "v1"),
        one_event("team/app", "no tag"),
    ];
    let good = [one_event("team/app", "v1"), one_event("team/app", "v2")];
    let events = [&good[..1], &bad, &good[1..]].concat();
    let (status, answer) = builder.post(json!({"events": events})).await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(answer["queued"].as_array().unwrap().len(), 2, "{answer}");
    assert_eq!(answer["refused"], 4, "{answer}");
    builder.idle().await;
    for tag in ["v1-soci", "v2-soci"] {
        assert_converted(&host, &format!("team/app:{tag}")).await;
    }
    // beside what is only ignored as well
    let pull = json!({"action": "pull", "target": {"digest": 7}});
    let (status, answer) = builder.post(json!({"events": [pull, bad[0]]})).await;
    assert_eq!((status, &answer["ignored"]), (202, &json!(1)), "{answer}");
    // nothing but bad ones is refused
    let (status, answer) = builder.post(json!({"events": bad})).await;
    assert_eq!(status, 400, "{answer}");
    let metrics = builder.get("/metrics").await;
    for line in [
        r#"socinbd_builder_events_total{outcome="accepted"} 1"#,
        r#"socinbd_builder_events_total{outcome="ignored"} 1"#,
        r#"socinbd_builder_events_total{outcome="refused"} 6"#,
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}:\n{metrics}"
        );
    }
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(log.contains("without those that were refused"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_its_registry_keeps_is_given_up_with_the_reason() {
    let registry = Registry::start();
    let folder = tempfile::tempdir().unwrap();
    let layout = images(["v1".to_owned()].into_iter());
    registry.add_layout("team/app", layout.path()).unwrap();
    registry.keep_tags();
    let before = registry.tags("team/app");
    let builder = Builder::start(&registry.host(), 0, folder.path(), &["--replace"]);
    builder.post(push_event("team/app", "v1")).await;
    builder.idle().await;
    assert_eq!(builder.counts().await["failed"], 1);
    assert_eq!(registry.tags("team/app"), before);
    let failed = folder.path().join("root/builder/failed");
    let file = std::fs::read_dir(failed).unwrap().next().unwrap().unwrap();
    let reason = std::fs::read_to_string(file.path()).unwrap();
    assert!(
        reason.contains("the tag v1 of") && reason.contains("--suffix"),
        "{reason}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_images_through_a_kill_and_a_real_registry_s_notifications() {
    let folder = tempfile::tempdir().unwrap();
    // a port that was free a moment ago: the registry has to know it before the builder runs
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let registry = DockerRegistry::start_with(&format!(
        "notifications:\n  endpoints:\n    - name: builder\n      url: http://127.0.0.1:{port}/events\n      headers:\n        Authorization: [Bearer {SECRET}]\n      timeout: 2s\n      threshold: 3\n      backoff: 100ms\n"
    ));
    let tags = || (1..=20).map(|number| format!("v{number}"));
    let layout = images(tags());
    let mut builder = Some(Builder::start(&registry.host, port, folder.path(), &[]));
    for tag in tags() {
        if tag == "v8" || tag == "v14" {
            drop(builder.take()); // killed with events on their way and images in the queue
            builder = Some(Builder::start(&registry.host, port, folder.path(), &[]));
        }
        succeeds(
            Command::new("skopeo")
                .args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"])
                .arg(layout.reference(&tag))
                .arg(format!("docker://{}/team/app:{tag}", registry.host)),
        );
    }
    let source = open(&registry.host, "team/app:v1").await;
    until("each image has its conversion", async || {
        let found = source.tags().await.unwrap();
        tags().all(|tag| found.contains(&format!("{tag}-soci")))
    })
    .await;
    builder.as_ref().unwrap().idle().await;
    assert_eq!(
        source.tags().await.unwrap().len(),
        40,
        "its own pushes make nothing more"
    );
    for tag in tags() {
        assert_converted(&registry.host, &format!("team/app:{tag}-soci")).await;
    }
    assert_eq!(
        builder.unwrap().counts().await,
        json!({"waiting": 0, "running": 0, "failed": 0})
    );
}
