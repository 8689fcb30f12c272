//! The process as the kernel sees it, with the names that Prometheus' own clients use.

use std::fs;

use super::families::{Family, Samples, Type};

/// The families of the process. Those that the kernel does not show are left out.
pub(super) fn families() -> Vec<Family> {
    [cpu(), start(), memory(), descriptors(), threads()]
        .into_iter()
        .flatten()
        .collect()
}

/// The fields of `/proc/self/stat` after the name of the program, which may have spaces. The first is the state, field 3 of proc(5).
fn stat() -> Option<Vec<u64>> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let number = |field: &str| field.parse().unwrap_or(0);
    Some(fields.split_ascii_whitespace().map(number).collect())
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

fn cpu() -> Option<Family> {
    let stat = stat()?;
    Some(Family {
        name: "process_cpu_seconds",
        help: "CPU time of the daemon",
        kind: Type::Counter,
        samples: Samples::one(seconds(stat.get(11)? + stat.get(12)?)),
    })
}

fn start() -> Option<Family> {
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
    let boot: f64 = boot.parse().ok()?;
    Some(Family {
        name: "process_start_time_seconds",
        help: "Start of the daemon, in seconds since 1970",
        kind: Type::Gauge,
        samples: Samples::one(boot + seconds(*stat()?.get(19)?)),
    })
}

fn memory() -> Option<Family> {
    let pages = fs::read_to_string("/proc/self/statm").ok()?;
    let resident: u64 = pages.split(' ').nth(1)?.parse().ok()?;
    Some(Family {
        name: "process_resident_memory_bytes",
        help: "Resident memory of the daemon",
        kind: Type::Gauge,
        samples: Samples::one((resident * rustix::param::page_size() as u64) as f64),
    })
}

fn descriptors() -> Option<Family> {
    // one of them is that of the directory
    let open = fs::read_dir("/proc/self/fd").ok()?.count();
    Some(Family {
        name: "process_open_fds",
        help: "Open file descriptors of the daemon",
        kind: Type::Gauge,
        samples: Samples::one(open.saturating_sub(1) as f64),
    })
}

fn threads() -> Option<Family> {
    Some(Family {
        name: "process_threads",
        help: "Threads of the daemon",
        kind: Type::Gauge,
        samples: Samples::one(*stat()?.get(17)? as f64),
    })
}
