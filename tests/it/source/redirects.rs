//! Blobs that lie elsewhere.

use socinbd::error::Kind;

use super::*;
use crate::support::registry::{Auth, Fault, Kind as Of, On, Redirects, Times};

const AN_HOUR: Duration = Duration::from_secs(3600);

async fn redirected(expired_status: u16) -> (Registry, Vec<u8>, Digest, Source) {
    let registry = Registry::start();
    let bytes = noise(100_000, 4);
    let blob = registry.add_blob("app", bytes.clone());
    registry.set_redirects(Some(Redirects {
        lifetime: AN_HOUR,
        expired_status,
    }));
    let source = open(&registry, "app").await;
    (registry, bytes, blob, source)
}

#[tokio::test]
async fn where_a_redirect_led_is_kept_for_its_blob() {
    let (registry, bytes, blob, source) = redirected(403).await;
    for at in 0..10 {
        let range = at * 1_000..at * 1_000 + 500;
        let got = source.range(&blob, range.clone()).await.expect("the range");
        assert_eq!(got, bytes[range.start as usize..range.end as usize]);
    }
    let counters = registry.counters();
    assert_eq!(counters.kind(Of::Blob).requests, 1);
    assert_eq!(counters.kind(Of::Cdn).requests, 10);
    // another blob has another target
    let other = registry.add_blob("app", "other");
    assert_eq!(
        source.range(&other, 0..5).await.expect("the range"),
        "other"
    );
    assert_eq!(registry.counters().kind(Of::Blob).requests, 2);
}

#[tokio::test]
async fn an_expired_target_is_resolved_anew_once() {
    for status in [400, 401, 403, 404, 410] {
        let (registry, bytes, blob, source) = redirected(status).await;
        source.range(&blob, 0..10).await.expect("the first");
        registry.expire_signatures();
        registry.reset_counters();
        assert_eq!(
            source.range(&blob, 50..60).await.expect("the second"),
            bytes[50..60]
        );
        let statuses: Vec<u16> = registry
            .counters()
            .log
            .iter()
            .map(|entry| entry.status)
            .collect();
        assert_eq!(statuses, [status, 307, 206]);

        // the new target says no too: that is the answer
        registry.fail(On::Kind(Of::Cdn), Fault::status(status), Times::UntilHealed);
        registry.reset_counters();
        let error = source.range(&blob, 50..60).await.expect_err("no twice");
        let statuses: Vec<u16> = registry
            .counters()
            .log
            .iter()
            .map(|entry| entry.status)
            .collect();
        assert_eq!(statuses, [status, 307, status]);
        let kind = match status {
            400 => Kind::Unsupported,
            404 | 410 => Kind::NotFound,
            _ => Kind::Unauthorized,
        };
        assert_eq!(error.kind(), kind, "{error:?}");
        assert!(!error.report().contains("signature"), "{error:?}");
        assert!(error.report().contains(&registry.cdn_host()), "{error:?}");
    }
}

#[tokio::test]
async fn a_target_that_fails_is_asked_for_anew_at_the_registry() {
    let (registry, bytes, blob, source) = redirected(403).await;
    source.range(&blob, 0..10).await.expect("the first");
    registry.fail(On::Kind(Of::Cdn), Fault::status(503), Times::Next(1));
    registry.reset_counters();
    assert_eq!(
        source.range(&blob, 50..60).await.expect("the second"),
        bytes[50..60]
    );
    let statuses: Vec<u16> = registry
        .counters()
        .log
        .iter()
        .map(|entry| entry.status)
        .collect();
    assert_eq!(statuses, [503, 307, 206]);
}

#[tokio::test]
async fn an_expiry_in_the_middle_of_a_stream_does_not_show() {
    let registry = Registry::start();
    let bytes = noise(18 << 20, 5);
    let blob = registry.add_blob("app", bytes.clone());
    registry.set_redirects(Some(Redirects {
        lifetime: AN_HOUR,
        expired_status: 403,
    }));
    let source = open(&registry, "app").await;
    registry.fail(On::Data, Fault::Cut { after: 1_000_000 }, Times::Next(1));
    registry.fail(On::Data, Fault::status(403), Times::Next(2));
    registry.fail(On::Data, Fault::Truncate { to: 77_777 }, Times::Next(4));
    assert!(
        streamed(&source, &blob, bytes.len())
            .await
            .expect("the blob")
            == bytes
    );
}

