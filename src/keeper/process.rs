//! The keeper's work: one daemon after the other, and what they have put into the store.

use std::{
    ffi::OsString,
    fs::File,
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    path::PathBuf,
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{
    death::{Unreaped, has_sleeping_thread, is_dead_but_sleeps},
    descriptors::Descriptors,
    message::{MAX_BYTES, Message, StoreChange, Watchdog},
    programs::Programs,
    restarts::Restarts,
    socket::{self, Socket},
};
use crate::{
    error::{Error, Kind, Result, ResultExt as _, report},
    kernel::{
        handover::{self, Datagram, KEEPER, Program, VARIABLES},
        session,
    },
};

/// Datagrams that are received before anything else is looked at. More than a socket's queue has.
const MAX_DATAGRAMS: usize = 1024;
/// How often it is looked whether the daemon is dead though the kernel cannot end it. It is when it looks so twice in a row.
const LOOK: Duration = Duration::from_secs(1);
/// How late a keeper is that was itself not running, as after a stop of the whole machine.
const LATE: Duration = Duration::from_secs(1);

/// The signal after which a daemon hands over to another one.
pub const RESTART: Signal = Signal::USR2;

/// The signal after which a daemon reads its configuration again.
pub const RELOAD: Signal = Signal::HUP;

/// What a keeper starts.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program, until a daemon names another one that follows it. Where a program cannot be started, as while it is being
    /// replaced, or ends before it serves, the one before is tried.
    pub program: PathBuf,
    /// What is tried where the first program is not there: the keeper's own.
    pub own: PathBuf,
    /// Its arguments; the first is its name.
    pub arguments: Vec<OsString>,
    /// Where the socket of the keeper is.
    pub run_dir: PathBuf,
    /// The times of the keeper.
    pub times: Times,
}

/// The times of a keeper.
#[derive(Clone, Debug)]
pub struct Times {
    /// How often a daemon that serves has to say that it works.
    pub watchdog: Duration,
    /// How long a daemon may take until it serves.
    pub start: Duration,
    /// From the signal that shows where a daemon hangs to the one that nothing survives.
    pub abort: Duration,
    /// The first pause before another start after a soon death.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// A death after this long is not soon.
    pub good_run: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            watchdog: super::WATCHDOG,
            start: Duration::from_secs(90),
            abort: Duration::from_secs(3),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            good_run: Duration::from_secs(10),
        }
    }
}

/// Starts a daemon, and another one whenever it dies; `signals` ([`session::receive_signals`]) go on to it. All but [`RESTART`] and [`RELOAD`] end it. `ready` is called when the
/// first one serves. Returns an exit status when a daemon has ended with success, when one that was told to end has ended, or when the
/// first one has ended before it served. A signal that ends it and that comes while one daemon follows another is for the one that serves
/// then: only that one can release what the daemon before has left.
pub fn keep(plan: &Plan, signals: &File, mut ready: impl FnMut()) -> Result<u8> {
    socket::remove_stale(&plan.run_dir);
    let times = &plan.times;
    let mut restarts = Restarts::new(times.first_pause, times.longest_pause, times.good_run);
    let mut store = Descriptors::default();
    let mut unreaped = Unreaped::default();
    let mut programs = Programs::new(&plan.program, &plan.own);
    let mut has_served = false;
    // a signal that no daemon has acted upon
    let mut end = None;
    loop {
        let ran = match Daemon::start(plan, &programs, &store) {
            Ok(mut daemon) => {
                daemon.receives_at_once = !has_served;
                if let Some(signal) = end.take() {
                    daemon.pass_on(signal);
                }
                let status = daemon.follow(&mut store, &mut unreaped, signals, &mut || {
                    has_served = true;
                    ready();
                })?;
                if status.success() || daemon.is_stopping || !has_served {
                    return Ok(exit_status(status));
                }
                if let Some(successor) = daemon.successor.take() {
                    tracing::info!("the daemon hands over to {}", successor.display());
                    programs.choose(successor);
                    end = daemon.end.or_else(|| ended_by(status));
                    continue;
                }
                if daemon.end.is_some() {
                    return Ok(exit_status(status));
                }
                end = ended_by(status);
                let was_ended = end.is_some() || daemon.was_killed_by_others(status);
                if daemon.serves_since.is_none() && !was_ended {
                    programs.exchange();
                }
                tracing::error!(
                    "the daemon, process {}, died: {status}",
                    daemon.process.id()
                );
                let ran = daemon
                    .serves_since
                    .map_or(Duration::ZERO, |it| it.elapsed());
                if daemon.is_asleep {
                    unreaped.add(daemon.process);
                }
                ran
            }
            Err(error) if has_served && end.is_none() => {
                tracing::error!("no daemon could be started: {}", error.report());
                Duration::ZERO
            }
            Err(error) => return Err(error),
        };
        let pause = restarts.pause(ran);
        tracing::warn!("the next daemon starts after {pause:?}");
        match end_in(signals, pause)? {
            Some(signal) if pause.is_zero() => end = Some(signal),
            Some(_) => return Ok(0),
            None => {}
        }
    }
}

