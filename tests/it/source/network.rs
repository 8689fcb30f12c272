//! Proxies, TLS, and certificates: a proxy of the test's own leads `registry.test` to the registry.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use socinbd::error::Kind;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::support::registry::{Auth, Fault, Kind as Of, On, Times};

const CERTIFICATE: &[u8] = include_bytes!("tls/server.pem");
const KEY: &[u8] = include_bytes!("tls/server.key");

pub(super) fn ca_file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/source/tls/ca.pem")
}

/// Speaks TLS as `registry.test` and as 127.0.0.1.
pub(super) fn acceptor() -> TlsAcceptor {
    acceptor_with(CERTIFICATE, KEY)
}

fn acceptor_with(certificate: &[u8], key: &[u8]) -> TlsAcceptor {
    acceptor_of(certificate, key, WebPkiClientVerifier::no_client_auth())
}

/// Wants a certificate of its clients.
pub(super) fn acceptor_with_clients(verifier: Arc<dyn ClientCertVerifier>) -> TlsAcceptor {
    acceptor_of(CERTIFICATE, KEY, verifier)
}

fn acceptor_of(
    certificate: &[u8],
    key: &[u8],
    clients: Arc<dyn ClientCertVerifier>,
) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(certificate)
        .map(|one| one.expect("a certificate"))
        .collect();
    let key = PrivateKeyDer::from_pem_slice(key).expect("a key");
    let configuration = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(clients)
        .with_single_cert(certificates, key)
        .expect("a server's configuration");
    TlsAcceptor::from(Arc::new(configuration))
}

/// A registry that speaks TLS on a loopback address: passes what is inside to the registry.
async fn tls_front(registry: &Registry) -> String {
    tls_front_with(registry, acceptor()).await
}

pub(super) async fn tls_front_with(registry: &Registry, acceptor: TlsAcceptor) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("an address");
    let target = registry.host();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, target) = (acceptor.clone(), target.clone());
            tokio::spawn(async move {
                let Ok(mut inside) = acceptor.accept(stream).await else {
                    return; // a client that does not speak TLS
                };
                let Ok(mut registry) = TcpStream::connect(target).await else {
                    return;
                };
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut registry).await;
            });
        }
    });
    address.to_string()
}

/// A proxy that takes CONNECT for any host, speaks TLS, and passes what is inside to the registry.
async fn tls_proxy(registry: &Registry) -> String {
    let acceptor = acceptor();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("an address");
    let target = registry.host();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, target) = (acceptor.clone(), target.clone());
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                while stream
                    .read_line(&mut line)
                    .await
                    .is_ok_and(|bytes| bytes > 2)
                {}
                if !line.starts_with("CONNECT registry.test:443") {
                    return;
                }
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
                let Ok(mut inside) = acceptor.accept(stream.into_inner()).await else {
                    return; // a client that does not trust it
                };
                let Ok(mut registry) = TcpStream::connect(target).await else {
                    return;
                };
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut registry).await;
            });
        }
    });
    format!("http://{address}")
}

async fn open_test_host(access: &Access) -> Source {
    let reference = "registry.test/app".parse().expect("a reference");
    Source::open_with(&reference, access, IMPATIENT)
        .await
        .expect("opening touches no network")
}

#[tokio::test]
async fn tls_through_a_proxy_with_a_ca_of_ones_own() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let proxy = tls_proxy(&registry).await;
    let access = Access {
        https_proxy: Some(proxy.clone()),
        ca_certificates: vec![ca_file()],
        ..Access::default()
    };
    let source = open_test_host(&access).await;
    assert_eq!(source.range(&blob, 0..5).await.expect("the blob"), "hello");
    assert_eq!(registry.counters().log[0].headers["host"], "registry.test");

    // the same without the CA: an error that says what to do, and no second try
    registry.reset_counters();
    let access = Access {
        https_proxy: Some(proxy),
        ..Access::default()
    };
    let source = open_test_host(&access).await;
    let error = source.range(&blob, 0..5).await.expect_err("not trusted");
    assert!(
        error.report().contains("its certificate is not trusted"),
        "{error:?}"
    );
    assert!(!error.report().contains("gave up"), "{error:?}");
    assert_eq!(registry.counters().total().requests, 0);
}

#[tokio::test]
async fn tls_at_a_loopback_address_when_it_is_asked_for() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let front = tls_front(&registry).await;
    let open = |access: Access| {
        let reference = format!("{front}/app").parse().expect("a reference");
        async move {
            Source::open_with(&reference, &access, IMPATIENT)
                .await
                .expect("opening touches no network")
        }
    };
    let access = Access {
        tls: true,
        ca_certificates: vec![ca_file()],
        ..Access::default()
    };
    let source = open(access).await;
    assert_eq!(source.range(&blob, 0..5).await.expect("the blob"), "hello");
    assert_eq!(registry.counters().total().requests, 1);
    let error = open(Access::default()).await.range(&blob, 0..5).await;
    assert_eq!(error.expect_err("plain HTTP").kind(), Kind::Unavailable);
    assert_eq!(registry.counters().total().requests, 1);
}

