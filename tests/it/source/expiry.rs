//! Credentials that last for seconds, as Amazon's registry gives them: a reader does not notice that they end.

use std::time::Instant;

use socinbd::error::Kind;

use super::*;
use crate::support::{
    credential_plugin::CredentialPlugin,
    registry::{Auth, DATED_PASSWORD, Fault, Kind as Of, On, Redirects, Times},
};

const LIFETIME: Duration = Duration::from_secs(1);

/// A registry whose passwords and signed URLs last for a second, with a blob.
fn short_lived() -> (Registry, Vec<u8>, Digest, CredentialPlugin) {
    let registry = Registry::start();
    let bytes = noise(400_000, 9);
    let blob = registry.add_blob("team/app", bytes.clone());
    registry.set_auth(Auth::Dated { lifetime: LIFETIME });
    registry.set_redirects(Some(Redirects {
        lifetime: LIFETIME,
        expired_status: 400,
    }));
    // it says that its passwords last longer than they do
    let plugin = CredentialPlugin::new(DATED_PASSWORD, "1h").for_registry(&registry.host());
    (registry, bytes, blob, plugin)
}

fn access(plugin: &CredentialPlugin) -> Access {
    Access {
        credential_plugins: Some(plugin.settings()),
        helper_environment: [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into(),
        ..Access::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_across_several_expiries_see_none() {
    let (registry, bytes, blob, plugin) = short_lived();
    let bytes = Arc::new(bytes);
    let source = open_with(&registry, "team/app", &access(&plugin), LIMITS).await;
    let end = Instant::now() + LIFETIME * 4 + LIFETIME / 2;
    let readers: Vec<_> = (0..6_u64)
        .map(|reader| {
            let (source, bytes) = (source.clone(), Arc::clone(&bytes));
            tokio::spawn(async move {
                let mut reads = 0;
                while Instant::now() < end {
                    let start = (reader * 7_919 + reads * 104_729) % 390_000;
                    let got = source.range(&blob, start..start + 9_000).await;
                    let got = got.unwrap_or_else(|error| panic!("{}", error.report()));
                    assert!(got == bytes[start as usize..start as usize + 9_000]);
                    reads += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                reads
            })
        })
        .collect();
    // a registry in trouble, too
    for _ in 0..4 {
        tokio::time::sleep(LIFETIME).await;
        registry.fail(
            On::Kind(Of::Blob),
            Fault::Status {
                code: 429,
                retry_after: Some("0".to_owned()),
            },
            Times::Next(2),
        );
    }
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.expect("no error");
    }
    let log = registry.counters().log;
    let refused = |kind, status| {
        let refused = log
            .iter()
            .filter(|it| it.kind == kind && it.status == status);
        refused.count()
    };
    println!(
        "{reads} reads, {} runs of the plugin, {} times 403, {} times 400",
        plugin.runs(),
        refused(Of::Blob, 403),
        refused(Of::Cdn, 400)
    );
    assert!(refused(Of::Blob, 403) >= 3 && refused(Of::Cdn, 400) >= 3);
    // one for each expiry, for all readers
    let runs = plugin.runs();
    assert!((4..=7).contains(&runs), "{runs} runs");
    // no credential goes to where the redirects lead
    let of_cdn = log.iter().filter(|entry| entry.kind == Of::Cdn);
    for entry in of_cdn {
        assert!(!entry.headers.contains_key("authorization"), "{entry:?}");
    }
}

#[tokio::test]
async fn repositories_of_a_registry_share_the_answer_of_a_plugin() {
    let (registry, _, blob, plugin) = short_lived();
    registry.set_auth(Auth::Dated {
        lifetime: Duration::from_secs(3600),
    });
    for repository in ["team/app", "team/other"] {
        registry.add_blob(repository, noise(400_000, 9));
        let source = open_with(&registry, repository, &access(&plugin), LIMITS).await;
        source.range(&blob, 0..10).await.expect("let in");
    }
    assert_eq!(plugin.runs(), 1);
}

#[tokio::test]
async fn a_token_service_that_refuses_a_kept_password_is_asked_with_a_new_one() {
    let (registry, _, blob, other) = short_lived();
    registry.set_redirects(None);
    let password = other.file("password");
    let plugin = CredentialPlugin::new(&format!("cat {}", password.display()), "1h")
        .for_registry(&registry.host());
    let source = open_with(&registry, "team/app", &access(&plugin), LIMITS).await;
    for (runs, password_now) in ["first", "second"].into_iter().enumerate() {
        std::fs::write(&password, password_now).expect("the password");
        registry.set_auth(Auth::Bearer {
            user: Some(("AWS".to_owned(), password_now.to_owned())),
            refresh_token: None,
            lifetime: Duration::from_secs(3600),
        });
        source.range(&blob, 0..10).await.expect("let in");
        // a token that ends needs no other password
        registry.revoke_tokens();
        source.range(&blob, 0..10).await.expect("let in");
        assert_eq!(plugin.runs(), runs + 1);
    }
    // an answer that is new is not asked for again
    std::fs::write(&password, "wrong").expect("the password");
    registry.set_auth(Auth::Bearer {
        user: Some(("AWS".to_owned(), "third".to_owned())),
        refresh_token: None,
        lifetime: Duration::from_secs(3600),
    });
    let error = source.range(&blob, 0..10).await.expect_err("wrong");
    assert_eq!(error.kind(), Kind::Unauthorized, "{error:?}");
    assert!(
        error.report().contains("credential plugin plugin"),
        "{error:?}"
    );
    assert!(!error.report().contains("wrong)"), "{error:?}");
    assert_eq!(plugin.runs(), 3);
}

#[tokio::test]
async fn a_plugin_that_fails_is_named_and_asked_again() {
    let (registry, _, blob, _) = short_lived();
    let plugin = CredentialPlugin::new("echo no role for this machine >&2; exit 1", "1h")
        .for_registry(&registry.host());
    let source = open_with(&registry, "team/app", &access(&plugin), IMPATIENT).await;
    let error = source.range(&blob, 0..10).await.expect_err("no password");
    // a read of a disk tries again until its time is over
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    let report = error.report();
    assert!(
        report.contains("credential plugin plugin failed"),
        "{report}"
    );
    assert!(report.contains("(no role for this machine)"), "{report}");
    let works = CredentialPlugin::new(DATED_PASSWORD, "1h");
    std::fs::copy(works.file("plugin"), plugin.file("plugin")).expect("copy");
    source.range(&blob, 0..10).await.expect("let in");
}

#[tokio::test]
async fn an_image_that_everybody_may_pull_needs_no_plugin() {
    let (registry, _, blob, _) = short_lived();
    registry.set_redirects(None);
    registry.set_auth(Auth::Open);
    let plugin = CredentialPlugin::new("exit 1", "1h").for_registry(&registry.host());
    let source = open_with(&registry, "team/app", &access(&plugin), LIMITS).await;
    source.range(&blob, 0..10).await.expect("let in");
    assert_eq!(plugin.runs(), 0);
    registry.set_auth(Auth::Bearer {
        user: None,
        refresh_token: None,
        lifetime: Duration::from_secs(3600),
    });
    source.range(&blob, 0..10).await.expect("let in");
    assert_eq!(plugin.runs(), 1);
}

#[tokio::test]
async fn credentials_that_were_missing_are_looked_for_again_after_a_403() {
    let (registry, _, blob, other) = short_lived();
    registry.set_redirects(None);
    registry.set_auth(Auth::Bearer {
        user: None,
        refresh_token: None,
        lifetime: Duration::from_secs(3600),
    });
    let may = other.file("may");
    let plugin = CredentialPlugin::new(&format!("cat {}", may.display()), "1h")
        .for_registry(&registry.host());
    let source = open_with(&registry, "team/app", &access(&plugin), LIMITS).await;
    // anonymous: challenged, and then refused
    registry.fail(On::Kind(Of::Blob), Fault::status(403), Times::After(1));
    let error = source.range(&blob, 0..10).await.expect_err("forbidden");
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    assert_eq!(plugin.runs(), 1);
    std::fs::write(&may, "secret").expect("the password");
    source.range(&blob, 0..10).await.expect("let in");
    assert_eq!(plugin.runs(), 2);
    // credentials that are refused are not looked for again: they may not be enough
    registry.fail(On::Kind(Of::Blob), Fault::status(403), Times::Next(1));
    let error = source.range(&blob, 0..10).await.expect_err("forbidden");
    assert_eq!(error.kind(), Kind::Unauthorized, "{error:?}");
    source.range(&blob, 0..10).await.expect("let in");
    assert_eq!(registry.counters().kind(Of::Token).requests, 2);
}
