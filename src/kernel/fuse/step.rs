//! The steps between a request and its answer, at which tests end the process.

use std::sync::Arc;

/// What has just been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request was received into its landing.
    Received,
    /// A read that waits for a fetch was put into a slot.
    Noted,
    /// The landing was made empty.
    Cleared,
    /// The data of a read in a slot has come.
    Fetched,
    /// A read in a slot was answered.
    Answered,
    /// Its slot was made free.
    Freed,
    /// The kernel was asked to send requests again.
    AskedAgain,
    /// A successor has made a part of the journal empty, whose requests come again.
    Emptied,
}

/// Called at each step, by any thread.
pub type AtStep = Arc<dyn Fn(Step) + Send + Sync>;
