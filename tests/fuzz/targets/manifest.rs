//! Any bytes as each of the documents that a registry has, and as what a person writes on a command line.

#![no_main]

use libfuzzer_sys::fuzz_target;
use socinbd::{
    oci::{ImageConfig, Platform, Reference, artifact, manifest, platform},
    soci::{index::IndexManifest, prefetch::Prefetch},
};

const TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "",
];

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    match choice >> 5 {
        0 => {
            let media_type = TYPES[usize::from(choice & 3)];
            artifact::what_is(bytes, media_type);
            if let Ok(manifest::Document::Index(index, _)) = manifest::parse(bytes, media_type) {
                let host = Platform::host();
                for candidate in platform::candidates(&index) {
                    let _ = candidate.platform.map(|offered| host.rank(&offered));
                }
            }
        }
        1 => drop(ImageConfig::parse(bytes, usize::from(choice & 7))),
        2 => {
            if let Ok(index) = IndexManifest::parse(bytes) {
                // what Go reads it can write again, and means the same
                let again = index.to_bytes().expect("it can be written");
                let again = IndexManifest::parse(&again).expect("and read");
                assert_eq!(again.layers.len(), index.layers.len());
            }
        }
        3 => {
            if let Ok(prefetch) = Prefetch::parse(bytes) {
                let runs = prefetch.runs(1000);
                assert!(runs.iter().all(|run| run.start < run.end && run.end.get() <= 1000));
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(bytes) else {
                return;
            };
            if let Ok(reference) = text.parse::<Reference>() {
                let again: Reference = reference.to_string().parse().expect("its own name");
                assert_eq!(again, reference);
            }
            if let Ok(platform) = text.parse::<Platform>() {
                platform.rank(&Platform::host());
            }
        }
    }
});
