//! Verifiers: outside programs that verify images before their first mount, as a rule by their signatures.
//!
//! The programs have the protocol of containerd's image verifier plugins (`io.containerd.image-verifier.v1.bindir`): they are called with
//! `-name NAME -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json`, and get the descriptor on standard input. Exit
//! status 0 accepts the image; standard output has the reason.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    engine::open::image::document,
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, Reference, manifest::Document, pattern},
    program::Program,
    source::{Access, Manifest, Source},
};

/// The media type of what a verifier reads.
const DESCRIPTOR: &str = "application/vnd.oci.descriptor.v1+json";
/// Verifiers that run at a time, at most.
const MAX_RUNNING: usize = 8;
/// Maximum time that a verifier waits for others, and all of one image for each other.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// Maximum number of characters of a reason.
const MAX_REASON: usize = 300;

/// What happens with an image that a verifier does not accept, or for which it cannot be run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// It is not mounted.
    #[default]
    Refuse,
    /// There is a warning in the log.
    Warn,
}

/// A verifier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verifier {
    /// The images that it verifies: a pattern for references without tag and digest, where `*` stands for any text and `?` for one character.
    pub pattern: String,
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its arguments before those of the protocol.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Maximum time of a run, in seconds.
    pub time_limit: u64,
    /// What happens with an image that it does not accept.
    pub on_failure: OnFailure,
}

/// The default of [`Verifier::time_limit`], in seconds: that of containerd.
pub const TIME_LIMIT: u64 = 10;

/// The verifiers of a state directory. They can be replaced while they are used.
pub struct Verifiers {
    all: Mutex<Arc<[Verifier]>>,
    running: Semaphore,
}

impl Default for Verifiers {
    fn default() -> Self {
        Self {
            all: Mutex::new(Arc::default()),
            running: Semaphore::new(MAX_RUNNING),
        }
    }
}

/// What is verified: the descriptor of a manifest, and the name by which it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    name: Reference,
    media_type: String,
    digest: Digest,
    size: usize,
}

impl Subject {
    pub(crate) fn new(name: &Reference, manifest: &Manifest) -> Self {
        Self {
            name: name.clone(),
            media_type: manifest.media_type.clone(),
            digest: manifest.digest,
            size: manifest.bytes.len(),
        }
    }

    /// The subject of an image whose manifest for one platform is known: what `named` names, if this is the manifest or an index that lists it,
    /// else the manifest itself. Signatures are as a rule of what a tag names.
    pub(crate) async fn of_pulled(
        named: &Reference,
        manifest: &Digest,
        access: &Access,
    ) -> Result<Self> {
        let source = Source::open(named, access).await?;
        let root = source.root_manifest().await?;
        let lists = || match document(&root) {
            Ok(Document::Index(index, _)) => index
                .manifests()
                .iter()
                .any(|entry| entry.digest().as_ref() == manifest.to_string()),
            _ => false,
        };
        if root.digest == *manifest || lists() {
            return Ok(Self::new(named, &root));
        }
        // the tag was given to another image meanwhile
        Ok(Self::new(named, &source.manifest(manifest).await?))
    }
}

impl Verifiers {
    /// Replaces all verifiers.
    pub fn set(&self, verifiers: &[Verifier]) {
        *self.all.lock().unwrap_or_else(PoisonError::into_inner) = verifiers.into();
    }

    /// Whether an image of this reference is verified.
    pub fn apply_to(&self, reference: &Reference) -> bool {
        !self.of(reference).is_empty()
    }

    fn of(&self, reference: &Reference) -> Vec<Verifier> {
        let name = reference.place().to_string();
        let all = Arc::clone(&self.all.lock().unwrap_or_else(PoisonError::into_inner));
        let matching = all.iter().filter(|it| pattern::matches(&it.pattern, &name));
        matching.cloned().collect()
    }

    /// Like [`Self::verify`], of what is found first.
    pub(crate) async fn verify_found(
        &self,
        name: &Reference,
        find: impl Future<Output = Result<Subject>>,
    ) -> Result<()> {
        match find.await {
            Ok(subject) => self.verify(&subject).await,
            Err(error) => {
                let error = error.context(format!("{name} is not verified"));
                let of_name = self.of(name);
                match of_name.iter().all(|it| it.on_failure == OnFailure::Warn) {
                    true => tracing::warn!("{}", error.report()),
                    false => return Err(error),
                }
                Ok(())
            }
        }
    }

