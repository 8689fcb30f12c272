//! Devices and mounts on the running kernel. They need root.

mod dm;
mod fuse;
mod fuse_kept;
mod kept;
mod loopdev;
mod mounts;
mod namespace;
mod nbd;
mod vm;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{succeeds, wait};

/// Makes an ext4 image from a directory, as a layer's disk is: 4 KiB blocks, no journal.
pub(crate) fn ext4_image(from: &Path, image: &Path) -> PathBuf {
    succeeds(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-d"])
            .args([from, image])
            .arg("8M"),
    );
    image.to_owned()
}

/// An ext4 image that holds these files.
pub(crate) fn image_of(folder: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let tree = folder.join(format!("{name}.tree"));
    std::fs::create_dir(&tree).unwrap();
    for (path, content) in files {
        let path = tree.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    ext4_image(&tree, &folder.join(name))
}

/// Waits for a condition that is to come true by itself soon.
#[track_caller]
pub(crate) fn eventually(condition: impl FnMut() -> bool) {
    wait("the condition comes true", condition);
}
