//! `socinbd convert`.

use std::{path::Path, process::ExitCode};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::making::{MakeArgs, PlatformsArgs, UploadArgs};
use crate::cli::{AccessArgs, GlobalArgs, absolute, output, progress::ProgressBars};
use crate::{
    engine::{
        make::{
            convert::{self, ConvertOutcome},
            options::ConvertOptions,
            report::ConvertReport,
        },
        open::local_indexes::LocalIndexes,
    },
    error::{Error, Kind, Result},
    oci::{Digest, Reference, pattern},
    source::{Access, Destination, Source},
};

/// Convert an image to an image with a SOCI index (v2)
///
/// The result is an OCI image index that binds the image and its SOCI index: its digest covers both. Source and destination are a
/// registry, an OCI layout directory, an OCI archive or containerd. Needs neither root nor a daemon. Blobs that the destination has are not sent again;
/// blobs of another repository of the same registry are mounted; zTOCs of existing indexes are used again. Other platforms, attestations
/// and unknown entries are copied unchanged; entries whose content is missing are left out, with a warning.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd convert registry.example/app:1.0 registry.example/app:1.0-soci\n\
\x20 socinbd convert oci:./app:1.0 registry.example/app:1.0 --all-platforms\n\
\x20 socinbd convert app.tar app-soci.tar --format oci-archive\n\
\x20 socinbd convert registry.example/app registry.example/app --tags 'v*' --suffix -soci")]
pub(crate) struct ConvertCommand {
    /// Image to convert
    source: String,
    /// Reference of the new image, with a tag
    destination: String,
    #[command(flatten)]
    platforms: PlatformsArgs,
    /// Format of a DESTINATION path
    ///
    /// With this option, SOURCE and DESTINATION are paths, not references.
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "tags")]
    format: Option<PathFormat>,
    /// Pattern of tags to convert, with * and ?
    ///
    /// SOURCE and DESTINATION are repositories. Tags that are converted already are skipped.
    #[arg(long, value_name = "PATTERN")]
    tags: Option<String>,
    /// Suffix of the new tags, with --tags
    ///
    /// Default: -soci if SOURCE and DESTINATION are the same repository, else none.
    #[arg(long, value_name = "TEXT", requires = "tags")]
    suffix: Option<String>,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    uploads: UploadArgs,
    #[command(flatten)]
    make: MakeArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PathFormat {
    /// OCI archive: a tar file
    OciArchive,
    /// OCI layout: a directory
    OciDir,
}

/// The output of `--tags --json`.
#[derive(Serialize)]
struct TagReport {
    tag: String,
    to: String,
    /// Digest of the image under the new tag.
    digest: Option<Digest>,
    outcome: &'static str,
    error: Option<String>,
}

impl ConvertCommand {
    pub(crate) async fn run(self, global: &GlobalArgs) -> Result<ExitCode> {
        let access = self.access.access()?;
        let options = ConvertOptions {
            create: self.make.options()?,
            platforms: self.platforms.platforms(),
            uploads: self.uploads.max_concurrent_uploads,
        };
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let (from, to) = (self.source()?, self.destination()?);
        let converter = Converter {
            json: global.json,
            access: &access,
            options: &options,
            local: &local,
        };
        if let Some(pattern) = &self.tags {
            return self.all(&converter, pattern, &from, &to).await;
        }
        let report = converter.convert(&from, &to).await?;
        for warning in &report.warnings {
            tracing::warn!("{warning}");
        }
        output::report(global.json, &report)?;
        Ok(ExitCode::SUCCESS)
    }

    fn source(&self) -> Result<Reference> {
        let path = Path::new(&self.source);
        match self.format {
            Some(_) if path.is_dir() => format!("oci:{}", self.source).parse(),
            Some(_) if path.is_file() => format!("oci-archive:{}", self.source).parse(),
            Some(_) => Err(Error::new(
                Kind::NotFound,
                format!("{}: no such directory or tar file", self.source),
            )),
            None => self.source.parse(),
        }
    }

