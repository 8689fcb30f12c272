//! `socinbd check`, beside a daemon and without one.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::Host;
use crate::{
    soci::make::{GZIP_LAYER, MadeLayout, tar_of},
    support::{registry::Registry, seeded_noise as noise},
};

/// Every disk below a folder.
fn disks(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(disks(&path)),
            path if path.ends_with("disk.ext4") => found.push(path),
            _ => {}
        }
    }
    found
}

/// Where a file is on a disk that has it: at the start of a block.
fn place(disk: &[u8], file: &[u8]) -> Option<usize> {
    let start = &file[..file.len().min(4096)];
    let mut blocks = disk.chunks(4096);
    Some(blocks.position(|block| block.starts_with(start))? * 4096)
}

/// Flips a bit of the byte that a file has there.
fn rot(disk: &Path, file: &[u8], at: usize) {
    let start = place(&fs::read(disk).unwrap(), file).expect("the disk has the file");
    let disk = fs::OpenOptions::new().write(true).open(disk).unwrap();
    disk.write_all_at(&[file[at] ^ 1], (start + at) as u64)
        .unwrap();
}

const SMALL: &[u8] = b"so few bytes\n";

#[test]
fn what_rots_is_found_and_mended_attached_or_not() {
    let host = Host::new();
    let (first, second) = (noise(300_000, 1), noise(200_000, 2));
    let mut layout = MadeLayout::new();
    let indexed = (
        GZIP_LAYER,
        tar_of(&[("first", &first), ("second", &second)]),
    );
    // too small for a zTOC: it is streamed
    let small = (GZIP_LAYER, tar_of(&[("small", SMALL)]));
    let image = layout.image("amd64", &[indexed, small]);
    layout.tag(&image, "latest");
    host.run(&[
        "index",
        "create",
        &layout.reference(""),
        "--span-size",
        "65536",
        "--min-layer-size",
        "100000",
    ]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let image = registry.reference("app");
    let mountpoint = host.mountpoint("mnt");
    host.attach(&image, &mountpoint, &[]);
    assert_eq!(fs::read(mountpoint.join("first")).unwrap(), first);
    assert_eq!(fs::read(mountpoint.join("second")).unwrap(), second);
    host.wait_complete(&mountpoint);

    let check = |arguments: &[&str], status| -> Vec<Value> {
        let output = host.output(&[&["--json", "check"], arguments].concat());
        let (text, error) = (
            output.stdout,
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        assert_eq!(output.status.code(), Some(status), "{error}");
        serde_json::from_slice(&text).unwrap()
    };
    let mend = |arguments: &[&str]| {
        assert_eq!(check(arguments, 0).len(), 2);
        let before: Vec<_> = disks(&host.root())
            .iter()
            .map(|it| fs::read(it).unwrap())
            .collect();
        for disk in disks(&host.root()) {
            let content = fs::read(&disk).unwrap();
            match place(&content, SMALL) {
                Some(_) => rot(&disk, SMALL, 0),
                None => rot(&disk, &second, 100_000),
            }
        }
        let found = check(arguments, 10);
        assert!(
            found.iter().all(|it| it["repaired"][0].is_string()),
            "{found:?}"
        );
        let after: Vec<_> = disks(&host.root())
            .iter()
            .map(|it| fs::read(it).unwrap())
            .collect();
        assert!(before == after);
        check(arguments, 0);
    };
    mend(&["--all"]);
    assert_eq!(fs::read(mountpoint.join("second")).unwrap(), second);
    host.detach(&mountpoint);
    mend(&[&image]);
    host.end_daemon();
    mend(&["--all"]);
    mend(&[&image]);

    // without a source it says what is wrong
    drop(registry);
    let indexed = disks(&host.root())
        .into_iter()
        .find(|disk| fs::metadata(disk.with_file_name("ztoc")).is_ok())
        .unwrap();
    rot(&indexed, &second, 100_000);
    let layer = indexed.ancestors().nth(2).unwrap().file_name().unwrap();
    let layer = format!("sha256:{}", layer.to_str().unwrap());
    let found = check(&[&layer], 7);
    assert!(found[0]["wrong"][0].as_str().unwrap().contains("disk.ext4"));
    let unknown = format!("sha256:{}", "0".repeat(64));
    let error = host.fail(&["check", &unknown], 3);
    assert!(error.contains("there is no disk of"), "{error}");
    host.fail(&["check"], 2);
}
