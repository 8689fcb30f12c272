//! Requests that change how a daemon works: its configuration and its log.

use std::{fmt, sync::Arc};

use hyper::{Response, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::body::{Body, json};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result},
};

/// What a reload of the configuration file has changed: `KEY = VALUE` each.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Reloaded {
    /// What counts from now on.
    pub applied: Vec<String>,
    /// What counts after a restart.
    pub needs_restart: Vec<String>,
}

impl fmt::Display for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let applied = self.applied.iter().map(|it| format!("{it}: applied"));
        let waiting = self.needs_restart.iter();
        let waiting = waiting.map(|it| format!("{it}: needs a restart of the daemon"));
        let lines: Vec<String> = applied.chain(waiting).collect();
        match lines.is_empty() {
            true => f.write_str("nothing has changed for the daemon"),
            false => f.write_str(&lines.join("\n")),
        }
    }
}

/// The filter of the log.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LogFilter {
    /// As `--log` takes it.
    pub filter: String,
}

/// What a daemon lets its clients change.
pub trait Control: Send + Sync {
    /// Reads the configuration file again.
    fn reload(&self) -> Result<Reloaded>;
    /// The filter of the log.
    fn log_filter(&self) -> LogFilter;
    /// Changes the filter of the log, until the next reload or restart.
    fn set_log_filter(&self, filter: &LogFilter) -> Result<()>;
}

/// Reads the configuration file again.
pub(super) async fn reload(control: Option<&Arc<dyn Control>>) -> Result<Response<Body>> {
    let control = Arc::clone(of(control)?);
    let reloaded = blocking(move || control.reload()).await?;
    Ok(json(StatusCode::OK, &reloaded))
}

/// Answers with the filter of the log.
pub(super) fn log_filter(control: Option<&Arc<dyn Control>>) -> Result<Response<Body>> {
    Ok(json(StatusCode::OK, &of(control)?.log_filter()))
}

/// Changes the filter of the log.
pub(super) fn set_log_filter(
    control: Option<&Arc<dyn Control>>,
    filter: &LogFilter,
) -> Result<Response<Body>> {
    of(control)?.set_log_filter(filter)?;
    log_filter(control)
}

fn of(control: Option<&Arc<dyn Control>>) -> Result<&Arc<dyn Control>> {
    control.ok_or_else(|| {
        Error::new(
            Kind::Unsupported,
            "`attach --foreground` has no configuration to change; start `socinbd daemon`",
        )
    })
}
