//! The configuration of a running daemon: what a reload changes.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::FromArgMatches as _;
use tokio::sync::watch;

use crate::{
    api::control::{Control, LogFilter, Reloaded},
    cli::{
        Cli, command,
        config::{Settings, keep},
        log,
    },
    engine::Engine,
    error::{Error, Kind, Result},
    keeper::FdStore,
};

/// What can be changed in a daemon while it runs.
pub(super) struct RunningConfiguration {
    settings: Mutex<Settings>,
    /// Has the limits of the local disk, and the verifiers.
    engine: Arc<Engine>,
    /// Keeps the file's text for the next daemon.
    store: FdStore,
    idle_exit: watch::Sender<Option<Duration>>,
}

impl RunningConfiguration {
    pub(super) fn new(
        settings: Settings,
        engine: Arc<Engine>,
        store: FdStore,
        idle_exit: Option<Duration>,
    ) -> Self {
        let configuration = Self {
            settings: Mutex::new(settings),
            engine,
            store,
            idle_exit: watch::Sender::new(idle_exit),
        };
        {
            let settings = configuration.settings();
            configuration.keep(&settings);
        }
        configuration
    }

    /// Time without attachments or requests until the daemon exits.
    pub(super) fn idle_exit(&self) -> watch::Receiver<Option<Duration>> {
        self.idle_exit.subscribe()
    }

    fn settings(&self) -> std::sync::MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, settings: &Settings) {
        if let Err(error) = keep(settings.text(), &self.store) {
            tracing::warn!("{}", error.report());
        }
    }

    /// Nothing is changed if the file is wrong.
    fn read(&self) -> Result<Reloaded> {
        let mut settings = self.settings();
        let mut new = settings.clone();
        let file = new.read(command)?;
        let wrong =
            |error: clap::Error| Error::with_source(Kind::InvalidArgument, "the options", error);
        let matches = new.matches(file, command, None).map_err(wrong)?;
        let Cli { global, command } = Cli::from_arg_matches(&matches).map_err(wrong)?;
        let (limits, disks) = (command.disk_limits(), self.engine.disks());
        if limits != disks.store().space_status().limits {
            disks.store().set_disk_limits(limits)?;
        }
        disks.verifiers().set(new.verifiers());
        log::change(&global.log, global.log_format)?;
        self.idle_exit.send_replace(command.idle_exit());
        let changes = new.changes_since(&settings);
        self.keep(&new);
        *settings = new;
        Ok(Reloaded {
            applied: changes.applied,
            needs_restart: changes.needs_restart,
        })
    }
}

impl Control for RunningConfiguration {
    fn reload(&self) -> Result<Reloaded> {
        let reloaded = self.read().inspect_err(|error| {
            tracing::error!("the configuration stays as it is: {}", error.report());
        })?;
        for change in &reloaded.needs_restart {
            tracing::warn!("{change}: needs a restart");
        }
        let applied = match reloaded.applied.is_empty() {
            true => "nothing else has changed".to_owned(),
            false => reloaded.applied.join(", "),
        };
        tracing::info!("the configuration was read again: {applied}");
        Ok(reloaded)
    }

    fn log_filter(&self) -> LogFilter {
        LogFilter {
            filter: log::current_filter(),
        }
    }

    fn set_log_filter(&self, filter: &LogFilter) -> Result<()> {
        log::change_filter(&filter.filter)?;
        tracing::info!("the log filter is {} until the next reload", filter.filter);
        Ok(())
    }
}
