//! The keys of the configuration file of `soci-snapshotter-grpc` 0.16.1, and what becomes of them.

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// It sets this option.
    Option(&'static str),
    /// It sets something that does not exist here: nothing is lost.
    None,
    /// It has no effect, and what it asks for is not done: a value other than none is a warning with this advice.
    Warning(&'static str),
    /// A limit on requests, with its default: those here are fixed, so another value is a warning.
    Limit(i64),
}

/// All keys, in the order of the source. `*` is the name of a host or of a compression.
pub(super) const KEYS: [(&str, Effect); 72] = [
    ("http_cache_type", Effect::None),
    ("filesystem_cache_type", Effect::None),
    ("resolve_result_entry", Effect::None),
    ("debug", Effect::Option("--log debug")),
    (
        "disable_verification",
        Effect::Warning("what is fetched is always verified"),
    ),
    ("max_concurrency", Effect::None),
    ("no_prometheus", Effect::Option("no --metrics-address")),
    ("mount_timeout_sec", Effect::None),
    ("fuse_metrics_emit_wait_duration_sec", Effect::None),
    ("http.dialtimeoutmsec", Effect::Limit(3_000)),
    ("http.responseheadertimeoutmsec", Effect::Limit(3_000)),
    ("http.requesttimeoutmsec", Effect::Limit(300_000)),
    ("http.maxretries", Effect::Limit(8)),
    ("http.minwaitmsec", Effect::Limit(30)),
    ("http.maxwaitmsec", Effect::Limit(300_000)),
    ("blob.valid_interval", Effect::None),
    ("blob.fetching_timeout_sec", Effect::Limit(300)),
    ("blob.max_retries", Effect::Limit(8)),
    ("blob.min_wait_msec", Effect::Limit(30)),
    ("blob.max_wait_msec", Effect::Limit(300_000)),
    ("blob.check_always", Effect::None),
    ("blob.force_single_range_mode", Effect::None),
    ("blob.max_span_verification_retries", Effect::None),
    ("directory_cache.max_lru_cache_entry", Effect::None),
    ("directory_cache.max_cache_fds", Effect::None),
    ("directory_cache.sync_add", Effect::None),
    ("directory_cache.direct", Effect::None),
    ("fuse.attr_timeout", Effect::None),
    ("fuse.entry_timeout", Effect::None),
    ("fuse.negative_timeout", Effect::None),
    (
        "fuse.log_fuse_operations",
        Effect::Warning("`socinbd top` and `socinbd why` show reads"),
    ),
    (
        "background_fetch.disable",
        Effect::Option("--unproven lazy"),
    ),
    ("background_fetch.silence_period_msec", Effect::None),
    ("background_fetch.fetch_period_msec", Effect::None),
    ("background_fetch.max_queue_size", Effect::None),
    ("background_fetch.drop_policy", Effect::None),
    ("background_fetch.emit_metric_period_sec", Effect::None),
    ("content_store.type", Effect::None),
    (
        "content_store.containerd_address",
        Effect::Option("--containerd-address"),
    ),
    ("prefetch.enable", Effect::None),
    ("prefetch.max_concurrency", Effect::None),
    ("metrics_address", Effect::Option("--metrics-address")),
    ("metrics_network", Effect::Option("--metrics-address")),
    (
        "debug_address",
        Effect::Warning("there is no profiler; the metrics have the processor time and the memory"),
    ),
    ("metadata_store", Effect::None),
    ("metadata_db_no_sync", Effect::None),
    ("metadata_insertion_chunk_size", Effect::None),
    ("skip_check_snapshotter_supported", Effect::None),
    (
        "pull_modes.soci_v1.enable",
        Effect::Option("--index-policy"),
    ),
    (
        "pull_modes.soci_v2.enable",
        Effect::Option("--index-policy"),
    ),
    ("pull_modes.parallel_pull_unpack.enable", PARALLEL),
    (
        "pull_modes.parallel_pull_unpack.experimental_parallel_pull_as_fallback",
        PARALLEL,
    ),
    (
        "pull_modes.parallel_pull_unpack.max_concurrent_downloads",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.max_concurrent_downloads_per_image",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.concurrent_download_chunk_size",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.max_concurrent_unpacks",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.max_concurrent_unpacks_per_image",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.decompress_streams.*.path",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.decompress_streams.*.args",
        Effect::None,
    ),
    (
        "pull_modes.parallel_pull_unpack.discard_unpacked_layers",
        Effect::None,
    ),
    ("kubeconfig_keychain.enable_keychain", KEYCHAIN),
    ("kubeconfig_keychain.kubeconfig_path", Effect::None),
    (
        "cri_keychain.enable_keychain",
        Effect::Option("--image-service"),
    ),
    (
        "cri_keychain.image_service_path",
        Effect::Option("--containerd"),
    ),
    (
        "resolver.host.*.mirrors.host",
        Effect::Option("--hosts-dir"),
    ),
    (
        "resolver.host.*.mirrors.insecure",
        Effect::Option("--hosts-dir"),
    ),
    (
        "resolver.host.*.mirrors.request_timeout_sec",
        Effect::Limit(0),
    ),
    ("resolver.auth_client_ttl_sec", Effect::None),
    ("resolver.enable_auth_client_sharing", Effect::None),
    ("resolver.custom_headers", Effect::Option("--label-header")),
    ("snapshotter.min_layer_size", Effect::Option("--rule")),
    ("snapshotter.allow_invalid_mounts_on_restart", Effect::None),
];

const PARALLEL: Effect = Effect::Warning(
    "set a rule with pull = \"disks\" in [[snapshotter.rule]] of /etc/socinbd/config.toml: layers are then fetched whole, in parallel",
);
const KEYCHAIN: Effect = Effect::Warning(
    "give the kubelet's credential plugins with image-credential-provider-config and image-credential-provider-bin-dir in /etc/socinbd/config.toml",
);
