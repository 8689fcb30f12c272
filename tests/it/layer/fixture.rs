//! A generated layer, its zTOC, a registry that has it, and a store.

use std::{
    collections::BTreeMap,
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use socinbd::{
    error::Kind,
    ext4::{DataRegion, Layout},
    layer::{Disk, LayerBlob, Store, StoreOptions, TableBytes},
    oci::{Digest, Packing},
    soci::build::{LayerIndexer, NoSink, Options as IndexOptions},
    source::{Access, Source},
    tar::Entry,
    tree::Tree,
    units::{DiskOffset, SpanId},
    ztoc::{Span, SpanTable, Ztoc},
};

use crate::support::{pauses, read_sparse, registry::Registry, until};

pub const REPOSITORY: &str = "app";

/// Numbers that are the same at each run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2) + 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// Bytes that compress about as text does.
    pub fn text(&mut self, length: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(length + 16);
        while text.len() < length {
            let word = self.below(5000);
            let _ = write!(text, "{word:x} ");
            if word < 50 {
                text.extend_from_slice(&self.0.to_le_bytes());
            }
        }
        text.truncate(length);
        text
    }
}

/// The regular files of a layer, by path.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A tar of these files, in order of their paths, and of what else a layer has.
pub fn tar(files: &Files) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let header = |kind, size, mode| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(mode);
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header
    };
    let mut folder = header(tar::EntryType::Directory, 0, 0o755);
    builder.append_data(&mut folder, "data/", &[][..]).unwrap();
    // replaced by the file of the same name that follows
    let mut first = header(tar::EntryType::Regular, 10_000, 0o644);
    let name = files.keys().next().unwrap();
    builder
        .append_data(&mut first, name, &[0x55; 10_000][..])
        .unwrap();
    for (path, bytes) in files {
        let mut file = header(tar::EntryType::Regular, bytes.len() as u64, 0o644);
        builder.append_data(&mut file, path, &bytes[..]).unwrap();
    }
    let mut link = header(tar::EntryType::Symlink, 0, 0o777);
    builder
        .append_link(&mut link, "data/symlink", "big")
        .unwrap();
    let mut link = header(tar::EntryType::Link, 0, 0o644);
    builder
        .append_link(&mut link, "data/hardlink", name)
        .unwrap();
    builder.into_inner().unwrap()
}

/// One of three sets of small files, an empty one, one of exactly a block, and a large one among them. Each is made once.
pub fn files(number: usize) -> Files {
    static MADE: [OnceLock<Files>; 3] = [const { OnceLock::new() }; 3];
    MADE[number].get_or_init(|| make_files(number)).clone()
}

