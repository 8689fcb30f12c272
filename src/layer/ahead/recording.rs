//! Records which spans are read, in the order of their first use. `record` writes the prefetch list from it.

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{oci::Digest, units::LayerOffset};

/// The first use of a span.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Touch {
    /// The layer.
    pub layer: Digest,
    /// The bytes of the span in the layer. They identify it for every table of the layer.
    pub bytes: Range<LayerOffset>,
}

/// The recorded spans of all disks of a store.
#[derive(Default)]
pub(crate) struct Touches(Mutex<TouchOrder>);

#[derive(Default)]
struct TouchOrder {
    order: Vec<Touch>,
    seen: HashSet<Touch>,
}

impl Touches {
    pub(crate) fn record(&self, touches: impl Iterator<Item = Touch>) {
        let mut state = self.state();
        for touch in touches {
            if state.seen.insert(touch.clone()) {
                state.order.push(touch);
            }
        }
    }

    pub(crate) fn in_order(&self) -> Vec<Touch> {
        self.state().order.clone()
    }

    fn state(&self) -> MutexGuard<'_, TouchOrder> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_use_counts() {
        let touch = |start| Touch {
            layer: Digest::of(b"layer"),
            bytes: LayerOffset(start)..LayerOffset(start + 1),
        };
        let touches = Touches::default();
        touches.record([touch(3), touch(1)].into_iter());
        touches.record([touch(1), touch(2), touch(3)].into_iter());
        assert_eq!(touches.in_order(), [touch(3), touch(1), touch(2)]);
    }
}
