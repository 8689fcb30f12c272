//! `socinbd builder`.

use std::{fs, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Args, ValueEnum};
use futures_util::future::join_all;
use tokio::net::TcpListener;

use super::{
    AccessArgs, GlobalArgs, absolute,
    images::making::{MakeArgs, PlatformsArgs, UploadArgs},
    output,
    signals::SignalReceiver,
};
use crate::{
    builder::{
        Build, Secret, Service,
        queue::Queue,
        rules::{Rules, Target},
    },
    engine::{make::options::ConvertOptions, open::local_indexes::LocalIndexes},
    error::{Error, Kind, Result, ResultExt},
    open_files,
    soci::index::Version,
};

/// Make SOCI indexes for images when they are pushed
///
/// A registry posts its push events to http://ADDR:PORT/events. Accepted are the notifications of a distribution registry, the webhooks of
/// Harbor (both formats), and the events of ECR sent by EventBridge. An event that was answered with 202 is in the queue on disk and
/// survives a crash; an event that is delivered twice makes one index. /healthz and /metrics report the state. The builder has no TLS: use
/// a reverse proxy.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd builder --registry registry.example --listen 127.0.0.1:8080\n\
\x20 socinbd builder --registry registry.example --listen 127.0.0.1:8080 \\\n\
\x20   --index-version v1 --backfill team/app\n\
\x20 socinbd builder --registry harbor.example --listen 0.0.0.0:8080 \\\n\
\x20   --secret-file secret --repository 'team/*' --tag 'v*'")]
pub(super) struct BuilderCommand {
    /// Registry to read from and push to: HOST[:PORT]
    ///
    /// Events that name another registry are refused.
    #[arg(long, value_name = "HOST")]
    registry: String,
    /// Address to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// File with the secret of senders; required off loopback
    ///
    /// A sender has the secret in its Authorization header, alone or after `Bearer`.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Queue directory [default: ROOT/builder]
    #[arg(long, value_name = "DIR")]
    queue: Option<PathBuf>,
    /// Pattern of accepted repositories, with * and ? (repeatable)
    #[arg(long, value_name = "PATTERN")]
    repository: Vec<String>,
    /// Pattern of accepted tags, with * and ? (repeatable)
    #[arg(long, value_name = "PATTERN")]
    tag: Vec<String>,
    /// SOCI version: v2 pushes a new image, v1 adds a referrer
    #[arg(long, value_enum, default_value_t = IndexVersion::V2)]
    index_version: IndexVersion,
    /// Suffix of the tags of v2 images
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "-soci",
        allow_hyphen_values = true,
        conflicts_with = "replace"
    )]
    suffix: String,
    /// Move the tag of the image to the v2 image
    #[arg(long)]
    replace: bool,
    /// Minimum total size of the layers of an image, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    min_image_size: u64,
    /// Repository whose tags are queued at start (repeatable)
    #[arg(long, value_name = "REPOSITORY")]
    backfill: Vec<String>,
    /// Number of images to work on in parallel
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: u8,
    #[command(flatten)]
    platforms: PlatformsArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    uploads: UploadArgs,
    #[command(flatten)]
    make: MakeArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IndexVersion {
    V1,
    V2,
}

impl BuilderCommand {
    pub(super) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        open_files::raise();
        let mut ends = SignalReceiver::that_end()?;
        let rules = self.rules()?;
        let secret = self.secret()?;
        let root = absolute(&global.root)?;
        let directory = match &self.queue {
            Some(directory) => absolute(directory)?,
            None => root.join("builder"),
        };
        let build = Build {
            access: self.access.access()?,
            options: ConvertOptions {
                create: self.make.options()?,
                uploads: self.uploads.max_concurrent_uploads,
                ..ConvertOptions::default()
            },
            min_image_size: self.min_image_size,
            local: LocalIndexes::open(&root)?,
        };
        let service = Service::new(rules, Queue::open(&directory)?, secret);
        let listening = || format!("listening on {}", self.listen);
        let listener = TcpListener::bind(self.listen)
            .await
            .or_kind(Kind::InvalidArgument, listening)?;
        let address = listener.local_addr().or_kind(Kind::Io, listening)?;
        output::line(&format!("listening on http://{address}/events"))?;

        tokio::spawn(Arc::clone(&service).serve(listener));
        let backlog = async {
            for repository in &self.backfill {
                let jobs = build.backlog(service.rules(), repository).await?;
                tracing::info!(repository, tags = jobs.len(), "queued");
                service.queue().add(&jobs)?;
            }
            Ok(())
        };
        let workers = join_all((0..self.workers).map(|_| service.work(&build)));
        let work = async { tokio::try_join!(backlog, async { Ok(workers.await) }) };
        // jobs that are running stay in the queue
        tokio::select! {
            _ = ends.next() => {}
            ended = work => drop(ended?),
        }
        Ok(ExitCode::SUCCESS)
    }

    fn secret(&self) -> Result<Option<Secret>> {
        let Some(file) = &self.secret_file else {
            return match self.listen.ip().is_loopback() {
                true => Ok(None),
                false => Err(Error::new(
                    Kind::InvalidArgument,
                    format!(
                        "{}: other hosts can reach this address: --secret-file is required",
                        self.listen
                    ),
                )),
            };
        };
        let context = || format!("reading the secret in {}", file.display());
        let text = fs::read_to_string(file).or_kind(Kind::InvalidArgument, context)?;
        Secret::new(&text).map(Some)
    }

    fn rules(&self) -> Result<Rules> {
        let rules = Rules {
            registry: self.registry.clone(),
            repositories: self.repository.clone(),
            tags: self.tag.clone(),
            platforms: self.platforms.platforms(),
            version: match self.index_version {
                IndexVersion::V1 => Version::V1,
                IndexVersion::V2 => Version::V2,
            },
            target: match self.replace {
                true => Target::Replace,
                false => Target::Suffix(self.suffix.clone()),
            },
        };
        rules.check()?;
        Ok(rules)
    }
}
