//! `socinbd serve`.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{ExitCode, Stdio},
    sync::Arc,
};

use clap::Args;
use tokio::process::Command;

use crate::{
    blocking::blocking,
    cli::{
        GlobalArgs, ImageArgs, IndexArgs, absolute, exit::INTERRUPTED, output,
        progress::ProgressBars, signals::SignalReceiver,
    },
    engine::{Disks, open::opened::OpenedLayer},
    error::{Error, Kind, Result, ResultExt},
    layer::ServedDisk,
    nbd, open_files,
};

/// Export the layers of an image over NBD
///
/// Each layer is an export, named by its digest and by its number, from 0 for the lowest. The layer of an image with one layer is the
/// default export too. The server runs until it gets SIGTERM, SIGINT, SIGQUIT or SIGHUP, or until the command of --run exits.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["socket", "listen"]))]
#[command(after_help = "Examples:\n\
\x20 socinbd serve oci:./app --socket /tmp/app.sock\n\
\x20 socinbd serve oci:./app --socket /tmp/app.sock --run 'nbdcopy $uri disk.ext4'")]
pub(crate) struct ServeCommand {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    index: IndexArgs,
    /// Unix socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// TCP address to listen on, e.g. 127.0.0.1:10809
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Allow a --listen address off loopback: there is no authentication
    #[arg(long, requires = "listen")]
    allow_remote: bool,
    /// Shell command to run; the server exits with it
    ///
    /// The command gets the variables $uri (NBD URI of the default export), $unixsocket or $port, and $exports (digests of the layers, lowest
    /// first). The exit status is that of the command.
    #[arg(long, value_name = "CMD")]
    run: Option<String>,
}

impl ServeCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        if let Some(address) = self.listen
            && !address.ip().is_loopback()
            && !self.allow_remote
        {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!(
                    "{address} is not a loopback address, and there is no authentication: to allow it, use --allow-remote"
                ),
            ));
        }
        open_files::raise();
        let mut ends = SignalReceiver::that_end()?;
        let disks = Disks::open(&absolute(&global.root)?)?;
        disks.verifiers().set(global.settings.verifiers());
        let progress = ProgressBars::new(global.json);
        let access = self.image.access.access()?;
        let (platform, choice) = (self.image.platform.as_ref(), self.index.choice());
        let event = |event| progress.event(event);
        let opened = tokio::select! {
            opened = disks.open_image(&self.image.image, &access, platform, &choice, &event) => opened?,
            _ = ends.next() => return Ok(ExitCode::from(INTERRUPTED)),
        };
        progress.finish();
        for warning in &opened.warnings {
            tracing::warn!("{warning}");
        }
        let exports: Vec<String> = opened
            .layers
            .iter()
            .rev()
            .map(|layer| layer.disk.layer().digest.to_string())
            .collect();
        let mut table = nbd::Exports::new();
        for OpenedLayer { disk, .. } in opened.layers.iter().rev() {
            table.add(
                disk.layer().digest.to_string(),
                format!("a layer of {}", self.image.image),
                Arc::clone(disk) as Arc<dyn ServedDisk>,
            )?;
        }
        let (table, runtime, limits) = (
            Arc::new(table),
            tokio::runtime::Handle::current(),
            nbd::Limits::default(),
        );
        let server = match (&self.socket, self.listen) {
            (Some(path), _) => nbd::Server::listen_unix(&absolute(path)?, table, runtime, limits)?,
            (None, Some(address)) => nbd::Server::listen_tcp(address, table, runtime, limits)?,
            (None, None) => {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    "--socket or --listen is required",
                ));
            }
        };
        let uri = server.address().uri("");
        let variable = match server.address() {
            nbd::Address::Unix(path) => ("unixsocket", path.display().to_string()),
            nbd::Address::Tcp(address) => ("port", address.port().to_string()),
        };
        let Some(command) = self.run else {
            if global.json {
                output::json(&serde_json::json!({ "uri": uri, "exports": exports }))?;
            } else {
                output::line(&uri)?;
            }
            ends.next().await;
            stop(server).await?;
            return Ok(ExitCode::SUCCESS);
        };
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(&command)
            .env("uri", &uri)
            .env(variable.0, &variable.1)
            .env("exports", exports.join(" "))
            .stdin(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .or_kind(Kind::Io, || format!("starting {command:?}"))?;
        open_files::give_back_to(child.id());
        let status = tokio::select! {
            status = child.wait() => status.or_kind(Kind::Io, || format!("waiting for {command:?}"))?,
            _ = ends.next() => return Ok(ExitCode::from(INTERRUPTED)),
        };
        stop(server).await?;
        use std::os::unix::process::ExitStatusExt;
        let code = status
            .code()
            .or(status.signal().map(|signal| 128 + signal))
            .and_then(|code| u8::try_from(code).ok());
        Ok(ExitCode::from(code.unwrap_or(1)))
    }
}

/// Stops the server away from the async workers: it waits for its connections.
async fn stop(server: nbd::Server) -> Result<()> {
    let stopped = blocking(move || {
        server.stop();
        Ok(())
    });
    stopped.await
}
