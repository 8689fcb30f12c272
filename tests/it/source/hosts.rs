//! Registries as a node configures them: `hosts.toml` of containerd, with mirrors, certificates and headers.

use std::path::{Path, PathBuf};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use socinbd::{error::Kind, source::Destination};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::{
    network::{acceptor, acceptor_with_clients, ca_file, tls_front_with},
    *,
};
use crate::support::registry::{
    Auth, Entry, Fault, INDEX, Kind as Of, MANIFEST, On, Redirects, Referrers, Times,
};

/// A registry that nobody can reach by its own name: what is read of it comes from the hosts of its file.
const REGISTRY: &str = "registry.test:5000";

/// A directory of hosts, as a node has it.
struct Certs {
    folder: tempfile::TempDir,
}

impl Certs {
    /// With a file for a registry.
    fn new(registry: &str, text: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let certs = Self { folder };
        certs.write(registry, text);
        certs
    }

    fn write(&self, registry: &str, text: &str) {
        let directory = self.folder.path().join(registry);
        std::fs::create_dir_all(&directory).expect("a directory");
        std::fs::write(directory.join("hosts.toml"), text).expect("hosts.toml");
    }

    fn access(&self) -> Access {
        Access {
            hosts_dirs: vec![self.folder.path().to_owned()],
            ..Access::default()
        }
    }

    async fn open(&self, rest: &str) -> Source {
        self.open_as(rest, &self.access()).await
    }

    async fn open_as(&self, rest: &str, access: &Access) -> Source {
        let reference = format!("{REGISTRY}/{rest}").parse().expect("a reference");
        Source::open_with(&reference, access, IMPATIENT)
            .await
            .expect("opening touches no network")
    }
}

/// Two hosts in the order of the file: a mirror with these settings, and the registry.
fn mirror_and_server(mirror: &Registry, settings: &str, server: &Registry) -> String {
    format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n{settings}\n",
        server.host(),
        mirror.host()
    )
}

fn tls_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/source/tls")
        .join(name)
}

/// The parameter `ns` of requests.
fn namespaces(registry: &Registry) -> Vec<String> {
    let of = |entry: &Entry| {
        url::form_urlencoded::parse(entry.query.as_bytes())
            .find(|(name, _)| name == "ns")
            .map_or_else(String::new, |(_, value)| value.into_owned())
    };
    registry.counters().log.iter().map(of).collect()
}

const EMPTY: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#;

#[tokio::test]
async fn a_mirror_is_asked_first_for_everything_and_is_told_the_registry() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    let blob = mirror.add_blob("app", "hello");
    let manifest = mirror.add_manifest("app", Some("1"), MANIFEST, EMPTY);
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"a/b","config":{{"mediaType":"x/y","digest":"{blob}","size":5}},"layers":[],"subject":{{"mediaType":"{MANIFEST}","digest":"{manifest}","size":1}}}}"#
    );
    mirror.add_manifest("app", None, MANIFEST, index);
    // lists come in parts: the parameter is in each request
    mirror.set_referrers(Referrers::Present {
        per_answer: 1,
        filters: false,
    });
    let source = certs.open("app:1").await;
    assert_eq!(source.root_manifest().await.expect("it").digest, manifest);
    assert_eq!(
        source.manifest(&manifest).await.expect("it").digest,
        manifest
    );
    assert_eq!(source.blob(&blob, 5, 9).await.expect("it"), "hello");
    assert_eq!(source.range(&blob, 1..3).await.expect("it"), "el");
    assert_eq!(streamed(&source, &blob, 5).await.expect("it"), b"hello");
    assert_eq!(source.tags().await.expect("tags"), ["1"]);
    let found = source.referrers(&manifest, "a/b").await.expect("a list");
    assert_eq!(found.len(), 1);
    let asked = namespaces(&mirror);
    assert!(asked.len() >= 7, "{asked:?}");
    assert!(asked.iter().all(|ns| ns == REGISTRY), "{asked:?}");
    assert_eq!(server.counters().total().requests, 0);
}

