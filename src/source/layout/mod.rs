//! An OCI image layout, in a directory or in a tar file that is not unpacked (OCI image specification 1.1, image layout).
//!
//! Reading trusts nothing: manifests and small blobs are checked against their digests, sizes against the files, and files that are not
//! regular are not opened. Writing uses temporary files and renames: into a directory under a lock, or as a new archive (`pack`).

use std::{ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt as _, try_unfold};
use serde::Deserialize;

use super::{Manifest, Referrer};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt},
    oci::{
        Digest,
        descriptor::Descriptor,
        manifest::MAX_MANIFEST_BYTES,
        media_type::{OCI_INDEX, is_index},
        referrers::{Candidate, NotAList, referring},
    },
};

mod archive;
mod blobs;
mod index;
mod pack;
mod stream;
mod write;

pub(super) use pack::Pack;
pub(super) use stream::Incoming;
pub use write::{Collected, NewArtifact};

use blobs::{Blob, Blobs};
use index::Root;

/// Bytes of a blob that a stream gives at once.
const PIECE_BYTES: usize = 1 << 20;
/// Maximum number of manifests that one search for referrers reads.
const MAX_REFERRERS_READ: usize = 4096;

/// An open layout, and the tag that was asked for. Cheap to clone.
#[derive(Clone)]
pub struct Layout(Arc<Opened>);

struct Opened {
    blobs: Blobs,
    tag: Option<String>,
}

impl Layout {
    /// Opens the layout in a directory. [`Self::root_manifest`] looks for `tag`.
    pub async fn open_folder(path: &Path, tag: Option<&str>) -> Result<Self> {
        let layout = Self(Arc::new(Opened {
            blobs: Blobs::Folder(path.to_owned()),
            tag: tag.map(str::to_owned),
        }));
        let opened = layout.clone();
        blocking(move || opened.0.check_marker()).await?;
        Ok(layout)
    }

    /// Opens the layout in a tar file: reads the headers of its members, once.
    pub async fn open_archive(path: &Path, tag: Option<&str>) -> Result<Self> {
        let (path, tag) = (path.to_owned(), tag.map(str::to_owned));
        blocking(move || {
            let file = blobs::open_regular(&path)?.file().clone();
            let members = archive::Members::scan(&file, &path)?;
            let opened = Opened {
                blobs: Blobs::Archive {
                    path,
                    file,
                    members,
                },
                tag,
            };
            opened.check_marker()?;
            Ok(Self(Arc::new(opened)))
        })
        .await
    }

    /// The manifest or index that the tag names; without a tag, the only image. Verified.
    pub async fn root_manifest(&self) -> Result<Manifest> {
        self.run(|opened| {
            let bytes = opened.index_json()?;
            let place = opened.place();
            let (entries, odd) = opened.judge_index(&bytes)?;
            for odd in odd {
                tracing::warn!("{place}: index.json: ignored: {odd}");
            }
            match index::root(&entries, opened.tag.as_deref(), &place)? {
                Root::Entry(entry) => {
                    opened.manifest(&entry.digest, &entry.media_type, Some(entry.size))
                }
                Root::Whole => Ok(Manifest {
                    media_type: OCI_INDEX.to_owned(),
                    digest: Digest::of(&bytes),
                    bytes,
                }),
            }
        })
        .await
    }