    fn destination(&self) -> Result<Reference> {
        let reference: Reference = match self.format {
            Some(PathFormat::OciArchive) => format!("oci-archive:{}", self.destination).parse()?,
            Some(PathFormat::OciDir) => format!("oci:{}", self.destination).parse()?,
            None => self.destination.parse()?,
        };
        match reference {
            Reference::Registry {
                digest: Some(_), ..
            } => Err(Error::new(
                Kind::InvalidArgument,
                format!("{reference}: the digest of the new image cannot be chosen: give a tag"),
            )),
            reference => Ok(reference),
        }
    }

    /// Converts the tags of a repository, one after the other. One that fails does not stop the others.
    async fn all(
        &self,
        converter: &Converter<'_>,
        wanted: &str,
        from: &Reference,
        to: &Reference,
    ) -> Result<ExitCode> {
        let same = from.place() == to.place();
        let suffix = match &self.suffix {
            Some(suffix) => suffix,
            None if same => "-soci",
            None => "",
        };
        if same && suffix.is_empty() {
            return Err(Error::new(
                Kind::InvalidArgument,
                "--tags does not replace tags in the same repository: give --suffix or another repository",
            ));
        }
        let source = Source::open(from, converter.access).await?;
        let tags = source.tags().await?;
        let chosen = tags.iter().filter(|tag| {
            pattern::matches(wanted, tag)
                && !tag.starts_with("sha256-")
                && !(same && tag.ends_with(suffix))
        });
        let mut reports = Vec::new();
        for tag in chosen {
            let (from, to) = (from.with_tag(tag)?, to.with_tag(&format!("{tag}{suffix}"))?);
            let mut report = TagReport {
                tag: tag.clone(),
                to: to.to_string(),
                digest: None,
                outcome: "unchanged",
                error: None,
            };
            match converter.unless_done(&from, &to).await {
                Ok(ConvertOutcome::Unchanged(done)) => report.digest = Some(done),
                Ok(ConvertOutcome::Converted(made)) => {
                    for warning in &made.warnings {
                        tracing::warn!("{from}: {warning}");
                    }
                    report.digest = Some(made.digest);
                    report.outcome = "converted";
                }
                Err(error) => {
                    report.outcome = "failed";
                    report.error = Some(error.report());
                }
            }
            if !converter.json {
                let what = match (&report.digest, &report.error) {
                    (Some(digest), _) => digest.to_string(),
                    (None, error) => error.clone().unwrap_or_default(),
                };
                output::line(&format!(
                    "{} -> {}: {} {what}",
                    report.tag, report.to, report.outcome
                ))?;
            }
            reports.push(report);
        }
        if converter.json {
            output::json(&reports)?;
        } else if reports.is_empty() {
            output::line(&format!("no tag of {from} matches {wanted:?}"))?;
        }
        Ok(match reports.iter().any(|report| report.error.is_some()) {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        })
    }
}

/// The common inputs of all conversions of one command.
struct Converter<'a> {
    json: bool,
    access: &'a Access,
    options: &'a ConvertOptions,
    local: &'a LocalIndexes,
}

impl Converter<'_> {
    async fn places(&self, from: &Reference, to: &Reference) -> Result<(Source, Destination)> {
        let source = Source::open(from, self.access).await?;
        // if the source does not exist, no layout is left over
        source.root_manifest().await?;
        Ok((source, Destination::open(to, self.access).await?))
    }

    async fn convert(&self, from: &Reference, to: &Reference) -> Result<ConvertReport> {
        let (source, destination) = self.places(from, to).await?;
        let progress = ProgressBars::new(self.json);
        let told = |layer, done, size| progress.layer(layer, done, size);
        let report = convert::convert(&source, &destination, self.options, self.local, &told).await;
        progress.finish();
        report
    }

    async fn unless_done(&self, from: &Reference, to: &Reference) -> Result<ConvertOutcome> {
        let (source, destination) = self.places(from, to).await?;
        let progress = ProgressBars::new(self.json);
        let told = |layer, done, size| progress.layer(layer, done, size);
        let (options, local) = (self.options, self.local);
        let outcome =
            convert::convert_unless_done(&source, &destination, options, local, &told).await;
        progress.finish();
        outcome
    }
}
