//! The metrics, as scrapers read them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    process::{Command, Stdio},
};

use super::{document, get};
use crate::{
    engine::{
        Host,
        lifecycle::{indexed, one_file_host},
    },
    snapshotter::{
        Snapshotter,
        image::{Container, Image, Pulled},
    },
    support::{
        registry::{Fault, Kind, On, Registry, Times},
        seeded_noise,
        tars::Layer,
        wait,
    },
};

const OPENMETRICS: &str = "Accept: application/openmetrics-text; version=1.0.0";

/// The families of an exposition in the text format: type and labels by name.
fn families(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut families = BTreeMap::new();
    for line in text.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            families.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
        }
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (sample, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
        let family = families.get_mut(name).map(|family| &mut family.1);
        let of_histogram = || name.rsplit_once('_').unwrap().0.to_owned();
        let labels = labels.trim_end_matches('}').split(',');
        let keys = labels.filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
        let keys = keys.filter(|key| key != "le");
        match family {
            Some(family) => family.extend(keys),
            None => families.get_mut(&of_histogram()).unwrap().1.extend(keys),
        }
    }
    families
}

/// The value of a sample.
fn value(text: &str, sample: &str) -> f64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("there is no {sample}:\n{text}"))
        .parse()
        .unwrap()
}

/// Gives a program the text, which must accept it; what it prints.
fn accepted_by(command: &mut Command, text: &str) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error} (scripts/setup test installs it)"));
    let mut input = child.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// Reads the families with a parser of Prometheus' Python client, which prints the name and the number of samples of each.
fn parsed_by_python(module: &str, text: &str) -> String {
    let script = format!(
        "import sys\nfrom {module} import text_string_to_metric_families as parse\nfor family in parse(sys.stdin.read()):\n  print(family.type, family.name, len(family.samples))"
    );
    accepted_by(Command::new("/usr/bin/python3").args(["-c", &script]), text)
}

#[test]
fn each_metric_is_in_the_table_of_the_document_and_no_other() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let text = get(&host, &[], "/metrics");
    let exposed = families(&text);
    let document = document("metrics.md");
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    let said = format!("- The number of series is {series} and does not change");
    assert!(document.contains(&said), "{said}");
    // what follows are the names of another program
    let (table, _) = document
        .split_once("\n## Metrics of soci-snapshotter")
        .unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let described: BTreeMap<_, _> = rows
        .map(|row| {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let label = cells[3].trim_matches('`');
            let labels = (!label.is_empty()).then(|| label.to_owned());
            let name = cells[1].trim_matches('`').to_owned();
            (name, (cells[2].to_owned(), labels.into_iter().collect()))
        })
        .collect();
    assert_eq!(exposed, described);
    host.detach(&mountpoint);
}

#[test]
fn prometheus_own_parsers_read_both_forms() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    fs::read(mountpoint.join("hello")).unwrap();
    let text = get(&host, &[], "/metrics");
    let openmetrics = get(&host, &["-H", OPENMETRICS], "/metrics");
    assert!(openmetrics.ends_with("# EOF\n") && !text.contains("# EOF"));
    let said = accepted_by(Command::new("promtool").args(["check", "metrics"]), &text);
    assert_eq!(said, "", "promtool finds no fault");
    let of_text = parsed_by_python("prometheus_client.parser", &text);
    let of_openmetrics = parsed_by_python("prometheus_client.openmetrics.parser", &openmetrics);
    assert_eq!(of_text, of_openmetrics);
    assert!(
        of_text.contains("histogram socinbd_read_duration_seconds 50"),
        "{of_text}"
    );
    let types = get(
        &host,
        &["-o", "/dev/null", "-w", "%{content_type}"],
        "/metrics",
    );
    assert_eq!(types, "text/plain; version=0.0.4; charset=utf-8");
    host.detach(&mountpoint);
}

