//! A mutex whose holder has panicked is taken all the same.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a mutex. What it guards is whole between any two statements that hold it.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
