//! A loopback registry for demonstrations and benchmarks: serves one OCI layout as `app`, behind a link with a set round trip and
//! bandwidth.
//!
//! `registry LAYOUT [--mbit N] [--rtt MS]` prints its address on standard output and serves until it is ended. SIGUSR1 prints
//! `requests bytes` since the last print.

#[path = "../tests/it/support/registry/mod.rs"]
mod registry;

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Serve an OCI layout as the repository `app` of a registry on loopback
#[derive(Parser)]
struct Arguments {
    /// The layout's folder
    layout: PathBuf,
    /// Bandwidth of the link, in megabits a second; 0: unlimited
    #[arg(long, default_value_t = 0)]
    mbit: u64,
    /// Round trip of the link, in milliseconds
    #[arg(long, default_value_t = 0)]
    rtt: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let registry = registry::Registry::start();
    registry.add_layout("app", &arguments.layout)?;
    let bytes_per_second = arguments.mbit * 125_000;
    registry.set_link(registry::Link {
        round_trip: Duration::from_millis(arguments.rtt),
        bytes_per_second,
    });
    println!("{}", registry.host());
    let mut asked = signal(SignalKind::user_defined1())?;
    while asked.recv().await.is_some() {
        let total = registry.counters().total();
        registry.reset_counters();
        println!("{} {}", total.requests, total.bytes);
    }
    Ok(())
}