#[test]
fn reads_fetches_and_attaches_are_counted() {
    let host = Host::new();
    let noise = seeded_noise(300_000, 5);
    let layout = indexed(&host, vec![Layer::new().file("noise", &noise)]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    let before = get(&host, &[], "/metrics");
    let absent = "socinbd_read_duration_seconds_count{data=\"absent\"}";
    for (sample, expected) in [
        ("socinbd_attachments{state=\"lazy\"}", 1.0),
        ("socinbd_layers{state=\"lazy\"}", 1.0),
        ("socinbd_attaches_total{outcome=\"success\"}", 1.0),
        ("socinbd_attach_duration_seconds_count", 1.0),
        ("socinbd_attach_first_byte_seconds_count", 0.0),
        ("socinbd_spans_present", 0.0),
        (absent, 0.0),
    ] {
        assert_eq!(value(&before, sample), expected, "{sample}");
    }
    assert_eq!(fs::read(mountpoint.join("noise")).unwrap(), noise);
    // nothing is fetched any more
    host.wait_complete(&mountpoint);
    let after = get(&host, &[], "/metrics");
    assert!(value(&after, absent) >= 1.0);
    assert_eq!(
        value(&after, "socinbd_attach_first_byte_seconds_count"),
        1.0
    );
    assert_eq!(value(&after, "socinbd_reads_waiting"), 0.0);
    for sample in [
        "socinbd_fetch_memory_bytes",
        "socinbd_requests_in_flight",
        "socinbd_requests_waiting",
        "socinbd_request_bytes_in_flight",
    ] {
        assert_eq!(value(&after, sample), 0.0, "{sample}");
    }
    assert!(value(&after, "socinbd_fetched_bytes_total") >= 290_000.0);
    let read = |text| value(text, "socinbd_read_bytes_total");
    assert!(read(&after) - read(&before) >= 300_000.0);
    assert!(value(&after, "socinbd_fetches_total") >= 1.0);
    assert_eq!(
        value(&after, "socinbd_fetch_first_byte_seconds_count"),
        value(&after, "socinbd_fetch_duration_seconds_count")
    );

    let missing = registry.reference("missing");
    host.fail(
        &["attach", &missing, host.mountpoint("b").to_str().unwrap()],
        3,
    );
    let failed = get(&host, &[], "/metrics");
    assert_eq!(
        value(&failed, "socinbd_attaches_total{outcome=\"failure\"}"),
        1.0
    );
    host.detach(&mountpoint);
    let detached = get(&host, &[], "/metrics");
    assert_eq!(value(&detached, "socinbd_attachments{state=\"lazy\"}"), 0.0);
    assert_eq!(value(&detached, "socinbd_layers{state=\"lazy\"}"), 0.0);
    // counters do not go back with the disk
    assert!(read(&detached) >= read(&failed));
}

#[test]
fn the_limits_of_the_disk_and_what_was_evicted_are_in_the_metrics() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let text = get(&host, &[], "/metrics");
    for (sample, expected) in [
        ("socinbd_disk_limit_bytes", f64::INFINITY),
        ("socinbd_disk_used_bytes", 0.0),
        ("socinbd_disk_room_bytes", f64::INFINITY),
        ("socinbd_disk_full", 0.0),
        ("socinbd_evicted_spans_total", 0.0),
        ("socinbd_evicted_bytes_total", 0.0),
    ] {
        assert_eq!(value(&text, sample), expected, "{sample}");
    }
    host.detach(&mountpoint);
    host.end_daemon();

    // the table has 1.3 MB, so there is room for half of the file
    let noise = seeded_noise(3 << 20, 5);
    let layout = indexed(&host, vec![Layer::new().file("noise", &noise)]);
    let config = host.mountpoint("etc").join("config.toml");
    fs::write(&config, "[disk]\ndisk-limit = \"3MiB\"\n").unwrap();
    let file = ["--config", config.to_str().unwrap(), "--device", "fuse"];
    host.attach(&layout.reference(""), &mountpoint, &file);
    assert!(fs::read(mountpoint.join("noise")).unwrap() == noise);
    let text = get(&host, &[], "/metrics");
    let limit = f64::from(3 << 20);
    let number = |sample| value(&text, sample);
    assert_eq!(number("socinbd_disk_limit_bytes"), limit);
    let used = number("socinbd_disk_used_bytes");
    assert!(used > 0.0 && used <= limit + f64::from(4 << 16), "{used}");
    assert!(number("socinbd_disk_room_bytes") <= limit - used);
    assert!(number("socinbd_evicted_spans_total") > 10.0, "{text}");
    assert!(number("socinbd_evicted_bytes_total") > 1e6, "{text}");
    host.detach(&mountpoint);
}