fn make_files(number: usize) -> Files {
    let mut random = Random::new(number as u64);
    let mut files = Files::new();
    for number in 0..300 {
        let length = random.below(9000) as usize;
        files.insert(format!("data/{number:03}"), random.text(length));
    }
    files.insert("data/100-empty".to_owned(), Vec::new());
    files.insert("data/100-block".to_owned(), random.text(4096));
    files.insert("data/big".to_owned(), random.text(3_000_000));
    files
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer with a zTOC.
#[derive(Clone)]
pub struct Layer {
    pub files: Files,
    pub blob: Bytes,
    pub layer: LayerBlob,
    pub ztoc: Bytes,
    pub table: Digest,
    pub entries: Vec<Entry>,
    pub spans: SpanTable,
    pub regions: Vec<DataRegion>,
}

impl Layer {
    /// One of three gzip layers of about 4 MiB in spans of 64 KiB and more. They take long to make, so each is made once.
    pub fn new(number: usize) -> Self {
        static MADE: [OnceLock<Layer>; 3] = [const { OnceLock::new() }; 3];
        let make = || {
            let files = files(number);
            let blob = gzip(&tar(&files));
            Self::of(files, blob, Packing::Gzip, 64 << 10)
        };
        MADE[number].get_or_init(make).clone()
    }

    /// The first one with its tar not compressed.
    pub fn plain() -> Self {
        static MADE: OnceLock<Layer> = OnceLock::new();
        let make = || {
            let files = files(0);
            let blob = tar(&files);
            Self::of(files, blob, Packing::Plain, 100_000)
        };
        MADE.get_or_init(make).clone()
    }

    pub fn of(files: Files, blob: Vec<u8>, packing: Packing, span_size: u64) -> Self {
        let options = IndexOptions {
            span_size,
            build_tool: "test".to_owned(),
            ..IndexOptions::default()
        };
        let mut indexer = LayerIndexer::new(packing, options, NoSink);
        indexer.write(&blob).unwrap();
        let (indexed, NoSink) = indexer.finish().unwrap();
        let ztoc = Bytes::from(indexed.ztoc.unwrap().unwrap());
        let table = Digest::of(&ztoc);
        let parsed = Ztoc::parse(&ztoc).unwrap();
        let tree = Tree::build(&parsed.entries).unwrap();
        let layout = Layout::new(&tree, &parsed.entries, table.bytes()).unwrap();
        let regions = layout.regions;
        Self {
            files,
            layer: LayerBlob {
                digest: indexed.digest,
                size: indexed.size,
                packing,
                diff_id: indexed.diff_id.unwrap(),
            },
            blob: blob.into(),
            ztoc,
            table,
            entries: parsed.entries,
            spans: parsed.spans,
            regions,
        }
    }

    /// Where a file's data is on the disk.
    pub fn place(&self, path: &str) -> Range<DiskOffset> {
        let entry = self
            .entries
            .iter()
            .rfind(|entry| entry.name == path.as_bytes())
            .unwrap();
        let region = self
            .regions
            .iter()
            .find(|region| region.layer.start == entry.data_offset)
            .unwrap();
        region.disk.clone()
    }

    /// The spans that a range of the disk needs, found the slow way.
    pub fn spans_of(&self, range: Range<DiskOffset>) -> Vec<SpanId> {
        let mut needed = Vec::new();
        for (id, span) in (0..).map(SpanId).zip(&self.spans.spans) {
            let hit = self.regions.iter().any(|region| {
                let part = region.clip_disk(&range);
                part.is_some_and(|part| {
                    part.layer.start < span.uncompressed.end
                        && span.uncompressed.start < part.layer.end
                        && span.uncompressed.start < span.uncompressed.end
                })
            });
            if hit {
                needed.push(id);
            }
        }
        needed
    }

    /// How many spans hold no file's data, and so are never fetched.
    pub fn empty_spans(&self) -> usize {
        let is_empty = |span: &&Span| {
            let mut regions = self.regions.iter();
            !regions.any(|region| region.clip_layer(&span.uncompressed).is_some())
        };
        self.spans.spans.iter().filter(is_empty).count()
    }

    /// Compressed bytes of these spans, each counted once.
    pub fn compressed(&self, spans: &[SpanId]) -> u64 {
        let mut bytes = 0;
        let mut end = 0;
        for id in spans {
            let span = &self.spans.spans[id.get() as usize];
            let start = span.compressed.start.get().max(end);
            end = span.compressed.end.get();
            bytes += end - start;
        }
        bytes
    }
}

/// A registry with a layer's blob, and a store that is empty.
pub struct Lab {
    pub layer: Layer,
    pub registry: Registry,
    pub root: tempfile::TempDir,
    pub store: Arc<Store>,
}

impl Lab {
    /// Fetches what is asked for, and never the whole layer: so that it can be counted.
    pub fn new(layer: Layer) -> Self {
        let options = StoreOptions {
            never_whole: true,
            ..StoreOptions::default()
        };
        Self::with_options(layer, options)
    }

    pub fn with_options(layer: Layer, options: StoreOptions) -> Self {
        let registry = Registry::start();
        registry.add_blob(REPOSITORY, layer.blob.clone());
        let root = tempfile::tempdir().unwrap();
        let store = Store::open_with(root.path(), options).unwrap();
        Self {
            layer,
            registry,
            root,
            store,
        }
    }

    pub async fn source(&self) -> Source {
        source(&self.registry).await
    }

    pub async fn disk(&self) -> Arc<Disk> {
        self.try_disk().await.unwrap()
    }

    pub async fn try_disk(&self) -> socinbd::error::Result<Arc<Disk>> {
        let Layer {
            layer, table, ztoc, ..
        } = &self.layer;
        let source = self.source().await;
        self.store
            .indexed(layer, table, TableBytes::of(ztoc.clone()), &source)
            .await
    }

    /// Closes the store, and opens it again.
    pub async fn reopen(&mut self, disk: Arc<Disk>) {
        drop(disk);
        let other = tempfile::tempdir().unwrap();
        drop(std::mem::replace(
            &mut self.store,
            Store::open(other.path()).unwrap(),
        ));
        self.store = open_when_free(self.root.path()).await;
    }

    /// Where the disk is.
    pub fn folder(&self) -> PathBuf {
        self.root
            .path()
            .join("layers/sha256")
            .join(self.layer.layer.digest.hex())
            .join(self.layer.table.hex())
    }

    /// The disk as it is in the store.
    pub fn stored(&self) -> Option<Arc<Disk>> {
        self.store
            .stored(&self.layer.layer.digest, &self.layer.table)
            .unwrap()
    }

    /// GETs of the layer's bytes, and their bytes.
    pub fn fetched(&self) -> (u64, u64) {
        let count = self.registry.counters().blob(&self.layer.layer.digest);
        (count.requests, count.bytes)
    }
}

pub async fn source(registry: &Registry) -> Source {
    let reference = registry.reference("app:1").parse().unwrap();
    Source::open(&reference, &Access::default()).await.unwrap()
}

/// Reads a range of a disk as a server does.
pub async fn read(
    disk: &Arc<Disk>,
    range: Range<DiskOffset>,
) -> Result<Vec<u8>, Arc<socinbd::error::Error>> {
    disk.make_present(range.clone()).await?;
    assert!(disk.is_present(range.clone()));
    let mut bytes = vec![0; (range.end.get() - range.start.get()) as usize];
    disk.read_present(range.start, &mut bytes).unwrap();
    Ok(bytes)
}

pub fn range(start: u64, length: u64) -> Range<DiskOffset> {
    DiskOffset(start)..DiskOffset(start + length)
}

/// Makes everything present, and waits until the layer has been checked.
pub async fn complete(disk: &Arc<Disk>) {
    disk.make_present(range(0, disk.size())).await.unwrap();
    assert!(disk.is_full());
    let ended = || disk.is_complete() || disk.check_error().is_some() || disk.degraded().is_some();
    until("the layer is checked", ended).await;
    let error = disk.check_error().or(disk.degraded());
    assert!(disk.is_complete(), "{error:?}");
}

/// The disk is an ext4 file system without a fault, and holds these files.
pub fn assert_holds(disk: &Path, files: &Files) {
    let check = Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(disk)
        .output()
        .expect("e2fsck runs (package e2fsprogs)");
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let ext4 = ext4_view::Ext4::load(Box::new(read_sparse(disk))).unwrap();
    for (path, bytes) in files {
        let found = ext4.read(format!("/{path}").as_str()).unwrap();
        assert!(found == *bytes, "{path} has other bytes");
    }
}

/// Changes the text of a folder's `state.json`, and gives it its check again.
pub fn change_state(folder: &Path, change: impl FnOnce(&str) -> String) {
    let path = folder.join("state.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let (body, _) = text.split_once(",\n  \"crc32\"").unwrap();
    let changed = change(body);
    assert_ne!(changed, body);
    let mut crc = flate2::Crc::new();
    crc.update(changed.as_bytes());
    let text = format!("{changed},\n  \"crc32\": \"{:08x}\"\n}}", crc.sum());
    std::fs::write(&path, text).unwrap();
}

/// Opens a store that was dropped just now: a task that ends may hold it a moment longer.
pub async fn open_when_free(root: &Path) -> Arc<Store> {
    let opening = async {
        let mut pauses = pauses();
        loop {
            match Store::open(root) {
                Err(error) if error.kind() == Kind::Busy => {
                    tokio::time::sleep(pauses.next().unwrap()).await;
                }
                store => break store.unwrap(),
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), opening)
        .await
        .expect("the store is closed within a minute")
}
