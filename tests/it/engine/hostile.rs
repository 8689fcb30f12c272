//! Images whose SOCI index lies.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use serde_json::{Value, json};
use socinbd::{
    oci::{Digest, Packing},
    soci::build::{LayerIndexer, NoSink, Options},
    tar::{Entry, EntryKind},
    units::LayerOffset,
};

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MANIFEST, MadeLayout, gzip, tar_of},
    support::{registry::Registry, ztocs::with_entries},
};

const SOCI_V1: &str = "application/vnd.amazon.soci.index.v1+json";

/// Text that is not all the same, and not long when compressed.
pub fn text(name: &str, length: usize) -> Vec<u8> {
    let lines = (0_u64..).flat_map(|number| {
        let number = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        format!("{name} {number:x}\n").into_bytes()
    });
    lines.take(length).collect()
}

/// The zTOC of a gzip layer in spans of about 64 KiB.
pub fn ztoc(blob: &[u8]) -> Vec<u8> {
    let options = Options {
        span_size: 64 << 10,
        ..Options::default()
    };
    let mut indexer = LayerIndexer::new(Packing::Gzip, options, NoSink);
    indexer.write(blob).unwrap();
    indexer.finish().unwrap().0.ztoc.unwrap().unwrap()
}

/// An image of one layer, and an index of version 1 with this zTOC pushed beside it.
pub fn layout(tar: &[u8], ztoc: &[u8]) -> MadeLayout {
    let mut layout = MadeLayout::new();
    let image = layout.image("amd64", &[(GZIP_LAYER, tar.to_vec())]);
    layout.tag(&image, "latest");
    let mut ztoc = layout.blob("application/octet-stream", ztoc);
    ztoc["annotations"] = json!({"com.amazon.soci.image-layer-digest": Digest::of(&gzip(tar))});
    let index = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": layout.blob(SOCI_V1, b"{}"),
        "layers": [ztoc],
        "subject": image,
    });
    let mut index = layout.blob(MANIFEST, index.to_string().as_bytes());
    index["artifactType"] = json!(SOCI_V1);
    layout.list(&index);
    layout
}

/// What `why --json` prints of the one attachment there.
fn why(host: &Host, what: &str) -> Value {
    let mut all: Vec<Value> = serde_json::from_str(&host.run(&["--json", "why", what])).unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn assert_file(path: &Path, mode: u32, content: &[u8]) {
    assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, mode);
    assert!(fs::read(path).unwrap() == content, "{}", path.display());
}

/// The layer has a shell, and a text file; the table says that the text file is the shell, with a setuid bit.
#[test]
fn an_honest_image_with_the_layer_of_a_lying_index_is_right() {
    let (shell, motd) = (text("shell", 300_000), text("motd", 200_000));
    let after = text("after", 400_000);
    let tar = tar_of(&[
        ("bin/sh", &shell),
        ("etc/motd", &motd),
        ("usr/after", &after),
    ]);
    let honest = ztoc(&gzip(&tar));
    let lying = with_entries(&honest, |entries| {
        let place = |name: &[u8]| entries.iter().position(|entry| entry.name == name);
        let (sh, motd) = (place(b"bin/sh").unwrap(), place(b"etc/motd").unwrap());
        entries[sh].name = b"etc/motd".to_vec();
        entries[sh].mode = 0o4755;
        entries[motd].name = b"bin/sh".to_vec();
    });
    let registry = Registry::start();
    for (repository, ztoc) in [("lying", &lying), ("honest", &honest)] {
        let layout = layout(&tar, ztoc);
        registry.add_layout(repository, layout.path()).unwrap();
    }
    let host = Host::new();
    let reference = |repository| registry.reference(repository);
    let (first, second, third) = (
        host.mountpoint("lying"),
        host.mountpoint("honest"),
        host.mountpoint("whole"),
    );

    let attached = host.attach(&reference("lying"), &first, &[]);
    assert_eq!(attached["layers"][0]["basis"], json!({"from": "ztoc"}));
    assert_eq!(attached["index"]["origin"], "referrer");
    let error = fs::read(first.join("etc/motd")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "EIO: {error}");
    let told = why(&host, first.to_str().unwrap());
    let layer = &told["layers"][0];
    assert_eq!(
        (&told["state"], &layer["state"]),
        (&json!("degraded"), &json!("degraded"))
    );
    assert_eq!(layer["reasons"][0]["span"], 0);
    let reason = layer["reasons"][0]["message"].as_str().unwrap();
    for part in [
        &Digest::of(&lying).to_string(),
        "has another name than the zTOC",
    ] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    let words = host.run(&["why", &reference("lying")]);
    for part in ["degraded, span 0: ", "SOCI v1, referrer", "lazy, with zTOC"] {
        assert!(words.contains(part), "{part}: {words}");
    }

    // the honest image, while the other one is attached
    let attached = host.attach(&reference("honest"), &second, &[]);
    assert_eq!(attached["layers"][0]["basis"], json!({"from": "ztoc"}));
    let none = host.attach(&reference("lying"), &third, &["--index-policy", "none"]);
    assert_eq!(none["layers"][0]["basis"]["from"], "whole");
    let because = none["layers"][0]["basis"]["why"].as_str().unwrap();
    assert!(because.contains("--index-policy none"), "{because}");
    for mountpoint in [&second, &third] {
        assert_file(&mountpoint.join("bin/sh"), 0o644, &shell);
        assert_file(&mountpoint.join("etc/motd"), 0o644, &motd);
        assert_file(&mountpoint.join("usr/after"), 0o644, &after);
    }
    for mountpoint in [&second, &third] {
        let told = why(&host, mountpoint.to_str().unwrap());
        assert_ne!(told["state"], "degraded", "{told}");
        assert_eq!(told["layers"][0]["reasons"], json!([]));
    }
    assert!(fs::read(first.join("etc/motd")).is_err());
    for mountpoint in [first, second, third] {
        host.detach(&mountpoint);
    }
    assert_eq!(host.left_over(), [""; 0]);
}