#[test]
fn failures_are_counted_by_their_reasons() {
    let host = Host::new();
    let layout = indexed(&host, vec![Layer::new().file("hello", b"hello\n")]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    let unavailable = Fault::Status {
        code: 503,
        retry_after: None,
    };
    registry.fail(On::Data, unavailable, Times::Next(2));
    assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
    let text = get(&host, &[], "/metrics");
    let retried = value(&text, "socinbd_retries_total{reason=\"status\"}");
    assert!(retried >= 1.0, "{text}");
    assert_eq!(value(&text, "socinbd_read_errors_total"), 0.0);
    wait("the layer is not degraded", || {
        value(&get(&host, &[], "/metrics"), "socinbd_layers_degraded") == 0.0
    });
    host.detach(&mountpoint);
}

/// The operations of soci-snapshotter 0.16.1, by family; a family without operations has none.
const SOCI: [(&str, &[&str]); 7] = [
    (
        "soci_fs_operation_duration_milliseconds",
        &[
            "mount",
            "remote_registry_get",
            "init_metadata_store",
            "background_fetch",
            "ztoc_unmarshal",
            "fuse_mount",
            "blob_redirect",
            "get_layer_size",
            "soci_index_fetch",
            "ztoc_fetch",
        ],
    ),
    (
        "soci_fs_operation_duration_microseconds",
        &["node_readdir", "synchronous_read"],
    ),
    (
        "soci_fs_operation_count",
        &[
            "synchronous_read_count",
            "synchronous_read_remote_registry_fetch_count",
            "fuse_failure_state",
            "fuse_node_getattr_failure_count",
            "fuse_node_listxattr_failure_count",
            "fuse_node_lookup_failure_count",
            "fuse_node_open_failure_count",
            "fuse_node_readdir_failure_count",
            "fuse_file_read_failure_count",
            "fuse_file_getattr_failure_count",
            "fuse_whiteout_getattr_failure_count",
            "fuse_unknown_operation_failure_count",
            "fuse_mount_failure_count",
            "local_mount_failure_count",
            "background_span_fetch_count",
            "background_span_fetch_failure_count",
            "background_fetch_work_queue_evicted",
            "resolve_cache_hit",
            "resolve_cache_miss",
            "preresolve_queue_drop",
        ],
    ),
    ("soci_fs_bytes_served", &["synchronous_bytes_served"]),
    (
        "soci_fs_image_operation_count_key",
        &["background_fetch_work_queue_size"],
    ),
    ("soci_fs_layer_size_bytes", &[]),
    ("soci_fs_layer_fetched_size_bytes", &[]),
];

/// The rows of a table of the document: the family and the operation, and the third cell.
fn soci_rows(heading: &str) -> BTreeMap<(String, String), String> {
    let document = document("metrics.md");
    let (_, section) = document.split_once(heading).unwrap();
    let section = section.split("\n#").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `soci_"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [family, operation] = [1, 2].map(|cell| cells[cell].trim_matches('`').to_owned());
        ((family, operation), cells[3].to_owned())
    })
    .collect()
}

