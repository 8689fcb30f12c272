//! Each file of a store, with each kind of damage, before the store is opened and while it is in use: all bytes that are read are right, no
//! read and no opening waits without an end, no table counts as false, and the next attach repairs or replaces what was damaged.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use socinbd::{
    layer::{Disk, Store, StoreOptions, TableBytes},
    oci::Packing,
};

use super::{
    damage::{assert_heals, flip, last_metadata, layer},
    fixture::{Lab, Layer, open_when_free, range, read},
};
use crate::{
    compact::{CompactLab, compact_of},
    support::{copy_folder, succeeds, until},
};

/// What happens to a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Harm {
    /// A bit is another one, at so many sixteenths of the file.
    Flipped(usize),
    Half,
    Longer,
    Empty,
    Gone,
    /// Something else is in its place.
    Directory,
    Fifo,
    EndlessDevice,
    LinkToNothing,
    /// A hole of a terabyte.
    Huge,
}

/// All kinds of damage of a file.
pub(super) const HARMS: [Harm; 14] = [
    Harm::Flipped(0),
    Harm::Flipped(3),
    Harm::Flipped(7),
    Harm::Flipped(11),
    Harm::Flipped(16),
    Harm::Half,
    Harm::Longer,
    Harm::Empty,
    Harm::Gone,
    Harm::Directory,
    Harm::Fifo,
    Harm::EndlessDevice,
    Harm::LinkToNothing,
    Harm::Huge,
];

/// All kinds of damage of a directory.
const HARMS_OF_DIRECTORIES: [Harm; 5] = [
    Harm::Gone,
    Harm::Empty,
    Harm::Fifo,
    Harm::EndlessDevice,
    Harm::LinkToNothing,
];

/// The files of the directory of a disk that was laid out from a zTOC. `last` is there for some layers, `disowned` and the two files after
/// it for moments only.
const OF_ZTOC: [&str; 14] = [
    "ztoc",
    "layout",
    "spans.table",
    "headers",
    "spans",
    "rest",
    "last",
    "sources.json",
    "stacking.json",
    "state.json",
    "disk.ext4",
    "disowned",
    "state.json.next",
    "sources.json.next",
];

/// What the directory of a disk has beside these if it was laid out from a compact index.
const OF_COMPACT: [&str; 5] = ["compact", "windows", "windows.json", "headers", "rest"];

const OF_STREAMED: [&str; 6] = [
    "layout",
    "pieces",
    "sources.json",
    "stacking.json",
    "state.json",
    "disk.ext4",
];

/// The files of a store that are not of one disk.
const OF_STORE: [&str; 2] = ["layers/lock", "layers/new"];

/// Harms a file; of a disk it is the file system's metadata. Returns false if there is nothing to harm.
pub fn harm(path: &Path, how: Harm) -> bool {
    let length = fs::metadata(path).map_or(0, |it| if it.is_file() { it.len() } else { 0 });
    let is_of_content = matches!(
        how,
        Harm::Flipped(_) | Harm::Half | Harm::Longer | Harm::Empty | Harm::Gone
    );
    let is_directory = path.is_dir();
    if is_of_content && length == 0 && !is_directory {
        return false;
    }
    // a directory has no content of its own
    if is_directory && !HARMS_OF_DIRECTORIES.contains(&how) {
        return false;
    }
    let remove = || match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    };
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(false);
        options.open(path).unwrap()
    };
    match how {
        Harm::Flipped(_) if path.ends_with("disk.ext4") => {
            flip(path, last_metadata(&fs::read(path).unwrap()) as u64);
        }
        Harm::Flipped(part) => flip(path, (length - 1) * part as u64 / 16),
        Harm::Half => open().set_len(length / 2).unwrap(),
        Harm::Longer => open().write_all_at(&[0x5a; 5000], length).unwrap(),
        Harm::Empty => {
            remove();
            fs::write(path, b"").unwrap();
        }
        Harm::Gone => remove(),
        Harm::Directory => {
            remove();
            fs::create_dir(path).unwrap();
        }
        Harm::Fifo => {
            remove();
            succeeds(Command::new("mkfifo").arg(path));
        }
        Harm::EndlessDevice => {
            remove();
            std::os::unix::fs::symlink("/dev/zero", path).unwrap();
        }
        Harm::LinkToNothing => {
            remove();
            std::os::unix::fs::symlink("/nothing/here", path).unwrap();
        }
        Harm::Huge => {
            if length == 0 {
                remove();
            }
            open().set_len(1 << 40).unwrap();
        }
    }
    true
}