#[tokio::test]
async fn credentials_go_to_the_registry_alone() {
    let (registry, _, blob, _) = redirected(403).await;
    registry.set_auth(Auth::Basic {
        user: "me".to_owned(),
        password: "pa:ss".to_owned(),
    });
    let config = docker_config(&registry.host(), "me", "pa:ss");
    let source = open_with(&registry, "app", &config.access, LIMITS).await;
    source.range(&blob, 0..10).await.expect("the first");
    source.range(&blob, 10..20).await.expect("the second");
    let log = registry.counters().log;
    assert!(log.iter().filter(|entry| entry.kind == Of::Cdn).count() == 2);
    for entry in &log {
        let shown = entry.headers.contains_key("authorization");
        assert!(!shown || entry.kind == Of::Blob, "{entry:?}");
    }
    assert!(
        log.iter()
            .any(|entry| entry.headers.contains_key("authorization"))
    );
}

#[tokio::test]
async fn a_redirect_within_the_registry_keeps_the_credentials() {
    let registry = Registry::start();
    let blob = registry.add_blob("new", "hello");
    registry.set_auth(Auth::Basic {
        user: "me".to_owned(),
        password: "pw".to_owned(),
    });
    let config = docker_config(&registry.host(), "me", "pw");
    let source = open_with(&registry, "old", &config.access, LIMITS).await;
    registry.fail(
        On::Kind(Of::Blob),
        Fault::Redirect {
            location: format!("/v2/new/blobs/{blob}"),
        },
        Times::Next(1),
    );
    registry.fail(
        On::Kind(Of::Blob),
        Fault::Redirect {
            location: format!("../../new/blobs/{blob}"),
        },
        Times::Next(1),
    );
    assert_eq!(source.range(&blob, 0..5).await.expect("the blob"), "hello");
}

#[tokio::test]
async fn redirects_that_lead_nowhere_are_errors() {
    for location in [
        "{self}",
        "file:///etc/passwd",
        "http://",
        "ftp://127.0.0.1/x",
        "//",
        "javascript:alert(1)",
    ] {
        let registry = Registry::start();
        let blob = registry.add_blob("app", "hello");
        let source = open_with(&registry, "app", &Access::default(), IMPATIENT).await;
        let location = location.to_owned();
        registry.fail(
            On::Any,
            Fault::Redirect {
                location: location.clone(),
            },
            Times::UntilHealed,
        );
        let error = source.range(&blob, 0..5).await.expect_err("nowhere");
        assert_eq!(error.kind(), Kind::Unavailable, "{location}: {error:?}");
        assert!(registry.counters().total().requests <= 10, "{location}");
    }
}

#[tokio::test]
async fn no_secret_reaches_a_log_or_an_error() {
    // this test's runtime has one thread: all of the client's own lines come through here
    let log = Log::start();
    let (registry, _, blob, _) = redirected(403).await;
    registry.set_auth(Auth::Bearer {
        user: Some(("me".to_owned(), "hunter2".to_owned())),
        refresh_token: None,
        lifetime: AN_HOUR,
    });
    let config = docker_config(&registry.host(), "me", "hunter2");
    let source = open_with(&registry, "app", &config.access, IMPATIENT).await;
    source.range(&blob, 0..10).await.expect("the range");
    let mut errors = String::new();
    for fault in [
        Fault::status(503),
        Fault::status(403),
        Fault::Close,
        Fault::Cut { after: 3 },
        Fault::Hang,
        Fault::Redirect {
            location: "{self}?signature=again".to_owned(),
        },
        Fault::WrongRange { shift: 3 },
    ] {
        registry.fail(On::Kind(Of::Cdn), fault, Times::UntilHealed);
        if let Err(error) = source.range(&blob, 20..30).await {
            errors.push_str(&format!("{error:?} {error} {}\n", error.report()));
        }
        registry.heal();
    }
    registry.set_auth(Auth::Bearer {
        user: Some(("me".to_owned(), "changed".to_owned())),
        refresh_token: None,
        lifetime: AN_HOUR,
    });
    registry.expire_signatures();
    let error = source
        .range(&blob, 0..10)
        .await
        .expect_err("another password");
    errors.push_str(&format!("{error:?}\n"));
    let logged = log.text();
    assert!(logged.contains("trying again"), "{logged}");
    assert!(errors.lines().count() >= 6, "{errors}");
    let encoded = crate::support::registry::base64(b"me:hunter2");
    for secret in ["signature", "hunter2", "token-", &encoded] {
        assert!(!errors.contains(secret), "{secret} in {errors}");
        let line = logged
            .lines()
            .find(|line| line.contains(secret) && line.contains("socinbd"));
        assert_eq!(line, None, "{secret}");
    }
}
