//! `socinbd snapshotter`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::daemon::Daemon;
use crate::{
    api::metrics::MetricsAddress,
    cli::{
        GlobalArgs, absolute,
        arguments::{AccessArgs, IndexArgs},
        pull_rule,
        space::limits::DiskArgs,
    },
    engine::{DeviceChoice, LayerMounter, MetricNames},
    error::Result,
    keeper::Service,
    layer::DiskLimits,
    snapshotter::{
        ImageServiceOptions, PullLimits, Rule, SnapshotterOptions, Unproven, labels::header_name,
    },
    source::Access,
};

/// The socket of a containerd that has its usual configuration.
const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Hold the images of containerd: a snapshotter
///
/// The command is `socinbd daemon`, which serves the snapshots API of containerd too. containerd uses it as a proxy plugin: images with a
/// SOCI index start lazily, and containerd pulls other ones as usual. `attach` and `run` use the same daemon, disks and devices.
///
/// Each --address has snapshots of its own, one for each containerd. Their name is that of the socket's file.
#[derive(Args)]
#[command(after_help = "Examples:\n\
\x20 socinbd snapshotter\n\
\x20 socinbd snapshotter --address /run/socinbd/snapshotter.sock --unproven lazy")]
pub(crate) struct SnapshotterCommand {
    /// Socket for containerd (repeatable)
    ///
    /// Default: snapshotter.sock in the runtime directory.
    #[arg(long, value_name = "FILE")]
    address: Vec<PathBuf>,
    /// Socket for the kubelet: the CRI image service
    ///
    /// Its requests are passed on to containerd. The credentials of its pulls are kept in memory, and layers are fetched with them. The
    /// kubelet's key is imageServiceEndpoint. It may be the same socket as an --address.
    #[arg(long, value_name = "FILE")]
    image_service: Option<PathBuf>,
    /// Socket of containerd, for --image-service
    ///
    /// Default: /run/containerd/containerd.sock.
    #[arg(long, value_name = "FILE")]
    containerd: Option<PathBuf>,
    /// Policy for layers that were not compared yet
    ///
    /// containerd uses a layer for every image that names its diff IDs, and trusts that they are true. lazy: the layer is served, and compared
    /// when all of it was read. verify-soon: all of it is fetched in the background and compared. stream: it is fetched and compared first.
    #[arg(
        long,
        value_enum,
        value_name = "POLICY",
        default_value_t,
        hide_possible_values = true
    )]
    unproven: Unproven,
    /// Rule for the pull of layers (repeatable)
    ///
    /// For example `disks,image=registry.example/*`. A rule is lazy, disks or containerd, with conditions after commas: image=PATTERN (`*` and `?`; HOST/REPOSITORY, with or without :TAG),
    /// max-image-size=BYTES and max-layer-size=BYTES (sizes of blobs). The first rule that applies to a layer counts. lazy: reads fetch what
    /// they need; it applies only to layers with a table in an index. disks: the layer is fetched whole and verified before containerd goes
    /// on. containerd: containerd fetches and unpacks it. Without a rule, layers with a table are lazy, and containerd pulls images without
    /// an index. Example: --rule lazy --rule disks
    #[arg(long, value_name = "RULE", value_parser = pull_rule::rule)]
    rule: Vec<Rule>,
    /// Who mounts lazy layers: daemon or containerd
    ///
    /// daemon: the layers are mounted in the state directory. containerd: it gets their devices and mounts them itself, while a container
    /// uses them; it needs containerd 2.2 or later, and programs that mount snapshots without its mount manager (nerdctl commit) fail.
    #[arg(
        long,
        value_enum,
        value_name = "WHO",
        default_value_t,
        hide_possible_values = true
    )]
    layer_mounts: LayerMounter,
    /// Header of requests to registries that labels of snapshots may set (repeatable)
    ///
    /// The label is containerd.io/snapshot/remote/soci.header.NAME. Images can set labels too: allow no header that gives rights.
    #[arg(long, value_name = "NAME", value_parser = header_name, hide_short_help = true)]
    label_header: Vec<String>,
    /// Block device: auto, nbd, loop or fuse
    #[arg(long, value_enum, default_value_t, hide_possible_values = true)]
    device: DeviceChoice,
    /// Log file, rotated at 1 MiB, instead of standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Address for GET /metrics, e.g. 127.0.0.1:9101
    ///
    /// An IP address with a port, or unix:PATH.
    /// The metrics are also on the socket of the runtime directory. Anybody that can connect to the address can read them: they have no
    /// names of images or files.
    #[arg(long, value_name = "ADDR")]
    metrics_address: Option<MetricsAddress>,
    /// Metric names: socinbd or both
    ///
    /// both: also those of AWS's soci-snapshotter, for dashboards that were made for it. These have labels with the digests of layers and the
    /// paths of their mounts.
    #[arg(
        long,
        value_enum,
        value_name = "NAMES",
        default_value_t,
        hide_possible_values = true,
        hide_short_help = true
    )]
    metrics_names: MetricNames,
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    index: IndexArgs,
}

impl SnapshotterCommand {
    pub(crate) fn log_file(&self) -> Option<&Path> {
        self.log_file.as_deref()
    }

    /// The limits of the local disk.
    pub(crate) fn disk_limits(&self) -> DiskLimits {
        self.disk.limits()
    }

    /// Serves, until it is ended.
    pub(crate) async fn run(
        self,
        global: &GlobalArgs,
        service: Option<Service>,
    ) -> Result<ExitCode> {
        let mut addresses = self
            .address
            .iter()
            .map(|address| absolute(address))
            .collect::<Result<Vec<_>>>()?;
        if addresses.is_empty() {
            addresses.push(absolute(&global.run_dir)?.join("snapshotter.sock"));
        }
        let containerd = self.containerd.as_deref();
        let image_service = match &self.image_service {
            Some(address) => Some(ImageServiceOptions {
                address: absolute(address)?,
                containerd: absolute(containerd.unwrap_or(Path::new(CONTAINERD)))?,
            }),
            None => None,
        };
        let options = SnapshotterOptions {
            access: Access {
                pull_credentials: image_service.is_some(),
                ..self.access.access()?
            },
            index: self.index.choice(),
            device: self.device,
            unproven: self.unproven,
            rules: self.rule.clone(),
            pull_limits: PullLimits::default(),
            layer_mounts: self.layer_mounts,
            image_service,
            label_headers: self.label_header.clone(),
        };
        let daemon = Daemon {
            idle_exit: None,
            disk_limits: self.disk_limits(),
            metrics_address: self.metrics_address,
            metric_names: self.metrics_names,
            snapshotter: Some((addresses, options)),
        };
        daemon.run(global, service).await
    }
}
