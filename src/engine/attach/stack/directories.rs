//! The corrections of an overlay that another program makes, of layers that are at paths or on devices.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

use super::{MountedLayer, layer_tree::LayerTree as _, make_top, plan};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    kernel::mount,
    layer::StackingFacts,
};

/// Where the content of a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LayerPlace {
    /// A directory, or the mount of a file system there.
    Directory(PathBuf),
    /// The root of the ext4 file system of a block device, which the other program mounts.
    Device(PathBuf),
}

/// A layer that the overlay has.
pub(crate) struct PlacedLayer {
    /// Its content.
    pub(crate) place: LayerPlace,
    /// The default for a directory: the program that has written it has made its attributes.
    pub(crate) facts: StackingFacts,
}

/// What an overlay of placed layers needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Corrections {
    /// Number of layers to stack, counted from the topmost.
    pub(crate) layers: usize,
    /// Whether the top tree was made. It is to be stacked on top of the layers.
    pub(crate) has_top: bool,
}

/// Plans the overlay of these layers, topmost first, none of them twice, and makes its top tree at `top` if it needs one. Blocks.
pub(crate) fn make_corrections(layers: &[PlacedLayer], top: &Path) -> Result<Corrections> {
    let roots: Vec<OwnedFd> = layers
        .iter()
        .map(|layer| layer.place.open())
        .collect::<Result<_>>()?;
    let mounted: Vec<MountedLayer<'_>> = roots
        .iter()
        .zip(layers)
        .map(|(root, layer)| MountedLayer {
            root: root.as_fd(),
            facts: layer.facts.clone(),
        })
        .collect();
    let plan = plan(&mounted).or_kind(Kind::Kernel, || {
        "reading the directories of the layers".into()
    })?;
    if !plan.top.is_empty() {
        make_top(top, &plan)?;
    }
    Ok(Corrections {
        layers: plan.layers,
        has_top: !plan.top.is_empty(),
    })
}

/// Gives a directory the attributes of another one: mode, owner, times, and extended attributes without those of overlayfs. Blocks.
pub(crate) fn copy_attributes(from: &LayerPlace, to: &Path) -> Result<()> {
    let root = from.open()?;
    let from_root = MountedLayer {
        root: root.as_fd(),
        facts: StackingFacts::default(),
    };
    let context = || format!("copying the attributes of {}", from.path().display());
    let found = from_root.look(b"").or_kind(Kind::Kernel, context)?;
    let found = found.ok_or_else(|| Error::new(Kind::NotFound, context()))?;
    found.attributes.apply(to).or_kind(Kind::Io, context)
}

impl LayerPlace {
    /// The path of the directory or of the device.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Device(path) => path,
        }
    }

    /// Opens the root directory. A device is mounted where nobody sees it, as long as the descriptor is open.
    fn open(&self) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match self {
            Self::Directory(path) => rustix::fs::open(path, flags, Mode::empty())
                .or_kind(Kind::Kernel, || {
                    format!("opening the layer at {}", path.display())
                }),
            Self::Device(device) => mount::ext4(device),
        }
    }
}