#[tokio::test]
async fn a_server_that_signs_itself_is_trusted_where_its_certificate_is_named() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let (certificate, key) = (
        include_bytes!("tls/self-signed.pem"),
        include_bytes!("tls/self-signed.key"),
    );
    let front = tls_front_with(&registry, acceptor_with(certificate, key)).await;
    let port = front.rsplit(':').next().expect("a port").to_owned();
    let read = |host: &str, ca: &[&str]| {
        let reference = format!("{host}:{port}/app").parse().expect("a reference");
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/source/tls");
        let access = Access {
            tls: true,
            ca_certificates: ca.iter().map(|name| folder.join(name)).collect(),
            ..Access::default()
        };
        async move {
            let source = Source::open_with(&reference, &access, IMPATIENT).await;
            source
                .expect("opening touches no network")
                .range(&blob, 0..5)
                .await
        }
    };
    let bytes = read("127.0.0.1", &["self-signed.pem"]).await;
    assert_eq!(bytes.expect("the blob"), "hello");
    // another one's certificate is no word for it, nor is its own for another name
    for (host, ca, words) in [
        ("127.0.0.1", &[][..], "is not trusted"),
        ("127.0.0.1", &["ca.pem"], "is not trusted"),
        ("localhost", &["self-signed.pem"], "is for other host names"),
    ] {
        let error = read(host, ca).await.expect_err(words).report();
        assert!(error.contains(words), "{host} {ca:?}: {error}");
        assert!(!error.contains("gave up"), "{host} {ca:?}: {error}");
    }
}

#[tokio::test]
async fn an_exception_with_a_port_is_asked_without_the_proxy() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let front = tls_front(&registry).await;
    let port = front.rsplit(':').next().expect("a port").to_owned();
    let read = |exceptions: String| {
        let reference = format!("registry.test:{port}/app");
        let reference = reference.parse().expect("a reference");
        let access = Access {
            https_proxy: Some("http://127.0.0.1:1".to_owned()),
            no_proxy: Some(exceptions),
            ca_certificates: vec![ca_file()],
            ..Access::default()
        };
        async move {
            let source = Source::open_with(&reference, &access, IMPATIENT);
            let source = source.await.expect("opening touches no network");
            source
                .range(&blob, 0..5)
                .await
                .expect_err("no such host")
                .report()
        }
    };
    // the name leads nowhere: who asks it directly is told that, who asks the proxy that nobody listens there
    let error = read(format!("other.test,registry.test:{port}")).await;
    assert!(error.contains("dns error"), "{error}");
    for exceptions in ["registry.test:1".to_owned(), String::new()] {
        let error = read(exceptions).await;
        assert!(error.contains("Connection refused"), "{error}");
    }
}

#[tokio::test]
async fn an_answer_to_plain_http_that_may_come_from_tls_says_so() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let plain = Fault::Answer {
        code: 400,
        headers: vec![("content-type".to_owned(), "text/plain".to_owned())],
        body: "Client sent an HTTP request to an HTTPS server.".into(),
    };
    registry.fail(On::Any, plain, Times::Next(1));
    let source = open_with(&registry, "app", &Access::default(), IMPATIENT).await;
    let error = source.range(&blob, 0..5).await.expect_err("refused");
    assert!(error.report().contains("if it needs TLS"), "{error:?}");
}

#[tokio::test]
async fn a_redirect_from_https_to_http_is_refused() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let access = Access {
        https_proxy: Some(tls_proxy(&registry).await),
        ca_certificates: vec![ca_file()],
        ..Access::default()
    };
    let location = format!("http://{}/v2/app/blobs/{blob}?signature=x", registry.host());
    registry.fail(On::Any, Fault::Redirect { location }, Times::Next(1));
    let source = open_test_host(&access).await;
    let error = source.range(&blob, 0..5).await.expect_err("refused");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.report().contains("from https to http"), "{error:?}");
    assert!(!error.report().contains("signature"), "{error:?}");
    assert_eq!(registry.counters().total().requests, 1);
}

#[tokio::test]
async fn a_password_is_not_sent_to_a_token_service_without_tls() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    // its realm is http://127.0.0.1:PORT/token
    registry.set_auth(Auth::Bearer {
        user: Some(("me".to_owned(), "pw".to_owned())),
        refresh_token: None,
        lifetime: Duration::from_secs(60),
    });
    let config = docker_config("registry.test", "me", "pw");
    let access = Access {
        https_proxy: Some(tls_proxy(&registry).await),
        ca_certificates: vec![ca_file()],
        ..config.access.clone()
    };
    let error = open_test_host(&access)
        .await
        .range(&blob, 0..5)
        .await
        .expect_err("refused");
    assert_eq!(error.kind(), Kind::Unauthorized, "{error:?}");
    assert_eq!(registry.counters().kind(Of::Token).requests, 0);
}

