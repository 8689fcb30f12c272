//! The golden vectors: what AWS's tool makes and says (`tests/vectors/README.md`). `SOCI_VECTORS` names the folder of a larger set.

mod accepts;

mod mutations;
mod tars;
mod ztocs;

use std::path::{Path, PathBuf};

use serde_json::Value;
use socinbd::{
    tar::{Entry, EntryKind, Timestamp},
    units::LayerOffset,
};

/// A set of vectors and its list of cases.
pub(crate) struct Vectors {
    folder: PathBuf,
    index: Value,
}

/// A layer of the set.
#[derive(Clone)]
pub(crate) struct Layer<'a> {
    pub(crate) id: &'a str,
    vectors: &'a Vectors,
    /// The layer's case in `index.json`.
    pub(crate) case: &'a Value,
}

/// A zTOC of a layer, as AWS's tool made it or refused to.
pub(crate) struct ZtocCase<'a> {
    pub(crate) layer: Layer<'a>,
    /// The zTOC's case in `index.json`.
    pub(crate) case: &'a Value,
}

/// A broken or unusual file and what AWS's tool did with it.
pub(crate) struct AcceptCase<'a> {
    pub(crate) id: &'a str,
    /// `accepted`, `rejected: STAGE`, ...
    pub(crate) outcome: &'a str,
    vectors: &'a Vectors,
    pub(crate) case: &'a Value,
}

impl Vectors {
    /// The project's own set, or the one that `SOCI_VECTORS` names.
    pub(crate) fn open() -> Self {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
        let folder = std::env::var_os("SOCI_VECTORS").map_or(own, PathBuf::from);
        let index = json(&folder.join("index.json"));
        Self { folder, index }
    }

    pub(crate) fn layers(&self) -> impl Iterator<Item = Layer<'_>> {
        list(&self.index["layers"]).iter().map(|case| Layer {
            id: text(&case["id"]),
            vectors: self,
            case,
        })
    }

    /// One layer by its name.
    pub(crate) fn layer(&self, id: &str) -> Layer<'_> {
        self.layers()
            .find(|layer| layer.id == id)
            .unwrap_or_else(|| panic!("the set has no layer {id}"))
    }

    /// All zTOCs that AWS's tool made.
    pub(crate) fn ztocs(&self) -> impl Iterator<Item = ZtocCase<'_>> {
        self.layers()
            .flat_map(Layer::ztocs)
            .filter(|ztoc| ztoc.case.get("file").is_some())
    }

    /// Accept and reject cases of a kind: `ztoc`, `index` or `prefetch`.
    pub(crate) fn accepts(&self, kind: &str) -> impl Iterator<Item = AcceptCase<'_>> {
        list(&self.index["accepts"]["cases"])
            .iter()
            .filter(move |case| case["kind"] == kind)
            .map(|case| AcceptCase {
                id: text(&case["id"]),
                outcome: text(&case["outcome"]),
                vectors: self,
                case,
            })
    }

    /// Image cases.
    pub(crate) fn images(&self) -> &[Value] {
        list(&self.index["images"])
    }

    /// A file of the set by its path in `index.json`.
    pub(crate) fn path(&self, relative: &Value) -> PathBuf {
        self.folder.join(text(relative))
    }

    /// A file's bytes.
    pub(crate) fn read(&self, relative: &Value) -> Vec<u8> {
        let path = self.path(relative);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// A dump or another JSON file.
    pub(crate) fn json(&self, relative: &Value) -> Value {
        json(&self.path(relative))
    }
}

impl<'a> Layer<'a> {
    /// The blob.
    pub(crate) fn blob(&self) -> Vec<u8> {
        self.vectors.read(&self.case["file"])
    }

    /// `gzip`, `uncompressed` or `zstd`.
    pub(crate) fn compression(&self) -> &'a str {
        text(&self.case["compression"])
    }

    /// The truth of the layer; none for zstd.
    pub(crate) fn expected(&self) -> Option<Value> {
        let path = self.case.get("expected")?;
        Some(self.vectors.json(path))
    }

    /// What AWS's tool made of it, and refused to make.
    pub(crate) fn ztocs(self) -> impl Iterator<Item = ZtocCase<'a>> {
        list(&self.case["ztocs"]).iter().map(move |case| ZtocCase {
            layer: self.clone(),
            case,
        })
    }
}

impl ZtocCase<'_> {
    /// The file's name, for messages.
    pub(crate) fn name(&self) -> &str {
        self.case["file"].as_str().unwrap_or(self.layer.id)
    }

    /// The zTOC.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.layer.vectors.read(&self.case["file"])
    }

    /// What AWS's reader says of it, with its list of files.
    pub(crate) fn dump(&self) -> Value {
        self.layer.vectors.dump(&self.case["dump"])
    }
}

