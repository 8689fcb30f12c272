//! One image: its index is made and pushed, unless it is there.

use super::{
    event::Push,
    queue::Job,
    rules::{Rules, Verdict},
};
use crate::{
    engine::{
        chosen::chosen,
        convert::{self, ConvertOptions, Outcome},
        create,
        image::Image,
        local::LocalIndexes,
    },
    error::{Error, Kind, Result},
    soci::index::{V1_TYPE, Version},
    source::{Access, Destination, Source},
};

/// How images are worked on.
pub struct Build {
    /// How the registry is reached.
    pub access: Access,
    /// How indexes are made, and for which platforms.
    pub options: ConvertOptions,
    /// Images whose layers have fewer bytes together get none.
    pub min_image_size: u64,
    /// zTOCs that are here already are used.
    pub local: LocalIndexes,
}

impl Build {
    /// Works on the image that a job names, as it is now. Says what was done.
    pub async fn image(&self, rules: &Rules, job: &Job) -> Result<String> {
        let source = Source::open(&rules.source(job)?, &self.access).await?;
        let root = source.root_manifest().await?;
        let images = chosen(&source, &root, &self.options.platforms)
            .await?
            .images;
        let size = |image: &Image| {
            let sizes = image.layers.iter().map(|layer| layer.size);
            sizes.fold(0, u64::saturating_add)
        };
        let largest = images.iter().map(size).max().unwrap_or(0);
        if largest < self.min_image_size {
            return Ok(format!(
                "left alone: it has {largest} bytes, fewer than {}",
                self.min_image_size
            ));
        }
        match rules.version {
            Version::V1 => self.refer(&source, &images).await,
            Version::V2 => self.convert(rules, job, &source).await,
        }
    }

    /// The jobs of all tags of a repository that the rules want.
    pub async fn backlog(&self, rules: &Rules, repository: &str) -> Result<Vec<Job>> {
        let any = Job {
            repository: repository.to_owned(),
            tag: "latest".to_owned(),
        };
        let source = Source::open(&rules.source(&any)?, &self.access).await?;
        let mut jobs = Vec::new();
        for tag in source.tags().await? {
            let push = Push {
                registry: None,
                repository: repository.to_owned(),
                tag,
                digest: None,
            };
            match rules.judge(&push) {
                Ok(Verdict::Wanted(job)) => jobs.push(job),
                Ok(Verdict::Ignored(_)) => {}
                Err(error) => {
                    let context = format!("repository {repository:?}");
                    return Err(Error::with_source(Kind::InvalidArgument, context, error));
                }
            }
        }
        Ok(jobs)
    }

    /// An index of version 1 for each image that has none.
    async fn refer(&self, source: &Source, images: &[Image]) -> Result<String> {
        let destination = Destination::open(source.reference(), &self.access).await?;
        let mut made = Vec::new();
        for image in images {
            let there = source.referrers(&image.digest, V1_TYPE).await?;
            if !self.options.create.force && !there.is_empty() {
                continue;
            }
            let report = create::create_at(
                image,
                &self.options.create,
                &self.local,
                &destination,
                self.options.uploads,
                &|_, _, _| {},
            )
            .await?;
            made.push(format!("{} for {}", report.index, report.platform));
        }
        Ok(match made.is_empty() {
            true => "left alone: it has a SOCI index".to_owned(),
            false => format!("made the SOCI index {}", made.join(", ")),
        })
    }

    /// The image with its index (version 2), unless it is there.
    async fn convert(&self, rules: &Rules, job: &Job, source: &Source) -> Result<String> {
        let name = rules.destination(job)?;
        let destination = Destination::open(&name, &self.access).await?;
        let options = &self.options;
        let explained = |error: Error| match error.kind() {
            Kind::Immutable => error.context(format!(
                "{name}: where a registry keeps its tags, the builder needs a --suffix that is new"
            )),
            _ => error,
        };
        let done =
            convert::convert_unless_done(source, &destination, options, &self.local, &|_, _, _| {})
                .await
                .map_err(explained)?;
        Ok(match done {
            Outcome::Unchanged(_) => format!("left alone: {name} is its conversion"),
            Outcome::Converted(report) => format!("made {name} with digest {}", report.digest),
        })
    }
}
