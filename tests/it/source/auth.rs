//! Who may pull: credentials, tokens, and their ends.

use std::os::unix::fs::PermissionsExt;

use socinbd::error::Kind;

use super::*;
use crate::support::registry::{Auth, Fault, Kind as Of, On, Times};

const AN_HOUR: Duration = Duration::from_secs(3600);

fn basic() -> Auth {
    Auth::Basic {
        user: "me".to_owned(),
        password: "pa:ss".to_owned(),
    }
}

fn bearer(user: Option<(&str, &str)>) -> Auth {
    Auth::Bearer {
        user: user.map(|(user, password)| (user.to_owned(), password.to_owned())),
        refresh_token: Some("refresh me".to_owned()),
        lifetime: AN_HOUR,
    }
}

fn with_blob(auth: Auth) -> (Registry, Digest) {
    let registry = Registry::start();
    let blob = registry.add_blob("team/app", noise(1_000, 6));
    registry.set_auth(auth);
    (registry, blob)
}

/// What reading ten bytes with these credentials gives.
async fn read(registry: &Registry, blob: &Digest, access: &Access) -> Result<()> {
    let source = open_with(registry, "team/app", access, IMPATIENT).await;
    source.range(blob, 0..10).await.map(|_| ())
}

#[tokio::test]
async fn a_name_and_a_password() {
    let (registry, blob) = with_blob(basic());
    let config = docker_config(&registry.host(), "me", "pa:ss");
    read(&registry, &blob, &config.access)
        .await
        .expect("let in");
    // anonymous, challenged, let in; and what was learned is used from then on
    let source = open_with(&registry, "team/app", &config.access, LIMITS).await;
    registry.reset_counters();
    source.range(&blob, 0..10).await.expect("let in");
    source.range(&blob, 10..20).await.expect("let in");
    assert_eq!(registry.counters().total().requests, 3);
}

#[tokio::test]
async fn who_is_not_let_in_is_told_what_to_do() {
    for auth in [basic(), bearer(Some(("me", "pa:ss")))] {
        let (registry, blob) = with_blob(auth);
        let none = read(&registry, &blob, &Access::default())
            .await
            .expect_err("anonymous");
        assert_eq!(none.kind(), Kind::Unauthorized, "{none:?}");
        let config = docker_config(&registry.host(), "me", "wrong");
        let wrong = read(&registry, &blob, &config.access)
            .await
            .expect_err("wrong");
        assert_eq!(wrong.kind(), Kind::Unauthorized, "{wrong:?}");
        let file = config.access.docker_config.as_ref().expect("a file");
        assert!(
            wrong.report().contains(&file.display().to_string()),
            "{wrong:?}"
        );
        assert!(!wrong.report().contains("wrong)"), "{wrong:?}");
        // never fall back to anonymous, and never try again what was refused
        assert!(registry.counters().total().requests <= 8);
    }
    let (registry, blob) = with_blob(basic());
    let none = read(&registry, &blob, &Access::default())
        .await
        .expect_err("anonymous");
    assert!(
        none.report()
            .contains(&format!("docker login {}", registry.host())),
        "{none:?}"
    );
}

#[tokio::test]
async fn tokens_for_everybody_and_for_who_has_a_password() {
    let (registry, blob) = with_blob(bearer(None));
    read(&registry, &blob, &Access::default())
        .await
        .expect("anonymous");

    let (registry, blob) = with_blob(bearer(Some(("me", "pa:ss"))));
    let config = docker_config(&registry.host(), "me", "pa:ss");
    read(&registry, &blob, &config.access)
        .await
        .expect("let in");
    let log = registry.counters().log;
    let token = log
        .iter()
        .find(|entry| entry.kind == Of::Token)
        .expect("a token");
    let query = percent_encoding::percent_decode_str(&token.query).decode_utf8_lossy();
    assert!(query.contains("service=tests"), "{query}");
    assert!(query.contains("scope=repository:team/app:pull"), "{query}");
}

