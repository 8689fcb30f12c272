//! The identity and the state of an open disk, as in `state.json` in its directory.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, TryLockError},
};

use super::{
    directory::{self, DiskDirectory},
    state::DiskState,
};
use crate::{
    error::{Error, Result},
    layer::{
        locked::locked,
        types::{LayerBlob, StackingFacts},
    },
    oci::Digest,
};

/// The record of an open disk.
pub(crate) struct DiskRecord {
    directory: DiskDirectory,
    /// The path of `disk.ext4`.
    path: PathBuf,
    layer: LayerBlob,
    table: Digest,
    state: Mutex<DiskState>,
    /// Read when the disk was opened, and taken by the first attach.
    facts: Mutex<Option<StackingFacts>>,
}

impl DiskRecord {
    pub(crate) fn new(directory: DiskDirectory, state: DiskState, facts: StackingFacts) -> Self {
        Self {
            path: directory.path().join(directory::DISK),
            layer: state.layer.clone(),
            table: state.table,
            state: Mutex::new(state),
            facts: Mutex::new(Some(facts)),
            directory,
        }
    }

    /// The directory of the disk.
    pub(crate) fn directory(&self) -> &DiskDirectory {
        &self.directory
    }

    /// The path of `disk.ext4`.
    pub(crate) fn disk_path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn layer(&self) -> &LayerBlob {
        &self.layer
    }

    /// The digest of the table that the disk was laid out from.
    pub(crate) fn table(&self) -> &Digest {
        &self.table
    }

    /// The state. The lock keeps it from changing.
    pub(crate) fn lock_state(&self) -> MutexGuard<'_, DiskState> {
        locked(&self.state)
    }

    /// As [`Self::lock_state`]; `None`: another thread has it.
    pub(crate) fn try_lock_state(&self) -> Option<MutexGuard<'_, DiskState>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Changes the state, in memory and in the directory.
    pub(crate) fn change_state(&self, change: impl FnOnce(&mut DiskState)) -> Result<()> {
        let mut state = self.lock_state();
        let mut next = state.clone();
        change(&mut next);
        self.replace_state(&mut state, next)
    }

    /// Makes `next` the state, in memory and in the directory.
    pub(crate) fn replace_state(&self, state: &mut DiskState, next: DiskState) -> Result<()> {
        if next != *state {
            self.directory.replace(directory::STATE, &next.encode())?;
            *state = next;
        }
        Ok(())
    }

    /// The paths of the layer that matter for stacking.
    pub(crate) fn stacking(&self) -> Result<StackingFacts> {
        locked(&self.facts)
            .take()
            .map_or_else(|| self.directory.stacking(), Ok)
    }

    /// The first evidence that the table contradicts the layer, if there is any.
    pub(crate) fn refuted(&self) -> Option<String> {
        self.lock_state().refuted.clone()
    }

    /// Records that the table contradicts the layer: no other attachment uses it, also after a restart.
    pub(crate) fn mark_table_false(&self, error: &Error) {
        let written = self.change_state(|state| {
            state.refuted.get_or_insert_with(|| error.report());
        });
        if let Err(error) = written {
            tracing::warn!("{}", error.report());
        }
    }
}
