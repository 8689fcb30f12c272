//! `socinbd daemon`.

use std::process::ExitCode;

use clap::Args;

use super::{Global, absolute, require_root, signals::Signals};
use crate::{
    api::server::Server,
    engine::Engine,
    error::{Kind, Result, ResultExt},
    open_files,
};

/// Hold the devices of attached images
///
/// `attach` and `run` start one where none runs. On SIGTERM, SIGINT or SIGQUIT it unmounts what is not in use, and ends.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd daemon --root /srv/socinbd --run-dir /run/socinbd-2")]
pub(super) struct Daemon {}

impl Daemon {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        require_root("the daemon")?;
        open_files::raise();
        let mut ends = Signals::that_end_the_daemon()?;
        let engine = std::sync::Arc::new(
            Engine::open(&absolute(&global.root)?, &absolute(&global.run_dir)?).await?,
        );
        let server = Server::bind(std::sync::Arc::clone(&engine))?;
        tracing::info!(root = %engine.root().display(), run_dir = %engine.run_dir().display(), "the daemon is ready");
        let answering = tokio::spawn(server.run());
        tokio::select! {
            signal = ends.next() => tracing::info!(?signal, "the daemon ends"),
            ended = answering => match ended.or_kind(Kind::Io, || "the daemon's sockets".into())? {},
        }
        engine.detach_all().await;
        Ok(ExitCode::SUCCESS)
    }
}
