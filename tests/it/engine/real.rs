//! The real images of `scripts/test-images`, and what independent tools make of them: GNU tar, applied layer by layer.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use serde_json::Value;
use socinbd::{oci::Digest, ztoc::Ztoc};
use tempfile::TempDir;

use super::Host;
use crate::support::{made_once, registry::Registry};

/// A copy of an image's layout, whose blobs are links to those in the cache: an index may be added to it.
pub struct RealImage {
    folder: TempDir,
}

/// An image with an index.
pub struct Indexed {
    pub image: RealImage,
    /// Of the layers, the lowest first.
    pub ztocs: Vec<Option<Digest>>,
}

/// A layer, as the manifest says.
pub struct RealLayer {
    pub digest: Digest,
    /// Bytes of its blob.
    pub size: u64,
    media_type: String,
    blob: PathBuf,
}

impl RealImage {
    /// `small`, `python` or `members`.
    pub fn of(name: &str) -> Self {
        Self::copy(&cached(name))
    }

    /// With a SOCI index in the layout, made by the program with these options; it takes long, and is made once.
    pub fn indexed(name: &str, options: &[&str]) -> Indexed {
        let made = made_once(&format!("{name}{}", options.concat()), |folder| {
            link(&cached(name), folder);
            let reference = format!("oci:{}:latest", folder.display());
            let arguments = [&["--json", "index", "create", &reference], options].concat();
            fs::write(folder.join("report"), Host::new().run(&arguments)).unwrap();
        });
        let image = Self::copy(&made);
        let report = image.json(&made.join("report"));
        let layers = report["layers"].as_array().unwrap();
        let ztoc = |layer: &Value| Some(layer["ztoc"].as_str()?.parse().unwrap());
        let ztocs = layers.iter().map(ztoc).collect();
        Indexed { image, ztocs }
    }

