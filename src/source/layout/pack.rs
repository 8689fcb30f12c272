//! A new layout in a tar file (POSIX.1-1988 ustar). Blobs are written to their final places, several in parallel; the file gets its name
//! when it is complete.

use std::{
    collections::HashSet,
    fs::{File, Permissions},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::{
    stream::{self, Incoming},
    write::tagged_entry,
};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, media_type::OCI_INDEX},
};

const BLOCK: u64 = 512;
/// The largest size that a header's eleven octal digits hold; more is written in base 256.
const MAX_OCTAL: u64 = (1 << 33) - 1;

/// An archive that is being written. If it is dropped before [`Pack::finish`], nothing is left of it.
#[derive(Clone)]
pub(in crate::source) struct Pack(Arc<Shared>);

struct Shared {
    path: PathBuf,
    file: Arc<File>,
    state: Mutex<PackState>,
}

struct PackState {
    temporary: Option<NamedTempFile>,
    /// Start of the next member.
    end: u64,
    /// Blobs that are there, or on their way.
    blobs: HashSet<Digest>,
    /// Of `index.json`.
    entries: Vec<Value>,
    /// Members that are not whole yet.
    open: usize,
}

impl Pack {
    /// Begins an archive with this final name.
    pub(in crate::source) async fn create(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        blocking(move || {
            let context = || format!("making the archive {}", path.display());
            let path = file_place(&path)?;
            let folder = path.parent().unwrap_or(Path::new("/"));
            let temporary = tempfile::Builder::new()
                .prefix(".socinbd-")
                .permissions(Permissions::from_mode(0o666)) // less the umask
                .tempfile_in(folder)
                .or_kind(Kind::Io, context)?;
            let file = temporary.as_file().try_clone().or_kind(Kind::Io, context)?;
            Ok(Self(Arc::new(Shared {
                file: Arc::new(file),
                path,
                state: Mutex::new(PackState {
                    temporary: Some(temporary),
                    end: 0,
                    blobs: HashSet::new(),
                    entries: Vec::new(),
                    open: 0,
                }),
            })))
        })
        .await
    }

    pub(in crate::source) fn has_blob(&self, digest: &Digest) -> bool {
        self.0.state().blobs.contains(digest)
    }

    /// Adds a blob that comes in pieces.
    pub(in crate::source) async fn copy_blob(&self, blob: Incoming) -> Result<()> {
        let (digest, size) = (blob.digest, blob.size);
        let context = || format!("{}: blob {digest}", self.0.path.display());
        let start = {
            let mut state = self.0.state();
            if !state.blobs.insert(digest) {
                return Ok(());
            }
            let start = state.reserve(size).ok_or_else(|| {
                Error::new(Kind::Unsupported, format!("{}: too large", context()))
            })?;
            state.open += 1;
            start
        };
        let data = start + BLOCK; // `reserve` has checked the whole member
        stream::write(Some((Arc::clone(&self.0.file), data)), blob)
            .await
            .map_err(|error| error.context(context()))?;
        // last: without its header, a member does not exist
        let name = format!("blobs/sha256/{}", digest.hex());
        self.member_header(start, &name, size).await?;
        self.0.state().open -= 1;
        Ok(())
    }

    /// Adds bytes as a blob.
    pub(in crate::source) async fn put_blob(&self, bytes: &Bytes) -> Result<()> {
        let piece = bytes.clone();
        let pieces = Box::pin(futures_util::stream::once(async { Ok(piece) }));
        self.copy_blob(Incoming {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            pieces,
            tap: None,
        })
        .await
    }

    /// Adds a manifest, and lists it in `index.json`.
    pub(in crate::source) async fn tag(
        &self,
        media_type: &str,
        bytes: &Bytes,
        tag: Option<&str>,
    ) -> Result<Digest> {
        self.put_blob(bytes).await?;
        self.list(tagged_entry(media_type, bytes, tag));
        Ok(Digest::of(bytes))
    }

    /// Adds an entry to `index.json`.
    pub(in crate::source) fn list(&self, entry: Value) {
        let mut state = self.0.state();
        state.entries.retain(|known| *known != entry);
        state.entries.push(entry);
    }

    /// Writes the last members, and gives the file its name.
    pub(in crate::source) async fn finish(&self) -> Result<()> {
        let context = || format!("writing the archive {}", self.0.path.display());
        let (entries, open) = {
            let state = self.0.state();
            (state.entries.clone(), state.open)
        };
        if open > 0 {
            return Err(Error::new(
                Kind::Io,
                format!("{}: {open} blobs are incomplete", context()),
            ));
        }
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        let index = serde_json::to_vec(&index).or_kind(Kind::Io, context)?;
        for (name, content) in [
            ("index.json", index),
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ] {
            let size = content.len() as u64;
            let start = self
                .0
                .state()
                .reserve(size)
                .ok_or_else(|| Error::new(Kind::Unsupported, context()))?;
            self.member_header(start, name, size).await?;
            self.0
                .file
                .write_all_at(&content, start + BLOCK)
                .or_kind(Kind::Io, context)?;
        }
        let (end, temporary) = {
            let mut state = self.0.state();
            (state.end, state.temporary.take())
        };
        let shared = Arc::clone(&self.0);
        blocking(move || {
            let context = || format!("writing the archive {}", shared.path.display());
            // two blocks of zeros end an archive
            let end = end.saturating_add(2 * BLOCK);
            shared.file.set_len(end).or_kind(Kind::Io, context)?;
            shared.file.sync_all().or_kind(Kind::Io, context)?;
            if let Some(temporary) = temporary {
                temporary.persist(&shared.path).or_kind(Kind::Io, context)?;
            }
            Ok(())
        })
        .await
    }

    async fn member_header(&self, start: u64, name: &str, size: u64) -> Result<()> {
        let header = header(name, size);
        let shared = Arc::clone(&self.0);
        blocking(move || {
            let written = shared.file.write_all_at(&header, start);
            written.or_kind(Kind::Io, || {
                format!("writing the archive {}", shared.path.display())
            })
        })
        .await
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, PackState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PackState {
    /// Sets room aside for a member of so many bytes; where its header begins.
    fn reserve(&mut self, size: u64) -> Option<u64> {
        let start = self.end;
        self.end = start
            .checked_add(BLOCK)?
            .checked_add(size)?
            .checked_next_multiple_of(BLOCK)?;
        Some(start)
    }
}

/// The path of the archive, with symlinks resolved. An existing file must be a regular file: the archive is renamed to this path at the end,
/// which would replace a device or a pipe.
fn file_place(path: &Path) -> Result<PathBuf> {
    let context = || format!("making the archive {}", path.display());
    let what = match path.metadata() {
        Ok(there) if there.is_file() => return path.canonicalize().or_kind(Kind::Io, context),
        Ok(there) if there.is_dir() => "a directory",
        Ok(_) => "a device or a pipe",
        Err(_) => return Ok(path.to_owned()), // creating the file reports the error
    };
    Err(Error::new(
        Kind::InvalidArgument,
        format!(
            "{} is {what}: an archive can only be written to a regular file",
            path.display()
        ),
    ))
}

/// The header of a regular file. The same name and size give the same bytes: no clock, no owner.
fn header(name: &str, size: u64) -> [u8; BLOCK as usize] {
    let mut header = [0; BLOCK as usize];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes()); // at most 77 of 100
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size <= MAX_OCTAL {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        "); // the checksum is made with blanks in its place
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