#[tokio::test]
async fn what_a_mirror_does_not_have_comes_from_the_registry() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    let blob = server.add_blob("app", "hello");
    let manifest = server.add_manifest("app", Some("1"), MANIFEST, EMPTY);
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"a/b","config":{{"mediaType":"x/y","digest":"{blob}","size":5}},"layers":[],"subject":{{"mediaType":"{MANIFEST}","digest":"{manifest}","size":1}}}}"#
    );
    server.add_manifest("app", None, MANIFEST, index);
    // it knows the repository, and has an empty list
    mirror.add_blob("app", "other");
    let source = certs.open("app:1").await;
    assert_eq!(source.root_manifest().await.expect("it").digest, manifest);
    assert_eq!(source.blob(&blob, 5, 9).await.expect("it"), "hello");
    assert_eq!(streamed(&source, &blob, 5).await.expect("it"), b"hello");
    let found = source.referrers(&manifest, "a/b").await.expect("a list");
    assert_eq!(found.len(), 1);
    assert!(source.tagged("2").await.expect("an answer").is_none());
    let asked = namespaces(&server);
    // the server is another host than the one of the reference
    assert!(asked.iter().all(|ns| ns == REGISTRY), "{asked:?}");

    // where nobody has it, the error has them all
    let nothing = Digest::of(b"nothing");
    let error = source.blob(&nothing, 5, 9).await.expect_err("nowhere");
    assert_eq!(error.kind(), Kind::NotFound);
    for host in [mirror.host(), server.host()] {
        assert!(error.report().contains(&host), "{}", error.report());
    }
}

#[tokio::test]
async fn a_mirror_that_is_down_in_the_middle_is_followed_by_the_registry_at_the_same_byte() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    let bytes = noise(300_000, 1);
    let blob = server.add_blob("app", bytes.clone());
    mirror.add_blob("app", bytes.clone());
    mirror.fail(On::Data, Fault::Cut { after: 100_000 }, Times::Next(1));
    let source = certs.open("app:1").await;
    let got = streamed(&source, &blob, bytes.len()).await.expect("it");
    assert!(got == bytes);
    assert_eq!(mirror.counters().blob(&blob).requests, 1);
    let rest = server.counters().blob(&blob).bytes;
    assert!(rest < 300_000, "{rest}");
    // it is remembered: the next one does not ask the mirror
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), bytes[..5]);
    assert_eq!(mirror.counters().blob(&blob).requests, 1);
}

#[tokio::test]
async fn a_mirror_that_lies_is_found_out_and_remembered() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    let blob = server.add_blob("app", "hello");
    mirror.add_blob_as("app", blob, "jello");
    let source = certs.open("app:1").await;
    // a stream has given out the wrong bytes before they can be compared: an error, and the next one is right
    let error = streamed(&source, &blob, 5).await.expect_err("other bytes");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.report().contains(&mirror.host()), "{error:?}");
    assert_eq!(streamed(&source, &blob, 5).await.expect("it"), b"hello");
    assert_eq!(mirror.counters().total().requests, 1);

    // bytes that are compared before they are given out come from the next host
    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    server.add_blob("app", "hello");
    mirror.add_blob_as("app", blob, "jello");
    let source = certs.open("app:1").await;
    let expected = Digest::of(b"he");
    let bytes = source.verified_range(&blob, 0..2, &expected).await;
    assert_eq!(bytes.expect("it"), "he");
    assert_eq!(mirror.counters().total().requests, 1);

    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    let manifest = server.add_manifest("app", Some("1"), MANIFEST, EMPTY);
    let other = Fault::Replace {
        content_type: MANIFEST.to_owned(),
        body: EMPTY.replace("[]", "[ ]").into(),
        headers: Vec::new(),
    };
    mirror.fail(On::Any, other, Times::UntilHealed);
    let source = certs.open("app:1").await;
    assert_eq!(
        source.manifest(&manifest).await.expect("it").digest,
        manifest
    );
    assert_eq!(mirror.counters().total().requests, 1);
    source.manifest(&manifest).await.expect("it");
    assert_eq!(mirror.counters().total().requests, 1);
}