    /// The manifest or index that another tag names, if there is one. Verified.
    pub async fn tagged(&self, tag: &str) -> Result<Option<Manifest>> {
        let tag = tag.to_owned();
        self.run(move |opened| {
            let entries = opened.parse_index(&opened.index_json()?)?;
            match index::root(&entries, Some(&tag), &opened.place()) {
                Ok(Root::Entry(entry)) => opened
                    .manifest(&entry.digest, &entry.media_type, Some(entry.size))
                    .map(Some),
                Ok(Root::Whole) => Ok(None),
                Err(error) if error.kind() == Kind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// A manifest by digest, verified.
    pub async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        let digest = *digest;
        self.run(move |opened| opened.manifest(&digest, "", None))
            .await
    }

    /// A whole small blob (at most `limit` bytes), verified against digest and size.
    pub async fn blob(&self, digest: &Digest, size: u64, limit: u64) -> Result<Bytes> {
        let digest = *digest;
        self.run(move |opened| opened.whole(&digest, Some(size), limit))
            .await
    }

    /// A range of a blob: exactly these bytes, not verified.
    pub async fn range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let digest = *digest;
        self.run(move |opened| {
            let context = || {
                format!(
                    "{}: bytes {} to {} of blob {digest}",
                    opened.place(),
                    range.start,
                    range.end
                )
            };
            let blob = opened.blobs.open(&digest)?;
            let length = range
                .end
                .checked_sub(range.start)
                .filter(|_| range.end <= blob.size)
                .and_then(|length| usize::try_from(length).ok())
                .ok_or_else(|| {
                    Error::new(
                        Kind::Corrupt,
                        format!("{}: the blob has {} bytes", context(), blob.size),
                    )
                })?;
            let mut bytes = vec![0; length];
            blob.read_at(range.start, &mut bytes)
                .or_kind(Kind::Io, context)?;
            Ok(bytes.into())
        })
        .await
    }

    /// A blob in order from this offset on, not verified. Ends after exactly `size` bytes or with an error.
    pub async fn stream(
        &self,
        digest: &Digest,
        offset: u64,
        size: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let digest = *digest;
        let blob = self
            .run(move |opened| opened.open_sized(&digest, Some(size)))
            .await?;
        let place = self.0.place();
        let pieces = try_unfold((blob, offset), move |(blob, offset): (Blob, u64)| {
            let place = place.clone();
            async move {
                let left = blob.size.saturating_sub(offset);
                if left == 0 {
                    return Ok(None);
                }
                let length =
                    usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
                blocking(move || {
                    let mut piece = vec![0; length];
                    blob.read_at(offset, &mut piece).or_kind(Kind::Io, || {
                        format!("{place}: blob {digest} at byte {offset}")
                    })?;
                    let next = offset + length as u64; // at most `size`
                    Ok(Some((Bytes::from(piece), (blob, next))))
                })
                .await
            }
        });
        Ok(pieces.boxed())
    }

    /// The manifests whose subject is this one, of this artifact type or of any: those that `index.json` lists, and those in the list under
    /// the tag `sha256-<hex>` that a copy from a registry without the referrers API has. In the order of `index.json`.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Referrer>> {
        let (subject, artifact_type) = (*subject, artifact_type.map(str::to_owned));
        self.run(move |opened| opened.referrers(&subject, artifact_type.as_deref()))
            .await
    }

    /// The tags of `index.json`, sorted; those of lists of referrers left out.
    pub async fn tags(&self) -> Result<Vec<String>> {
        self.run(|opened| Ok(index::tags(&opened.parse_index(&opened.index_json()?)?)))
            .await
    }

    /// The manifests that `index.json` lists with this artifact type, with the annotations of their entries, in its order.
    pub async fn listed(&self, artifact_type: &str) -> Result<Vec<Referrer>> {
        let artifact_type = artifact_type.to_owned();
        self.run(move |opened| {
            let mut entries = opened.parse_index(&opened.index_json()?)?;
            entries.retain(|entry| entry.artifact_type.as_ref() == Some(&artifact_type));
            let listed = entries.into_iter().map(|entry| Referrer {
                digest: entry.digest,
                size: entry.size,
                artifact_type: artifact_type.clone(),
                annotations: entry.annotations,
            });
            Ok(listed.collect())
        })
        .await
    }

    /// Runs on a thread that may block.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Opened) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let opened = self.0.clone();
        blocking(move || work(&opened)).await
    }
}

impl Opened {
    fn place(&self) -> String {
        format!("layout {}", self.blobs.path().display())
    }

