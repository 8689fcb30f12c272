//! Chooses the images of a reference by platform, for all commands.
//!
//! An image index may contain image indexes (some builders make one per platform). Entries without a platform or type are read only as far
//! as the choice needs it: if an entry names exactly the wanted platform, no other manifest is read.

use std::collections::HashSet;

use oci_spec::image::ImageIndex;

use super::image::{Image, document};
use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest, Platform,
        manifest::{self, Document, parse},
        platform::{Candidate, candidates},
    },
    source::{Manifest, Source},
};

/// Maximum depth of nested indexes.
pub(crate) const MAX_DEPTH: usize = 8;
/// Maximum number of manifests and indexes that one choice reads.
const MAX_DOCUMENTS: usize = 256;

/// Maximum number of warnings about invalid entries, per index.
const MAX_ODD: usize = 8;

/// The platforms to choose from an image index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Platforms {
    /// The platform of this machine; a single image is taken whatever its platform is.
    #[default]
    Host,
    /// These platforms. Each must exist.
    These(Vec<Platform>),
    /// All platforms whose images exist.
    All,
}

/// There is no image for a platform. Trying again is useless, because the content of an index does not change.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct PlatformNotOffered {
    text: String,
    lists_nothing: bool,
}

impl PlatformNotOffered {
    /// Whether the index lists no image at all.
    pub fn lists_nothing(&self) -> bool {
        self.lists_nothing
    }

    fn error(text: String, lists_nothing: bool) -> Error {
        let cause = Self {
            text: text.clone(),
            lists_nothing,
        };
        Error::with_source(Kind::NotFound, text, cause)
    }
}

/// The chosen images.
#[derive(Default)]
pub struct ChosenImages {
    /// The images, in the order of the index, without repetitions.
    pub images: Vec<Image>,
    /// For [`Platforms::All`]: messages about listed images that are missing.
    pub absent: Vec<String>,
    /// Warnings for the user, e.g. about invalid entries.
    pub warnings: Vec<String>,
}

/// Chooses the images of `root`, an image or an image index.
pub async fn choose_images(
    source: &Source,
    root: &Manifest,
    platforms: &Platforms,
) -> Result<ChosenImages> {
    let wanted = match platforms {
        Platforms::All => Vec::new(),
        Platforms::Host => vec![Platform::host()],
        Platforms::These(wanted) => wanted.clone(),
    };
    let is_strict = *platforms != Platforms::Host;
    let (index, odd) = match document(root)? {
        Document::Index(index, odd) => (*index, odd),
        Document::Image(_) => return single(source, root, &wanted, is_strict).await,
    };
    let mut catalog = ImageCatalog::of(source, root, &index, odd);
    if *platforms == Platforms::All {
        return catalog.all().await;
    }
    let mut picked = HashSet::new();
    for platform in &wanted {
        picked.insert(catalog.choose(platform, is_strict).await?);
    }
    Ok(catalog.take(&picked))
}

/// Handles a reference to a single image.
async fn single(
    source: &Source,
    root: &Manifest,
    wanted: &[Platform],
    is_strict: bool,
) -> Result<ChosenImages> {
    let host = Platform::host();
    let unstated = wanted.first().unwrap_or(&host);
    let image = Image::of_manifest(source, root.clone(), unstated, None).await?;
    let other = wanted
        .iter()
        .find(|platform| platform.rank(&image.platform).is_none());
    match other {
        Some(platform) if is_strict => Err(PlatformNotOffered::error(
            not_offered_text(platform, &[image.platform]),
            false,
        )),
        _ => Ok(ChosenImages {
            images: vec![image],
            ..ChosenImages::default()
        }),
    }
}

/// The entries of an index and its nested indexes, as far as they were read.
struct ImageCatalog<'a> {
    source: &'a Source,
    root: Digest,
    /// In the order of the index; the entries of a nested index replace its own entry.
    entries: Vec<CatalogEntry>,
    /// Manifests that were read; none is read twice.
    opened: HashSet<Digest>,
    absent: Vec<String>,
    warnings: Vec<String>,
}

struct CatalogEntry {
    digest: Digest,
    /// The platform of the entry, or of the nested index that contains it.
    platform: Option<Platform>,
    content: EntryContent,
    /// Nesting depth.
    depth: usize,
}

enum EntryContent {
    /// Not read yet; may be anything.
    Closed,
    /// An image for the platform of the entry, not read yet.
    Listed,
    /// An image that was read, offered for this platform.
    Read(Box<Image>, Platform),
}

impl CatalogEntry {
    fn of(candidate: Candidate<'_>, outer: Option<&Platform>, depth: usize) -> Result<Self> {
        Ok(Self {
            digest: candidate.descriptor.digest().as_ref().parse()?,
            content: match candidate.is_image {
                true => EntryContent::Listed,
                false => EntryContent::Closed,
            },
            platform: candidate.platform.or(outer.cloned()),
            depth,
        })
    }

