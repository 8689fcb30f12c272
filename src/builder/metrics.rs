//! The metrics of the builder, in the OpenMetrics text format of Prometheus.

use std::time::Duration;

use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::queue::Counts;

type Labels = [(&'static str, &'static str); 1];

/// All metrics.
pub(super) struct Metrics {
    registry: Registry,
    events: Family<Labels, Counter>,
    images: Family<Labels, Counter>,
    queue: Family<Labels, Gauge>,
    time: Histogram,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("socinbd_builder");
        let (events, images, queue) = (Family::default(), Family::default(), Family::default());
        // from a quarter of a second to an hour and more
        let time = Histogram::new(exponential_buckets(0.25, 2.0, 15));
        let event_help = "Events posted, by result: accepted, ignored, refused";
        registry.register("events", event_help, Family::clone(&events));
        let image_help = "Images processed, by result: made, skipped, delayed, failed";
        registry.register("images", image_help, Family::clone(&images));
        let queue_help = "Images in the queue, by state: waiting, running, failed";
        registry.register("queue", queue_help, Family::clone(&queue));
        registry.register_with_unit(
            "build",
            "Processing time of an image",
            Unit::Seconds,
            time.clone(),
        );
        Self {
            registry,
            events,
            images,
            queue,
            time,
        }
    }

    /// `outcome`: `accepted`, `ignored` or `refused`.
    pub(super) fn event(&self, outcome: &'static str) {
        self.events.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// `outcome`: `made`, `skipped`, `delayed` or `failed`.
    pub(super) fn image(&self, outcome: &'static str, time: Duration) {
        self.images.get_or_create(&[("outcome", outcome)]).inc();
        self.time.observe(time.as_secs_f64());
    }

    /// The text for a scraper.
    pub(super) fn text(&self, counts: Counts) -> String {
        for (state, count) in [
            ("waiting", counts.waiting),
            ("running", counts.running),
            ("failed", counts.failed),
        ] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.queue.get_or_create(&[("state", state)]).set(count);
        }
        let mut text = String::new();
        // writing to a String cannot fail
        let _ = encode(&mut text, &self.registry);
        text
    }
}
