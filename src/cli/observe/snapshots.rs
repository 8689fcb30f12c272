//! The snapshots of containerd in `list` and `why`.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::layer_lines::{print_basis, print_devices, print_heading};
use crate::{
    api::client::Client,
    cli::{GlobalArgs, absolute, output},
    engine::{DiskBasis, SnapshotKind, SnapshotLayer, SnapshotStatus},
    error::Result,
    kernel::mount::info::{self, Mount},
};

/// All snapshots: those of the daemon, or, if no daemon answers, those of the records.
pub(super) async fn all(global: &GlobalArgs, client: &Client) -> Result<Vec<SnapshotStatus>> {
    match client.daemon().await? {
        Some(_) => client.snapshots().await,
        None => SnapshotStatus::without_daemon(&absolute(&global.root)?),
    }
}

/// The table of snapshots.
pub(super) fn text(snapshots: &[SnapshotStatus]) -> String {
    let dash = || "-".to_owned();
    let rows = snapshots.iter().map(|snapshot| {
        let layer = snapshot.layer.as_ref();
        let mounted = layer.and_then(|layer| layer.mounted.as_ref());
        [
            format!("{}/{}", snapshot.set, snapshot.number),
            kind(snapshot).to_owned(),
            match (layer, mounted) {
                (None, _) => "files".to_owned(),
                (Some(_), None) => "not mounted".to_owned(),
                (Some(_), Some(layer)) => layer.state.to_string(),
            },
            mounted.map_or_else(dash, |layer| layer.device.to_string()),
            mounted
                .and_then(|layer| layer.spans)
                .map_or_else(dash, |(present, all)| format!("{present}/{all}")),
            layer.map_or_else(dash, |layer| layer.image.to_string()),
            snapshot.name.clone(),
        ]
    });
    output::table_text(
        [
            "SNAPSHOT", "KIND", "CONTENT", "DEVICE", "SPANS", "IMAGE", "NAME",
        ],
        rows,
    )
}

fn kind(snapshot: &SnapshotStatus) -> &'static str {
    match snapshot.kind {
        SnapshotKind::Active => "active",
        SnapshotKind::View => "view",
        SnapshotKind::Committed => "committed",
    }
}

/// The snapshots that a text names, each with its parents: by number, name, chain ID, or the path of its directory or mount.
pub(super) fn named<'a>(
    all: &'a [SnapshotStatus],
    what: &str,
) -> Result<Vec<Vec<&'a SnapshotStatus>>> {
    let place = absolute(Path::new(what))?;
    let mounts = match place.exists() {
        true => info::own()?,
        false => Vec::new(),
    };
    let mount = info::topmost(&mounts, &place.canonicalize().unwrap_or(place.clone()));
    let is_named = |snapshot: &&SnapshotStatus| {
        let is_number = match what.rsplit_once('/') {
            Some((set, number)) => set == snapshot.set && is(number, snapshot.number),
            None => is(what, snapshot.number),
        };
        is_number
            || is_name(&snapshot.name, what)
            || snapshot
                .layer
                .as_ref()
                .is_some_and(|layer| layer.chain_id.to_string() == what)
            || place == snapshot.path
            || Some(&*place) == snapshot.path.parent()
            || mount.is_some_and(|mount| shows(mount, &snapshot.path, &mounts))
    };
    let found = all.iter().filter(is_named);
    Ok(found.map(|snapshot| chain(all, snapshot)).collect())
}

fn is(text: &str, number: u64) -> bool {
    text.parse() == Ok(number)
}

/// Whether a name of the snapshotter is that of a client: containerd puts its namespace and a number before it.
fn is_name(name: &str, what: &str) -> bool {
    let mut parts = name.splitn(3, '/');
    name == what || parts.nth(2) == Some(what)
}

/// Whether a mount shows the snapshot with this content: an overlay with it as the topmost directory, or the content itself.
fn shows(mount: &Mount, content: &Path, mounts: &[Mount]) -> bool {
    if mount.fs_type == "overlay" {
        return topmost(&mount.super_options).is_some_and(|path| content.ends_with(path));
    }
    let is_layer = info::topmost(mounts, content).is_some_and(|it| it.device == mount.device);
    let directory = content.parent().and_then(Path::parent);
    let set = directory.and_then(Path::parent);
    let relative = set.and_then(|set| content.strip_prefix(set).ok());
    is_layer || relative.is_some_and(|relative| mount.root.ends_with(relative))
}