#[test]
fn the_names_of_soci_have_its_types_labels_and_units_or_a_reason_why_not() {
    let registry = Registry::start();
    let noise = seeded_noise(300_000, 5);
    let layers = vec![
        Layer::new().file("noise", &noise),
        Layer::new().file("small", b"small"),
    ];
    let image = Image::push(&registry, "app", layers, true);
    let options = ["--metrics-names", "both", "--unproven", "lazy"];
    let snapshotter = Snapshotter::start(&options);
    let metrics = || get(&snapshotter.host, &[], "/metrics");
    let (pulled, top) = image.pull(&snapshotter, "default");
    assert_eq!(pulled, [Pulled::Lazy, Pulled::Lazy]);
    let container = Container::start(&snapshotter, "container", &top);
    assert!(fs::read(container.root.path().join("noise")).unwrap() == noise);

    let text = metrics();
    let exposed = families(&text);
    let exposed = exposed.iter().filter(|(name, _)| name.starts_with("soci_"));
    let exposed: BTreeMap<_, _> = exposed.collect();
    let operation = |line: &str| {
        let (family, labels) = line.split_once('{')?;
        let family = family
            .trim_end_matches("_bucket")
            .trim_end_matches("_sum")
            .trim_end_matches("_count");
        // a family may end in one of these itself
        let is_known = SOCI.iter().any(|(name, _)| *name == family);
        let family = match is_known {
            true => family.to_owned(),
            false => format!("{family}_count"),
        };
        let operation = labels.split_once("operation_type=\"");
        let operation = operation.map_or("", |(_, rest)| rest.split('"').next().unwrap());
        Some((family, operation.to_owned()))
    };
    let lines = text.lines().filter(|line| line.starts_with("soci_"));
    let operations: BTreeSet<_> = lines.filter_map(operation).collect();
    let described = soci_rows("### Exposed names");
    let rows: BTreeSet<_> = described.keys().cloned().collect();
    assert_eq!(operations, rows);
    for ((family, _), kind) in &described {
        assert_eq!(&exposed[family].0, kind, "{family}");
    }
    for (family, (_, labels)) in exposed {
        let expected = match family.as_str() {
            "soci_fs_image_operation_count_key" => ["image", "operation_type"],
            "soci_fs_layer_size_bytes" | "soci_fs_layer_fetched_size_bytes" => {
                ["digest", "mountpoint"]
            }
            _ => ["layer", "operation_type"],
        };
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        assert_eq!(labels, expected, "{family}");
    }
    // all that soci has is in one of the tables, and in no more
    let absent = soci_rows("### Names without a counterpart");
    for (family, operations) in SOCI {
        for operation in if operations.is_empty() {
            &[""]
        } else {
            operations
        } {
            let row = (family.to_owned(), (*operation).to_owned());
            let places = (described.contains_key(&row), absent.contains_key(&row));
            assert!(places.0 != places.1, "{row:?}");
        }
    }

    let of = |family: &str, operation: &str| {
        let sample = format!("{family}{{operation_type=\"{operation}\",layer=\"\"}}");
        value(&text, &sample)
    };
    let mounts = of("soci_fs_operation_duration_milliseconds_count", "mount");
    assert_eq!(mounts, 2.0);
    let prepared = value(&text, "socinbd_layers_prepared_total{how=\"lazy\"}");
    assert_eq!(prepared, mounts);
    let seconds = value(&text, "socinbd_layer_prepare_seconds_sum");
    let milliseconds = of("soci_fs_operation_duration_milliseconds_sum", "mount");
    assert!((milliseconds - seconds * 1e3).abs() < 1e-6, "{text}");
    assert!(
        text.contains(
            "soci_fs_operation_duration_microseconds_bucket{le=\"1000.0\",operation_type="
        )
    );
    let served = of("soci_fs_bytes_served", "synchronous_bytes_served");
    assert_eq!(served, value(&text, "socinbd_read_bytes_total"));
    let reads = of("soci_fs_operation_count", "synchronous_read_count");
    assert_eq!(reads, value(&text, "socinbd_reads_total"));
    assert_eq!(of("soci_fs_operation_count", "fuse_failure_state"), 0.0);
    let content = snapshotter.host.root().join("snapshots/snapshotter");
    let of_layer = |family: &str| {
        let begin = format!(
            "{family}{{digest=\"{}\",mountpoint=\"{}/",
            image.blobs[0],
            content.display()
        );
        let line = text.lines().find(|line| line.starts_with(&begin));
        let (_, value) = line
            .unwrap_or_else(|| panic!("{begin}: {text}"))
            .rsplit_once(' ')
            .unwrap();
        value.parse::<f64>().unwrap()
    };
    let size = of_layer("soci_fs_layer_size_bytes");
    let fetched = of_layer("soci_fs_layer_fetched_size_bytes");
    assert!(
        fetched > 250_000.0 && fetched <= size,
        "{fetched} of {size}"
    );

    let openmetrics = get(&snapshotter.host, &["-H", OPENMETRICS], "/metrics");
    parsed_by_python("prometheus_client.parser", &text);
    let said = parsed_by_python("prometheus_client.openmetrics.parser", &openmetrics);
    assert!(said.contains("unknown soci_fs_operation_count 7"), "{said}");
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn layers_that_containerd_extracts_are_counted_by_reason() {
    let registry = Registry::start();
    let layers = |name: &str| vec![Layer::new().file(name, name.as_bytes())];
    let image = |name: &str, indexed: bool| Image::push(&registry, name, layers(name), indexed);
    let rule = format!("containerd,image={}/ruled", registry.host());
    let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--rule", &rule]);
    let mut expected = BTreeMap::new();
    let mut pulled = |image: &Image, how: Pulled, sample: &str| {
        let answer = image.pull(&snapshotter, "default").0;
        assert_eq!(answer, [how], "{sample}");
        *expected.entry(sample.to_owned()).or_insert(0.0) += 1.0;
        let text = get(&snapshotter.host, &[], "/metrics");
        for (sample, count) in &expected {
            assert_eq!(value(&text, sample), *count, "{sample}");
        }
    };
    let prepared = |how: &str| format!("socinbd_layers_prepared_total{{how=\"{how}\"}}");
    let extracted = |why: &str| format!("socinbd_layers_extracted_total{{reason=\"{why}\"}}");
    let lazy = image("lazy", true);
    pulled(&lazy, Pulled::Lazy, &prepared("lazy"));
    pulled(&lazy, Pulled::Lazy, &prepared("existing"));
    pulled(
        &image("plain", false),
        Pulled::Extracted,
        &extracted("table"),
    );
    pulled(&image("ruled", true), Pulled::Extracted, &extracted("rule"));
    let mut missing = image("other", true);
    missing.reference = registry.reference("missing:1");
    pulled(&missing, Pulled::Extracted, &extracted("failure"));
    let late = image("late", true);
    registry.fail(On::Kind(Kind::Manifest), Fault::Hang, Times::UntilHealed);
    pulled(&late, Pulled::Extracted, &extracted("late"));
    registry.heal();

    // containerd without the annotations
    let client = snapshotter.client();
    let target = image("unnamed", true).chain[0].to_string();
    let labels = [(socinbd::snapshotter::labels::TARGET, target.as_str())];
    client.prepare("default/7/unnamed", "", &labels).unwrap();
    // a container is no layer
    client.prepare("default/8/container", "", &[]).unwrap();
    let text = get(&snapshotter.host, &[], "/metrics");
    assert_eq!(value(&text, &extracted("labels")), 1.0);
    assert_eq!(value(&text, "socinbd_layer_prepare_seconds_count"), 1.0);
    client.remove_all();
    snapshotter.end();
}

#[test]
fn an_address_of_its_own_has_the_metrics_and_nothing_else() {
    let host = Host::new();
    let socket = host.root().with_file_name("metrics.sock");
    let address = format!("unix:{}", socket.display());
    let daemon = |address: &str| host.command(&["daemon", "--metrics-address", address]);
    // a file of a person is not removed
    fs::write(&socket, "text").unwrap();
    let output = daemon(&address).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("--metrics-address"), "{error}");
    assert_eq!(output.status.code(), Some(5), "{error}");
    assert_eq!(fs::read(&socket).unwrap(), b"text");
    fs::remove_file(&socket).unwrap();

    let mut child = daemon(&address).spawn().unwrap();
    wait("the socket is there", || socket.exists());
    let ask = |path: &str| {
        let output = Command::new("curl")
            .args(["-sS", "-w", "%{http_code}", "--unix-socket"])
            .arg(&socket)
            .arg(format!("http://localhost{path}"))
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(families(ask("/metrics").trim_end_matches("200")).len(), 45);
    assert!(ask("/v1/attachments").ends_with("404"));
    // the next daemon has the address too
    host.kill_served_by_keeper();
    wait("the next daemon answers", || {
        ask("/metrics").ends_with("200")
    });
    host.end_daemon();
    child.wait().unwrap();
}