/// The exit status that stands for the end of a process, as in a shell.
fn exit_status(status: ExitStatus) -> u8 {
    let signal = status.signal().map(|signal| 128 + signal);
    status
        .code()
        .or(signal)
        .and_then(|it| u8::try_from(it).ok())
        .unwrap_or(1)
}

/// The signal that has ended a daemon which did not receive it, and which was not this keeper's: it was about to serve, or to leave.
fn ended_by(status: ExitStatus) -> Option<Signal> {
    let signal = status.signal().and_then(Signal::from_named_raw)?;
    [Signal::TERM, Signal::INT, Signal::QUIT]
        .contains(&signal)
        .then_some(signal)
}

/// Waits, and gives a signal that has come meanwhile and that ends the daemon.
fn end_in(signals: &File, pause: Duration) -> Result<Option<Signal>> {
    let end = Instant::now() + pause;
    loop {
        let rest = end.saturating_duration_since(Instant::now());
        let mut ends = [PollFd::new(signals, PollFlags::IN)];
        wait(&mut ends, Some(rest))?;
        while let Some(signal) = next_signal(signals)? {
            if is_ending(signal) {
                return Ok(Some(signal));
            }
        }
        if rest.is_zero() {
            return Ok(None);
        }
    }
}

/// Whether a signal ends the keeper and its daemon.
fn is_ending(signal: Signal) -> bool {
    ![RESTART, RELOAD].contains(&signal)
}

fn next_signal(signals: &File) -> Result<Option<Signal>> {
    let number = session::next_signal(signals).or_kind(Kind::Io, || "receiving a signal".into())?;
    // only those with a name were asked for
    Ok(number.and_then(Signal::from_named_raw))
}

/// Waits for descriptors.
fn wait(descriptors: &mut [PollFd<'_>], time: Option<Duration>) -> Result<()> {
    // a time that does not fit is as good as none
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    rustix::io::retry_on_intr(|| poll(descriptors, time.as_ref()))
        .or_kind(Kind::Io, || "waiting for the daemon".into())?;
    Ok(())
}

/// A daemon that was started.
struct Daemon<'a> {
    times: &'a Times,
    process: Child,
    /// Its process as a descriptor.
    handle: OwnedFd,
    socket: Socket,
    serves_since: Option<Instant>,
    /// It has said that it ends.
    is_stopping: bool,
    /// The signal that it was told to end with.
    end: Option<Signal>,
    /// No daemon has served before it, so signals are sent although it may not receive them yet.
    receives_at_once: bool,
    /// What it is sent as soon as it serves.
    when_ready: Vec<Signal>,
    /// The program that it has named to follow it.
    successor: Option<PathBuf>,
    /// Until then something must have happened.
    deadline: Option<Instant>,
    /// What is done when nothing has.
    next: Option<Signal>,
    /// When it is looked next whether it is dead.
    look_at: Instant,
    /// Threads in uninterruptible sleep are all that is left of it.
    is_asleep: bool,
}

