//! The slots of the journal that are in use by this process.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::journal::{Journal, SLOTS};

#[derive(Debug)]
pub(super) struct Slots {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    free: Vec<usize>,
    is_closed: bool,
}

/// A slot, if one was free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Slot(usize),
    NoneFree,
    Closed,
}

impl Slots {
    /// Those in which the journal has no read are free.
    pub(super) fn of(journal: &Journal) -> Self {
        let left = journal.left();
        let is_free = |slot: &usize| left.iter().all(|(other, _)| other != slot);
        let free = (0..SLOTS).rev().filter(is_free).collect();
        Self {
            state: Mutex::new(State {
                free,
                is_closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// A free slot; waits for one for some time.
    pub(super) fn take(&self, at_most: Duration) -> Taken {
        let waiting = |state: &mut State| state.free.is_empty() && !state.is_closed;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), at_most, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        match state.free.pop() {
            _ if state.is_closed => Taken::Closed,
            Some(slot) => Taken::Slot(slot),
            None => Taken::NoneFree,
        }
    }

    /// Makes a slot free, also in the journal. After [`Slots::close`] the journal stays as it is.
    pub(super) fn give_back(&self, slot: usize, journal: &Journal) {
        let mut state = self.lock();
        if !state.is_closed {
            journal.free(slot);
            state.free.push(slot);
            self.changed.notify_one();
        }
    }

    /// From now on this process does not change the slots: they are for a successor.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
