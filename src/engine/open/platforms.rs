//! The images of a reference that a job is for, by platform: the one choice, for all commands.
//!
//! An index may hold indexes (some builders make an index for each platform). Entries that do not say what they are are read as far as the
//! choice needs it: where an entry names just the platform that is wanted, nothing else is read.

use std::collections::HashSet;

use oci_spec::image::ImageIndex;
use serde_json::Value;

use super::image::{Image, document};
use crate::{
    error::{Error, Kind, Result},
    oci::{
        Digest, Platform,
        index_edit::digest_of,
        manifest::{self, Document, parse},
        media_type,
        platform::{Candidate, candidates},
    },
    source::{Manifest, Source},
};

/// Indexes in each other, at most.
pub(crate) const MAX_DEPTH: usize = 8;
/// Manifests and indexes that one choice reads, at most.
const MAX_DOCUMENTS: usize = 256;

/// Indexes that are gone through for what is in them, at most.
const MAX_INDEXES: usize = 64;
/// Entries of one index that cannot be read and are told of, at most.
const MAX_ODD: usize = 8;

/// Which images of an image index are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Platforms {
    /// The one for this machine; of a single image, that one.
    #[default]
    Host,
    /// Those for these; each must be there.
    These(Vec<Platform>),
    /// All that are there.
    All,
}

/// There is no image for a platform, and there will be none: what an index lists does not change.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct PlatformNotOffered {
    text: String,
    lists_nothing: bool,
}

impl PlatformNotOffered {
    /// Whether there is no image at all.
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

/// The images that were chosen.
#[derive(Default)]
pub struct ChosenImages {
    /// In the order in which the index lists them, each once.
    pub images: Vec<Image>,
    /// Of [`Platforms::All`], those that are listed and not there, each as a sentence.
    pub absent: Vec<String>,
    /// What the person should know: entries that cannot be read and were passed over.
    pub warnings: Vec<String>,
}

/// The images that are meant of what `root` is.
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

/// The image of a reference that leads to just one.
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

/// What an index lists, as far as it has been looked into.
struct ImageCatalog<'a> {
    source: &'a Source,
    root: Digest,
    /// In the order of the index; what an index in it lists stands in its place.
    entries: Vec<CatalogEntry>,
    /// Documents that were opened: none is opened twice.
    opened: HashSet<Digest>,
    absent: Vec<String>,
    warnings: Vec<String>,
}

struct CatalogEntry {
    digest: Digest,
    /// What the entry says, or that of the index that it is in.
    platform: Option<Platform>,
    content: EntryContent,
    /// How many indexes it is in.
    depth: usize,
}

enum EntryContent {
    /// Nobody has looked yet.
    Closed,
    /// The manifest of an image for the platform, as its entry says.
    Listed,
    /// It was read, and is offered for this platform.
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

    /// The platform of what is known to be an image.
    fn offers(&self) -> Option<&Platform> {
        match &self.content {
            EntryContent::Closed => None,
            EntryContent::Listed => self.platform.as_ref(),
            EntryContent::Read(_, platform) => Some(platform),
        }
    }

    /// Whether something for a platform may be found in it.
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

    /// The entries of an index; `odd` tells of those that could not be read.
    fn listed(
        &mut self,
        index: &ImageIndex,
        odd: Vec<String>,
        outer: Option<&Platform>,
        depth: usize,
    ) -> Vec<CatalogEntry> {
        let odd = odd.into_iter().take(MAX_ODD);
        self.warnings
            .extend(odd.map(|odd| format!("the index lists what cannot be read: {odd}")));
        let mut entries = Vec::new();
        for candidate in candidates(index) {
            match CatalogEntry::of(candidate, outer, depth) {
                Ok(entry) => entries.push(entry),
                Err(error) => self
                    .warnings
                    .push(format!("an entry is passed over: {}", error.report())),
            }
        }
        entries
    }

