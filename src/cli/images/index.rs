//! `socinbd index`.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::making::{LoginArgs, MakeArgs, PlatformsArgs, UploadArgs};
use crate::cli::{AccessArgs, GlobalArgs, absolute, output, progress::ProgressBars};
use crate::{
    engine::{
        make::{create, options::CreateOptions},
        open::{
            local_indexes::{LocalIndex, LocalIndexes},
            platforms::{ChosenImages, Platforms, choose_images},
        },
        transfer::{
            gc,
            push::{self, ExistingIndexPolicy, PushOptions},
        },
    },
    error::{Error, Kind, Result, ResultExt},
    oci::{Digest, Platform, Reference, artifact::what_is},
    soci::index::{IndexManifest, V1_TYPE},
    source::{Destination, Manifest, Source},
};

/// Make, push, list, show and remove SOCI indexes (v1)
#[derive(Subcommand)]
#[command(after_help = "Examples:\n\
\x20 socinbd index create oci:./app:latest\n\
\x20 socinbd index list")]
pub(crate) enum IndexCommand {
    Create(IndexCreateCommand),
    Push(IndexPushCommand),
    #[command(visible_alias = "ls")]
    List(IndexListCommand),
    Info(IndexInfoCommand),
    #[command(visible_alias = "remove")]
    Rm(IndexRmCommand),
    Gc(IndexGcCommand),
}

/// Make a SOCI index (v1) for an image
///
/// Each layer is read once; zTOCs of existing indexes are used again. The index is stored in the OCI layout of the image, or with the image
/// in containerd, or else in the state directory, where `attach` finds it, or with --push in the registry of the image. The image is not
/// changed.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index create oci:./app:latest\n\
\x20 socinbd index create registry.example/app --span-size 1048576\n\
\x20 socinbd index create registry.example/app --all-platforms --push\n\
\x20 socinbd index create containerd://default/registry.example/app:1")]
pub(crate) struct IndexCreateCommand {
    /// Image: NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    ///
    /// Or containerd://NAMESPACE/NAME, an image of containerd.
    image: Reference,
    #[command(flatten)]
    platforms: PlatformsArgs,
    /// Store the index in the registry of the image
    #[arg(long)]
    push: bool,
    /// Store the index in the state directory, and not with the image
    #[arg(long, conflicts_with = "push")]
    local: bool,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    uploads: UploadArgs,
    #[command(flatten)]
    make: MakeArgs,
}

/// Push the SOCI index (v1) of an image, and the image if it is missing
///
/// Pushes the newest index of each platform, from the OCI layout of the image, from containerd or from the state directory.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index push registry.example/app:1\n\
\x20 socinbd index push oci:./app:1 registry.example/app:1 --all-platforms")]
pub(crate) struct IndexPushCommand {
    /// Image with the index
    image: Reference,
    /// Destination of index and image [default: IMAGE]
    destination: Option<Reference>,
    #[command(flatten)]
    platforms: PlatformsArgs,
    /// Handling of another index: warn, skip or allow
    ///
    /// If the destination has another index of the image: warn pushes and prints a warning, skip does not push, allow pushes.
    #[arg(
        long,
        value_enum,
        value_name = "ACTION",
        default_value_t,
        hide_possible_values = true
    )]
    existing_index: ExistingIndexPolicy,
    /// Leave the tag of the destination as it is
    ///
    /// An image is copied without a tag, and only if its manifest is missing.
    #[arg(long)]
    keep_tag: bool,
    /// Print warnings only
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    login: LoginArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    uploads: UploadArgs,
}

/// List the SOCI indexes in the state directory, or those of an image
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index list\n\
\x20 socinbd index list registry.example/app:1 --platform linux/arm64")]
pub(crate) struct IndexListCommand {
    /// Image whose indexes are listed, from its registry or layout
    ///
    /// Or containerd://NAMESPACE, for all images of a namespace of containerd.
    image: Option<Reference>,
    /// Image to list the indexes of, in the state directory
    #[arg(long, value_name = "IMAGE", conflicts_with = "image")]
    r#ref: Option<Reference>,
    /// Platform to list the indexes of (repeatable) [default: all]
    #[arg(long, short, value_name = "PLATFORM")]
    platform: Vec<Platform>,
    /// Print digests only
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    access: AccessArgs,
}

/// Show a SOCI index as JSON
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index info sha256:6a5d...\n\
\x20 socinbd index info sha256:6a5d... --at registry.example/app")]
pub(crate) struct IndexInfoCommand {
    /// Digest of the index
    digest: Digest,
    /// Repository or layout with the index [default: the state directory]
    #[arg(long, value_name = "IMAGE")]
    at: Option<Reference>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Remove SOCI indexes, and zTOCs that no other index uses
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index rm sha256:6a5d...\n\
\x20 socinbd index rm --ref registry.example/app:1")]
pub(crate) struct IndexRmCommand {
    /// Digests of the indexes
    #[arg(required_unless_present = "ref")]
    digests: Vec<Digest>,
    /// Image whose indexes are all removed, in the state directory or in containerd
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["digests", "at"])]
    r#ref: Option<Reference>,
    /// Repository or layout with the indexes [default: the state directory]
    #[arg(long, value_name = "IMAGE")]
    at: Option<Reference>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Remove SOCI indexes (v1) of deleted images from a repository