    /// The platform, if the entry is an image.
    fn offers(&self) -> Option<&Platform> {
        match &self.content {
            EntryContent::Closed => None,
            EntryContent::Listed => self.platform.as_ref(),
            EntryContent::Read(_, platform) => Some(platform),
        }
    }

    /// Whether the entry may contain an image for a platform.
    fn may_hold(&self, wanted: &Platform) -> bool {
        let stated = self.platform.as_ref();
        matches!(self.content, EntryContent::Closed)
            && stated.is_none_or(|stated| wanted.rank(stated).is_some())
    }
}

impl<'a> ImageCatalog<'a> {
    fn of(source: &'a Source, root: &Manifest, index: &ImageIndex, odd: Vec<String>) -> Self {
        let mut catalog = Self {
            source,
            root: root.digest,
            entries: Vec::new(),
            opened: HashSet::from([root.digest]),
            absent: Vec::new(),
            warnings: Vec::new(),
        };
        catalog.entries = catalog.listed(index, odd, None, 1);
        catalog
    }

    /// The entries of an index; `odd` has messages about invalid ones.
    fn listed(
        &mut self,
        index: &ImageIndex,
        odd: Vec<String>,
        outer: Option<&Platform>,
        depth: usize,
    ) -> Vec<CatalogEntry> {
        let odd = odd.into_iter().take(MAX_ODD);
        self.warnings
            .extend(odd.map(|odd| format!("invalid entry in the image index: {odd}")));
        let mut entries = Vec::new();
        for candidate in candidates(index) {
            match CatalogEntry::of(candidate, outer, depth) {
                Ok(entry) => entries.push(entry),
                Err(error) => self.warnings.push(format!(
                    "skipped an entry of the image index: {}",
                    error.report()
                )),
            }
        }
        entries
    }

    /// Chooses the best image for a platform: of equally good ones the first that exists.
    async fn choose(&mut self, wanted: &Platform, is_strict: bool) -> Result<Digest> {
        let mut absent: Vec<(usize, String)> = Vec::new();
        loop {
            let ranked = self.ranked(wanted);
            let best = ranked.iter().map(|(rank, _)| *rank).min();
            let is_untried = |at: &usize| absent.iter().all(|(tried, _)| tried != at);
            let mut equals = ranked.iter().filter(|(rank, _)| Some(*rank) == best);
            let next = equals.find_map(|(_, at)| Some(*at).filter(is_untried));
            let closed = self.entries.iter().position(|entry| entry.may_hold(wanted));
            match (best, next, closed) {
                // an exact match, or all entries have been read
                (Some(0), Some(at), _) | (Some(_), Some(at), None) => match self.read(at).await? {
                    ImagePresence::Present(digest) => return Ok(digest),
                    ImagePresence::Absent(text) => absent.push((at, text)),
                },
                (_, _, Some(at)) => {
                    self.open(at).await?;
                    absent.clear(); // the positions have changed
                }
                (Some(_), None, None) => {
                    let text = absent.into_iter().next().map(|(_, text)| text);
                    return Err(self.absent(text.unwrap_or_default()).await);
                }
                (None, _, None) => return self.only(wanted, is_strict),
            }
        }
    }