#[tokio::test]
async fn a_refresh_token_and_a_registry_token() {
    let (registry, blob) = with_blob(bearer(Some(("me", "pa:ss"))));
    let config = config_file(&format!(
        r#"{{"auths":{{"{}":{{"identitytoken":"refresh me"}}}}}}"#,
        registry.host()
    ));
    read(&registry, &blob, &config.access)
        .await
        .expect("let in");
    let log = registry.counters().log;
    let token = log
        .iter()
        .find(|entry| entry.kind == Of::Token)
        .expect("a token");
    assert_eq!(token.method, "POST");
    assert!(!token.query.contains("refresh"), "no secret in a URL");

    // what the service gave, given again as the registry's own
    let config = config_file(&format!(
        r#"{{"auths":{{"{}":{{"registrytoken":"token-1"}}}}}}"#,
        registry.host()
    ));
    registry.reset_counters();
    read(&registry, &blob, &config.access)
        .await
        .expect("let in");
    assert_eq!(registry.counters().kind(Of::Token).requests, 0);
}

#[tokio::test]
async fn a_token_that_ends_in_the_middle_is_renewed_once_for_all() {
    let (registry, blob) = with_blob(bearer(None));
    let source = open(&registry, "team/app").await;
    source.range(&blob, 0..10).await.expect("the first");
    registry.revoke_tokens();
    registry.reset_counters();
    let readers: Vec<_> = (0..8)
        .map(|at| {
            let source = source.clone();
            tokio::spawn(async move { source.range(&blob, at * 100..at * 100 + 100).await })
        })
        .collect();
    for reader in readers {
        reader.await.expect("no panic").expect("the range");
    }
    assert_eq!(registry.counters().kind(Of::Token).requests, 1);
}

