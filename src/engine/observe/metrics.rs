//! The metrics of the daemon: the counters of the process, and what is attached at the moment. `docs/metrics.md` describes them.

use std::collections::BTreeMap;

use super::{
    families::{Family, Labels, MetricsFormat, Samples, Type},
    process,
};
use crate::{
    engine::attach::{engine::Engine, types::AttachmentState},
    error::{Error, Kind, Result},
    layer::{DiskProgress, SpaceStatus, Store},
    metrics::{
        Counter, Counters, Distribution, ExtractionReason, METRICS, Outcome, Prepared, RetryReason,
        Verified,
    },
    source::{self, RequestLoad},
};

impl Engine {
    /// The metrics in this form.
    pub async fn metrics(&self, format: MetricsFormat) -> Result<String> {
        let mut states: BTreeMap<&str, u64> = AttachmentState::ALL
            .iter()
            .map(|state| (state.name(), 0))
            .collect();
        for status in self.list().await? {
            *states.entry(status.state.name()).or_default() += 1;
        }
        let mut families = vec![
            gauge_by(
                "socinbd_build_info",
                "The version of the daemon; the value is 1",
                "version",
                [(env!("CARGO_PKG_VERSION"), 1)],
            ),
            gauge_by(
                "socinbd_attachments",
                "Attachments by state",
                "state",
                states,
            ),
        ];
        families.extend(of_store(self.disks().store()));
        families.extend(of_space(&self.disks().store().space_status()));
        families.extend(of_requests(source::request_load()));
        families.extend(of_process());
        families.extend(process::families());
        families.extend(self.soci_families());
        format.write(families).map_err(|error| {
            Error::with_source(Kind::Io, "writing the metrics", error) // memory is allocated or the process ends
        })
    }
}

/// The disks that are open.
fn of_store(store: &Store) -> Vec<Family> {
    let mut layers = [("lazy", 0), ("filling", 0), ("full", 0), ("complete", 0)];
    let (mut degraded, mut present, mut spans) = (0, 0, 0);
    for disk in store.open_disks() {
        let state = match *disk.progress().borrow() {
            DiskProgress::Lazy => 0,
            DiskProgress::Filling => 1,
            DiskProgress::Full => 2,
            DiskProgress::Complete => 3,
        };
        layers[state].1 += 1; // one of four
        degraded += u64::from(disk.degraded().is_some());
        let counts = disk.span_counts();
        present += u64::from(counts.0);
        spans += u64::from(counts.1);
    }
    let load = store.load();
    vec![
        gauge_by(
            "socinbd_layers",
            "Layers in use, by the progress of their disk",
            "state",
            layers,
        ),
        gauge(
            "socinbd_layers_degraded",
            "Layers in use whose fetches fail, one of whose sources is down, or whose bytes are wrong",
            degraded,
        ),
        gauge("socinbd_spans", "Spans of the layers in use", spans),
        gauge(
            "socinbd_spans_present",
            "Present spans of the layers in use",
            present,
        ),
        gauge(
            "socinbd_reads_waiting",
            "Reads that wait for a fetch",
            load.reads_waiting,
        ),
        gauge(
            "socinbd_background_fetches_running",
            "Fetches that no read waits for and that need a permit: of the rest of a layer, or of a prefetch list",
            load.background_fetches,
        ),
        gauge(
            "socinbd_decodes_waiting",
            "Spans that have arrived and wait for a decoding thread",
            load.decodes_waiting,
        ),
        gauge(
            "socinbd_fetch_memory_bytes",
            "Memory for compressed bytes in flight",
            load.fetch_memory_bytes,
        ),
        gauge(
            "socinbd_held_bytes",
            "Bytes of spans that are held in memory because the local disk has rejected them",
            load.held_bytes,
        ),
    ]
}

/// The limits of the local disk.
fn of_space(space: &SpaceStatus) -> Vec<Family> {
    let gauge = |name, help, value: Option<f64>| Family {
        name,
        help,
        kind: Type::Gauge,
        samples: Samples::one(value.unwrap_or(f64::INFINITY)),
    };
    let counter = |name, help, value: u64| Family {
        name,
        help,
        kind: Type::Counter,
        samples: Samples::one(value as f64),
    };
    vec![
        gauge(
            "socinbd_disk_limit_bytes",
            "Maximum number of bytes of all disks; infinite without a limit",
            space.limits.limit.map(|limit| limit as f64),
        ),
        gauge(
            "socinbd_disk_used_bytes",
            "Bytes of all disks; 0 without a limit and a reserve, because they are not measured then",
            Some(space.used_bytes as f64),
        ),
        gauge(
            "socinbd_disk_room_bytes",
            "Bytes that can be written before something has to be removed; infinite without a limit and a reserve",
            space.room_bytes.map(|room| room as f64),
        ),
        gauge(
            "socinbd_disk_full",
            "1 if the last write found no room, and nothing could be removed",
            Some(f64::from(u8::from(space.is_full))),
        ),
        counter(
            "socinbd_evicted_spans",
            "Spans that were removed from the local disk to make room",
            space.evicted_spans,
        ),
        counter(
            "socinbd_evicted_bytes",
            "Bytes that were removed from the local disk to make room",
            space.evicted_bytes,
        ),
    ]
}