    /// The manifest of the best image for a platform: of equals the first that is there.
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
                // nothing can be better, or nothing else is left to look into
                (Some(0), Some(at), _) | (Some(_), Some(at), None) => match self.read(at).await? {
                    ImagePresence::Present(digest) => return Ok(digest),
                    ImagePresence::Absent(text) => absent.push((at, text)),
                },
                (_, _, Some(at)) => {
                    self.open(at).await?;
                    absent.clear(); // entries have moved
                }
                (Some(_), None, None) => {
                    let text = absent.into_iter().next().map(|(_, text)| text);
                    return Err(self.absent(text.unwrap_or_default()).await);
                }
                (None, _, None) => return self.only(wanted, is_strict),
            }
        }
    }

    /// Those that run on a platform, by how well and where they stand.
    fn ranked(&self, wanted: &Platform) -> Vec<(usize, usize)> {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(at, entry)| Some((wanted.rank(entry.offers()?)?, at)))
            .collect()
    }

    /// The only image of an index that says nothing of platforms: as good as asked for.
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
        // what is absent may come, and be what is wanted
        Err(match self.absent.is_empty() {
            true => PlatformNotOffered::error(text, offered.is_empty() && self.warnings.is_empty()),
            false => Error::new(Kind::NotFound, text),
        })
    }

    /// Reads an image's manifest and configuration, unless that is done.
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
                    "{name} is listed, but its manifest {digest} is not there"
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

    /// Looks into an entry that does not say what it is.
    async fn open(&mut self, at: usize) -> Result<()> {
        if at >= self.entries.len() {
            return Ok(());
        }
        let entry = self.entries.remove(at);
        if !self.opened.insert(entry.digest) {
            return Ok(()); // what it has is there already
        }
        if self.opened.len() > MAX_DOCUMENTS {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "its index leads to more than {MAX_DOCUMENTS} documents that do not say what they are"
                ),
            ));
        }
        let found = match self.source.manifest(&entry.digest).await {
            Ok(found) => found,
            Err(error) if error.kind() == Kind::NotFound => {
                self.absent
                    .push(format!("{} is listed and is not there", entry.digest));
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
            Err(manifest::Error::NotAnImage(_)) => {} // a signature beside the images, say
            Err(error) => self
                .warnings
                .push(format!("manifest {} is passed over: {error}", entry.digest)),
        }
        Ok(())
    }

    /// All images that are there.
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
                    "it lists no image".to_owned(),
                    self.warnings.is_empty(),
                ),
                false => Error::new(
                    Kind::NotFound,
                    format!("none of the images that it lists is there: {absent}"),
                ),
            });
        }
        Ok(self.take(&there))
    }

    /// These images, in the order of the index.
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

    /// The error of an image that is listed and not there: it says which are.
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
            true => "no other image that it lists is there".to_owned(),
            false => format!("there is {}; --platform names one", names(&there)),
        };
        Error::new(Kind::NotFound, format!("{text}; {there}"))
    }
}

/// Whether what an index lists is there.
enum ImagePresence {
    Present(Digest),
    /// It is not, in a sentence.
    Absent(String),
}

pub(crate) fn too_deep(digest: &Digest) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("index {digest}: more than {MAX_DEPTH} indexes in each other"),
    )
}

fn not_offered_text(platform: &Platform, offered: &[Platform]) -> String {
    let text = match offered.is_empty() {
        true => "it has no image".to_owned(),
        false => format!("it has {}; --platform names one", names(offered)),
    };
    format!("no image for {platform}; {text}")
}

fn names(platforms: &[Platform]) -> String {
    let mut names: Vec<String> = platforms.iter().map(Platform::to_string).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

/// A document, if it is an index, and the indexes in it, as far as they can be read.
pub(crate) async fn indexes(source: &Source, root: &Manifest) -> Vec<Manifest> {
    let is_index = |found: &Manifest| {
        let document = parse(&found.bytes, &found.media_type);
        matches!(document, Ok(Document::Index(..)))
    };
    let mut found: Vec<Manifest> = Some(root.clone()).into_iter().filter(is_index).collect();
    let mut at = 0;
    while let Some(index) = found.get(at) {
        at += 1;
        let is_index_entry =
            |entry: &Value| media_type::is_index(entry["mediaType"].as_str().unwrap_or_default());
        for digest in listed(index, is_index_entry) {
            if found.len() == MAX_INDEXES || found.iter().any(|taken| taken.digest == digest) {
                continue;
            }
            found.extend(source.manifest(&digest).await.ok().filter(is_index));
        }
    }
    found
}

/// The digests of some entries of an index.
pub(crate) fn listed(index: &Manifest, is_wanted: impl Fn(&Value) -> bool) -> Vec<Digest> {
    let document: Value = serde_json::from_slice(&index.bytes).unwrap_or_default();
    let entries = document["manifests"].as_array().into_iter().flatten();
    entries
        .filter(|entry| is_wanted(entry))
        .filter_map(|entry| digest_of(entry).parse().ok())
        .collect()
}