/// An entry of no size behind all others.
fn add(entries: &mut Vec<Entry>, kind: EntryKind, name: String, target: &str) {
    let last = entries.last().unwrap();
    entries.push(Entry {
        name: name.into_bytes(),
        kind,
        linkname: target.as_bytes().to_vec(),
        data_offset: LayerOffset(last.data_offset.get() + 512),
        size: 0,
        ..last.clone()
    });
}

/// A table that costs little to write and would cost much to lay out: a gigabyte of address space and a minute of one core are enough to
/// refuse it, and to unpack the layer without it.
#[test]
fn a_table_that_is_a_bomb_costs_no_more_than_the_layer() {
    type Bomb = fn(&mut Vec<Entry>);
    let bombs: [(&str, Bomb); 3] = [
        ("the layer implies more than", |entries| {
            for number in 0..2000 {
                let path = format!("{number:03}/").repeat(1000);
                add(entries, EntryKind::Fifo, path + "x", "");
            }
        }),
        ("hard links; the limit is", |entries| {
            for number in 0..70_000 {
                add(entries, EntryKind::Hardlink, format!("l{number}"), "big");
            }
        }),
        ("symlinks takes more than", |entries| {
            for number in 0..39 {
                // 800 steps each
                let next = format!("{}s{}", "s39/../".repeat(400), number + 1);
                add(entries, EntryKind::Symlink, format!("s{number}"), &next);
            }
            add(entries, EntryKind::Directory, "s39".to_owned(), "");
            for number in 0..3000 {
                // another parent each time
                let parent = number % 39;
                add(entries, EntryKind::Fifo, format!("s{parent}/{number}"), "");
            }
        }),
    ];
    // as much layer as the entries would need
    let tar = tar_of(&[("big", &vec![0; 40_000_000])]);
    let honest = ztoc(&gzip(&tar));
    for (why, bomb) in bombs {
        let lying = with_entries(&honest, |entries| {
            entries[0].size = 512;
            add(entries, EntryKind::Fifo, "first".to_owned(), "");
            entries[1].data_offset = LayerOffset(2048);
            bomb(entries);
        });
        let layout = layout(&tar, &lying);
        let host = Host::new();
        let socket = host.mountpoint("run").join("nbd.sock");
        let program = host.command(&[
            "serve",
            &layout.reference("latest"),
            "--socket",
            socket.to_str().unwrap(),
            "--run",
            "nbdinfo --size \"$uri\"",
        ]);
        let mut limited = Command::new("prlimit");
        limited.args(["--as=1073741824", "--cpu=60", "--"]);
        limited.arg(program.get_program()).args(program.get_args());
        // the C library would reserve address space for each thread
        let output = limited.env("MALLOC_ARENA_MAX", "1").output();
        let output = output.expect("this test needs prlimit (util-linux)");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{why}: {} {error}", output.status);
        assert!(
            error.contains("is not lazy") && error.contains(why),
            "{why}: {error}"
        );
    }
}

#[test]
fn why_of_what_is_not_attached_says_where_to_look() {
    let host = Host::new();
    let error = host.fail(&["why", "/nowhere"], 3);
    assert!(error.contains("socinbd list"), "{error}");
    let error = host.fail(&["why", "registry.example/app"], 3);
    assert!(error.contains("socinbd inspect"), "{error}");
}
