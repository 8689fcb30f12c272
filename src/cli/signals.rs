//! Signals: those that end a process, those that are passed on, and those that are ignored.
//!
//! All are caught and none is set to `SIG_IGN`, because child processes would inherit that.

use rustix::process::Signal;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    error::{Kind, Result, ResultExt},
    keeper,
    kernel::session,
};

/// The signals that end a process in order.
const ENDING: [Signal; 3] = [Signal::TERM, Signal::INT, Signal::QUIT];

/// The signals whose default action ends a process, and which have no meaning here: a stray one must not end the daemon, which holds the
/// devices of running containers.
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

/// The signals that are passed on to the program of an image.
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

/// Signals, caught as long as the process lives and received here.
pub(super) struct SignalReceiver(mpsc::Receiver<Signal>);

impl SignalReceiver {
    /// The signals that end a serving process. SIGHUP is one of them, unless the process was started with SIGHUP ignored (nohup(1)). Stray
    /// signals that would kill the process are caught.
    pub(super) fn that_end() -> Result<Self> {
        match session::ignores(Signal::HUP) {
            true => Self::ending(&[]),
            false => Self::ending(&[Signal::HUP]),
        }
    }

    /// Like [`Self::that_end`], for the daemon, which SIGHUP does not end.
    pub(super) fn that_end_the_daemon() -> Result<Self> {
        Self::ending(&[])
    }

    /// The signal after which the daemon reads its configuration again.
    pub(super) fn that_reload_the_daemon() -> Result<Self> {
        Self::of(&[keeper::RELOAD])
    }

    /// The signal after which another daemon follows this one: what systemd sends with `RestartKillSignal=SIGUSR2`.
    pub(super) fn that_restart_the_daemon() -> Result<Self> {
        Self::of(&[keeper::RESTART])
    }

    /// The signals that interrupt a command, except those that it was started to ignore.
    pub(super) fn that_interrupt() -> Result<Self> {
        let signals = [&ENDING[..], &[Signal::HUP]].concat();
        let meant: Vec<Signal> = signals
            .into_iter()
            .filter(|signal| !session::ignores(*signal))
            .collect();
        Self::of(&meant)
    }

    /// The signals to pass on to the program of an image.
    pub(super) fn to_pass_on() -> Result<Self> {
        Self::of(&PASSED_ON)
    }

    fn ending(also: &[Signal]) -> Result<Self> {
        let mut others = Self::of(&MEANINGLESS)?;
        tokio::spawn(async move {
            loop {
                let signal = others.next().await;
                tracing::debug!(?signal, "signal ignored");
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

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) -> Signal {
        match self.0.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await, // the runtime ends
        }
    }
}

/// The signals that end a process have their usual action from now on: what runs this one sees that it has ended by one.
pub(super) fn end_as_usual() {
    session::take_default(&ENDING);
}

/// Makes writes past the file size limit fail with an error. By default they kill the process.
pub(super) fn survive_large_files() -> Result<()> {
    // caught from now on, as long as the process lives
    drop(SignalReceiver::of(&[Signal::XFSZ])?);
    Ok(())
}