    /// Runs all verifiers that apply. Each must accept.
    pub(crate) async fn verify(&self, subject: &Subject) -> Result<()> {
        for verifier in self.of(&subject.name) {
            let running = timeout(MAX_WAIT, self.running.acquire()).await;
            let running = running.map_err(|_| too_many()).and_then(|permit| {
                permit.or_kind(Kind::Io, || "waiting for other verifiers".to_owned())
            });
            let verified = match running {
                Ok(_permit) => verifier.run(subject).await,
                Err(error) => Err(error),
            };
            match (verified, verifier.on_failure) {
                (Ok(()), _) => {}
                (Err(error), OnFailure::Refuse) => return Err(error),
                (Err(error), OnFailure::Warn) => tracing::warn!("{}", error.report()),
            }
        }
        Ok(())
    }
}

fn too_many() -> Error {
    let why = format!("{MAX_RUNNING} verifiers run already, and none has ended for a long time");
    Error::new(Kind::Unavailable, why)
}

impl Verifier {
    async fn run(&self, subject: &Subject) -> Result<()> {
        let Subject {
            name,
            media_type,
            digest,
            size,
        } = subject;
        let label = format!("the verifier {}", self.program.display());
        let (name, digest) = (name.to_string(), digest.to_string());
        let own = [
            "-name",
            &name,
            "-digest",
            &digest,
            "-stdin-media-type",
            DESCRIPTOR,
        ];
        let arguments = self.args.iter().map(String::as_str).chain(own);
        let arguments: Vec<String> = arguments.map(str::to_owned).collect();
        let descriptor = serde_json::json!({
            "mediaType": media_type,
            "digest": digest,
            "size": size,
        })
        .to_string();
        let program = Program {
            name: &label,
            path: &self.program,
            arguments: &arguments,
            environment: &environment(),
            input: descriptor.as_bytes(),
        };
        let exited = program.run(Duration::from_secs(self.time_limit)).await;
        let exited = exited.map_err(|error| {
            let kind = match error.kind() {
                Kind::Unavailable => Kind::Unavailable,
                _ => Kind::Unauthorized,
            };
            let what = format!("{name} ({digest}) is not verified");
            Error::with_source(kind, what, error)
        })?;
        let reason = reason(&exited.output);
        if exited.status.success() {
            tracing::info!(
                image = name,
                digest,
                "{label} has accepted the image{reason}"
            );
            return Ok(());
        }
        Err(Error::new(
            Kind::Unauthorized,
            format!(
                "{label} has refused {name} ({digest}) with {}{}{}",
                exited.status,
                reason,
                match reason.is_empty() {
                    true => exited.words(&[]),
                    false => String::new(),
                }
            ),
        ))
    }
}

/// The reason of a verifier, after a colon; empty if it has told none.
fn reason(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let words: Vec<&str> = text.split_whitespace().collect();
    let words = words.join(" ");
    let shown: String = words
        .chars()
        .filter(|letter| !letter.is_control())
        .take(MAX_REASON)
        .collect();
    match shown.is_empty() {
        true => shown,
        false => format!(": {shown}"),
    }
}