/// A layer, and how its disk is made.
enum Kind {
    Ztoc(Lab),
    Compact(Box<CompactLab>),
    Streamed(Lab),
}

impl Kind {
    fn layer(&self) -> &Layer {
        match self {
            Self::Ztoc(lab) | Self::Streamed(lab) => &lab.layer,
            Self::Compact(lab) => &lab.lab.layer,
        }
    }

    /// As an attach does.
    async fn disk(&self, store: &Arc<Store>) -> socinbd::error::Result<Arc<Disk>> {
        match self {
            Self::Ztoc(lab) => {
                let (layer, ztoc) = (&lab.layer, lab.layer.ztoc.clone());
                let (bytes, source) = (TableBytes::of(ztoc), lab.source().await);
                store
                    .indexed(&layer.layer, &layer.table, bytes, &source)
                    .await
            }
            Self::Compact(lab) => lab.try_disk_in(store).await,
            Self::Streamed(lab) => {
                let source = lab.source().await;
                store.streamed(&lab.layer.layer, &source, &|_| {}).await
            }
        }
    }

    /// The root of a store that has the disk and is closed.
    async fn root(&self, is_complete: bool) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            never_whole: true,
            ..StoreOptions::default()
        };
        let store = Store::open_with(root.path(), options).unwrap();
        let disk = self.disk(&store).await.unwrap();
        if is_complete {
            super::fixture::complete(&disk).await;
        } else {
            let end = self.layer().place("data/big").end;
            read(&disk, self.layer().place("data/000")).await.unwrap();
            read(&disk, range(end.get() - 5000, 5000)).await.unwrap();
        }
        drop((disk, store));
        drop(open_when_free(root.path()).await);
        root
    }
}

/// The directory of the only disk of a store.
fn directory_of_disk(root: &Path) -> PathBuf {
    let only = |path: PathBuf| fs::read_dir(path).unwrap().next().unwrap().unwrap().path();
    only(only(root.join("layers/sha256")))
}

/// One damage.
#[derive(Clone, Debug)]
struct Case {
    /// Below the root.
    file: PathBuf,
    how: Harm,
    /// The store is in use.
    in_use: bool,
}

/// Reads a small file, a part of the large one, and all of it. Right bytes, or an error.
async fn read_files(disk: &Arc<Disk>, layer: &Layer, case: &Case) -> Result<(), String> {
    for name in ["data/003", "data/000", "data/big"] {
        let place = layer.place(name);
        let present = disk.make_present(place.clone()).await;
        present.map_err(|error| error.report())?;
        let mut bytes = vec![0; layer.files[name].len()];
        let read = disk.read_present(place.start, &mut bytes);
        read.map_err(|error| error.to_string())?;
        assert!(bytes == layer.files[name], "{case:?}: {name}");
    }
    Ok(())
}

async fn suffer(kind: &Kind, pristine: &Path, case: &Case) {
    let root = tempfile::tempdir().unwrap();
    copy_folder(&pristine.join("layers"), &root.path().join("layers"));
    let path = root.path().join(&case.file);
    if case.in_use {
        let store = Store::open(root.path()).unwrap();
        let disk = kind.disk(&store).await.unwrap();
        read(&disk, kind.layer().place("data/000")).await.unwrap();
        let lock = File::open(root.path().join("layers/lock")).unwrap();
        if !harm(&path, case.how) {
            return;
        }
        let _ = read_files(&disk, kind.layer(), case).await;
        // an attach repairs it, or says that the images in use must be detached first
        if let Ok(again) = kind.disk(&store).await {
            let _ = read_files(&again, kind.layer(), case).await;
        }
        let _ = disk.sync();
        drop((disk, store));
        // also when the file of the lock is another one by now: two stores at a time are no damage
        until("the first store is closed", || lock.try_lock().is_ok()).await;
        drop(lock);
        drop(open_when_free(root.path()).await);
    } else if !harm(&path, case.how) {
        return;
    }
    let what = format!("{case:?}");
    for _ in 0..2 {
        let store = open_when_free(root.path()).await;
        let disk = kind.disk(&store).await;
        let disk = disk.unwrap_or_else(|error| panic!("{what}: {}", error.report()));
        let read = read_files(&disk, kind.layer(), case).await;
        assert_eq!(read, Ok(()), "{what}");
        assert_heals(&disk, &kind.layer().files, &what).await;
        // the damaged file of another disk of the layer is no obstacle
        store.list().unwrap();
        store.directories().unwrap();
        drop((disk, store));
    }
}

