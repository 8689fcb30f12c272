//! What the benchmarks share: a layer to work on, and rounds that pair a subject with its yardstick.
//!
//! A figure is a ratio of the two in one run: machines differ, and so do minutes on one machine.

#![allow(dead_code, reason = "each benchmark uses a part")]

use std::{
    io::{Read, Write},
    path::Path,
    time::{Duration, Instant},
};

pub mod zlib;

/// Rounds of each pair; their medians count.
const ROUNDS: usize = 7;

/// Bytes of the layer that is made where none is given.
const MADE_BYTES: u64 = 256 << 20;

/// A gzip layer: the file that `LAYER` names, else a tar of this machine's programs and libraries, packed at level 6.
pub fn layer() -> Vec<u8> {
    if let Some(path) = std::env::var_os("LAYER") {
        let bytes = std::fs::read(&path).expect("the file that LAYER names");
        println!("layer: {} bytes, as LAYER says", bytes.len());
        return bytes;
    }
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    let mut tar = tar::Builder::new(gzip);
    tar.follow_symlinks(false);
    let mut left = MADE_BYTES;
    add(&mut tar, Path::new("/usr"), &mut left);
    let bytes = tar
        .into_inner()
        .and_then(|gzip| gzip.finish())
        .expect("memory does not fail");
    println!(
        "layer: {} MB of /usr in {} MB of gzip",
        (MADE_BYTES - left) >> 20,
        bytes.len() >> 20
    );
    bytes
}

/// Adds a folder's files, sorted, as long as there is room.
fn add(tar: &mut tar::Builder<impl Write>, folder: &Path, left: &mut u64) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(metadata) = path.symlink_metadata() else {
            continue;
        };
        if metadata.is_dir() {
            add(tar, &path, left);
        } else if metadata.is_file() && metadata.len() <= *left {
            let Ok(file) = std::fs::File::open(&path) else {
                continue;
            };
            let name = path.strip_prefix("/").unwrap_or(&path);
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&metadata);
            tar.append_data(&mut header, name, file.take(metadata.len()))
                .expect("a file that stays as it is");
            *left -= metadata.len();
        }
    }
}

/// Runs both by turns, and prints the medians of their times and of the ratios of their speeds. `bytes` is what each passes over.
pub fn pair(name: &str, bytes: u64, mut subject: impl FnMut(), mut yardstick: impl FnMut()) {
    subject(); // caches, allocations, clock speeds
    yardstick();
    let mut rounds: Vec<(Duration, Duration)> = (0..ROUNDS)
        .map(|_| (timed(&mut subject), timed(&mut yardstick)))
        .collect();
    let mut ratios: Vec<f64> = rounds
        .iter()
        .map(|(subject, yardstick)| yardstick.as_secs_f64() / subject.as_secs_f64())
        .collect();
    ratios.sort_by(f64::total_cmp);
    rounds.sort();
    let subject = rounds[ROUNDS / 2].0;
    rounds.sort_by_key(|round| round.1);
    let yardstick = rounds[ROUNDS / 2].1;
    let speed = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    println!(
        "{name:<44} {:7.0} MB/s  yardstick {:7.0} MB/s  ratio {:.2} ({:.2} to {:.2})",
        speed(subject),
        speed(yardstick),
        ratios[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS - 1],
    );
}

fn timed(work: &mut impl FnMut()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// The processor and the kernel, for whoever reads the figures.
pub fn print_machine() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "machine: {}, {cores} cores, Linux {}",
        model.trim_start_matches([' ', '\t', ':']),
        kernel.trim()
    );
}

/// Peak resident memory of this process in bytes, from now on.
pub fn reset_peak() {
    // 5: the peak (proc(5), clear_refs)
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// See [`reset_peak`].
pub fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap_or_default();
    line.trim()
        .trim_end_matches(" kB")
        .parse::<u64>()
        .unwrap_or(0)
        * 1024
}