#[tokio::test]
async fn a_mirror_without_resolve_answers_no_tags_and_no_lists() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let pull = "capabilities = [\"pull\"]";
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, pull, &server));
    mirror.add_manifest("app", Some("1"), INDEX, EMPTY);
    let manifest = server.add_manifest("app", Some("1"), MANIFEST, EMPTY);
    let source = certs.open("app:1").await;
    assert_eq!(source.root_manifest().await.expect("it").digest, manifest);
    assert_eq!(source.tags().await.expect("tags"), ["1"]);
    assert!(
        source
            .all_referrers(&manifest)
            .await
            .expect("a list")
            .is_empty()
    );
    assert_eq!(mirror.counters().total().requests, 0);
    assert_eq!(
        source.manifest(&manifest).await.expect("it").digest,
        manifest
    );
    assert_eq!(mirror.counters().total().requests, 1);

    // where nobody may answer
    let alone = format!("{pull}\nserver = \"http://{}\"", server.host());
    let source = Certs::new(REGISTRY, &alone).open("app:1").await;
    let error = source.root_manifest().await.expect_err("nobody may");
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(error.report().contains("\"resolve\""), "{error:?}");
}

#[tokio::test]
async fn a_path_in_the_place_of_v2_and_one_before_it() {
    let registry = Registry::start();
    let blob = registry.add_blob("proxy/app", "hello");
    let own = format!(
        "server = \"http://{}/v2/proxy\"\noverride_path = true",
        registry.host()
    );
    let source = Certs::new(REGISTRY, &own).open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
    // without, v2 follows: such a path the registry of the tests does not have
    let below = format!("server = \"http://{}/some\"", registry.host());
    let source = Certs::new(REGISTRY, &below).open("app").await;
    source.range(&blob, 0..5).await.expect_err("not there");
    let log = registry.counters().log;
    assert_eq!(log[0].path, format!("/v2/proxy/app/blobs/{blob}"));
    assert_eq!(log[1].path, format!("/some/v2/app/blobs/{blob}"));
}

#[tokio::test]
async fn a_default_is_for_registries_that_have_no_directory() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let server = format!("server = \"http://{}\"", registry.host());
    let certs = Certs::new("_default", &server);
    let source = certs.open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
    // a change counts for what is opened from then on
    certs.write(REGISTRY, "server = \"http://127.0.0.1:1\"");
    let error = certs.open("app").await.range(&blob, 0..5).await;
    let error = error.expect_err("nobody listens");
    assert!(error.report().contains("127.0.0.1:1"), "{error:?}");
    certs.write(REGISTRY, "server = 1");
    let reference = format!("{REGISTRY}/app").parse().expect("a reference");
    let opened = Source::open_with(&reference, &certs.access(), IMPATIENT).await;
    let error = opened.err().expect("malformed").report();
    assert!(error.contains("hosts.toml: line 1: server"), "{error}");
}

#[tokio::test]
async fn credentials_are_those_of_the_mirrors_own_host() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, "", &server));
    let blob = mirror.add_blob("app", "hello");
    let auth = |name: &str| Auth::Basic {
        user: name.to_owned(),
        password: "pw".to_owned(),
    };
    mirror.set_auth(auth("mirror"));
    // those of the registry are not shown to the mirror
    let config = docker_config(REGISTRY, "mirror", "pw");
    let access = Access {
        docker_config: config.access.docker_config.clone(),
        ..certs.access()
    };
    let source = certs.open_as("app", &access).await;
    source.range(&blob, 0..5).await.expect_err("no credentials");
    let shown = |registry: &Registry| {
        let log = registry.counters().log;
        log.iter()
            .filter(|entry| entry.headers.contains_key("authorization"))
            .count()
    };
    assert_eq!(shown(&mirror), 0);
    // its own are
    let config = docker_config(&mirror.host(), "mirror", "pw");
    let access = Access {
        docker_config: config.access.docker_config.clone(),
        ..certs.access()
    };
    let source = certs.open_as("app", &access).await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
    assert_eq!(shown(&mirror), 1);
    assert_eq!(shown(&server), 0);
}

