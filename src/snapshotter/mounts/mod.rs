//! The mounts that containerd makes of a snapshot.
//!
//! Lower layers are directories, which one overlay over them names. Or some are devices: then there is a mount for each lower layer and for the
//! directory of the snapshot, and an overlay over these mounts, by containerd's mount manager (2.2 and later; `docs/mounts.md` there). All that
//! the overlay names is in these mounts, so that the paths have a common beginning: containerd leaves it out of options that are longer than a
//! page, and maps the owners of all that is below it.

pub(super) mod owners;

use std::path::Path;

use super::proto::types::Mount;
use crate::{engine::attach::stack::directories::LayerPlace, kernel::mount::idmap::IdMaps};

/// The directory with the content of a snapshot, in its directory: what was written, or the mount of a lazy layer.
pub(super) const CONTENT: &str = "fs";
/// The working directory of overlayfs.
pub(super) const WORK: &str = "work";

/// Characters that a path in an option of overlayfs must not have.
pub(super) const RESERVED: [char; 3] = [',', ':', '\\'];
/// What containerd's mount manager replaces in options.
pub(super) const TEMPLATE: &str = "{{";

/// Mounts that containerd's mount manager makes, at most.
pub(super) const MAX_MANAGED: usize = 256;

/// As for the mounts of `attach`: one device number for all files, and nothing that an image says is believed as a mark of overlayfs.
const OPTIONS: [&str; 3] = ["xino=on", "metacopy=off", "index=off"];

/// The lower layers of a snapshot.
pub(super) struct Lowers {
    /// Topmost first.
    pub(super) places: Vec<LayerPlace>,
    /// The maps that containerd is to apply to them.
    pub(super) maps: Option<IdMaps>,
}

impl Lowers {
    /// Whether containerd mounts one of them.
    pub(super) fn has_device(&self) -> bool {
        let mut places = self.places.iter();
        places.any(|place| matches!(place, LayerPlace::Device(_)))
    }
}

/// The mounts of an active snapshot with its directory.
pub(super) fn active(directory: &Path, lowers: &Lowers) -> Vec<Mount> {
    if lowers.places.is_empty() {
        return vec![bind(&directory.join(CONTENT), "rw")];
    }
    stack(lowers, Some(directory))
}

/// The mounts of an active snapshot that gets its parent when it is committed. containerd does not make this mount: it extracts to the upper
/// directory, and writes whiteouts as overlayfs has them because the mount is an overlay.
pub(super) fn rebased(directory: &Path) -> Vec<Mount> {
    let upper = format!("upperdir={}", directory.join(CONTENT).display());
    vec![overlay("overlay", vec!["rw".to_owned(), upper])]
}

/// The mounts of a view with its directory.
pub(super) fn view(directory: &Path, lowers: &Lowers) -> Vec<Mount> {
    match &lowers.places[..] {
        [] => vec![bind(&directory.join(CONTENT), "ro")],
        [one] => {
            let mut mount = lower(one);
            mount.options.extend(owners(lowers));
            vec![mount]
        }
        _ => stack(lowers, None),
    }
}

/// The mount of an active snapshot whose content is complete: that it is read-only tells containerd so.
pub(super) fn staged(directory: &Path) -> Vec<Mount> {
    vec![bind(&directory.join(CONTENT), "ro")]
}

/// An overlay, and the mounts that it needs. `writable`: the directory of a snapshot that is written to.
fn stack(lowers: &Lowers, writable: Option<&Path>) -> Vec<Mount> {
    let mut options = OPTIONS.map(str::to_owned).to_vec();
    let mut own = |directory: &str| {
        let own = [("workdir", WORK), ("upperdir", CONTENT)];
        options.extend(own.map(|(option, name)| format!("{option}={directory}/{name}")));
    };
    if !lowers.has_device() {
        if let Some(directory) = writable {
            own(&directory.display().to_string());
        }
        let paths = lowers.places.iter();
        let paths: Vec<_> = paths.map(|it| it.path().display().to_string()).collect();
        options.push(format!("lowerdir={}", paths.join(":")));
        return vec![overlay("overlay", options)];
    }
    let mut mounts = Vec::new();
    if let Some(directory) = writable {
        own("{{ mount 0 }}");
        mounts.push(bind(directory, "rw"));
    }
    options.extend(owners(lowers));
    let first = mounts.len();
    options.push(match lowers.places.len() {
        1 => format!("lowerdir={{{{ mount {first} }}}}"),
        count => {
            let last = first + count.saturating_sub(1);
            format!("lowerdir={{{{ overlay {first} {last} }}}}")
        }
    });
    mounts.extend(lowers.places.iter().map(lower));
    mounts.push(overlay("format/overlay", options));
    mounts
}

/// The mount of a lower layer.
fn lower(place: &LayerPlace) -> Mount {
    match place {
        LayerPlace::Directory(path) => bind(path, "ro"),
        LayerPlace::Device(device) => Mount {
            r#type: "ext4".to_owned(),
            source: device.display().to_string(),
            target: String::new(),
            // as the daemon mounts it
            options: ["ro", "nodev", "errors=continue"]
                .map(str::to_owned)
                .to_vec(),
        },
    }
}

/// The options with which containerd maps the owners of lower layers.
fn owners(lowers: &Lowers) -> Vec<String> {
    let maps = lowers.maps.iter().flat_map(|maps| {
        let [users, groups] = maps.texts();
        [format!("uidmap={users}"), format!("gidmap={groups}")]
    });
    maps.collect()
}

fn bind(source: &Path, access: &str) -> Mount {
    Mount {
        r#type: "bind".to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options: vec![access.to_owned(), "rbind".to_owned()],
    }
}

fn overlay(kind: &str, options: Vec<String>) -> Mount {
    Mount {
        r#type: kind.to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options,
    }
}
