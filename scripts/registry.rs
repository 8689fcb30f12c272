//! A loopback registry for demonstrations and benchmarks: serves OCI layouts behind a link with a set round trip and bandwidth.
//!
//! `registry LAYOUT... [--mbit N] [--rtt MS] [--answer-after S]` prints its address on standard output and serves until it is ended. The first
//! layout is the repository `app`, the next ones are `app-2`, `app-3` and so on. SIGUSR1 prints `requests bytes` since the last print. SIGUSR2
//! prints the largest number of connections so far, and begins to answer each request after `--answer-after`, or ends that.

#[path = "../tests/it/support/registry/mod.rs"]
mod registry;

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use registry::{Fault, On, Times};
use tokio::signal::unix::{SignalKind, signal};

/// Serve OCI layouts as repositories of a registry on loopback
#[derive(Parser)]
struct Arguments {
    /// The layouts' folders
    #[arg(required = true)]
    layouts: Vec<PathBuf>,
    /// Bandwidth of the link, in megabits a second; 0: unlimited
    #[arg(long, default_value_t = 0)]
    mbit: u64,
    /// Round trip of the link, in milliseconds
    #[arg(long, default_value_t = 0)]
    rtt: u64,
    /// Seconds after which each request is answered, from SIGUSR2 on
    #[arg(long, default_value_t = 0)]
    answer_after: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let registry = registry::Registry::start();
    for (number, layout) in (1..).zip(&arguments.layouts) {
        let name = match number {
            1 => "app".to_owned(),
            number => format!("app-{number}"),
        };
        registry.add_layout(&name, layout)?;
    }
    let bytes_per_second = arguments.mbit * 125_000;
    registry.set_link(registry::Link {
        round_trip: Duration::from_millis(arguments.rtt),
        bytes_per_second,
    });
    println!("{}", registry.host());
    let mut asked = signal(SignalKind::user_defined1())?;
    let mut slower = signal(SignalKind::user_defined2())?;
    let mut is_slow = false;
    loop {
        tokio::select! {
            _ = asked.recv() => {
                let total = registry.counters().total();
                registry.reset_counters();
                println!("{} {}", total.requests, total.bytes);
            }
            _ = slower.recv() => {
                println!("{}", registry.most_connections());
                is_slow = !is_slow;
                match is_slow {
                    true => {
                        let delay = Fault::Delay(Duration::from_secs(arguments.answer_after));
                        registry.fail(On::Any, delay, Times::UntilHealed);
                    }
                    false => registry.heal(),
                }
            }
        }
    }
}