///
/// Looks at the tags of the referrers tag schema (sha256-...) and at the images given with --image. Entries of these tags whose content is
/// missing are removed too. A registry with the referrers API does not list deleted images: give their digests.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd index gc --remote registry.example/app --dry-run\n\
\x20 socinbd index gc --remote registry.example/app --image sha256:6a5d...")]
pub(crate) struct IndexGcCommand {
    /// Repository
    #[arg(long, value_name = "REPOSITORY")]
    remote: Reference,
    /// Digest of an image manifest whose indexes are looked at (repeatable)
    #[arg(long, value_name = "DIGEST")]
    image: Vec<Digest>,
    /// Print what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    access: AccessArgs,
}

impl IndexCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
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

impl IndexCreateCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        let access = self.access.access()?;
        let options = CreateOptions {
            in_state_directory: self.local,
            ..self.make.options()?
        };
        let source = Source::open(&self.image, &access).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let destination = match self.push {
            true => Some(Destination::open(&self.image, &access).await?),
            false => None,
        };
        let root = source.root_manifest().await?;
        let ChosenImages {
            images,
            absent,
            warnings,
        } = choose_images(&source, &root, &self.platforms.platforms()).await?;
        for warning in absent.iter().chain(&warnings) {
            tracing::warn!("{warning}");
        }
        let progress = ProgressBars::new(global.json);
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

impl IndexPushCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        let access = self.access.access()?;
        let source = Source::open(&self.image, &access).await?;
        let to = self.destination.as_ref().unwrap_or(&self.image);
        if to == &self.image && matches!(to, Reference::Archive { .. }) {
            return Err(Error::new(
                Kind::InvalidArgument,
                "an archive cannot be changed: give a destination",
            ));
        }
        let access = self.login.with(access, to);
        let destination = Destination::open(to, &access).await?;
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let options = PushOptions {
            platforms: self.platforms.platforms(),
            existing: self.existing_index,
            keep_tag: self.keep_tag,
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

impl IndexListCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
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

    /// Lists the indexes beside the image, or those of all images of a namespace of containerd.
    async fn of_image(&self, global: &GlobalArgs, image: &Reference) -> Result<()> {
        let access = self.access.access()?;
        let source = Source::open(image, &access).await?;
        let images = source.images().await?;
        let mut list: Vec<LocalIndex> = Vec::new();
        for one in &images {
            match self.indexes(&Source::open(one, &access).await?).await {
                Ok(found) => list.extend(found),
                Err(error) if one == image => return Err(error),
                Err(error) => tracing::debug!("{one}: {}", error.report()),
            }
        }
        // an image may have several names
        let mut seen = std::collections::HashSet::new();
        list.retain(|index| seen.insert(index.digest));
        self.print(global, &list)
    }

    async fn indexes(&self, source: &Source) -> Result<Vec<LocalIndex>> {
        let root = source.root_manifest().await?;
        let platforms = match &self.platform[..] {
            [] => Platforms::All,
            these => Platforms::These(these.to_vec()),
        };
        let images = choose_images(source, &root, &platforms).await?.images;
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
        Ok(list)
    }

    fn print(&self, global: &GlobalArgs, list: &[LocalIndex]) -> Result<()> {
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

impl IndexInfoCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        let manifest = self.manifest(global).await?;
        IndexManifest::parse(&manifest.bytes).or_kind(Kind::InvalidArgument, || {
            let what = what_is(&manifest.bytes, &manifest.media_type);
            format!("{} is {what}, not a SOCI index", self.digest)
        })?;
        let document: serde_json::Value = serde_json::from_slice(&manifest.bytes)
            .or_kind(Kind::Corrupt, || self.digest.to_string())?;
        output::json(&document)
    }

    /// Reads the manifest from a repository, a layout, or the state directory.
    async fn manifest(&self, global: &GlobalArgs) -> Result<Manifest> {
        let Some(at) = &self.at else {
            let local = LocalIndexes::open(&absolute(&global.root)?)?;
            return local.manifest(&self.digest).await;
        };
        let source = Source::open(at, &self.access.access()?).await?;
        source.manifest(&self.digest).await
    }
}

impl IndexRmCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        if let Some(at) = &self.at {
            let to = Destination::open(at, &self.access.access()?).await?;
            for digest in &self.digests {
                let source = Source::open(at, &self.access.access()?).await?;
                let manifest = source.manifest(digest).await?;
                let index = IndexManifest::parse(&manifest.bytes)
                    .or_kind(Kind::InvalidArgument, || {
                        format!("{digest} is not a SOCI index")
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
            Some(image @ Reference::Containerd { .. }) => {
                return self.of_containerd(image).await;
            }
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
                        format!("the state directory has no index of {image}"),
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

    /// Removes all indexes of an image of containerd.
    async fn of_containerd(&self, image: &Reference) -> Result<()> {
        let access = self.access.access()?;
        let source = Source::open(image, &access).await?;
        let to = Destination::open(image, &access).await?;
        let root = source.root_manifest().await?;
        let images = choose_images(&source, &root, &Platforms::All).await?.images;
        let mut removed = 0;
        for image in images {
            for index in source.referrers(&image.digest, V1_TYPE).await? {
                to.delete_referrer(&index.digest, &image.digest).await?;
                output::line(&format!("removed {}", index.digest))?;
                removed += 1;
            }
        }
        if removed == 0 {
            let text = format!("{image} has no SOCI index (v1)");
            return Err(Error::new(Kind::NotFound, text));
        }
        Ok(())
    }
}

impl IndexGcCommand {
    async fn run(self, global: &GlobalArgs) -> Result<()> {
        let destination = Destination::open(&self.remote, &self.access.access()?).await?;
        let report = gc::collect(&destination, &self.image, self.dry_run).await?;
        match global.json {
            true => output::json(&report),
            false => output::line(&report.to_string()),
        }
    }
}
