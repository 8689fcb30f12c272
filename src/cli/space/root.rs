//! The root that a command is about: through its daemon, or, if no daemon uses it, directly.

use std::path::PathBuf;

use crate::{
    api::{PinRequest, client::Client},
    blocking::blocking,
    cli::{GlobalArgs, absolute},
    engine::{
        AttachmentRecords, Disks,
        space::{
            image_record::ImageRecord,
            prune::{self, PruneReport, PruneRequest},
            usage::{self, SpaceReport},
        },
    },
    error::{Error, Kind, Result},
};

pub(super) enum Root {
    /// The daemon of the root.
    Daemon(Client),
    /// No daemon: this process has the lock of the root.
    Locked(Box<LockedRoot>),
}

pub(super) struct LockedRoot {
    root: PathBuf,
    disks: Disks,
    attachments: AttachmentRecords,
}

impl Root {
    pub(super) async fn open(global: &GlobalArgs) -> Result<Self> {
        let run_dir = absolute(&global.run_dir)?;
        let client = Client::new(&run_dir);
        let root = absolute(&global.root)?;
        // the daemon reports its root without symlinks
        let root = root.canonicalize().unwrap_or(root);
        match client.daemon().await? {
            Some(daemon) if daemon.root == root => Ok(Self::Daemon(client)),
            _ if !root.is_dir() => Err(Error::new(
                Kind::NotFound,
                format!(
                    "there is no state directory {}; name it with --root",
                    root.display()
                ),
            )),
            _ => Ok(Self::Locked(Box::new(LockedRoot {
                disks: Disks::open(&root)?,
                attachments: AttachmentRecords::open(&root, &run_dir)?,
                root,
            }))),
        }
    }

    pub(super) async fn space(self) -> Result<SpaceReport> {
        match self {
            Self::Daemon(client) => client.space().await,
            Self::Locked(locked) => {
                let LockedRoot {
                    root,
                    disks,
                    attachments,
                } = *locked;
                blocking(move || usage::report(&root, disks.store(), disks.images(), &attachments))
                    .await
            }
        }
    }

    pub(super) async fn prune(self, request: PruneRequest) -> Result<PruneReport> {
        match self {
            Self::Daemon(client) => client.prune(&request).await,
            Self::Locked(locked) => {
                let LockedRoot {
                    disks, attachments, ..
                } = *locked;
                blocking(move || {
                    prune::prune(disks.store(), disks.images(), &attachments, &request)
                })
                .await
            }
        }
    }

    pub(super) async fn pin(self, request: PinRequest) -> Result<ImageRecord> {
        match self {
            Self::Daemon(client) => client.pin(&request).await,
            Self::Locked(locked) => {
                let images = locked.disks;
                blocking(move || images.images().pin(&request.reference, request.pinned)).await
            }
        }
    }
}
