//! Which snapshots are being changed. Changes of different snapshots run side by side, because each waits for the disk: a node that starts
//! many containers creates many snapshots at once. Changes that touch the same snapshot come one after the other.

use std::{
    collections::HashSet,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// The changes that run.
pub(super) struct Changes {
    state: Mutex<State>,
    /// Notified when a change has ended.
    ended: Condvar,
}

struct State {
    next_id: u64,
    running: Vec<Claim>,
}

/// What a change needs for itself.
struct Claim {
    /// The names that it gives or takes, or whose snapshots it changes.
    names: Vec<String>,
    /// A snapshot that others may need as well, and that must stay as it is.
    parent: Option<String>,
    /// The number of the snapshot that it creates.
    id: Option<u64>,
}

impl Claim {
    fn conflicts_with(&self, other: &Self) -> bool {
        let has = |claim: &Self, name: &String| claim.names.contains(name);
        self.names.iter().any(|name| has(other, name))
            || self.parent.as_ref().is_some_and(|name| has(other, name))
            || other.parent.as_ref().is_some_and(|name| has(self, name))
    }
}

/// A change that runs, until this is dropped.
pub(super) struct Change<'a> {
    changes: &'a Changes,
    /// Its first name, which no other change that runs has.
    name: String,
}

impl Changes {
    /// `next_id`: the number of the next snapshot.
    pub(super) fn new(next_id: u64) -> Self {
        Self {
            state: Mutex::new(State {
                next_id,
                running: Vec::new(),
            }),
            ended: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a change of the snapshots of these names, below which `parent` stays. Waits until no other change touches them. Blocks.
    pub(super) fn begin(
        &self,
        name: &str,
        other: Option<&str>,
        parent: Option<&str>,
    ) -> Change<'_> {
        let claim = Claim {
            names: [Some(name), other]
                .into_iter()
                .flatten()
                .map(str::to_owned)
                .collect(),
            parent: parent.map(str::to_owned),
            id: None,
        };
        let must_wait = |state: &mut State| {
            let mut running = state.running.iter();
            running.any(|running| running.conflicts_with(&claim))
        };
        let free = self.ended.wait_while(self.state(), must_wait);
        free.unwrap_or_else(PoisonError::into_inner)
            .running
            .push(claim);
        Change {
            changes: self,
            name: name.to_owned(),
        }
    }

    /// The numbers of the snapshots that are being created, while `look` looks at those that exist.
    pub(super) fn with_ids<T>(&self, look: impl FnOnce(HashSet<u64>) -> T) -> T {
        let state = self.state();
        look(state.running.iter().filter_map(|claim| claim.id).collect())
    }
}

impl Change<'_> {
    /// A number for the snapshot that it creates.
    pub(super) fn new_id(&self) -> u64 {
        let mut state = self.changes.state();
        let id = state.next_id;
        state.next_id += 1;
        if let Some(claim) = state.running.iter_mut().find(|claim| self.is(claim)) {
            claim.id = Some(id);
        }
        id
    }

    fn is(&self, claim: &Claim) -> bool {
        claim.names.first() == Some(&self.name)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut state = self.changes.state();
        state.running.retain(|claim| !self.is(claim));
        drop(state);
        self.changes.ended.notify_all();
    }
}