#[tokio::test]
async fn headers_go_to_their_host_and_not_where_it_redirects_and_not_to_logs() {
    let log = Log::start();
    let (mirror, server) = (Registry::start(), Registry::start());
    let headers = format!(
        "[host.\"http://{}\".header]\nx-key = \"secret-word\"\nx-list = [\"a\", \"b\"]\n",
        mirror.host()
    );
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, &headers, &server));
    let blob = mirror.add_blob("app", "hello");
    mirror.set_redirects(Some(Redirects {
        lifetime: Duration::from_secs(60),
        expired_status: 403,
    }));
    let source = certs.open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
    let has = |entry: &Entry| {
        entry
            .headers
            .get("x-key")
            .is_some_and(|key| key == "secret-word")
    };
    let entries = mirror.counters().log;
    assert_eq!(entries.len(), 2);
    assert!(has(&entries[0]) && entries[0].kind == Of::Blob);
    assert!(!has(&entries[1]) && entries[1].kind == Of::Cdn);
    assert!(!entries[1].headers.contains_key("x-list"));
    // nor to the next host
    mirror.fail(On::Any, Fault::status(503), Times::UntilHealed);
    mirror.set_redirects(None);
    server.add_blob("app", "other");
    let other = Digest::of(b"other");
    assert_eq!(source.range(&other, 0..5).await.expect("it"), "other");
    assert!(!server.counters().log.iter().any(has));
    assert!(!log.text().contains("secret-word"));
    assert!(!format!("{:?}", source.access()).contains("secret-word"));
}

#[tokio::test]
async fn a_ca_of_a_host_is_trusted_for_this_host() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let front = tls_front_with(&registry, acceptor()).await;
    let server = format!("server = \"https://{front}\"\n");
    let ca = format!("{server}ca = {:?}\n", ca_file());
    let source = Certs::new(REGISTRY, &ca).open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
    let error = Certs::new(REGISTRY, &server).open("app").await;
    let error = error.range(&blob, 0..5).await.expect_err("not trusted");
    assert!(error.report().contains("is not trusted"), "{error:?}");

    // a relative path, in Docker's way, and a file that is missing
    let certs = Certs::new("unused", "");
    let directory = certs.folder.path().join(&front);
    std::fs::create_dir(&directory).expect("a directory");
    std::fs::copy(ca_file(), directory.join("ca.crt")).expect("a certificate");
    let reference = format!("{front}/app").parse().expect("a reference");
    let access = certs.access();
    let read = async || {
        let source = Source::open_with(&reference, &access, IMPATIENT).await;
        source.expect("opened").range(&blob, 0..5).await
    };
    assert_eq!(read().await.expect("it"), "hello");
    std::fs::write(directory.join("hosts.toml"), "ca = \"ca.crt\"").expect("hosts.toml");
    assert_eq!(read().await.expect("it"), "hello");
    std::fs::write(directory.join("hosts.toml"), "ca = \"none.crt\"").expect("hosts.toml");
    let error = read().await.expect_err("no file").report();
    assert!(error.contains("none.crt"), "{error}");
}

#[tokio::test]
async fn a_host_whose_certificate_is_not_verified() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let front = tls_front_with(&registry, acceptor()).await;
    let server = format!("server = \"https://{front}\"\nskip_verify = true\n");
    let source = Certs::new(REGISTRY, &server).open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
}