/// All cases of files below a directory.
fn cases(directory: &Path, files: &[&str], harms: &[Harm]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (file, how) in files
        .iter()
        .flat_map(|file| harms.iter().map(move |how| (file, *how)))
    {
        for in_use in [false, true] {
            cases.push(Case {
                file: directory.join(file),
                how,
                in_use,
            });
        }
    }
    cases
}

/// Makes a disk for each case, damages it, and repairs it.
async fn suffer_all(kind: Kind, files: &[&str], harms: &[Harm]) {
    let kind = Arc::new(kind);
    let mut failed = Vec::new();
    for is_complete in [false, true] {
        let pristine = Arc::new(kind.root(is_complete).await);
        let directory = directory_of_disk(pristine.path());
        let directory = directory.strip_prefix(pristine.path()).unwrap();
        let mut all = cases(directory, files, harms);
        // once, as they are the same for all kinds
        if files == OF_ZTOC && harms == HARMS {
            all.extend(cases(Path::new(""), &OF_STORE, &HARMS));
            let directories = [directory, directory.parent().unwrap()];
            let directories = directories.map(|it| it.to_str().unwrap());
            all.extend(cases(Path::new(""), &directories, &HARMS_OF_DIRECTORIES));
        }
        let all = futures_util::stream::iter(all).map(|case| {
            let (kind, pristine) = (Arc::clone(&kind), Arc::clone(&pristine));
            let named = format!("{case:?}, complete: {is_complete}");
            let suffering = async move { suffer(&kind, pristine.path(), &case).await };
            let bounded = tokio::time::timeout(Duration::from_secs(120), suffering);
            let one = tokio::spawn(bounded);
            async move { (named, one.await) }
        });
        let ended: Vec<_> = all.buffer_unordered(4).collect().await;
        for (named, ended) in ended {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(_)) => failed.push(format!("{named}: out of time")),
                Err(_) => failed.push(named),
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_of_a_disk_with_a_ztoc_is_repaired() {
    let lab = Lab::new(layer(200, Packing::Gzip, true));
    suffer_all(Kind::Ztoc(lab), &OF_ZTOC, &HARMS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_of_a_disk_of_an_uncompressed_layer_is_repaired() {
    let lab = Lab::new(layer(201, Packing::Plain, false));
    let harms = [Harm::Flipped(7), Harm::Half, Harm::Gone, Harm::Fifo];
    suffer_all(Kind::Ztoc(lab), &OF_ZTOC, &harms).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_of_a_disk_with_a_compact_index_is_repaired() {
    let layer = layer(202, Packing::Gzip, false);
    let compact = compact_of(&layer, 16 << 10);
    let lab = CompactLab::of(layer, compact.bytes, compact.table_size);
    suffer_all(Kind::Compact(Box::new(lab)), &OF_COMPACT, &HARMS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_of_the_disk_of_a_streamed_layer_is_repaired() {
    let lab = Lab::new(layer(203, Packing::Gzip, false));
    suffer_all(Kind::Streamed(lab), &OF_STREAMED, &HARMS).await;
}

/// Without the directories that all disks are in, a store cannot be opened: the error names the directory.
#[test]
fn something_else_in_the_place_of_the_directory_of_all_layers_is_named() {
    for name in ["layers", "layers/sha256"] {
        for how in [Harm::Empty, Harm::Fifo, Harm::LinkToNothing] {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join(name);
            // not by a store: a process that another test starts at this moment would have its lock too
            fs::create_dir_all(root.path().join("layers/sha256")).unwrap();
            assert!(harm(&path, how));
            let error = Store::open(root.path()).err().unwrap().report();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