/// What is in flight at registries.
fn of_requests(load: RequestLoad) -> Vec<Family> {
    vec![
        gauge(
            "socinbd_requests_in_flight",
            "Requests to registries that were sent and whose answers have not arrived in full",
            load.requests,
        ),
        gauge(
            "socinbd_requests_waiting",
            "Requests to registries that wait because others are in flight",
            load.waiting,
        ),
        gauge(
            "socinbd_request_bytes_in_flight",
            "Bytes of the answers in flight that have not arrived",
            load.bytes,
        ),
    ]
}

/// What has happened since the process was started.
fn of_process() -> Vec<Family> {
    let metrics = &METRICS;
    vec![
        counter(
            "socinbd_reads",
            "Reads of devices that were answered",
            &metrics.reads,
        ),
        counter(
            "socinbd_read_bytes",
            "Bytes of these reads",
            &metrics.read_bytes,
        ),
        counter(
            "socinbd_read_errors",
            "Reads that have failed: the data could not be fetched in time, or the local disk has failed",
            metrics.read_errors.get(),
        ),
        histograms(
            "socinbd_read_duration_seconds",
            "Time of a read: of present data, of one of 16 reads; of absent data, of each read, until its data is present",
            vec![
                (vec![("data", "present".to_owned())], metrics.present.get()),
                (vec![("data", "absent".to_owned())], metrics.absent.get()),
            ],
        ),
        counter(
            "socinbd_fetches",
            "Ranged requests for spans and for windows of compact indexes",
            &metrics.fetches,
        ),
        counter(
            "socinbd_fetched_bytes",
            "Compressed bytes of these requests",
            &metrics.fetched_bytes,
        ),
        histogram(
            "socinbd_fetch_first_byte_seconds",
            "Time from a request to its first bytes",
            metrics.fetch_first_byte.get(),
        ),
        histogram(
            "socinbd_fetch_duration_seconds",
            "Time from a request to its last bytes",
            metrics.fetch.get(),
        ),
        counters(
            "socinbd_fetch_failures",
            "Fetches that a source could not answer, by kind of error",
            "kind",
            Kind::ALL.map(|(_, name)| name),
            &metrics.fetch_failures,
        ),
        counters(
            "socinbd_background_spans",
            "Spans that no read has waited for and that fetches in the background were to bring, by outcome",
            "outcome",
            Outcome::NAMES,
            &metrics.background_spans,
        ),
        counters(
            "socinbd_retries",
            "Requests to a registry that were repeated, by reason",
            "reason",
            RetryReason::NAMES,
            &metrics.retries,
        ),
        counters(
            "socinbd_verification_failures",
            "Bytes that have not passed a verification: of a span, of a table by a span, of a layer as a whole",
            "of",
            Verified::NAMES,
            &metrics.verification_failures,
        ),
        counter(
            "socinbd_false_diff_ids",
            "Layers that do not have the diff ID that their image states",
            &metrics.false_diff_ids,
        ),
        counter(
            "socinbd_conflicting_claims",
            "Images that name the chain ID of an unproven layer for another layer",
            &metrics.conflicting_claims,
        ),
        counters(
            "socinbd_layers_prepared",
            "Layers that containerd has asked for and need not extract, by the content of their snapshots",
            "how",
            Prepared::NAMES,
            &metrics.layers_prepared,
        ),
        counters(
            "socinbd_layers_extracted",
            "Layers that containerd has asked for and extracts itself, by reason",
            "reason",
            ExtractionReason::NAMES,
            &metrics.layers_extracted,
        ),
        histogram(
            "socinbd_layer_prepare_seconds",
            "Time from containerd's request for a layer to its snapshot, of layers that are lazy or on a disk",
            metrics.layer_prepare.get(),
        ),
        counters(
            "socinbd_attaches",
            "Attaches that have ended",
            "outcome",
            Outcome::NAMES,
            &metrics.attaches,
        ),
        histogram(
            "socinbd_attach_duration_seconds",
            "Time from the request of an attach to its mount",
            metrics.attach.get(),
        ),
        histogram(
            "socinbd_attach_first_byte_seconds",
            "Time from the request of an attach to the first read of file data of its layers",
            metrics.attach_first_byte.get(),
        ),
    ]
}

fn counter(name: &'static str, help: &'static str, counter: &Counter) -> Family {
    Family {
        name,
        help,
        kind: Type::Counter,
        samples: Samples::one(counter.get() as f64),
    }
}

fn counters<const N: usize>(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: [&'static str; N],
    counters: &Counters<N>,
) -> Family {
    Family {
        name,
        help,
        kind: Type::Counter,
        samples: Samples::by(label, values.into_iter().zip(counters.get())),
    }
}

fn gauge(name: &'static str, help: &'static str, value: u64) -> Family {
    Family {
        name,
        help,
        kind: Type::Gauge,
        samples: Samples::one(value as f64),
    }
}

fn gauge_by(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: impl IntoIterator<Item = (&'static str, u64)>,
) -> Family {
    Family {
        name,
        help,
        kind: Type::Gauge,
        samples: Samples::by(label, values),
    }
}

fn histogram(name: &'static str, help: &'static str, distribution: Distribution) -> Family {
    histograms(name, help, vec![(Labels::new(), distribution)])
}

fn histograms(
    name: &'static str,
    help: &'static str,
    samples: Vec<(Labels, Distribution)>,
) -> Family {
    Family {
        name,
        help,
        kind: Type::Histogram,
        samples: Samples::Distributions(samples),
    }
}