/// A server that knows clients by their certificates.
fn strict_acceptor() -> TlsAcceptor {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(tls_file("client-ca.pem")).expect("a certificate");
    roots.add(ca).expect("a CA");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    acceptor_with_clients(verifier.build().expect("a verifier"))
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_the_host_that_wants_one() {
    let registry = Registry::start();
    let blob = registry.add_blob("app", "hello");
    let front = tls_front_with(&registry, strict_acceptor()).await;
    let (certificate, key) = (tls_file("client.pem"), tls_file("client.key"));
    let server = format!("server = \"https://{front}\"\nca = {:?}\n", ca_file());
    let pair = format!("{server}client = [[{certificate:?}, {key:?}]]\n");
    let source = Certs::new(REGISTRY, &pair).open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");

    // both in one file
    let both = tempfile::NamedTempFile::new().expect("a file");
    let text = [&certificate, &key].map(|path| std::fs::read_to_string(path).expect("PEM"));
    std::fs::write(both.path(), text.concat()).expect("written");
    let one = format!("{server}client = {:?}\n", both.path());
    let source = Certs::new(REGISTRY, &one).open("app").await;
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");

    // none, and one whose key is another's
    let error = Certs::new(REGISTRY, &server).open("app").await;
    error.range(&blob, 0..5).await.expect_err("no certificate");
    let other = format!(
        "{server}client = [[{certificate:?}, {:?}]]\n",
        tls_file("server.key")
    );
    let error = Certs::new(REGISTRY, &other).open("app").await;
    let error = error.range(&blob, 0..5).await.expect_err("another's key");
    assert!(error.report().contains("server.key"), "{error:?}");
    assert!(error.report().contains("no PEM key"), "{error:?}");
}

#[tokio::test]
async fn what_is_pushed_goes_to_the_first_host_that_may_be_written_to_alone() {
    let (mirror, server) = (Registry::start(), Registry::start());
    let pull = "capabilities = [\"pull\", \"resolve\"]";
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, pull, &server));
    let reference = format!("{REGISTRY}/app:1").parse().expect("a reference");
    let push = async |certs: &Certs| {
        let destination = Destination::open_with(&reference, &certs.access(), IMPATIENT).await?;
        destination.put_blob(&"hello".into()).await?;
        let manifest = destination.tag_manifest(MANIFEST, &EMPTY.into()).await?;
        // what was written is read where it was written
        let source = destination.source().await?.expect("a source");
        assert_eq!(source.root_manifest().await?.digest, manifest);
        Result::<()>::Ok(())
    };
    push(&certs).await.expect("pushed");
    assert_eq!(mirror.counters().total().requests, 0);
    assert_eq!(server.tags("app").len(), 1);
    // one that may
    let all = "capabilities = [\"pull\", \"push\"]";
    let certs = Certs::new(REGISTRY, &mirror_and_server(&mirror, all, &server));
    server.reset_counters();
    push(&certs).await.expect("pushed");
    assert_eq!(mirror.tags("app").len(), 1);
    assert_eq!(server.counters().total().requests, 0);
    // nobody may
    let none = format!("{pull}\nserver = \"http://{}\"", server.host());
    let error: Result<()> = push(&Certs::new(REGISTRY, &none)).await;
    assert!(error.expect_err("refused").report().contains("\"push\""));
}

#[tokio::test]
async fn a_connection_that_is_not_made_in_time_is_made_to_the_next_host() {
    // a listener whose queue is full answers no connection
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("an address");
    let server = Registry::start();
    let blob = server.add_blob("app", "hello");
    let text = format!(
        "server = \"http://{}\"\n[host.\"https://{address}\"]\ndial_timeout = \"200ms\"\n",
        server.host()
    );
    let source = Certs::new(REGISTRY, &text).open("app").await;
    // TLS never begins: this is a part of the connection
    let began = std::time::Instant::now();
    assert_eq!(source.range(&blob, 0..5).await.expect("it"), "hello");
    assert!(began.elapsed() < IMPATIENT.connect);
}