#[tokio::test]
async fn plain_http_by_a_proxy_and_around_it() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    // the registry serves as the proxy too: it passes over the host in the request line
    let access = Access {
        plain_http: true,
        http_proxy: Some(format!("http://user:secret@{}", registry.host())),
        ..Access::default()
    };
    let source = open_test_host(&access).await;
    assert_eq!(source.range(&blob, 0..5).await.expect("the blob"), "hello");
    let log = registry.counters().log;
    assert_eq!(log[0].headers["host"], "registry.test");
    assert!(log[0].headers.contains_key("proxy-authorization"));

    let around = Access {
        no_proxy: Some("other.test,registry.test".to_owned()),
        ..access.clone()
    };
    let error = open_test_host(&around)
        .await
        .range(&blob, 0..5)
        .await
        .expect_err("no such host");
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    assert_eq!(registry.counters().total().requests, 1);

    // loopback is never asked of a proxy
    let nowhere = Access {
        http_proxy: Some("http://127.0.0.1:1".to_owned()),
        ..Access::default()
    };
    let source = open_with(&registry, "app", &nowhere, IMPATIENT).await;
    assert_eq!(source.range(&blob, 0..5).await.expect("the blob"), "hello");
}

#[tokio::test]
async fn settings_that_make_no_sense_are_named() {
    let empty = tempfile::NamedTempFile::new().expect("a file");
    let digest = Digest::of(b"x");
    for (access, kind, said) in [
        (
            Access {
                https_proxy: Some("http://user:secret@[".to_owned()),
                ..Access::default()
            },
            Kind::InvalidArgument,
            "not a valid proxy URL",
        ),
        (
            Access {
                ca_certificates: vec![empty.path().to_owned()],
                ..Access::default()
            },
            Kind::InvalidArgument,
            "no PEM certificate",
        ),
        (
            Access {
                ca_certificates: vec!["/nonexistent/ca.pem".into()],
                ..Access::default()
            },
            Kind::Io,
            "/nonexistent/ca.pem",
        ),
    ] {
        let error = open_test_host(&access)
            .await
            .range(&digest, 0..5)
            .await
            .expect_err(said);
        assert_eq!(error.kind(), kind, "{error:?}");
        assert!(error.report().contains(said), "{error:?}");
        assert!(!error.report().contains("secret"), "{error:?}");
    }
}

#[tokio::test]
async fn a_registry_without_tls_is_told_from_one_that_is_down() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    // a proxy that leads to the registry without TLS in between
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let proxy = format!("http://{}", listener.local_addr().expect("an address"));
    let target = registry.host();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            while stream
                .read_line(&mut line)
                .await
                .is_ok_and(|bytes| bytes > 2)
            {}
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            if let Ok(mut registry) = TcpStream::connect(&target).await {
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut registry).await;
            }
        }
    });
    let access = Access {
        https_proxy: Some(proxy),
        ca_certificates: vec![ca_file()],
        ..Access::default()
    };
    let error = open_test_host(&access)
        .await
        .range(&blob, 0..5)
        .await
        .expect_err("no TLS there");
    assert!(error.report().contains("plain HTTP"), "{error:?}");
}

/// A registry that answers when no more connections have come for a moment. Returns its address and the largest number of connections at
/// once.
async fn slow_registry() -> (String, Arc<AtomicUsize>) {
    const ANSWER: &[u8] =
        b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let most = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&most);
    tokio::spawn(async move {
        let mut waiting: Vec<TcpStream> = Vec::new();
        loop {
            match tokio::time::timeout(Duration::from_millis(300), listener.accept()).await {
                Ok(accepted) => waiting.push(accepted.unwrap().0),
                Err(_) => {
                    for mut stream in waiting.drain(..) {
                        let mut head = [0; 4096];
                        let _ = stream.read(&mut head).await.unwrap();
                        stream.write_all(ANSWER).await.unwrap();
                    }
                }
            }
            counted.fetch_max(waiting.len(), Ordering::Relaxed);
        }
    });
    (address, most)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_one_registry_are_bounded() {
    let (address, most) = slow_registry().await;
    let asked = (0..200_u32).map(|number| {
        let reference = format!("{address}/app-{number}").parse().unwrap();
        tokio::spawn(async move {
            let source = Source::open(&reference, &Access::default()).await.unwrap();
            let error = source.manifest(&Digest::of(b"")).await.unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound, "{}", error.report());
        })
    });
    for one in asked.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    assert_eq!(most.load(Ordering::Relaxed), 64);
}
