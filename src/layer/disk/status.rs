//! Whether a disk is degraded, and the reasons.

use super::Disk;
use crate::layer::{read::health::DegradedReason, sources::health::SourceDown};

impl Disk {
    /// The first reason for which the disk is degraded, if there is one.
    pub fn degraded(&self) -> Option<String> {
        let down = || self.sources_down().first().map(ToString::to_string);
        self.health.degraded().or_else(down)
    }

    /// All reasons for which the disk is degraded.
    pub fn reasons(&self) -> Vec<DegradedReason> {
        let down = self.sources_down().into_iter().map(|down| DegradedReason {
            span: None,
            message: down.to_string(),
        });
        self.health.reasons().into_iter().chain(down).collect()
    }

    /// The sources that are down. None if the disk needs no sources.
    pub fn sources_down(&self) -> Vec<SourceDown> {
        match self.is_full() {
            true => Vec::new(),
            false => self.sources.down(),
        }
    }
}