    /// The entries that run on a platform: their ranks and positions.
    fn ranked(&self, wanted: &Platform) -> Vec<(usize, usize)> {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(at, entry)| Some((wanted.rank(entry.offers()?)?, at)))
            .collect()
    }

    /// If the index has one image and no platforms, takes that image. Otherwise returns the error that there is no image.
    fn only(&mut self, wanted: &Platform, is_strict: bool) -> Result<Digest> {
        if let [entry] = &mut self.entries[..]
            && entry.platform.is_none()
            && let EntryContent::Read(image, _) = &mut entry.content
        {
            let is_unstated = image.platform == Platform::unknown();
            if is_unstated {
                image.platform = wanted.clone();
            }
            if is_unstated || !is_strict {
                return Ok(image.digest);
            }
        }
        let offered: Vec<Platform> = self
            .entries
            .iter()
            .filter_map(|entry| entry.offers().or(entry.platform.as_ref()).cloned())
            .collect();
        let mut text = not_offered_text(wanted, &offered);
        for noted in self.warnings.iter().chain(&self.absent) {
            text = format!("{text}; {noted}");
        }
        // a missing manifest may be pushed later, and may be for the wanted platform
        Err(match self.absent.is_empty() {
            true => PlatformNotOffered::error(text, offered.is_empty() && self.warnings.is_empty()),
            false => Error::new(Kind::NotFound, text),
        })
    }

    /// Reads the manifest and configuration of an image, unless they were read already.
    async fn read(&mut self, at: usize) -> Result<ImagePresence> {
        let Some(entry) = self.entries.get_mut(at) else {
            return Ok(ImagePresence::Absent(String::new()));
        };
        let (Some(platform), EntryContent::Listed) = (&entry.platform, &entry.content) else {
            return Ok(ImagePresence::Present(entry.digest));
        };
        let name = format!("the image for {platform}");
        let manifest = match self.source.manifest(&entry.digest).await {
            Ok(manifest) => manifest,
            Err(error) if error.kind() == Kind::NotFound => {
                let digest = entry.digest;
                return Ok(ImagePresence::Absent(format!(
                    "{name} is listed, but its manifest {digest} is missing"
                )));
            }
            Err(error) => return Err(error.context(name)),
        };
        let image = Image::of_manifest(self.source, manifest, platform, Some(self.root))
            .await
            .map_err(|error| error.context(name))?;
        entry.content = EntryContent::Read(Box::new(image), platform.clone());
        Ok(ImagePresence::Present(entry.digest))
    }

    /// Reads an entry without a platform or type.
    async fn open(&mut self, at: usize) -> Result<()> {
        if at >= self.entries.len() {
            return Ok(());
        }
        let entry = self.entries.remove(at);
        if !self.opened.insert(entry.digest) {
            return Ok(()); // read before
        }
        if self.opened.len() > MAX_DOCUMENTS {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "the image index leads to more than {MAX_DOCUMENTS} manifests without a platform"
                ),
            ));
        }
        let found = match self.source.manifest(&entry.digest).await {
            Ok(found) => found,
            Err(error) if error.kind() == Kind::NotFound => {
                self.absent
                    .push(format!("{} is listed, but missing", entry.digest));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match parse(&found.bytes, &found.media_type) {
            Ok(Document::Index(index, odd)) => {
                if entry.depth == MAX_DEPTH {
                    return Err(too_deep(&entry.digest));
                }
                let inner = self.listed(&index, odd, entry.platform.as_ref(), entry.depth + 1);
                self.entries.splice(at..at, inner);
            }
            Ok(Document::Image(_)) => {
                let unstated = entry.platform.clone().unwrap_or_else(Platform::unknown);
                let image =
                    Image::of_manifest(self.source, found, &unstated, Some(self.root)).await?;
                let platform = image.platform.clone();
                let content = EntryContent::Read(Box::new(image), platform);
                self.entries.insert(at, CatalogEntry { content, ..entry });
            }
            Err(manifest::Error::NotAnImage(_)) => {} // e.g. a signature
            Err(error) => self
                .warnings
                .push(format!("skipped manifest {}: {error}", entry.digest)),
        }
        Ok(())
    }

    /// All images that exist.
    async fn all(mut self) -> Result<ChosenImages> {
        let closed = |entry: &CatalogEntry| matches!(entry.content, EntryContent::Closed);
        while let Some(at) = self.entries.iter().position(closed) {
            self.open(at).await?;
        }
        let mut there = HashSet::new();
        for at in 0..self.entries.len() {
            match self.read(at).await? {
                ImagePresence::Present(digest) => {
                    there.insert(digest);
                }
                ImagePresence::Absent(text) => self.absent.push(text),
            }
        }
        if there.is_empty() {
            let absent = self.absent.join("; ");
            return Err(match absent.is_empty() {
                true => PlatformNotOffered::error(
                    "the image index lists no image".to_owned(),
                    self.warnings.is_empty(),
                ),
                false => Error::new(
                    Kind::NotFound,
                    format!("all images that the image index lists are missing: {absent}"),
                ),
            });
        }
        Ok(self.take(&there))
    }

    /// The picked images, in the order of the index.
    fn take(self, picked: &HashSet<Digest>) -> ChosenImages {
        let mut images: Vec<Image> = Vec::new();
        for entry in self.entries {
            if let EntryContent::Read(image, _) = entry.content
                && picked.contains(&image.digest)
                && images.iter().all(|taken| taken.digest != image.digest)
            {
                images.push(*image);
            }
        }
        ChosenImages {
            images,
            absent: self.absent,
            warnings: self.warnings,
        }
    }

    /// The error of a listed image that is missing; it names the platforms that exist.
    async fn absent(&mut self, text: String) -> Error {
        let mut there = Vec::new();
        for at in 0..self.entries.len() {
            if let Ok(ImagePresence::Present(_)) = self.read(at).await
                && let Some(platform) = self.entries.get(at).and_then(CatalogEntry::offers)
            {
                there.push(platform.clone());
            }
        }
        let there = match there.is_empty() {
            true => "all other images of the image index are missing too".to_owned(),
            false => format!(
                "available platforms: {}; select one with --platform",
                names(&there)
            ),
        };
        Error::new(Kind::NotFound, format!("{text}; {there}"))
    }
}

/// Whether a listed image exists.
enum ImagePresence {
    Present(Digest),
    /// It is missing; a message.
    Absent(String),
}

pub(crate) fn too_deep(digest: &Digest) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("index {digest}: more than {MAX_DEPTH} levels of nested indexes"),
    )
}

fn not_offered_text(platform: &Platform, offered: &[Platform]) -> String {
    let text = match offered.is_empty() {
        true => "there are no images".to_owned(),
        false => format!(
            "available platforms: {}; select one with --platform",
            names(offered)
        ),
    };
    format!("no image for {platform}; {text}")
}

fn names(platforms: &[Platform]) -> String {
    let mut names: Vec<String> = platforms.iter().map(Platform::to_string).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}
