//! The options that select zTOCs or prefetch artifacts.

use clap::Args;

use crate::{
    cli::{AccessArgs, GlobalArgs, IndexArgs, absolute, output},
    engine::open::{
        artifacts::{self, ArtifactKind, IndexArtifact},
        image::Image,
        local_indexes::LocalIndexes,
        search,
    },
    error::{Error, Kind, Result},
    oci::{Digest, Platform, Reference},
    source::Source,
};

/// The indexes in which artifacts are looked up.
#[derive(Args, Clone, Debug)]
pub(crate) struct ArtifactArgs {
    /// Image whose index is used [default: all local indexes]
    ///
    /// Or containerd://NAMESPACE, for the indexes of all images of a namespace of containerd.
    #[arg(long, value_name = "IMAGE")]
    pub at: Option<Reference>,
    /// Platform, with --at [default: the host's]
    #[arg(long, short, value_name = "PLATFORM", requires = "at")]
    platform: Option<Platform>,
    #[command(flatten)]
    pub access: AccessArgs,
    #[command(flatten)]
    index: IndexArgs,
}

impl ArtifactArgs {
    /// Finds the artifacts.
    pub(crate) async fn find(
        &self,
        global: &GlobalArgs,
        kind: ArtifactKind,
    ) -> Result<Vec<IndexArtifact>> {
        let local = LocalIndexes::open(&absolute(&global.root)?)?;
        let Some(at) = &self.at else {
            return artifacts::local(&local, kind).await;
        };
        let access = self.access.access()?;
        let source = Source::open(at, &access).await?;
        let mut tables = Vec::new();
        for one in source.images().await? {
            let source = Source::open(&one, &access).await?;
            match self.of_image(&source, &local, kind).await {
                Ok(found) => tables.extend(found),
                Err(error) if one == *at => return Err(error),
                Err(error) => tracing::debug!("{one}: {}", error.report()),
            }
        }
        Ok(tables)
    }

    async fn of_image(
        &self,
        source: &Source,
        local: &LocalIndexes,
        kind: ArtifactKind,
    ) -> Result<Vec<IndexArtifact>> {
        let at = source.reference();
        let image = Image::resolve(source, self.platform.as_ref()).await?;
        let found = search::find(&image, &self.index.choice(), local).await?;
        let index = found.index.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("image {at} has no SOCI index; make one with `socinbd index create`"),
            )
        })?;
        Ok(artifacts::of_index(&index, &at.to_string(), kind))
    }
}

/// Prints artifacts, each once.
pub(crate) fn print(global: &GlobalArgs, tables: &[IndexArtifact], quiet: bool) -> Result<()> {
    if global.json {
        return output::json(&tables);
    }
    if quiet {
        let mut digests: Vec<Digest> = tables.iter().map(|table| table.digest).collect();
        digests.sort();
        digests.dedup();
        return digests
            .iter()
            .try_for_each(|digest| output::line(&digest.to_string()));
    }
    let layer = |table: &IndexArtifact| {
        table
            .layer
            .map_or("-".to_owned(), |layer| layer.to_string())
    };
    output::table(
        ["DIGEST", "SIZE", "LAYER DIGEST"],
        tables.iter().map(|table| {
            [
                table.digest.to_string(),
                output::bytes(table.size),
                layer(table),
            ]
        }),
    )
}

/// The artifact with this digest.
pub(super) fn of_digest<'a>(
    tables: &'a [IndexArtifact],
    digest: &Digest,
) -> Result<&'a IndexArtifact> {
    tables
        .iter()
        .find(|table| table.digest == *digest)
        .ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("no index lists {digest}; give the image with --at"),
            )
        })
}
