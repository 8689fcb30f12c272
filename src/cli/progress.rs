//! Progress on a terminal; nothing in a pipe.

use std::{collections::HashMap, sync::Mutex};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{engine::OpenEvent, oci::Digest};

/// Shows the progress on standard error, if that is a terminal.
pub(super) struct ProgressBars {
    bars: MultiProgress,
    by_layer: Mutex<HashMap<Digest, ProgressBar>>,
}

impl ProgressBars {
    /// `quiet` shows nothing at all.
    pub(super) fn new(quiet: bool) -> Self {
        let target = if quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self {
            bars: MultiProgress::with_draw_target(target),
            by_layer: Mutex::default(),
        }
    }

    /// Shows an event of an attach.
    pub(super) fn event(&self, event: OpenEvent) {
        match event {
            OpenEvent::Resolved { layers, indexed } => {
                tracing::info!(layers, indexed, "the image is resolved");
            }
            OpenEvent::Streaming { layer, done, size } => self.layer(layer, done, size),
            OpenEvent::Warning { message } => {
                drop(self.bars.println(format!("socinbd: {message}")))
            }
        }
    }

    /// Shows that `done` of `size` bytes of a layer are done.
    pub(super) fn layer(&self, layer: Digest, done: u64, size: u64) {
        let mut by_layer = self
            .by_layer
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let bar = by_layer.entry(layer).or_insert_with(|| {
            let style = ProgressStyle::with_template(
                "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
            );
            let bar = self
                .bars
                .add(ProgressBar::new(size))
                .with_prefix(layer.hex()[..12].to_owned());
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar
        });
        bar.set_position(done);
        if done >= size {
            bar.finish_and_clear();
        }
    }

    /// Clears the progress.
    pub(super) fn finish(&self) {
        let _ = self.bars.clear(); // fails only without a terminal
    }
}