/// The topmost directory of an overlay: its upper directory, or the first lower one. containerd leaves out what all begin with.
fn topmost(options: &OsStr) -> Option<PathBuf> {
    let options: Vec<&[u8]> = options.as_bytes().split(|byte| *byte == b',').collect();
    let of = |name: &str| {
        let mut options = options.iter();
        options.find_map(|option| option.strip_prefix(name.as_bytes()))
    };
    let upper = of("upperdir=");
    let path = upper.or_else(|| of("lowerdir=")?.split(|byte| *byte == b':').next())?;
    Some(PathBuf::from(OsStr::from_bytes(path)))
}

/// A snapshot and its parents, the snapshot first.
fn chain<'a>(all: &'a [SnapshotStatus], snapshot: &'a SnapshotStatus) -> Vec<&'a SnapshotStatus> {
    let mut chain = vec![snapshot];
    let mut next = snapshot;
    // a damaged record could be its own parent
    while let Some(parent) = &next.parent
        && chain.len() <= all.len()
    {
        let is_parent = |it: &&SnapshotStatus| it.set == snapshot.set && it.name == *parent;
        match all.iter().find(is_parent) {
            Some(found) => next = found,
            None => break,
        }
        chain.push(next);
    }
    chain
}

/// Prints a snapshot and its layers, topmost first.
pub(super) fn print(chain: &[&SnapshotStatus]) -> Result<()> {
    let Some(snapshot) = chain.first() else {
        return Ok(());
    };
    let (set, number, kind) = (&snapshot.set, snapshot.number, kind(snapshot));
    output::line(&format!(
        "snapshot {set}/{number} ({kind}): {}",
        snapshot.name
    ))?;
    chain.iter().try_for_each(|snapshot| match &snapshot.layer {
        Some(layer) => print_layer(snapshot, layer),
        None => print_directory(snapshot),
    })
}

fn print_layer(snapshot: &SnapshotStatus, layer: &SnapshotLayer) -> Result<()> {
    match &layer.mounted {
        Some(mounted) => {
            print_heading(&layer.digest, layer.size, &mounted.state, mounted.spans)?;
            output::line(&format!("  device: {}", mounted.device))?;
            print_devices(&mounted.devices)?;
            output::line(&format!("  mounted at {}", snapshot.path.display()))?;
            if let Some(why) = &mounted.why {
                output::line(&format!("  {why}"))?;
            }
        }
        None => {
            print_heading(&layer.digest, layer.size, &"not mounted", None)?;
            output::line("  no container has needed it since the start of the daemon")?;
        }
    }
    print_basis(&layer.basis, &layer.table)?;
    // a layer on a disk is there for this reason, which was printed
    let is_told = matches!(&layer.basis, DiskBasis::Whole { why } if *why == layer.chosen_by);
    if !layer.chosen_by.is_empty() && !is_told {
        output::line(&format!("  chosen: {}", layer.chosen_by))?;
    }
    output::line(&format!(
        "  of {}, manifest {}",
        layer.image, layer.manifest
    ))?;
    output::line(&format!("  chain ID {}", layer.chain_id))
}

fn print_directory(snapshot: &SnapshotStatus) -> Result<()> {
    let (kind, path) = (kind(snapshot), snapshot.path.display());
    output::line(&format!("{kind} files in {path}"))?;
    match &snapshot.why {
        Some(why) => output::line(&format!("  extracted by containerd: {why}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_directory_of_an_overlay() {
        let of = |options: &str| topmost(OsStr::new(options));
        let path = |path: &str| Some(PathBuf::from(path));
        assert_eq!(
            of("rw,lowerdir=2/fs:1/fs,upperdir=/r/3/fs,workdir=/r/3/work"),
            path("/r/3/fs")
        );
        assert_eq!(of("ro,lowerdir=2/fs:1/fs"), path("2/fs"));
        assert_eq!(of("ro"), None);
    }

    #[test]
    fn names_are_those_of_the_snapshotter_or_of_its_client() {
        assert!(is_name("k8s.io/12/sha256:ab", "sha256:ab"));
        assert!(is_name("k8s.io/12/a/b", "a/b"));
        assert!(is_name("k8s.io/12/a/b", "k8s.io/12/a/b"));
        assert!(!is_name("k8s.io/12/a/b", "b"));
        assert!(!is_name("/lazy/ab", "12"));
    }
}
