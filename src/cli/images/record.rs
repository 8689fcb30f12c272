//! `socinbd record`.

use std::{process::ExitCode, sync::Arc};

use clap::Args;

use super::making::UploadArgs;
use crate::cli::{
    GlobalArgs, ImageArgs, IndexArgs, absolute,
    attached::{
        attach::{self, MountArgs},
        run::ProgramArgs,
    },
    output,
    progress::ProgressBars,
    require_root,
    signals::SignalReceiver,
};
use crate::{
    engine::{
        AttachedImage, Engine, RecordingDirectory,
        make::{
            convert, create,
            options::{ConvertOptions, CreateOptions},
        },
        open::{
            compact_index::CompactIndex, image::Image, local_indexes::LocalIndexes,
            platforms::Platforms, search, soci_index::SociIndex,
        },
    },
    error::{Error, Kind, Result},
    layer,
    oci::Reference,
    open_files,
    soci::index::DEFAULT_SPAN_SIZE,
    source::{Destination, Source},
};

/// Run an image once and record the spans that its start reads
///
/// The spans that the program reads go into prefetch artifacts, one per layer, in the order of their first use; `attach` and `run` then
/// fetch these spans ahead of the program. The artifacts come with a new SOCI index (v1), which has the zTOCs of the old index and is stored
/// as by `index create`. With --to, the result is an image with a SOCI index (v2), under another reference, because its digest differs. If
/// the image has a compact index, a new compact index with the same tables is made too. Stop the program once it is ready: everything that
/// it reads is recorded.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd record registry.example/app:1 --push -- python3 -c 'import app'\n\
\x20 socinbd record registry.example/app:1 --to registry.example/app:1-fast")]
pub(crate) struct RecordCommand {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    index: IndexArgs,
    #[command(flatten)]
    options: MountArgs,
    /// Store the index in the registry of the image
    #[arg(long, conflicts_with = "to")]
    push: bool,
    /// Reference of a new image with the index in it (v2)
    #[arg(long, value_name = "IMAGE")]
    to: Option<Reference>,
    #[command(flatten)]
    uploads: UploadArgs,
    #[command(flatten)]
    program: ProgramArgs,
}

impl RecordCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        require_root("record")?;
        open_files::raise();
        let root = absolute(&global.root)?;
        let local = LocalIndexes::open(&root)?;
        let access = self.image.access.access()?;
        let source = Source::open(&self.image.image, &access).await?;
        let image = Image::resolve(&source, self.image.platform.as_ref()).await?;
        let found = search::find(&image, &self.index.choice(), &local).await?;
        let Some(index) = found.index else {
            return Err(Error::new(
                Kind::NotFound,
                format!(
                    "{} has no SOCI index; make one with `socinbd index create`",
                    self.image.image
                ),
            ));
        };
        let mut options = options_of(&index, found.compact.as_ref(), &image);
        let (status, uses) = self.record(global).await?;
        options.uses = uses;
        let spans = options.uses.len();
        let progress = ProgressBars::new(global.json);
        let told = |layer, done, size| progress.layer(layer, done, size);
        let uploads = self.uploads.max_concurrent_uploads;
        match &self.to {
            Some(to) => {
                let destination = Destination::open(to, &access).await?;
                let options = ConvertOptions {
                    create: options,
                    platforms: Platforms::These(vec![image.platform.clone()]),
                    uploads,
                };
                let report =
                    convert::convert(&source, &destination, &options, &local, &told).await?;
                progress.finish();
                output::report(global.json, &report)?;
            }
            None => {
                let report = match self.push {
                    true => {
                        let destination = Destination::open(&self.image.image, &access).await?;
                        create::create_at(&image, &options, &local, &destination, uploads, &told)
                            .await?
                    }
                    false => create::create(&image, &options, &local, &told).await?,
                };
                progress.finish();
                output::report(global.json, &report)?;
            }
        }
        if !global.json {
            output::line(&format!(
                "the program exited with status {status} and read {spans} spans"
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Runs the program on empty disks in a directory of their own; returns its status and the recorded reads.
    async fn record(&self, global: &GlobalArgs) -> Result<(u8, Vec<layer::Touch>)> {
        // so that a signal does not leave mounts and devices
        let mut ends = SignalReceiver::that_end()?;
        let directory = RecordingDirectory::new(&absolute(&global.root)?)?;
        let store = layer::StoreOptions {
            record: true,
            never_whole: true,
            ..layer::StoreOptions::default()
        };
        let (root, run_dir) = (directory.path().join("root"), directory.path().join("run"));
        let engine = Engine::open_with(&root, &run_dir, store).await?;
        let recorded = self.record_on(&engine, global, &mut ends).await;
        engine.end().await;
        recorded
    }

    async fn record_on(
        &self,
        engine: &Arc<Engine>,
        global: &GlobalArgs,
        ends: &mut SignalReceiver,
    ) -> Result<(u8, Vec<layer::Touch>)> {
        let request = attach::request(&self.image, &self.index, &self.options, true, None)?;
        let progress = ProgressBars::new(global.json);
        let event = |event| progress.event(event);
        let attached = tokio::select! {
            attached = engine.attach(request, &event) => attached?,
            _ = ends.next() => return Err(Error::new(Kind::Io, "interrupted before the program was started")),
        };
        progress.finish();
        let AttachedImage { attachment, mount } = attached;
        let status = self.program.clone().run(mount, &attachment).await?;
        Ok((status, engine.touches()))
    }
}

/// Options with the sizes of these indexes, so that their tables are reused and no layer is read again.
fn options_of(index: &SociIndex, compact: Option<&CompactIndex>, image: &Image) -> CreateOptions {
    let indexed = || {
        image
            .layers
            .iter()
            .filter(|layer| index.ztoc(&layer.digest).is_some())
    };
    let span_size = indexed().find_map(|layer| index.manifest.span_size_of(&layer.digest));
    let compact_span_size = compact.and_then(|compact| {
        let part = indexed().find_map(|layer| compact.layer(&layer.digest));
        part.map(|part| part.span_size)
    });
    CreateOptions {
        span_size: span_size.unwrap_or(DEFAULT_SPAN_SIZE),
        min_layer_size: indexed().map(|layer| layer.size).min().unwrap_or(0),
        compact_span_size,
        ..CreateOptions::default()
    }
}
