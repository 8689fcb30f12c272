//! Registries and their failures, against the registry of `support`.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use socinbd::{
    error::Result,
    oci::Digest,
    source::{Access, Limits, Source},
};

use crate::support::{registry::Registry, seeded_noise as noise};

mod auth;
mod documents;
mod expiry;
mod hosts;
mod network;
mod peers;
mod ranges;
mod redirects;
mod referrers;
mod streams;
mod writes;

/// Short enough for a test, long enough for a busy machine.
const LIMITS: Limits = Limits {
    connect: Duration::from_secs(5),
    first_byte: Duration::from_secs(10),
    stall: Duration::from_secs(5),
    control_patience: Duration::from_secs(4),
    data_patience: Duration::from_secs(4),
};

/// Gives up as soon as it may.
const IMPATIENT: Limits = Limits {
    connect: Duration::from_secs(5),
    first_byte: Duration::from_secs(5),
    stall: Duration::from_millis(300),
    control_patience: Duration::from_millis(600),
    data_patience: Duration::from_millis(600),
};

async fn open(registry: &Registry, rest: &str) -> Source {
    open_with(registry, rest, &Access::default(), LIMITS).await
}

async fn open_with(registry: &Registry, rest: &str, access: &Access, limits: Limits) -> Source {
    let reference = registry
        .reference(rest)
        .parse()
        .expect("a reference to the test registry");
    Source::open_with(&reference, access, limits)
        .await
        .expect("opening touches no network")
}

/// All of a blob, as a stream gives it.
async fn streamed(source: &Source, digest: &Digest, size: usize) -> Result<Vec<u8>> {
    let pieces = source.stream(digest, size as u64).await?;
    let pieces: Vec<_> = pieces.try_collect().await?;
    Ok(pieces.concat())
}

/// What the thread of a test logs, as long as this is there.
struct Log {
    lines: Lines,
    _second: tracing::Dispatch,
    _guard: tracing::subscriber::DefaultGuard,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("the log").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> Self {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        // with one subscriber alone, `tracing` takes a line for off everywhere when a thread without any (another test's) is the first
        // to reach it; with a second it asks them all
        let second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::new());
        let guard = tracing::subscriber::set_default(subscriber);
        tracing::callsite::rebuild_interest_cache();
        Self {
            lines,
            _second: second,
            _guard: guard,
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lines.0.lock().expect("the log")).into_owned()
    }

    /// The warnings, one a line.
    fn warnings(&self) -> Vec<String> {
        let text = self.text();
        let warnings = text.lines().filter(|line| line.contains(" WARN "));
        warnings.map(str::to_owned).collect()
    }
}

/// A credentials' file, and the access that names it.
struct Config {
    folder: tempfile::TempDir,
    access: Access,
}

fn config_file(json: &str) -> Config {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("config.json");
    std::fs::write(&file, json).expect("write the configuration");
    let access = Access {
        docker_config: Some(file),
        ..Access::default()
    };
    Config { folder, access }
}

/// What `docker login` writes.
fn docker_config(host: &str, user: &str, password: &str) -> Config {
    let auth = crate::support::registry::base64(format!("{user}:{password}").as_bytes());
    config_file(&format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#))
}