    fn check_marker(&self) -> Result<()> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        let marker = self.blobs.open_marker().map_err(|error| {
            if error.kind() == Kind::NotFound {
                error.context(format!(
                    "{} is not an OCI image layout",
                    self.blobs.path().display()
                ))
            } else {
                error
            }
        })?;
        let context = || format!("{}: oci-layout", self.place());
        let bytes = read_bounded(&marker, 4096).or_kind(Kind::Corrupt, context)?;
        let marker: Marker = serde_json::from_slice(&bytes).or_kind(Kind::Corrupt, context)?;
        if !marker.image_layout_version.starts_with("1.") {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{}: image layout version {:?} is not supported, only 1.0.0",
                    self.place(),
                    marker.image_layout_version
                ),
            ));
        }
        Ok(())
    }

    fn index_json(&self) -> Result<Bytes> {
        let blob = self.blobs.open_index()?;
        let bytes = read_bounded(&blob, index::MAX_INDEX_BYTES)
            .or_kind(Kind::Corrupt, || format!("{}: index.json", self.place()))?;
        Ok(bytes.into())
    }

    fn parse_index(&self, bytes: &[u8]) -> Result<Vec<Descriptor>> {
        Ok(self.judge_index(bytes)?.0)
    }

    /// The valid entries of an `index.json`, and messages about the others.
    fn judge_index(&self, bytes: &[u8]) -> Result<(Vec<Descriptor>, Vec<String>)> {
        index::entries(bytes)
            .map_err(|error| error.context(format!("{}: index.json", self.place())))
    }

    fn open_sized(&self, digest: &Digest, size: Option<u64>) -> Result<Blob> {
        let blob = self
            .blobs
            .open(digest)
            .map_err(|error| error.context(format!("{}: blob {digest}", self.place())))?;
        match size {
            Some(size) if size != blob.size => Err(Error::new(
                Kind::Corrupt,
                format!(
                    "{}: blob {digest} has {} bytes, but {size} in its descriptor",
                    self.place(),
                    blob.size
                ),
            )),
            _ => Ok(blob),
        }
    }

    /// A whole blob, verified.
    fn whole(&self, digest: &Digest, size: Option<u64>, limit: u64) -> Result<Bytes> {
        let blob = self.open_sized(digest, size)?;
        let context = || format!("{}: blob {digest}", self.place());
        let bytes = read_bounded(&blob, limit).or_kind(Kind::Corrupt, context)?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::new(
                Kind::Corrupt,
                format!("{}: its content has the digest {actual}", context()),
            ));
        }
        Ok(bytes.into())
    }

    /// `media_type` is that of the descriptor, if there is one.
    fn manifest(&self, digest: &Digest, media_type: &str, size: Option<u64>) -> Result<Manifest> {
        let bytes = self.whole(digest, size, MAX_MANIFEST_BYTES)?;
        Ok(Manifest::of(*digest, media_type, bytes))
    }

    fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Referrer>> {
        let entries = self.parse_index(&self.index_json()?)?;
        let mut found: Vec<Referrer> = Vec::new();
        let mut read = 0;
        for entry in &entries {
            let list = match index::is_list_of(entry, subject) {
                true => self.list(entry, subject)?,
                false => vec![entry.clone()],
            };
            for entry in list {
                let other_type = artifact_type.is_some()
                    && entry.artifact_type.is_some()
                    && entry.artifact_type.as_deref() != artifact_type;
                if other_type
                    || is_index(&entry.media_type)
                    || found.iter().any(|known| known.digest == entry.digest)
                {
                    continue;
                }
                read += 1;
                if read > MAX_REFERRERS_READ {
                    return Err(Error::new(
                        Kind::Unsupported,
                        format!(
                            "{}: more than {MAX_REFERRERS_READ} manifests to search for referrers",
                            self.place()
                        ),
                    ));
                }
                found.extend(self.referrer(&entry, subject, artifact_type));
            }
        }
        Ok(found)
    }

    /// The entries of the list of referrers that has the tag of the subject; none if the tag is of something else.
    fn list(&self, entry: &Descriptor, subject: &Digest) -> Result<Vec<Descriptor>> {
        let manifest = self.manifest(&entry.digest, &entry.media_type, Some(entry.size))?;
        let passed_over = |why: &NotAList| {
            tracing::info!(
                "{}: {} is ignored as a list of referrers: {why}",
                self.place(),
                entry.digest
            );
        };
        let candidate = match Candidate::read(&manifest.bytes, &manifest.media_type, subject) {
            Ok(candidate) => candidate,
            Err(why) => {
                passed_over(&why);
                return Ok(Vec::new());
            }
        };
        let looked_at = candidate.untyped().filter_map(|digest| {
            let manifest = self.whole(&digest, None, MAX_MANIFEST_BYTES).ok()?;
            Some((digest, referring(&manifest, subject)?))
        });
        let looked_at = looked_at.collect();
        let (entries, odd) = match candidate.prove(looked_at) {
            Ok(list) => list.descriptors(),
            Err(why) => {
                passed_over(&why);
                return Ok(Vec::new());
            }
        };
        for odd in odd {
            tracing::warn!("{}: list {}: ignored: {odd}", self.place(), entry.digest);
        }
        Ok(entries)
    }

    /// The entry as a referrer, if its manifest exists and has the subject.
    fn referrer(
        &self,
        entry: &Descriptor,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Option<Referrer> {
        let bytes = self
            .whole(&entry.digest, Some(entry.size), MAX_MANIFEST_BYTES)
            .ok()?;
        let found = referring(&bytes, subject)?;
        artifact_type
            .is_none_or(|wanted| found.artifact_type == wanted)
            .then_some(Referrer {
                digest: entry.digest,
                size: entry.size,
                artifact_type: found.artifact_type,
                annotations: found.annotations,
            })
    }
}

/// A complete blob, of at most `limit` bytes.
fn read_bounded(blob: &Blob, limit: u64) -> std::io::Result<Vec<u8>> {
    if blob.size > limit {
        return Err(std::io::Error::new(
            std::io::ErrorKind::FileTooLarge,
            format!("{} bytes long, over the limit of {limit}", blob.size),
        ));
    }
    blob.read_all()
}
