//! `socinbd daemon`.

use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Global, absolute, require_root};
use crate::{
    api::server::Server,
    engine::Engine,
    error::{Kind, Result, ResultExt},
    open_files,
};

/// Hold the devices of attached images
///
/// `attach` and `run` start one where none runs. On SIGTERM or SIGINT it unmounts what is not in use, and ends.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd daemon --root /srv/socinbd --run-dir /run/socinbd-2")]
pub(super) struct Daemon {}

impl Daemon {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        require_root("the daemon")?;
        open_files::raise();
        let engine = std::sync::Arc::new(
            Engine::open(&absolute(&global.root)?, &absolute(&global.run_dir)?).await?,
        );
        let server = Server::bind(std::sync::Arc::clone(&engine))?;
        tracing::info!(root = %engine.root().display(), run_dir = %engine.run_dir().display(), "the daemon is ready");
        let answering = tokio::spawn(server.run());
        tokio::select! {
            signal = stop_signal() => signal?,
            ended = answering => match ended.or_kind(Kind::Io, || "the daemon's sockets".into())? {},
        }
        engine.detach_all().await;
        Ok(ExitCode::SUCCESS)
    }
}

/// Returns at SIGTERM or SIGINT.
pub(super) async fn stop_signal() -> Result<()> {
    let setup = || "waiting for signals".to_owned();
    let mut terminate = signal(SignalKind::terminate()).or_kind(Kind::Io, setup)?;
    let mut interrupt = signal(SignalKind::interrupt()).or_kind(Kind::Io, setup)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
