//! `socinbd index`.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{
    AccessArgs, Global, absolute,
    making::{MakeArgs, PlatformsArgs, UploadArgs},
    output,
    progress::Progress,
};
use crate::{
    engine::{
        make::create,
        open::{
            local_indexes::{LocalIndex, LocalIndexes},
            platforms::{Chosen, chosen},
        },
        transfer::{
            gc,
            push::{self, Existing, PushOptions},
        },
    },
    error::{Error, Kind, Result, ResultExt},
    oci::{Digest, Platform, Reference, artifact::what_is},
    soci::index::{IndexManifest, V1_TYPE},
    source::{Destination, Manifest, Source},
};

/// Make, push, show and remove SOCI indexes (v1)
#[derive(Subcommand)]
pub(super) enum Index {
    Create(Create),
    Push(Push),
    #[command(visible_alias = "ls")]
    List(List),
    Info(Info),
    #[command(visible_alias = "remove")]
    Rm(Rm),
    Gc(Gc),
}

/// Make a SOCI index (v1) for an image
///
/// Each layer passes once; zTOCs that an index has already are used again. The index is stored in the OCI layout that the image is in, or
/// in the local root, where `attach` finds it, or with --push in the image's registry. The image is not changed.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index create oci:./app:latest\n\
\x20 socinbd index create registry.example/app --span-size 1048576\n\
\x20 socinbd index create registry.example/app --all-platforms --push")]
pub(super) struct Create {
    /// The image: NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    image: Reference,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    make: MakeArgs,
    /// Store the index in the registry that the image is in
    #[arg(long)]
    push: bool,
    #[command(flatten)]
    uploads: UploadArgs,
}

/// Push an image's SOCI index (v1), and the image where it is not there yet
///
/// The newest index of each image goes: from the OCI layout that the image is in, or from the local root.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index push registry.example/app:1\n\
\x20 socinbd index push oci:./app:1 registry.example/app:1 --all-platforms")]
pub(super) struct Push {
    /// The image
    image: Reference,
    /// Where to push index and image to [default: where the image is]
    destination: Option<Reference>,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    platforms: PlatformsArgs,
    /// What to do where the image has another index: push and say so, do not push, or push
    #[arg(long, value_enum, value_name = "WHAT", default_value_t)]
    existing_index: Existing,
    #[command(flatten)]
    uploads: UploadArgs,
    /// Print nothing but warnings
    #[arg(long, short)]
    quiet: bool,
}

/// List the indexes of the local root, or those of an image where it is
#[derive(Args)]
pub(super) struct List {
    /// The image whose indexes are listed from its registry or layout
    image: Option<Reference>,
    #[command(flatten)]
    access: AccessArgs,
    /// Only those made for this image, of the local root
    #[arg(long, value_name = "IMAGE", conflicts_with = "image")]
    r#ref: Option<Reference>,
    /// Only those for this platform; may be repeated
    #[arg(long, short, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<Platform>,
    /// Print digests only
    #[arg(long, short)]
    quiet: bool,
}

/// Show an index as JSON
#[derive(Args)]
pub(super) struct Info {
    /// The index
    digest: Digest,
    /// Look for it in this repository or layout [default: the local root]
    #[arg(long, value_name = "IMAGE")]
    at: Option<Reference>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Remove indexes, and the zTOCs that no other index has
#[derive(Args)]
pub(super) struct Rm {
    /// The indexes
    #[arg(required_unless_present = "ref")]
    digests: Vec<Digest>,
    /// All that were made for this image
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["digests", "at"])]
    r#ref: Option<Reference>,
    /// Remove them from this repository or layout [default: the local root]
    #[arg(long, value_name = "IMAGE")]
    at: Option<Reference>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Remove indexes (v1) whose image is gone from a repository, and entries that list what is gone
///
/// What is looked at: the lists that stand in for the referrers API (tags sha256-...), and the images named by --image. A registry with
/// the referrers API cannot be asked for images that it no longer has: name them.
#[derive(Args)]
pub(super) struct Gc {
    /// The repository
    #[arg(long, value_name = "REPOSITORY")]
    remote: Reference,
    /// Look at the indexes of this image manifest too, by its digest; may be repeated
    #[arg(long, value_name = "DIGEST")]
    image: Vec<Digest>,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    access: AccessArgs,
}

