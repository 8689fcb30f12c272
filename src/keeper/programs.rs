//! The programs of the daemons of a keeper.

use std::path::{Path, PathBuf};

/// The program of the next daemon, and the one that is tried where it does not work.
pub(super) struct Programs {
    current: PathBuf,
    other: PathBuf,
}

impl Programs {
    pub(super) fn new(program: &Path, own: &Path) -> Self {
        Self {
            current: program.to_owned(),
            other: own.to_owned(),
        }
    }

    /// The one that is started next.
    pub(super) fn current(&self) -> &Path {
        &self.current
    }

    /// The one that is started where the other one cannot be.
    pub(super) fn other(&self) -> &Path {
        &self.other
    }

    /// A daemon has named the program that follows it.
    pub(super) fn choose(&mut self, successor: PathBuf) {
        if successor != self.current {
            self.other = std::mem::replace(&mut self.current, successor);
        }
    }

    /// The current one did not serve.
    pub(super) fn exchange(&mut self) {
        std::mem::swap(&mut self.current, &mut self.other);
    }
}
