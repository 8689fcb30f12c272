//! `socinbd run`.

use std::process::ExitCode;

use clap::Args;

use super::{
    Global, ImageArgs, IndexArgs, attach, attach::MountArgs, progress::Progress, require_root,
    start,
};
use crate::{
    api::client::Client,
    engine::Attachment,
    error::{Error, Kind, Result, ResultExt},
    kernel::namespace::{self, Container},
};

/// Run an image's program in its own root, without containerd
///
/// It has namespaces of its own for processes, mounts, host name and IPC, the host's network, and a writable layer that ends with it.
/// Environment, user, working directory and entrypoint are those of the image.
#[derive(Args)]
pub struct Run {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    index: IndexArgs,
    #[command(flatten)]
    options: MountArgs,
    /// Set an environment variable; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Run as this user instead of the image's
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Start in this folder instead of the image's
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Run this program instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Arguments instead of the image's own
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

impl Run {
    pub async fn run(self, global: &Global) -> Result<ExitCode> {
        require_root("run")?;
        let request = attach::request(&self.image, &self.index, &self.options, true, None)?;
        let client = start::daemon(global).await?;
        let progress = Progress::new(global.json);
        let attachment = client
            .attach(&request, &|event| progress.event(event))
            .await?;
        progress.finish();
        let ended = self.inside(&client, &attachment).await;
        let released = client.release(&attachment.id).await;
        let status = ended?;
        released?;
        Ok(ExitCode::from(status))
    }

    async fn inside(self, client: &Client, attachment: &Attachment) -> Result<u8> {
        let mut process = attachment.process.clone();
        if let Some(entrypoint) = self.entrypoint {
            process.entrypoint = vec![entrypoint];
            process.cmd.clear();
        }
        let command = process.command(&self.command)?;
        let root = client.mount(&attachment.id)?;
        client.mounted(&attachment.id).await?;
        let container = Container {
            root,
            args: command,
            env: process.env.into_iter().chain(self.env).collect(),
            working_dir: self.workdir.unwrap_or(process.working_dir),
            user: self.user.unwrap_or(process.user),
            hostname: attachment.id[..12].to_owned(),
        };
        let ended = tokio::task::spawn_blocking(move || namespace::run(container)).await;
        ended
            .or_kind(Kind::Kernel, || "running the program".into())?
            .map_err(|error: Error| {
                error.context(format!("running the program of {}", attachment.reference))
            })
    }
}