impl Index {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode> {
        match self {
            Self::Create(command) => command.run(global).await,
            Self::Push(command) => command.run(global).await,
            Self::List(command) => command.run(global).await,
            Self::Info(command) => command.run(global).await,
            Self::Rm(command) => command.run(global).await,
            Self::Gc(command) => command.run(global).await,
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Create {
    async fn run(self, global: &Global) -> Result<()> {
        let access = self.access.access()?;
        let options = self.make.options()?;
        let source = Source::open(&self.image, &access).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let destination = match self.push {
            true => Some(Destination::open(&self.image, &access).await?),
            false => None,
        };
        let root = source.root_manifest().await?;
        let Chosen {
            images,
            absent,
            warnings,
        } = chosen(&source, &root, &self.make.platforms.platforms()).await?;
        for warning in absent.iter().chain(&warnings) {
            tracing::warn!("{warning}");
        }
        let progress = Progress::new(global.json);
        let told = |layer, done, size| progress.layer(layer, done, size);
        let mut reports = Vec::new();
        for image in &images {
            let report = match &destination {
                None => create::create(image, &options, &local, &told).await?,
                Some(to) => {
                    let uploads = self.uploads.max_concurrent_uploads;
                    create::create_at(image, &options, &local, to, uploads, &told).await?
                }
            };
            for warning in &report.warnings {
                tracing::warn!("{warning}");
            }
            reports.push(report);
        }
        progress.finish();
        match (global.json, &reports[..]) {
            (true, [report]) => output::json(report),
            (true, reports) => output::json(&reports),
            (false, reports) => reports
                .iter()
                .try_for_each(|report| output::line(&report.to_string())),
        }
    }
}

impl Push {
    async fn run(self, global: &Global) -> Result<()> {
        let access = self.access.access()?;
        let source = Source::open(&self.image, &access).await?;
        let to = self.destination.as_ref().unwrap_or(&self.image);
        if to == &self.image && matches!(to, Reference::Archive { .. }) {
            return Err(Error::new(
                Kind::InvalidArgument,
                "an archive is not written to: name a destination",
            ));
        }
        let destination = Destination::open(to, &access).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let options = PushOptions {
            platforms: self.platforms.platforms(),
            existing: self.existing_index,
            uploads: self.uploads.max_concurrent_uploads,
        };
        let report = push::push(&source, &destination, &options, &local).await?;
        for warning in &report.warnings {
            tracing::warn!("{warning}");
        }
        match (global.json, self.quiet) {
            (true, _) => output::json(&report),
            (false, true) => Ok(()),
            (false, false) => output::line(&report.to_string()),
        }
    }
}

impl List {
    async fn run(self, global: &Global) -> Result<()> {
        if let Some(image) = &self.image {
            return self.of_image(global, image).await;
        }
        let mut list = LocalIndexes::open(&absolute(&global.root)?)?.list().await?;
        let wanted = self.r#ref.as_ref().map(Reference::to_string);
        list.retain(|index| {
            let is_of_platform = |text: &String| {
                text.parse()
                    .is_ok_and(|platform| self.platform.contains(&platform))
            };
            (wanted.is_none() || index.reference == wanted)
                && (self.platform.is_empty() || index.platform.as_ref().is_some_and(is_of_platform))
        });
        self.print(global, &list)
    }

    /// Those of the image's own place.
    async fn of_image(&self, global: &Global, image: &Reference) -> Result<()> {
        let source = Source::open(image, &self.access.access()?).await?;
        let root = source.root_manifest().await?;
        let platforms = match &self.platform[..] {
            [] => crate::engine::make::convert::Platforms::All,
            these => crate::engine::make::convert::Platforms::These(these.to_vec()),
        };
        let images = chosen(&source, &root, &platforms).await?.images;
        let mut list = Vec::new();
        for image in images {
            let mut found = source.referrers(&image.digest, V1_TYPE).await?;
            let annotations = image.manifest.annotations().as_ref();
            let named = annotations
                .and_then(|annotations| annotations.get(crate::soci::index::INDEX_DIGEST));
            if let Some(Ok(named)) = named.map(|named| named.parse()) {
                let manifest = source.manifest(&named).await?;
                list.push(LocalIndex::of(&image, &manifest)?);
            }
            for referrer in found.drain(..) {
                let manifest = source.manifest(&referrer.digest).await?;
                list.push(LocalIndex::of(&image, &manifest)?);
            }
        }
        self.print(global, &list)
    }

    fn print(&self, global: &Global, list: &[LocalIndex]) -> Result<()> {
        if global.json {
            return output::json(&list);
        }
        if self.quiet {
            return list
                .iter()
                .try_for_each(|index| output::line(&index.digest.to_string()));
        }
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        output::table(
            [
                "DIGEST", "SIZE", "IMAGE", "PLATFORM", "MANIFEST", "VERSION", "CREATED",
            ],
            list.iter().map(|index| {
                [
                    index.digest.to_string(),
                    output::bytes(index.size),
                    or_dash(&index.reference),
                    or_dash(&index.platform),
                    or_dash(&index.image.map(|image| image.to_string())),
                    format!("v{}", index.version),
                    or_dash(&index.created),
                ]
            }),
        )
    }
}

impl Info {
    async fn run(self, global: &Global) -> Result<()> {
        let manifest = find(global, &self.digest, self.at.as_ref(), &self.access).await?;
        IndexManifest::parse(&manifest.bytes).or_kind(Kind::InvalidArgument, || {
            let what = what_is(&manifest.bytes, &manifest.media_type);
            format!("{} is {what}, no SOCI index", self.digest)
        })?;
        let document: serde_json::Value = serde_json::from_slice(&manifest.bytes)
            .or_kind(Kind::Corrupt, || self.digest.to_string())?;
        output::json(&document)
    }
}

/// A manifest of a repository or layout, or of the local root.
async fn find(
    global: &Global,
    digest: &Digest,
    at: Option<&Reference>,
    access: &AccessArgs,
) -> Result<Manifest> {
    match at {
        Some(at) => {
            let source = Source::open(at, &access.access()?).await?;
            source.manifest(digest).await
        }
        None => {
            let local = LocalIndexes::open(&absolute(&global.root)?)?;
            local.manifest(digest).await
        }
    }
}

impl Rm {
    async fn run(self, global: &Global) -> Result<()> {
        if let Some(at) = &self.at {
            let to = Destination::open(at, &self.access.access()?).await?;
            for digest in &self.digests {
                let manifest = find(global, digest, Some(at), &self.access).await?;
                let index = IndexManifest::parse(&manifest.bytes)
                    .or_kind(Kind::InvalidArgument, || {
                        format!("{digest} is no SOCI index")
                    })?;
                let subject = index
                    .subject
                    .and_then(|subject| subject.digest.parse().ok());
                match subject {
                    Some(subject) => to.delete_referrer(digest, &subject).await?,
                    None => {
                        return Err(Error::new(
                            Kind::InvalidArgument,
                            format!("{digest} is part of an image (v2): remove the image"),
                        ));
                    }
                };
                output::line(&format!("removed {digest} from {at}"))?;
            }
            return Ok(());
        }
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let digests = match &self.r#ref {
            None => self.digests,
            Some(image) => {
                let image = image.to_string();
                let list = local.list().await?;
                let digests: Vec<Digest> = list
                    .iter()
                    .filter(|index| index.reference.as_ref() == Some(&image))
                    .map(|index| index.digest)
                    .collect();
                if digests.is_empty() {
                    return Err(Error::new(
                        Kind::NotFound,
                        format!("no index was made here for {image}"),
                    ));
                }
                digests
            }
        };
        for digest in digests {
            let freed = local.remove(&digest).await?.ok_or_else(|| {
                Error::new(Kind::NotFound, format!("there is no SOCI index {digest}"))
            })?;
            output::line(&format!("removed {digest}: {}", output::bytes(freed.bytes)))?;
        }
        Ok(())
    }
}

impl Gc {
    async fn run(self, global: &Global) -> Result<()> {
        let destination = Destination::open(&self.remote, &self.access.access()?).await?;
        let report = gc::collect(&destination, &self.image, self.dry_run).await?;
        match global.json {
            true => output::json(&report),
            false => output::line(&report.to_string()),
        }
    }
}
