//! Metrics under the names of AWS's soci-snapshotter 0.16.1, for dashboards that were made for it. `docs/metrics.md` has the two tables: what is
//! exposed, and what has no counterpart.

use std::{path::PathBuf, sync::atomic::Ordering};

use super::families::{Family, Labels, Samples, Type};
use crate::{
    engine::attach::engine::Engine,
    layer::DiskProgress,
    metrics::{Distribution, ExtractionReason, METRICS, Outcome, SAMPLED},
    oci::Digest,
};

/// The names of the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MetricNames {
    /// Those of this program.
    #[default]
    Socinbd,
    /// Those of AWS's soci-snapshotter too.
    Both,
}

/// A layer of a snapshot.
pub(super) struct SnapshotLayer {
    digest: Digest,
    mountpoint: PathBuf,
    size: u64,
    fetched: u64,
}

/// A histogram of durations: the label of its operation, and the distribution in seconds.
type Durations = (&'static str, Distribution);

impl Engine {
    /// Sets the names of the metrics.
    pub fn set_metric_names(&self, names: MetricNames) {
        let are_both = names == MetricNames::Both;
        self.exposes_soci_names.store(are_both, Ordering::Relaxed);
    }

    /// The metrics under the names of soci-snapshotter; none unless they are wanted.
    pub(super) fn soci_families(&self) -> Vec<Family> {
        if !self.exposes_soci_names.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let layers = self.layer_mounts().into_iter();
        let layers = layers.map(|(mountpoint, device)| SnapshotLayer {
            digest: device.disk().layer().digest,
            mountpoint,
            size: device.disk().layer().size,
            fetched: device.disk().present_blob_bytes(),
        });
        let disks = self.disks().store().open_disks().into_iter();
        let filling = disks.filter(|disk| *disk.progress().borrow() == DiskProgress::Filling);
        families(&layers.collect::<Vec<_>>(), filling.count())
    }
}

/// `filling`: the number of layers whose rest is being fetched.
fn families(layers: &[SnapshotLayer], filling: usize) -> Vec<Family> {
    let metrics = &METRICS;
    let background = metrics.background_spans.get();
    let extracted = metrics.layers_extracted.get();
    let failed = [
        ExtractionReason::Late,
        ExtractionReason::Conflict,
        ExtractionReason::Failure,
    ];
    let failed: u64 = failed.iter().map(|why| extracted[*why as usize]).sum();
    let counts = [
        ("synchronous_read_count", metrics.reads.get()),
        (
            "synchronous_read_remote_registry_fetch_count",
            metrics.absent.get().count,
        ),
        ("fuse_failure_state", metrics.read_errors.periods()),
        (
            "fuse_file_read_failure_count",
            metrics.read_errors.get().get(),
        ),
        ("fuse_mount_failure_count", failed),
        (
            "background_span_fetch_count",
            background[Outcome::Success as usize],
        ),
        (
            "background_span_fetch_failure_count",
            background[Outcome::Failure as usize],
        ),
    ];
    vec![
        histogram(
            "soci_fs_operation_duration_milliseconds",
            "Durations of operations, in milliseconds",
            1e3,
            [
                ("mount", metrics.layer_prepare.get()),
                ("remote_registry_get", metrics.fetch_first_byte.get()),
            ],
        ),
        histogram(
            "soci_fs_operation_duration_microseconds",
            "Durations of operations, in microseconds",
            1e6,
            [("synchronous_read", reads())],
        ),
        by_operation(
            "soci_fs_operation_count",
            "Operations",
            Type::ForeignCounter,
            "layer",
            &counts,
        ),
        by_operation(
            "soci_fs_bytes_served",
            "Bytes of operations",
            Type::Gauge,
            "layer",
            &[("synchronous_bytes_served", metrics.read_bytes.get())],
        ),
        by_operation(
            "soci_fs_image_operation_count_key",
            "Operations on images",
            Type::Gauge,
            "image",
            &[("background_fetch_work_queue_size", filling as u64)],
        ),
        of_layers(
            "soci_fs_layer_fetched_size_bytes",
            "Bytes of the layer's blob that are on the local disk",
            layers,
            |layer| layer.fetched,
        ),
        of_layers(
            "soci_fs_layer_size_bytes",
            "Size of the layer's blob",
            layers,
            |layer| layer.size,
        ),
    ]
}

/// All reads: one of [`SAMPLED`] reads of present data stands for all of them.
fn reads() -> Distribution {
    let (present, absent) = (METRICS.present.get(), METRICS.absent.get());
    let buckets = present.buckets.iter().zip(&absent.buckets);
    Distribution {
        buckets: buckets
            .map(|(present, absent)| (present.0, present.1 * SAMPLED + absent.1))
            .collect(),
        sum_seconds: present.sum_seconds * SAMPLED as f64 + absent.sum_seconds,
        count: present.count * SAMPLED + absent.count,
    }
}

/// The labels of an operation; the other label has no value, because the counters are those of all layers.
fn labels(operation: &str, other: &'static str) -> Labels {
    vec![
        ("operation_type", operation.to_owned()),
        (other, String::new()),
    ]
}

/// `per_second`: units of the family in a second.
fn histogram<const N: usize>(
    name: &'static str,
    help: &'static str,
    per_second: f64,
    operations: [Durations; N],
) -> Family {
    let of_unit = |seconds: f64| {
        // bounds are whole microseconds
        (seconds * 1e6).round() * per_second / 1e6
    };
    let samples = operations.into_iter().map(|(operation, it)| {
        let buckets = it.buckets.iter();
        let distribution = Distribution {
            buckets: buckets.map(|(le, count)| (of_unit(*le), *count)).collect(),
            sum_seconds: it.sum_seconds * per_second,
            count: it.count,
        };
        (labels(operation, "layer"), distribution)
    });
    Family {
        name,
        help,
        kind: Type::Histogram,
        samples: Samples::Distributions(samples.collect()),
    }
}

fn by_operation(
    name: &'static str,
    help: &'static str,
    kind: Type,
    other: &'static str,
    operations: &[(&str, u64)],
) -> Family {
    let samples = operations.iter();
    let samples = samples.map(|(operation, value)| (labels(operation, other), *value as f64));
    Family {
        name,
        help,
        kind,
        samples: Samples::Numbers(samples.collect()),
    }
}

fn of_layers(
    name: &'static str,
    help: &'static str,
    layers: &[SnapshotLayer],
    value: impl Fn(&SnapshotLayer) -> u64,
) -> Family {
    let samples = layers.iter().map(|layer| {
        let labels = vec![
            ("digest", layer.digest.to_string()),
            ("mountpoint", layer.mountpoint.display().to_string()),
        ];
        (labels, value(layer) as f64)
    });
    Family {
        name,
        help,
        kind: Type::ForeignCounter,
        samples: Samples::Numbers(samples.collect()),
    }
}