/// The environment of verifiers: that of credential helpers, with what a program needs to reach a registry.
fn environment() -> BTreeMap<String, String> {
    let own = Access::from_environment();
    let mut environment = own.helper_environment;
    let directory = own.docker_config.as_deref().and_then(|file| file.parent());
    let certificates = own.ca_certificates.first();
    let more = [
        ("HTTPS_PROXY", own.https_proxy),
        ("HTTP_PROXY", own.http_proxy),
        ("NO_PROXY", own.no_proxy),
        (
            "DOCKER_CONFIG",
            directory.map(|it| it.display().to_string()),
        ),
        (
            "SSL_CERT_FILE",
            certificates.map(|it| it.display().to_string()),
        ),
    ];
    let given = more.into_iter();
    environment.extend(given.filter_map(|(name, value)| Some((name.to_owned(), value?))));
    environment
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn verifier(folder: &tempfile::TempDir, script: &str) -> Verifier {
        let program = folder.path().join("verifier");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Verifier {
            pattern: "registry.example/team/*".to_owned(),
            program,
            args: vec!["-key".to_owned(), "a b".to_owned()],
            time_limit: 60,
            on_failure: OnFailure::Refuse,
        }
    }

    fn subject(name: &str) -> Subject {
        Subject {
            name: name.parse().unwrap(),
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            digest: Digest::new([7; 32]),
            size: 123,
        }
    }

    async fn verify(verifier: Verifier, name: &str) -> Result<()> {
        let verifiers = Verifiers::default();
        verifiers.set(&[verifier]);
        verifiers.verify(&subject(name)).await
    }

    const IMAGE: &str = "registry.example/team/app:1";

    #[tokio::test]
    async fn a_verifier_is_called_as_containerd_calls_it() {
        let folder = tempfile::tempdir().unwrap();
        let asked = folder.path().join("asked");
        let script = format!(
            "for argument; do echo \"$argument\"; done > {0}; cat >> {0}; echo signed",
            asked.display()
        );
        verify(verifier(&folder, &script), IMAGE).await.unwrap();
        let digest = Digest::new([7; 32]);
        assert_eq!(
            std::fs::read_to_string(asked).unwrap(),
            format!(
                "-key\na b\n-name\n{IMAGE}\n-digest\n{digest}\n-stdin-media-type\n{DESCRIPTOR}\n\
                {{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"digest\":\"{digest}\",\"size\":123}}"
            )
        );
    }

    #[tokio::test]
    async fn what_is_not_accepted_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        for (script, kind, text) in [
            (
                "echo 'no signature'; exit 1",
                Kind::Unauthorized,
                "with exit status: 1: no signature",
            ),
            (
                "echo 'no key' >&2; exit 3",
                Kind::Unauthorized,
                "with exit status: 3 (no key)",
            ),
            ("kill -9 $$", Kind::Unauthorized, "with signal: 9"),
            (
                "head -c 1000000000 /dev/zero",
                Kind::Unavailable,
                "more than 65536 bytes",
            ),
            (
                "head -c 200000 /dev/zero >&2; printf '\\033[1m\\n'; exit 1",
                Kind::Unauthorized,
                ": [1m",
            ),
        ] {
            let error = verify(verifier(&folder, script), IMAGE).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{script}");
            let report = error.report();
            assert!(report.contains(text), "{script}: {report}");
            assert!(report.contains(IMAGE) && report.len() < 1000, "{report}");
            // others are not verified, and the policy may be to warn
            let other = verifier(&folder, script);
            verify(other, "registry.example/other/app:1").await.unwrap();
            let lenient = Verifier {
                on_failure: OnFailure::Warn,
                ..verifier(&folder, script)
            };
            verify(lenient, IMAGE).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_verifier_that_hangs_or_is_missing_refuses() {
        let folder = tempfile::tempdir().unwrap();
        let slow = Verifier {
            time_limit: 1,
            ..verifier(&folder, "sleep 600")
        };
        let error = verify(slow, IMAGE).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.report().contains("did not answer within 1 s"));
        let missing = Verifier {
            program: folder.path().join("missing"),
            ..verifier(&folder, "")
        };
        let error = verify(missing, IMAGE).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unauthorized);
        assert!(error.report().contains("missing"), "{}", error.report());
    }

    #[tokio::test]
    async fn each_verifier_of_an_image_must_accept() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let verifiers = Verifiers::default();
        assert!(!verifiers.apply_to(&IMAGE.parse().unwrap()));
        verifiers.set(&[verifier(&one, "exit 0"), verifier(&two, "exit 1")]);
        assert!(verifiers.apply_to(&IMAGE.parse().unwrap()));
        assert!(!verifiers.apply_to(&"oci:/registry.example/team/app".parse().unwrap()));
        verifiers.verify(&subject(IMAGE)).await.unwrap_err();
        verifiers.set(&[verifier(&one, "exit 0")]);
        verifiers.verify(&subject(IMAGE)).await.unwrap();
    }
}
