//! One image: its index is made and pushed, unless it exists.

use super::{
    event::Push,
    queue::Job,
    rules::{Rules, Verdict},
};
use crate::{
    engine::{
        make::{
            convert::{self, ConvertOutcome},
            create,
            options::ConvertOptions,
        },
        open::{
            image::Image,
            local_indexes::LocalIndexes,
            platforms::{PlatformNotOffered, Platforms, choose_images},
        },
    },
    error::{Error, Kind, Result, report},
    oci::manifest::{self, parse},
    soci::index::{V1_TYPE, Version},
    source::{Access, Destination, Manifest, Source},
};

/// How images are worked on.
pub struct Build {
    /// How the registry is reached.
    pub access: Access,
    /// How indexes are made. The rules have the platforms.
    pub options: ConvertOptions,
    /// Images whose layers have fewer bytes together get none.
    pub min_image_size: u64,
    /// zTOCs that are here already are used.
    pub local: LocalIndexes,
}

/// The result for an image, as text.
#[derive(Debug)]
pub enum BuildOutcome {
    /// Its index is there now.
    Made(String),
    /// It gets none, by the rules, or has one.
    LeftAlone(String),
}

/// Why no index was made, by what can be done about it.
#[derive(Debug)]
pub enum BuildFailure {
    /// It may pass by itself: the registry is away, or refuses.
    Passing(Error),
    /// The tag is not there: not yet, or not any more.
    NoTag(Error),
    /// Something that the image names is not there, yet.
    Incomplete(Error),
    /// As the image and the rules are it will fail each time.
    Lasting(Error),
}

impl From<Error> for BuildFailure {
    fn from(error: Error) -> Self {
        match error.kind() {
            Kind::Unavailable | Kind::Io | Kind::Unauthorized => Self::Passing(error),
            // the entries of an index do not change
            Kind::NotFound if error.cause::<PlatformNotOffered>().is_none() => {
                Self::Incomplete(error)
            }
            _ => Self::Lasting(error),
        }
    }
}

impl Build {
    /// Works on the image that a job names, as it is now.
    pub async fn image(&self, rules: &Rules, job: &Job) -> Result<BuildOutcome, BuildFailure> {
        let source = Source::open(&rules.source(job)?, &self.access).await?;
        let root = source
            .root_manifest()
            .await
            .map_err(|error| match error.kind() {
                Kind::NotFound => BuildFailure::NoTag(error),
                _ => error.into(),
            })?;
        let left_alone = |why: String| Ok(BuildOutcome::LeftAlone(format!("skipped: {why}")));
        if let Err(error @ manifest::Error::NotAnImage(_)) = parse(&root.bytes, &root.media_type) {
            return left_alone(error.to_string()); // a chart, a signature
        }
        let offered = self.offered(&source, &root, &rules.platforms).await;
        let (mut platforms, images) = match offered {
            Err(error) if error.cause().is_some_and(PlatformNotOffered::lists_nothing) => {
                return left_alone(error.report()); // attestations alone
            }
            offered => offered?,
        };
        let size = |image: &Image| {
            let sizes = image.layers.iter().map(|layer| layer.size);
            sizes.fold(0, u64::saturating_add)
        };
        let largest = images.iter().map(size).max().unwrap_or(0);
        if largest < self.min_image_size {
            return left_alone(format!(
                "it has {largest} bytes, fewer than {}",
                self.min_image_size
            ));
        }
        let least = self.options.create.min_layer_size;
        let has_large_layer = |image: &Image| image.layers.iter().any(|layer| layer.size >= least);
        let count = images.len();
        let images: Vec<Image> = images.into_iter().filter(has_large_layer).collect();
        if images.is_empty() {
            return left_alone(format!("each of its layers has fewer than {least} bytes"));
        }
        if images.len() < count {
            platforms = Platforms::These(images.iter().map(|it| it.platform.clone()).collect());
        }
        let done = match rules.version {
            Version::V1 => self.refer(&source, &images).await,
            Version::V2 => self.convert(rules, job, &source, platforms).await,
        };
        Ok(done?)
    }

    /// The images for the platforms of the rules. If the rules have several platforms, those that the image has are taken, at least one.
    async fn offered(
        &self,
        source: &Source,
        root: &Manifest,
        platforms: &Platforms,
    ) -> Result<(Platforms, Vec<Image>)> {
        let Platforms::These(wanted) = platforms else {
            let chosen = choose_images(source, root, platforms).await?;
            return Ok((platforms.clone(), chosen.images));
        };
        let (mut there, mut missing) = (Vec::new(), None);
        for platform in wanted {
            let one = Platforms::These(vec![platform.clone()]);
            match choose_images(source, root, &one).await {
                Ok(_) => there.push(platform.clone()),
                Err(error) if error.cause::<PlatformNotOffered>().is_some() => {
                    missing = Some(error)
                }
                Err(error) => return Err(error),
            }
        }
        match missing {
            Some(error) if there.is_empty() => Err(error),
            _ => {
                let platforms = Platforms::These(there);
                let chosen = choose_images(source, root, &platforms).await?;
                Ok((platforms, chosen.images))
            }
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
            };
            match rules.judge(&push) {
                Ok(Verdict::Wanted(job)) => jobs.push(job),
                Ok(Verdict::Ignored(_)) => {}
                Err(error) => {
                    tracing::warn!(repository, "a tag is skipped: {}", report(&error));
                }
            }
        }
        Ok(jobs)
    }

    /// An index of version 1 for each image that has none.
    async fn refer(&self, source: &Source, images: &[Image]) -> Result<BuildOutcome> {
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
            true => BuildOutcome::LeftAlone("skipped: it has a SOCI index".to_owned()),
            false => BuildOutcome::Made(format!("made the SOCI index {}", made.join(", "))),
        })
    }

    /// The image with its index (version 2), unless it is there.
    async fn convert(
        &self,
        rules: &Rules,
        job: &Job,
        source: &Source,
        platforms: Platforms,
    ) -> Result<BuildOutcome> {
        let name = rules.destination(job)?;
        let destination = Destination::open(&name, &self.access).await?;
        let options = &ConvertOptions {
            platforms,
            ..self.options.clone()
        };
        let explained = |error: Error| match error.kind() {
            Kind::Immutable => error.context(format!(
                "{name}: the registry does not allow this tag to be replaced; give another --suffix"
            )),
            _ => error,
        };
        let done =
            convert::convert_unless_done(source, &destination, options, &self.local, &|_, _, _| {})
                .await
                .map_err(explained)?;
        Ok(match done {
            ConvertOutcome::Unchanged(_) => {
                BuildOutcome::LeftAlone(format!("skipped: {name} is its conversion"))
            }
            ConvertOutcome::Converted(report) => {
                BuildOutcome::Made(format!("made {name} with digest {}", report.digest))
            }
        })
    }
}