impl Vectors {
    fn dump(&self, path: &Value) -> Value {
        let mut dump = self.json(path);
        if let Some(other) = dump.get("files_same_as") {
            dump["files"] = self.json(other)["files"].take();
        }
        dump
    }
}

impl AcceptCase<'_> {
    /// The bytes: a file, or a base with some bytes overwritten.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let Some(patch) = self.case.get("patch") else {
            return self.vectors.read(&self.case["file"]);
        };
        let mut bytes = self.vectors.read(&patch["base"]);
        for change in list(&patch["replace"]) {
            let offset = usize::try_from(number(&change["offset"])).expect("an offset");
            let new = unhex(text(&change["hex"]));
            bytes[offset..offset + new.len()].copy_from_slice(&new);
        }
        bytes
    }

    /// The layer that a zTOC of these is for.
    pub(crate) fn layer(&self) -> Vec<u8> {
        self.vectors.read(&self.case["layer"])
    }
}

/// An entry of `expected/`, as the tar reader must give it: what Go's `archive/tar` sees, with a zTOC's rules for ids and sizes.
/// `None` for what is no file (PAX global headers).
pub(crate) fn expected_entry(from: &Value) -> Option<Entry> {
    let kind = match text(&from["typeflag"]) {
        "0" | "7" | "S" => EntryKind::Regular,
        "1" => EntryKind::Hardlink,
        "2" => EntryKind::Symlink,
        "3" => EntryKind::Char,
        "4" => EntryKind::Block,
        "5" => EntryKind::Directory,
        "6" => EntryKind::Fifo,
        _ => return None,
    };
    let time = list(&from["mtime_unix_ns"]);
    Some(Entry {
        mtime: Some(Timestamp {
            seconds: number(&time[0]),
            nanoseconds: u32::try_from(number(&time[1])).expect("nanoseconds"),
        }),
        ..entry(from, kind, "data_offset", "size")
    })
}

/// An entry of a zTOC's dump, as `Ztoc::parse` must give it. The time is to be compared as text.
pub(crate) fn dumped_entry(from: &Value) -> Entry {
    let kind = match text(&from["type"]) {
        "reg" => EntryKind::Regular,
        "hardlink" => EntryKind::Hardlink,
        "symlink" => EntryKind::Symlink,
        "char" => EntryKind::Char,
        "block" => EntryKind::Block,
        "dir" => EntryKind::Directory,
        "fifo" => EntryKind::Fifo,
        other => panic!("type {other}"),
    };
    entry(from, kind, "uncompressed_offset", "uncompressed_size")
}

fn entry(from: &Value, kind: EntryKind, offset: &str, size: &str) -> Entry {
    let unsigned = |value: &Value| u64::try_from(number(value)).expect("not negative");
    // ids are cut to 32 bits; only regular files have data, whatever a header says
    let id = |value: &Value| u32::try_from(number(value) & 0xffff_ffff).expect("32 bits");
    Entry {
        name: bytes_of(from, "name"),
        kind,
        data_offset: LayerOffset(unsigned(&from[offset])),
        size: match kind {
            EntryKind::Regular => unsigned(&from[size]),
            _ => 0,
        },
        linkname: bytes_of(from, "linkname"),
        mode: number(&from["mode"]),
        uid: id(&from["uid"]),
        gid: id(&from["gid"]),
        uname: bytes_of(from, "uname").into(),
        gname: bytes_of(from, "gname").into(),
        mtime: None,
        devmajor: number(&from["devmajor"]),
        devminor: number(&from["devminor"]),
        pax: from
            .get("pax")
            .map(list)
            .unwrap_or_default()
            .iter()
            .map(|record| (bytes_of(record, "key"), bytes_of(record, "value")))
            .collect(),
        sparse: None,
    }
}

/// A string field, or the base64 that stands in its place where it is not UTF-8.
pub(crate) fn bytes_of(from: &Value, name: &str) -> Vec<u8> {
    match from.get(name) {
        Some(value) => text(value).as_bytes().to_vec(),
        None => unbase64(text(&from[format!("{name}_b64")])),
    }
}

/// The list that must be here.
pub(crate) fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("{value} is no list"))
}

/// The text that must be here.
pub(crate) fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

/// The number that must be here.
pub(crate) fn number(value: &Value) -> i64 {
    value
        .as_i64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

fn json(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hex digits"))
        .collect()
}

fn unbase64(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => panic!("{text:?} is no base64"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).expect("eight bits"));
        }
    }
    bytes
}

/// 64 hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn base64_of_a_vector_is_read() {
    assert_eq!(unbase64("AP//YQ=="), b"\0\xff\xffa");
    assert_eq!(unbase64(""), b"");
}