#[tokio::test]
async fn credentials_whose_time_is_over_are_read_again_also_after_a_403() {
    let (registry, blob) = with_blob(basic());
    let config = docker_config(&registry.host(), "me", "pa:ss");
    let source = open_with(&registry, "team/app", &config.access, IMPATIENT).await;
    source.range(&blob, 0..10).await.expect("let in");
    let forbidden = |message: &str| Fault::Answer {
        code: 403,
        headers: vec![("content-type".to_owned(), "application/json".to_owned())],
        body: format!(r#"{{"errors":[{{"code":"DENIED","message":"{message}"}}]}}"#).into(),
    };
    let expired = forbidden("Your authorization token has expired. Reauthenticate and try again.");
    registry.fail(On::Any, expired.clone(), Times::Next(1));
    source.range(&blob, 0..10).await.expect("let in again");
    // a password changed on both sides
    registry.set_auth(Auth::Basic {
        user: "me".to_owned(),
        password: "new".to_owned(),
    });
    let renewed = docker_config(&registry.host(), "me", "new");
    let (old, new) = (&config.access.docker_config, &renewed.access.docker_config);
    std::fs::copy(new.as_ref().expect("a file"), old.as_ref().expect("a file")).expect("copy");
    source
        .range(&blob, 0..10)
        .await
        .expect("with the new password");

    registry.reset_counters();
    registry.fail(On::Any, expired, Times::UntilHealed);
    let error = source.range(&blob, 0..10).await.expect_err("always");
    assert_eq!(error.kind(), Kind::Unauthorized, "{error:?}");
    assert_eq!(registry.counters().total().requests, 2);
    registry.heal();
    registry.reset_counters();
    registry.fail(On::Any, forbidden("not yours"), Times::Next(1));
    let error = source.range(&blob, 0..10).await.expect_err("not expired");
    assert!(error.report().contains("DENIED: not yours"), "{error:?}");
    assert_eq!(registry.counters().total().requests, 1);
}

#[tokio::test]
async fn a_token_service_that_fails() {
    let (registry, blob) = with_blob(bearer(None));
    registry.fail(On::Kind(Of::Token), Fault::status(503), Times::Next(2));
    read_patiently(&registry, &blob)
        .await
        .expect("it came back");
    for (content_type, body) in [
        ("text/html", "<html>welcome</html>"),
        ("application/json", "{}"),
        ("application/json", r#"{"token":"sec\nret"}"#),
        ("application/json", r#"{"token":7}"#),
        ("application/json", "[[[[[[[["),
    ] {
        registry.revoke_tokens();
        registry.fail(
            On::Kind(Of::Token),
            Fault::Replace {
                content_type: content_type.to_owned(),
                body: body.into(),
                headers: Vec::new(),
            },
            Times::Next(1),
        );
        let error = read_patiently(&registry, &blob).await.expect_err(body);
        assert_eq!(error.kind(), Kind::Unauthorized, "{error:?}");
        assert!(!error.report().contains("welcome") && !error.report().contains("ret\""));
    }
}

async fn read_patiently(registry: &Registry, blob: &Digest) -> Result<()> {
    let source = open(registry, "team/app").await;
    source.range(blob, 0..10).await.map(|_| ())
}

#[tokio::test]
async fn challenges_that_cannot_be_answered() {
    for (challenge, said) in [
        ("", "without a WWW-Authenticate challenge"),
        ("Negotiate", "negotiate"),
        ("Bearer", "token service"),
        ("Bearer realm=\"\"", "token service"),
        ("Bearer realm=\"ftp://127.0.0.1/token\"", "https"),
        ("Bearer realm=\"file:///etc/passwd\"", "https"),
    ] {
        let (registry, blob) = with_blob(Auth::Open);
        let headers = match challenge {
            "" => Vec::new(),
            challenge => vec![("www-authenticate".to_owned(), challenge.to_owned())],
        };
        registry.fail(
            On::Any,
            Fault::Answer {
                code: 401,
                headers,
                body: bytes::Bytes::new(),
            },
            Times::UntilHealed,
        );
        let error = read(&registry, &blob, &Access::default())
            .await
            .expect_err(challenge);
        assert_eq!(error.kind(), Kind::Unauthorized, "{challenge}: {error:?}");
        assert!(error.report().contains(said), "{challenge}: {error:?}");
        assert_eq!(registry.counters().total().requests, 1, "{challenge}");
    }
}

/// A helper that keeps what it was asked, and gives this answer.
fn helper(folder: &std::path::Path, script: &str) {
    let file = folder.join("docker-credential-test");
    let text = format!(
        "#!/bin/sh\nread server\necho \"$1 $server $HOME $SECRET\" >> {}/asked\n{script}\n",
        folder.display()
    );
    std::fs::write(&file, text).expect("write the helper");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("make it run");
}

fn with_helper(registry: &Registry, key: &str, script: &str) -> Config {
    let mut config = config_file(&match key {
        "credsStore" => r#"{"credsStore":"test"}"#.to_owned(),
        _ => format!(r#"{{"credHelpers":{{"{}":"test"}}}}"#, registry.host()),
    });
    helper(config.folder.path(), script);
    let path = format!("{}:/usr/bin:/bin", config.folder.path().display());
    let environment = &mut config.access.helper_environment;
    environment.insert("PATH".to_owned(), path);
    environment.insert("HOME".to_owned(), "/users/who/asked".to_owned());
    config
}

#[tokio::test]
async fn helpers_are_asked_in_the_environment_of_who_asked() {
    let (registry, blob) = with_blob(basic());
    for key in ["credsStore", "credHelpers"] {
        let config = with_helper(
            &registry,
            key,
            r#"echo '{"ServerURL":"x","Username":"me","Secret":"pa:ss"}'"#,
        );
        read(&registry, &blob, &config.access)
            .await
            .expect("let in");
        let asked = std::fs::read_to_string(config.folder.path().join("asked")).expect("asked");
        assert_eq!(
            asked,
            format!("get {} /users/who/asked \n", registry.host())
        );
    }
    let (registry, blob) = with_blob(bearer(Some(("me", "pa:ss"))));
    let config = with_helper(
        &registry,
        "credHelpers",
        r#"echo '{"ServerURL":"x","Username":"<token>","Secret":"refresh me"}'"#,
    );
    read(&registry, &blob, &config.access)
        .await
        .expect("let in");
}

#[tokio::test]
async fn helpers_that_fail_are_named_and_not_quoted() {
    let (registry, blob) = with_blob(basic());
    for (script, said, kind) in [
        (
            "echo 'credentials not found in native keychain'; exit 1",
            "docker login",
            Kind::Unauthorized,
        ),
        (
            "echo top-secret; echo no key for top-secret here >&2; exit 3",
            "docker-credential-test get failed (exit status: 3) (no key for ... here)",
            Kind::Unavailable,
        ),
        (
            "echo top-secret",
            "the answer is not JSON",
            Kind::Unavailable,
        ),
        (
            "head -c 1000000 /dev/zero",
            "running docker-credential-test: its answer has more than 65536 bytes",
            Kind::Unavailable,
        ),
    ] {
        let config = with_helper(&registry, "credHelpers", script);
        let error = read(&registry, &blob, &config.access)
            .await
            .expect_err(script);
        // one that fails may work later: a read of a disk tries again
        assert_eq!(error.kind(), kind, "{script}: {error:?}");
        assert!(error.report().contains(said), "{script}: {error:?}");
        assert!(
            !error.report().contains("top-secret"),
            "{script}: {error:?}"
        );
    }
    let config = config_file(r#"{"credsStore":"absent"}"#);
    let error = read(&registry, &blob, &config.access)
        .await
        .expect_err("no such helper");
    assert!(
        error
            .report()
            .contains("docker-credential-absent is not in PATH"),
        "{error:?}"
    );
    let config = config_file(r#"{"credsStore":"../../bin/sh"}"#);
    let error = read(&registry, &blob, &config.access)
        .await
        .expect_err("no name");
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error:?}");
}

/// As with Docker: who has no helper pulls what everybody may pull.
#[tokio::test]
async fn a_helper_that_is_not_there_does_not_keep_a_public_image() {
    let (registry, blob) = with_blob(bearer(None));
    for file in [
        "",
        "{\"auths\":null,\"credHelpers\":null}",
        "{\"auths\":{\"other.example\":null}}",
        "{\"auths\":{\"other.example\":{}},\"credsStore\":\"absent\"}",
    ] {
        let config = config_file(file);
        read(&registry, &blob, &config.access).await.expect(file);
    }
    let log = Log::start();
    for (script, said) in [
        ("exit 3", "get failed"),
        ("echo no JSON", "the answer is not JSON"),
    ] {
        let config = with_helper(&registry, "credHelpers", script);
        read(&registry, &blob, &config.access).await.expect(script);
        let warnings = log.warnings();
        let last = warnings.last().expect(script);
        assert!(
            last.contains("from a helper") && last.contains(said),
            "{last}"
        );
    }
}

#[tokio::test]
async fn files_that_are_broken_or_absent() {
    let (registry, blob) = with_blob(basic());
    let config = config_file(r#"{"auths":{"x":{"auth":"dG9wLXNlY3JldA"#);
    let error = read(&registry, &blob, &config.access)
        .await
        .expect_err("broken");
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error:?}");
    assert!(!error.report().contains("dG9w"), "{error:?}");

    let (registry, blob) = with_blob(Auth::Open);
    read(&registry, &blob, &config.access)
        .await
        .expect("nobody asked for credentials");

    // Docker's file has nothing for this registry, Podman's has
    let (registry, blob) = with_blob(basic());
    let mut config = docker_config("other.example", "me", "no");
    let podman = docker_config(&format!("{}/team", registry.host()), "me", "pa:ss");
    config.access.podman_auth = podman.access.docker_config.clone();
    read(&registry, &blob, &config.access)
        .await
        .expect("Podman's file");
}
