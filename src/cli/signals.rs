//! Signals: which end a process, which it passes on, and which are nothing to it.
//!
//! All are caught, and none is ignored (`SIG_IGN`): the programs that are started would inherit that.

use rustix::process::Signal;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    error::{Kind, Result, ResultExt},
    kernel::session,
};

/// What ends a process in order.
const ENDING: [Signal; 3] = [Signal::TERM, Signal::INT, Signal::QUIT];

/// What ends a process by default, and means nothing here: a stray one must not take the devices of running containers along.
const MEANINGLESS: [Signal; 9] = [
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::IO,
    Signal::POWER,
    Signal::STKFLT,
    Signal::XCPU,
];

/// What a program gets that runs in an image's root.
const PASSED_ON: [Signal; 11] = [
    Signal::INT,
    Signal::QUIT,
    Signal::TERM,
    Signal::HUP,
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::IO,
    Signal::POWER,
];

/// Signals that are caught as long as the process lives, and told here.
pub(super) struct Signals(mpsc::Receiver<Signal>);

impl Signals {
    /// The signals that end a process which serves until it is ended; a hang-up is one of them, unless it was started to ignore that
    /// (nohup(1)). Others that would kill it do not.
    pub(super) fn that_end() -> Result<Self> {
        match session::ignores_hangup() {
            true => Self::ending(&[], &[]),
            false => Self::ending(&[Signal::HUP], &[]),
        }
    }

    /// As [`Self::that_end`], for the daemon: a hang-up is nothing to it.
    pub(super) fn that_end_the_daemon() -> Result<Self> {
        Self::ending(&[], &[Signal::HUP])
    }

    /// The signals that go on to the program which is run.
    pub(super) fn to_pass_on() -> Result<Self> {
        Self::of(&PASSED_ON)
    }

    fn ending(also: &[Signal], not: &[Signal]) -> Result<Self> {
        let mut others = Self::of(&[&MEANINGLESS, not].concat())?;
        tokio::spawn(async move {
            loop {
                let signal = others.next().await;
                tracing::debug!(?signal, "a signal that means nothing here");
            }
        });
        Self::of(&[&ENDING, also].concat())
    }

    fn of(signals: &[Signal]) -> Result<Self> {
        let (sender, receiver) = mpsc::channel(1);
        for &number in signals {
            let mut caught = signal(SignalKind::from_raw(number.as_raw()))
                .or_kind(Kind::Io, || format!("waiting for signal {number:?}"))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while caught.recv().await.is_some() && sender.send(number).await.is_ok() {}
            });
        }
        Ok(Self(receiver))
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Signal {
        match self.0.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await, // the runtime ends
        }
    }
}

/// Has writes past the limit of a file's size fail, with an error that says so. By default they kill the process.
pub(super) fn survive_large_files() -> Result<()> {
    // caught from now on, as long as the process lives
    drop(Signals::of(&[Signal::XFSZ])?);
    Ok(())
}
