//! Writing to a layout in a directory: blobs, manifests, and their entries in `index.json`.
//!
//! A lock on `oci-layout` admits one change at a time. A reader sees `index.json` before or after a change, never in between, and
//! everything that it lists exists already.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Write,
    os::unix::fs::{DirBuilderExt, MetadataExt as _, PermissionsExt},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use super::{
    Layout, Opened,
    blobs::{Blobs, blob_path, open_regular},
    index::REF_NAME,
    read_bounded,
    stream::{self, Incoming},
};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt},
    oci::{Digest, manifest::MAX_MANIFEST_BYTES, referrers::referring},
};

/// An artifact to be stored: a manifest and the blobs that it names.
#[derive(Clone, Debug)]
pub struct NewArtifact {
    /// Media type of the manifest.
    pub media_type: String,
    /// The manifest.
    pub manifest: Bytes,
    /// Its type, written to its entry in `index.json`.
    pub artifact_type: String,
    /// Annotations of its entry.
    pub annotations: BTreeMap<String, String>,
    /// Its blobs. Those that are there already are not written again.
    pub blobs: Vec<Bytes>,
}

/// The result of a removal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Blobs removed.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl NewArtifact {
    /// Its descriptor, as lists of referrers and `index.json` have it.
    pub(in crate::source) fn entry(&self) -> Value {
        let mut entry = json!({
            "mediaType": self.media_type,
            "digest": Digest::of(&self.manifest).to_string(),
            "size": self.manifest.len(),
        });
        if !self.annotations.is_empty() {
            entry["annotations"] = json!(self.annotations);
        }
        entry["artifactType"] = json!(self.artifact_type);
        entry
    }
}

/// The entry of a manifest in `index.json`, with its tag.
pub(super) fn tagged_entry(media_type: &str, bytes: &Bytes, tag: Option<&str>) -> Value {
    let mut entry = json!({
        "mediaType": media_type,
        "digest": Digest::of(bytes).to_string(),
        "size": bytes.len(),
    });
    if let Some(tag) = tag {
        entry["annotations"] = json!({ REF_NAME: tag });
    }
    entry
}

