//! What CRI asks for every ten seconds: each of 1,000 snapshots by its name, one after the other, and a list of all. Milliseconds, of the server
//! and a client in one process.
//!
//!     cargo bench --bench snapshots

use std::time::{Duration, Instant};

use socinbd::{
    engine::Engine,
    snapshotter::{
        Server, SnapshotterOptions,
        proto::snapshots::{ListSnapshotsRequest, PrepareSnapshotRequest, StatSnapshotRequest},
    },
};

#[path = "../tests/it/snapshotter/connection.rs"]
mod connection;
mod support;

const SNAPSHOTS: usize = 1000;
const ROUNDS: usize = 15;

fn main() {
    support::print_machine();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("snapshots.sock");
    // as the daemon: a runtime with a thread for each processor
    let daemon = tokio::runtime::Runtime::new().expect("a runtime");
    let addresses = [socket.clone()];
    let server = daemon.block_on(async {
        let [root, run_dir] = ["root", "run"].map(|name| folder.path().join(name));
        let engine = Engine::open(&root, &run_dir).await.expect("an engine");
        let options = SnapshotterOptions::default();
        let server = Server::bind(&engine, &addresses, options, None).await;
        server.expect("a server")
    });
    daemon.spawn(server.run());
    let client = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    client.block_on(ask(&socket));
}

async fn ask(socket: &std::path::Path) {
    let mut client = connection::connect(socket).await.expect("it listens");
    let names: Vec<String> = (0..SNAPSHOTS)
        .map(|number| format!("k8s.io/{number}/snapshot"))
        .collect();
    for name in &names {
        let request = PrepareSnapshotRequest {
            key: name.clone(),
            labels: [("containerd.io/gc.root".to_owned(), "x".to_owned())].into(),
            ..Default::default()
        };
        client.prepare(request).await.expect("a snapshot");
    }
    let (mut stats, mut lists) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for name in &names {
            let request = StatSnapshotRequest {
                key: name.clone(),
                ..Default::default()
            };
            client.stat(request).await.expect("it is there");
        }
        stats.push(start.elapsed());
        let start = Instant::now();
        let request = ListSnapshotsRequest::default();
        let mut answer = client.list(request).await.expect("a list").into_inner();
        let mut found = 0;
        while let Some(message) = answer.message().await.expect("a message") {
            found += message.info.len();
        }
        assert_eq!(found, SNAPSHOTS);
        lists.push(start.elapsed());
    }
    print("Stat of each", stats);
    print("List of all", lists);
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{SNAPSHOTS} snapshots, {what}: median {:.1} ms, fastest {:.1} ms, slowest {:.1} ms",
        milliseconds(times[times.len() / 2]),
        milliseconds(times[0]),
        milliseconds(times[times.len() - 1]),
    );
}
