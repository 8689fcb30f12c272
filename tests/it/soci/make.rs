//! Layouts for tests, made from nothing.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use socinbd::oci::Digest;
use tempfile::TempDir;

use crate::support::tars::Layer;

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A layout in a folder of its own, written as it grows.
pub struct MadeLayout {
    folder: TempDir,
    entries: Vec<Value>,
}

impl MadeLayout {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
        fs::write(
            folder.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        let made = Self {
            folder,
            entries: Vec::new(),
        };
        made.write_index();
        made
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// `oci:DIR`, with a tag.
    pub fn reference(&self, tag: &str) -> String {
        match tag {
            "" => format!("oci:{}", self.path().display()),
            tag => format!("oci:{}:{tag}", self.path().display()),
        }
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }

    /// Adds a blob and gives its descriptor.
    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// Adds the manifest of an image of these tars (packed as their media types say) and gives its descriptor.
    pub fn image(&self, architecture: &str, layers: &[(&str, Vec<u8>)]) -> Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|(_, tar)| Digest::of(tar)).collect();
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let layers: Vec<Value> = layers
            .iter()
            .map(|(media_type, tar)| match *media_type {
                GZIP_LAYER => self.blob(media_type, &gzip(tar)),
                "application/vnd.oci.image.layer.v1.tar+zstd" => {
                    self.blob(media_type, &zstd::encode_all(&tar[..], 3).unwrap())
                }
                _ => self.blob(media_type, tar),
            })
            .collect();
        self.manifest(
            &self.blob(
                "application/vnd.oci.image.config.v1+json",
                config.to_string().as_bytes(),
            ),
            &layers,
        )
    }

    /// A layout with an image of these gzip layers, the lowest first, tagged `latest`.
    pub fn of(layers: Vec<Layer>) -> Self {
        let mut layout = Self::new();
        let layers: Vec<_> = layers
            .into_iter()
            .map(|layer| (GZIP_LAYER, layer.tar()))
            .collect();
        let image = layout.image("amd64", &layers);
        layout.tag(&image, "latest");
        layout
    }

    pub fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    pub fn index(&self, manifests: &[Value]) -> Value {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        self.blob(INDEX, index.to_string().as_bytes())
    }

    /// Lists a descriptor in `index.json`, under a tag.
    pub fn tag(&mut self, descriptor: &Value, tag: &str) {
        let mut entry = descriptor.clone();
        entry["annotations"][REF_NAME] = json!(tag);
        self.list(&entry);
    }

    /// Lists a descriptor in `index.json` as it is.
    pub fn list(&mut self, descriptor: &Value) {
        self.entries.push(descriptor.clone());
        self.write_index();
    }

    fn write_index(&self) {
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// The same layout as a tar file, its members' names with a prefix.
    pub fn packed(&self, prefix: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut archive = tar::Builder::new(&mut file);
        let mut names = vec!["oci-layout".to_owned(), "index.json".to_owned()];
        for blob in fs::read_dir(self.path().join("blobs/sha256")).unwrap() {
            let name = blob.unwrap().file_name().into_string().unwrap();
            names.push(format!("blobs/sha256/{name}"));
        }
        for name in names {
            let bytes = fs::read(self.path().join(&name)).unwrap();
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            let packed = format!("{prefix}{name}");
            // the crate's own setters clean a leading "./" away
            header.as_old_mut().name[..packed.len()].copy_from_slice(packed.as_bytes());
            header.set_cksum();
            archive.append(&header, &bytes[..]).unwrap();
        }
        archive.finish().unwrap();
        drop(archive);
        file.flush().unwrap();
        file
    }
}

/// The digest of a descriptor.
pub fn digest(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(2));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A tar of these regular files.
pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        header.set_cksum();
        archive.append_data(&mut header, name, *bytes).unwrap();
    }
    archive.into_inner().unwrap()
}