impl Layout {
    /// Opens the layout in a directory; if there is none, makes it, with directories of this mode.
    pub async fn open_or_create(path: &Path, mode: u32) -> Result<Self> {
        let folder = path.to_owned();
        blocking(move || {
            let context = || format!("cannot make the layout {}", folder.display());
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(mode);
            builder
                .create(folder.join("blobs/sha256"))
                .or_kind(Kind::Io, context)?;
            for (name, content) in [
                ("index.json", r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#),
                ("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#), // last: it says that all is there
            ] {
                // another process may be making the same layout: whose file is there first stays
                match written(&folder, content.as_bytes(), mode & 0o666)
                    .and_then(|file| Ok(file.persist_noclobber(folder.join(name))?))
                {
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                    result => drop(result.or_kind(Kind::Io, context)?),
                }
            }
            Ok(())
        })
        .await?;
        Self::open_folder(path, None).await
    }

    /// Stores an artifact and lists it in `index.json`, as the last (the newest) of all; an entry that it has there already moves
    /// there. Fields that this program does not know stay as they are. Returns the manifest's digest.
    pub async fn store(&self, artifact: NewArtifact) -> Result<Digest> {
        self.run(move |opened| {
            let folder = opened.folder()?;
            let _lock = opened.lock(folder)?;
            let mode = opened.file_mode(folder);
            for blob in artifact.blobs.iter().chain([&artifact.manifest]) {
                opened.put(folder, blob, mode)?;
            }
            let digest = Digest::of(&artifact.manifest);
            let entry = artifact.entry();
            opened.change_index(folder, mode, |manifests| {
                manifests.retain(|known| known["digest"] != entry["digest"]);
                manifests.push(entry);
            })?;
            Ok(digest)
        })
        .await
    }

    /// Whether there is a blob of this size.
    pub async fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool> {
        let digest = *digest;
        self.run(move |opened| Ok(opened.open_sized(&digest, Some(size)).is_ok()))
            .await
    }

    /// Adds a blob that is received in pieces. It appears only when it is complete and its digest is right. If `from`, the layout that it
    /// comes from, has it as a file that can be linked here, the file gets another name here, and its bytes are read, not written.
    pub(in crate::source) async fn copy_blob(
        &self,
        blob: Incoming,
        from: Option<&Self>,
    ) -> Result<()> {
        let (digest, size) = (blob.digest, blob.size);
        let context =
            |opened: &Opened| format!("{}: blob {digest} cannot be written", opened.place());
        let from = from.cloned();
        let (path, to) = self
            .run(move |opened| {
                let (folder, mode) = (opened.folder()?, opened.file_mode(opened.folder()?));
                let blobs = folder.join("blobs/sha256");
                let file = match from.and_then(|from| link(&from, &digest, size, &blobs, mode)) {
                    Some(linked) => NewBlob::Linked(linked),
                    None => NewBlob::Empty(
                        temporary(&blobs, mode)
                            .or_kind(Kind::Io, || format!("{}: a new blob", opened.place()))?,
                    ),
                };
                Ok((blob_path(folder, &digest), file))
            })
            .await?;
        let file = match &to {
            NewBlob::Linked(_) => None,
            NewBlob::Empty(file) => {
                let open = file.as_file().try_clone();
                Some((Arc::new(open.or_kind(Kind::Io, || context(&self.0))?), 0))
            }
        };
        stream::write(file, blob)
            .await
            .map_err(|error| error.context(context(&self.0)))?;
        self.run(move |_| {
            let save = || -> std::io::Result<()> {
                match to {
                    NewBlob::Linked(linked) => {
                        fs::File::open(linked.path())?.sync_all()?;
                        linked.persist(&path)?;
                    }
                    NewBlob::Empty(file) => {
                        file.as_file().sync_all()?;
                        file.persist(&path)?;
                    }
                }
                Ok(())
            };
            save().or_kind(Kind::Io, || path.display().to_string())
        })
        .await
    }

    /// Adds a manifest, and lists it in `index.json` under a tag, which no other entry has then.
    pub(in crate::source) async fn tag(
        &self,
        media_type: &str,
        bytes: &Bytes,
        tag: Option<&str>,
    ) -> Result<Digest> {
        let entry = tagged_entry(media_type, bytes, tag);
        let (bytes, tag) = (bytes.clone(), tag.map(str::to_owned));
        self.run(move |opened| {
            let folder = opened.folder()?;
            let _lock = opened.lock(folder)?;
            let mode = opened.file_mode(folder);
            opened.put(folder, &bytes, mode)?;
            opened.change_index(folder, mode, |manifests| {
                let replaced = |known: &Value| match &tag {
                    Some(tag) => known["annotations"][REF_NAME] == tag.as_str(),
                    None => {
                        known["digest"] == entry["digest"]
                            && known["annotations"][REF_NAME].is_null()
                    }
                };
                match manifests.iter().position(replaced) {
                    Some(place) => {
                        manifests[place] = entry.clone();
                        let mut first = true;
                        manifests.retain(|known| !replaced(known) || std::mem::take(&mut first));
                    }
                    None => manifests.push(entry),
                }
            })?;
            Ok(Digest::of(&bytes))
        })
        .await
    }

    /// Adds bytes as a blob.
    pub(in crate::source) async fn put_blob(&self, bytes: &Bytes) -> Result<()> {
        let bytes = bytes.clone();
        self.run(move |opened| {
            let folder = opened.folder()?;
            opened.put(folder, &bytes, opened.file_mode(folder))
        })
        .await
    }

    /// Takes a referrer out of `index.json`. Its blobs stay: other tools may know about them. An error where the manifest does not refer to
    /// the subject.
    pub(in crate::source) async fn unlist_referrer(
        &self,
        digest: &Digest,
        subject: &Digest,
    ) -> Result<bool> {
        let (digest, subject) = (*digest, *subject);
        self.run(move |opened| {
            let folder = opened.folder()?;
            let _lock = opened.lock(folder)?;
            match opened.whole(&digest, None, MAX_MANIFEST_BYTES) {
                Ok(manifest) if referring(&manifest, &subject).is_none() => {
                    return Err(Error::new(
                        Kind::InvalidArgument,
                        format!(
                            "{}: {digest} does not refer to {subject}; it is not removed",
                            opened.place()
                        ),
                    ));
                }
                Ok(_) => {}
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
            opened.unlist(folder, &digest)
        })
        .await
    }

    /// Takes a manifest out of `index.json`, and removes the blobs that nothing listed there leads to any more. Only for a layout
    /// of our own: in others there may be blobs that other tools know about. `None` when it was not listed.
    pub async fn remove(&self, digest: &Digest) -> Result<Option<Collected>> {
        let digest = *digest;
        self.run(move |opened| {
            let folder = opened.folder()?;
            let _lock = opened.lock(folder)?;
            if !opened.unlist(folder, &digest)? {
                return Ok(None);
            }
            opened.collect(folder).map(Some)
        })
        .await
    }

    /// Whether this can be written to: a folder, not an archive.
    pub fn is_writable(&self) -> bool {
        matches!(self.0.blobs, Blobs::Folder(_))
    }
}

impl Opened {
    fn folder(&self) -> Result<&Path> {
        match &self.blobs {
            Blobs::Folder(path) => Ok(path),
            Blobs::Archive { path, .. } => Err(Error::new(
                Kind::Unsupported,
                format!("{} is an archive: it cannot be changed", path.display()),
            )),
        }
    }

    /// Held until the file is closed.
    fn lock(&self, folder: &Path) -> Result<Arc<File>> {
        let context = || format!("{}: cannot be locked", self.place());
        let marker = open_regular(&folder.join("oci-layout"))?.file().clone();
        rustix::fs::flock(&marker, rustix::fs::FlockOperation::LockExclusive)
            .or_kind(Kind::Io, context)?;
        Ok(marker)
    }

    /// New files are as readable as the layout's others are.
    fn file_mode(&self, folder: &Path) -> u32 {
        fs::metadata(folder.join("index.json"))
            .map_or(0o600, |metadata| metadata.permissions().mode() & 0o666)
    }

    fn put(&self, folder: &Path, bytes: &Bytes, mode: u32) -> Result<()> {
        let digest = Digest::of(bytes);
        if self
            .whole(&digest, Some(bytes.len() as u64), bytes.len() as u64)
            .is_ok()
        {
            return Ok(());
        }
        let path = blob_path(folder, &digest);
        replace(&path, bytes, mode).or_kind(Kind::Io, || {
            format!("{}: blob {digest} cannot be written", self.place())
        })
    }

    fn change_index(
        &self,
        folder: &Path,
        mode: u32,
        change: impl FnOnce(&mut Vec<Value>),
    ) -> Result<()> {
        let context = || format!("{}: index.json", self.place());
        let bytes = self.index_json()?;
        let mut index: Map<String, Value> =
            serde_json::from_slice(&bytes).or_kind(Kind::Corrupt, context)?;
        let manifests = index.entry("manifests").or_insert(Value::Null);
        if manifests.is_null() {
            *manifests = json!([]);
        }
        change(manifests.as_array_mut().ok_or_else(|| {
            Error::new(
                Kind::Corrupt,
                format!("{}: manifests is not an array", context()),
            )
        })?);
        let changed = serde_json::to_vec(&index).or_kind(Kind::Io, context)?;
        if changed == bytes {
            return Ok(());
        }
        replace(&folder.join("index.json"), &changed, mode).or_kind(Kind::Io, context)
    }

    /// Takes a manifest out of `index.json`. Whether it was there.
    fn unlist(&self, folder: &Path, digest: &Digest) -> Result<bool> {
        let digest = digest.to_string();
        let mut was_listed = false;
        self.change_index(folder, self.file_mode(folder), |manifests| {
            let before = manifests.len();
            manifests.retain(|known| known["digest"] != digest.as_str());
            was_listed = manifests.len() != before;
        })?;
        Ok(was_listed)
    }

    /// Removes blobs that `index.json` does not lead to, and leftovers of interrupted writes.
    fn collect(&self, folder: &Path) -> Result<Collected> {
        let context = || format!("{}: its unused blobs cannot be removed", self.place());
        let mut used: BTreeSet<Digest> = BTreeSet::new();
        let mut todo: Vec<Digest> = self
            .parse_index(&self.index_json()?)?
            .iter()
            .map(|entry| entry.digest)
            .collect();
        while let Some(digest) = todo.pop() {
            if used.insert(digest) {
                todo.extend(self.successors(&digest));
            }
        }
        let mut collected = Collected::default();
        for file in fs::read_dir(folder.join("blobs/sha256")).or_kind(Kind::Io, context)? {
            let file = file.or_kind(Kind::Io, context)?;
            let name = file.file_name();
            let digest = format!("sha256:{}", name.to_string_lossy()).parse::<Digest>();
            if digest.is_ok_and(|digest| used.contains(&digest)) {
                continue;
            }
            let bytes = file.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(file.path()).or_kind(Kind::Io, context)?;
            collected.blobs += 1;
            collected.bytes = collected.bytes.saturating_add(bytes);
        }
        Ok(collected)
    }

    /// The content that a blob refers to, if it is a manifest.
    fn successors(&self, digest: &Digest) -> Vec<Digest> {
        let Ok(blob) = self.blobs.open(digest) else {
            return Vec::new();
        };
        let document = read_bounded(&blob, MAX_MANIFEST_BYTES)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
            .unwrap_or_default();
        let lists = ["layers", "manifests", "blobs"]
            .iter()
            .filter_map(|key| document[*key].as_array())
            .flatten();
        [&document["config"], &document["subject"]]
            .into_iter()
            .chain(lists)
            .filter_map(|descriptor| descriptor["digest"].as_str()?.parse().ok())
            .collect()
    }
}

/// Writes a file whole or not at all.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    written(folder, bytes, mode)?.persist(path)?;
    File::open(folder)?.sync_all()
}

/// A blob that has no name yet.
enum NewBlob {
    /// A new file.
    Empty(NamedTempFile),
    /// That of another layout.
    Linked(NamedTempFile<()>),
}

/// Another name, below `blobs`, for the file of a blob in a layout. `None` if a link would not be as good as a new file: the blob is in an
/// archive or on another file system, is not a regular file of this user, or has another mode.
fn link(
    from: &Layout,
    digest: &Digest,
    size: u64,
    blobs: &Path,
    mode: u32,
) -> Option<NamedTempFile<()>> {
    let Blobs::Folder(folder) = &from.0.blobs else {
        return None;
    };
    let file = blob_path(folder, digest);
    let linked = tempfile::Builder::new()
        .prefix(".socinbd-")
        .make_in(blobs, |name| fs::hard_link(&file, name))
        .ok()?;
    // the name may have led to another file before: this is the file that is linked now
    let found = fs::symlink_metadata(linked.path()).ok()?;
    let is_own = found.uid() == rustix::process::geteuid().as_raw();
    let as_made_here = found.is_file() && found.len() == size && found.mode() & 0o7777 == mode;
    (is_own && as_made_here).then_some(linked)
}

/// An empty temporary file.
fn temporary(folder: &Path, mode: u32) -> std::io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".socinbd-")
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(folder)
}

/// A temporary file with this content, which has reached the disk.
fn written(folder: &Path, bytes: &[u8], mode: u32) -> std::io::Result<NamedTempFile> {
    let mut file = temporary(folder, mode)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    Ok(file)
}