impl<'a> Daemon<'a> {
    fn start(plan: &'a Plan, programs: &Programs, store: &Descriptors) -> Result<Self> {
        let socket = Socket::bind(&plan.run_dir)?;
        let descriptors = store.all();
        let mut environment: Vec<(OsString, OsString)> = std::env::vars_os()
            .filter(|(name, _)| !VARIABLES.iter().any(|variable| name == variable))
            .collect();
        let micros = plan.times.watchdog.as_micros().to_string();
        environment.extend([
            ("NOTIFY_SOCKET".into(), socket.path().into()),
            (KEEPER.into(), "1".into()),
            ("WATCHDOG_USEC".into(), micros.into()),
        ]);
        if !descriptors.is_empty() {
            environment.extend([
                ("LISTEN_FDS".into(), descriptors.len().to_string().into()),
                ("LISTEN_FDNAMES".into(), store.names().into()),
            ]);
        }
        let program = |file| Program {
            file,
            arguments: &plan.arguments,
            environment: &environment,
            descriptors: &descriptors,
        };
        let process = handover::spawn(&program(programs.current())).or_else(|error| {
            tracing::warn!(
                "starting {}: {}",
                programs.current().display(),
                report(&error)
            );
            handover::spawn(&program(programs.other()))
        });
        let mut process = process.or_kind(Kind::Io, || "starting the daemon".into())?;
        let pid = Pid::from_child(&process);
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(errno) => {
                let _ = process.kill();
                let _ = process.wait();
                return Err(errno).or_kind(Kind::Kernel, || "following the daemon".into());
            }
        };
        Ok(Self {
            times: &plan.times,
            process,
            handle,
            socket,
            serves_since: None,
            is_stopping: false,
            end: None,
            receives_at_once: false,
            when_ready: Vec::new(),
            successor: None,
            deadline: Instant::now().checked_add(plan.times.start),
            next: Some(Signal::ABORT),
            look_at: Instant::now() + LOOK,
            is_asleep: false,
        })
    }

    /// Does what it asks for, until it has ended. The status of one that cannot end yet is that of a killed process.
    fn follow(
        &mut self,
        store: &mut Descriptors,
        unreaped: &mut Unreaped,
        signals: &File,
        ready: &mut dyn FnMut(),
    ) -> Result<ExitStatus> {
        loop {
            let next = self
                .deadline
                .map_or(self.look_at, |it| it.min(self.look_at));
            let rest = next.saturating_duration_since(Instant::now());
            let mut ends = [
                PollFd::new(&self.handle, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            wait(&mut ends, Some(rest))?;
            // what it has sent before it ended comes too: this is asked for first
            let has_ended = !ends[0].revents().is_empty();
            self.receive(store, ready);
            if has_ended {
                return self
                    .process
                    .wait()
                    .or_kind(Kind::Io, || "waiting for the daemon".into());
            }
            while let Some(signal) = next_signal(signals)? {
                self.pass_on(signal);
            }
            self.look_at_the_time();
            if self.look_at <= Instant::now() {
                self.look_at = Instant::now() + LOOK;
                unreaped.reap();
                if self.is_dead_but_sleeps() {
                    let pid = self.process.id();
                    tracing::warn!("the kernel cannot end process {pid}, which is dead, yet");
                    return Ok(ExitStatus::from_raw(Signal::KILL.as_raw()));
                }
            }
        }
    }

    /// Whether it has been dead since the last look, and a thread waits in uninterruptible sleep, perhaps for the next daemon.
    fn is_dead_but_sleeps(&mut self) -> bool {
        let was_asleep =
            std::mem::replace(&mut self.is_asleep, is_dead_but_sleeps(self.process.id()));
        was_asleep && self.is_asleep
    }

    /// Whether a process killed it that is not this one, which says nothing about its program.
    fn was_killed_by_others(&self, status: ExitStatus) -> bool {
        status.signal() == Some(Signal::KILL.as_raw()) && self.next.is_some()
    }

    /// Sends it a signal when it can act upon it. Each would end a daemon that does not receive it yet, without a chance to release what the
    /// daemon before has left.
    fn pass_on(&mut self, signal: Signal) {
        if is_ending(signal) {
            self.end = Some(signal);
        }
        // one that does not serve yet may have read its configuration already
        let may_wait = !self.receives_at_once || signal == RELOAD;
        match self.serves_since.is_none() && may_wait {
            true => self.when_ready.push(signal),
            false => self.send(signal),
        }
    }

    fn send(&self, signal: Signal) {
        if let Err(errno) = pidfd_send_signal(&self.handle, signal) {
            tracing::debug!(%errno, "the daemon has ended");
        }
    }

    /// Receives what has come.
    fn receive(&mut self, store: &mut Descriptors, ready: &mut dyn FnMut()) {
        for _ in 0..MAX_DATAGRAMS {
            match handover::receive(&self.socket, MAX_BYTES) {
                Ok(Some(datagram)) => {
                    if let Err(error) = self.act(datagram, store, ready) {
                        tracing::warn!("a notification was passed over: {}", error.report());
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!("receiving a notification: {}", report(&error));
                    return;
                }
            }
        }
    }

    /// Does what a datagram says; descriptors that are not kept are closed with it.
    fn act(
        &mut self,
        datagram: Datagram,
        store: &mut Descriptors,
        ready: &mut dyn FnMut(),
    ) -> Result<()> {
        if datagram.sender != self.process.id() {
            return Err(Error::new(
                Kind::Unauthorized,
                format!("process {} is not the daemon", datagram.sender),
            ));
        }
        if datagram.is_cut {
            return Err(Error::new(
                Kind::Corrupt,
                "it is too long, or has descriptors for which there is no room",
            ));
        }
        let message = Message::parse(&datagram.bytes)?;
        match message.store {
            Some(StoreChange::Put(name)) => store.put(&name, datagram.descriptors)?,
            Some(StoreChange::Remove(name)) => store.remove(&name),
            None => {}
        }
        if message.is_ready && self.serves_since.is_none() {
            self.serves_since = Some(Instant::now());
            for signal in std::mem::take(&mut self.when_ready) {
                self.send(signal);
            }
            self.has_answered();
            ready();
        }
        if message.successor.is_some() {
            self.successor = message.successor;
        }
        if message.is_stopping {
            self.is_stopping = true;
            (self.deadline, self.next) = (None, None);
        }
        match message.watchdog {
            Some(Watchdog::Alive) => self.has_answered(),
            Some(Watchdog::Trigger) if self.next == Some(Signal::ABORT) => {
                self.deadline = Some(Instant::now());
            }
            _ => {}
        }
        Ok(())
    }

    /// Gives it another period of the watchdog, unless it is not watched, or has been told to die.
    fn has_answered(&mut self) {
        if self.serves_since.is_some() && self.next == Some(Signal::ABORT) {
            self.deadline = Instant::now().checked_add(self.times.watchdog);
        }
    }

    /// Kills it when its time is over.
    fn look_at_the_time(&mut self) {
        let now = Instant::now();
        let (Some(deadline), Some(next)) = (self.deadline, self.next) else {
            return;
        };
        if now < deadline {
            return;
        }
        // it may just not have run, as this process
        if next == Signal::ABORT && now > deadline + LATE {
            self.deadline = now.checked_add(self.times.watchdog);
            return;
        }
        let pid = self.process.id();
        // a core dump would wait for a thread in uninterruptible sleep, and nothing ends that wait
        if next == Signal::ABORT && !has_sleeping_thread(pid) {
            tracing::error!("the daemon, process {pid}, does not answer, and is aborted");
            self.deadline = now.checked_add(self.times.abort);
            self.next = Some(Signal::KILL);
            return self.send(next);
        }
        tracing::error!("the daemon, process {pid}, does not answer, and is killed");
        (self.deadline, self.next) = (None, None);
        self.send(Signal::KILL);
    }
}