    fn copy(layout: &Path) -> Self {
        let folder = TempDir::with_prefix("socinbd-image-").unwrap();
        link(layout, folder.path());
        Self { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A registry that has it as `app:latest`, and the index if one was made.
    pub fn serve(&self) -> Registry {
        let registry = Registry::start();
        registry.add_layout("app", self.path()).unwrap();
        registry
    }

    /// A zTOC of its index.
    pub fn ztoc(&self, digest: &Digest) -> Ztoc {
        Ztoc::parse(&fs::read(self.blob(digest)).unwrap()).unwrap()
    }

    /// The layers, the lowest first.
    pub fn layers(&self) -> Vec<RealLayer> {
        let index: Value = self.json(&self.path().join("index.json"));
        let manifests = index["manifests"].as_array().unwrap();
        let tagged = |manifest: &&Value| {
            !manifest["annotations"]["org.opencontainers.image.ref.name"].is_null()
        };
        let manifest = digest(manifests.iter().find(tagged).unwrap());
        let manifest = self.json(&self.blob(&manifest));
        let layers = manifest["layers"].as_array().unwrap();
        let layer = |layer: &Value| RealLayer {
            digest: digest(layer),
            size: layer["size"].as_u64().unwrap(),
            media_type: layer["mediaType"].as_str().unwrap().to_owned(),
            blob: self.blob(&digest(layer)),
        };
        layers.iter().map(layer).collect()
    }

    /// Unpacks it with GNU tar, a layer after the other; of each layer first what its whiteouts remove.
    ///
    /// That keeps all that a tar says, parts of a second too (umoci drops those). Only the number of a file's links counts names that
    /// are there: on an overlay a removed name of a lower layer still counts.
    pub fn unpack(&self, into: &Path) {
        for layer in self.layers() {
            for name in layer.whiteouts() {
                let (folder, name) = name.rsplit_once('/').unwrap_or(("", &name));
                let folder = into.join(folder);
                if name == ".wh..wh..opq" {
                    for entry in fs::read_dir(&folder).into_iter().flatten() {
                        remove(&entry.unwrap().path());
                    }
                } else {
                    remove(&folder.join(&name[4..]));
                }
            }
            let before = stamp(into);
            layer.untar(into, &["--exclude=.wh.*"]);
            // a root that the tar only implies keeps its time; tar leaves it to the clock
            if !layer.names().iter().any(|name| name == "./") {
                restore(into, before);
            }
        }
    }

    /// Unpacks each layer into a folder of its own with GNU tar, turns whiteouts into what overlayfs knows, and mounts an overlay of them.
    pub fn overlay(&self, place: &Path) -> Overlay {
        let mut folders = Vec::new();
        for (number, layer) in self.layers().iter().enumerate() {
            let folder = place.join(format!("layer-{number}"));
            fs::create_dir_all(&folder).unwrap();
            layer.untar(&folder, &["--exclude=.wh.*"]);
            let whiteouts = layer.whiteouts();
            let opaque = |folder: &str| whiteouts.contains(&format!("{folder}/.wh..wh..opq"));
            for path in &whiteouts {
                let (parent, name) = path.rsplit_once('/').unwrap();
                let target = folder.join(parent).join(&name[4..]);
                let before = stamp(&folder.join(parent));
                if name == ".wh..wh..opq" {
                    xattr::set(folder.join(parent), "trusted.overlay.opaque", b"y").unwrap();
                } else if target.is_dir() && !target.is_symlink() {
                    xattr::set(&target, "trusted.overlay.opaque", b"y").unwrap();
                } else if !opaque(parent) && fs::symlink_metadata(&target).is_err() {
                    run(Command::new("mknod").arg(&target).args(["c", "0", "0"]));
                }
                restore(&folder.join(parent), before);
            }
            folders.insert(0, folder.display().to_string());
        }
        let mountpoint = place.join("overlay");
        fs::create_dir_all(&mountpoint).unwrap();
        let options = format!("lowerdir={}", folders.join(":"));
        run(Command::new("mount")
            .args(["-t", "overlay", "-o", &options, "overlay"])
            .arg(&mountpoint));
        Overlay(mountpoint)
    }

    /// Holds what is seen at `place` against the headers in the layers' own tars, for an image whose gzip layers have no whiteouts and name
    /// no path twice; with the content of what is below `content`. The number of entries looked at.
    pub fn check_entries(&self, place: &Path, content: Option<&Path>) -> usize {
        let mut count = 0;
        for layer in self.layers() {
            let blob = fs::File::open(&layer.blob).unwrap();
            let mut tar = tar::Archive::new(flate2::read::MultiGzDecoder::new(blob));
            for entry in tar.entries().unwrap() {
                let mut entry = entry.unwrap();
                let path = entry_path(&entry.path_bytes()).to_owned();
                let below = content.is_none_or(|content| path.starts_with(content));
                if !below {
                    continue;
                }
                count += 1;
                let seen = fs::symlink_metadata(place.join(&path));
                let seen = seen.unwrap_or_else(|error| panic!("{path:?}: {error}"));
                let kind = entry.header().entry_type();
                let link = entry
                    .link_name_bytes()
                    .map(|link| entry_path(&link).to_owned());
                match kind {
                    tar::EntryType::Regular => assert_eq!(seen.size(), entry.size(), "{path:?}"),
                    tar::EntryType::Symlink => {
                        let link = std::ffi::OsString::from_vec(
                            entry.link_name_bytes().unwrap().into_owned(),
                        );
                        assert_eq!(fs::read_link(place.join(&path)).unwrap(), link, "{path:?}");
                    }
                    tar::EntryType::Link => {
                        let target = fs::symlink_metadata(place.join(link.unwrap())).unwrap();
                        assert_eq!(seen.ino(), target.ino(), "{path:?}");
                        continue;
                    }
                    tar::EntryType::Directory => assert!(seen.is_dir(), "{path:?}"),
                    other => panic!("{path:?}: {other:?}"),
                }
                assert_eq!(kind == tar::EntryType::Regular, seen.is_file(), "{path:?}");
                let header = entry.header();
                let expected = (
                    header.mode().unwrap(),
                    header.uid().unwrap(),
                    header.gid().unwrap(),
                    header.mtime().unwrap(),
                );
                let seen = (
                    seen.mode() & 0o7777,
                    u64::from(seen.uid()),
                    u64::from(seen.gid()),
                    seen.mtime() as u64,
                );
                assert_eq!(seen, expected, "{path:?}");
                if content.is_some() && kind == tar::EntryType::Regular {
                    let mut expected = Vec::new();
                    std::io::Read::read_to_end(&mut entry, &mut expected).unwrap();
                    assert!(fs::read(place.join(&path)).unwrap() == expected, "{path:?}");
                }
            }
        }
        count
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }

    fn json(&self, path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }
}

impl RealLayer {
    /// The paths of its whiteouts as they stand in the tar, without a leading `./`.
    fn whiteouts(&self) -> Vec<String> {
        let names = self.names();
        let whiteouts = names.iter().filter(|name| name.contains("/.wh."));
        whiteouts
            .map(|name| name.trim_start_matches("./").to_owned())
            .collect()
    }

    /// The names in the tar, as GNU tar lists them. A layer is listed once: that is to decompress it.
    fn names(&self) -> Arc<Vec<String>> {
        static LISTED: Mutex<BTreeMap<String, Arc<Vec<String>>>> = Mutex::new(BTreeMap::new());
        let known = LISTED.lock().unwrap().get(&self.digest.hex()).cloned();
        known.unwrap_or_else(|| {
            let output = self.tar(&["-t", "--quoting-style=literal"]);
            let names = String::from_utf8_lossy(&output);
            let names = Arc::new(names.lines().map(str::to_owned).collect());
            let mut listed = LISTED.lock().unwrap();
            listed.insert(self.digest.hex(), Arc::clone(&names));
            names
        })
    }

    fn untar(&self, into: &Path, options: &[&str]) {
        let into = format!("--directory={}", into.display());
        let usual = [
            "-xp",
            "--numeric-owner",
            "--same-owner",
            "--xattrs",
            "--xattrs-include=*",
            &into,
        ];
        self.tar(&[&usual, options].concat());
    }

    fn tar(&self, arguments: &[&str]) -> Vec<u8> {
        let decoder = match self.media_type.rsplit_once('+') {
            Some((_, "gzip")) => "pigz",
            Some((_, "zstd")) => "zstd",
            _ => "cat",
        };
        let mut decode = Command::new(decoder);
        if decoder != "cat" {
            decode.arg("-dc");
        }
        let blob = fs::File::open(&self.blob).unwrap();
        let mut decode = decode.stdin(blob).stdout(Stdio::piped()).spawn().unwrap();
        let output = Command::new("tar")
            .args(arguments)
            .stdin(decode.stdout.take().unwrap())
            .output()
            .expect("this test needs GNU tar");
        let _ = decode.wait();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tar {arguments:?}: {error}");
        output.stdout
    }
}

/// A mounted overlay of plain folders; unmounted when dropped.
pub struct Overlay(pub PathBuf);

impl Drop for Overlay {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

/// The path of an entry as the tar has it, without `./` at its start.
pub fn entry_path(name: &[u8]) -> &Path {
    let name = name.strip_prefix(b"./").unwrap_or(name);
    Path::new(std::ffi::OsStr::from_bytes(name))
}

/// The layout of an image that `scripts/test-images` has made.
fn cached(name: &str) -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = || variable("XDG_CACHE_HOME").or(Some(variable("HOME")?.join(".cache")));
    let images = variable("SOCINBD_TEST_IMAGES")
        .or_else(|| Some(cache()?.join("socinbd/images")))
        .expect("HOME is set");
    let image = images.join(name);
    assert!(
        image.join("index.json").exists(),
        "{} is not there: run scripts/test-images",
        image.display()
    );
    image
}

/// Makes a copy of a layout, whose blobs are links.
fn link(layout: &Path, copy: &Path) {
    for file in ["index.json", "oci-layout"] {
        fs::copy(layout.join(file), copy.join(file)).unwrap();
    }
    let blobs = copy.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    for blob in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap();
        let target = blob.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(target, blobs.join(blob.file_name())).unwrap();
    }
}

fn digest(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

fn stamp(folder: &Path) -> std::time::SystemTime {
    fs::metadata(folder).unwrap().modified().unwrap()
}

fn restore(folder: &Path, time: std::time::SystemTime) {
    fs::File::open(folder).unwrap().set_modified(time).unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
