//! What an operator sees of a daemon and of its attachments.

mod api;
mod commands;
mod metrics;
mod report;

use std::{
    path::Path,
    process::{Command, Output},
};

use crate::{
    engine::Host,
    support::{seeded_noise, tars::Layer},
};

/// curl(1), which asks the daemon of a host; what follows are its options and the path.
fn command(host: &Host, arguments: &[&str], path: &str) -> Command {
    let mut command = Command::new("curl");
    command
        .args(["-sS", "--max-time", "60", "--unix-socket"])
        .arg(host.run_dir().join("socinbd.sock"))
        .args(arguments)
        .arg(format!("http://localhost{path}"));
    command
}

/// Asks the daemon.
fn curl(host: &Host, arguments: &[&str], path: &str) -> Output {
    let output = command(host, arguments, path).output();
    output.expect("this test needs curl")
}

/// The body of an answer that must be a success.
fn get(host: &Host, arguments: &[&str], path: &str) -> String {
    let output = curl(host, &[&["--fail"], arguments].concat(), path);
    assert!(
        output.status.success(),
        "{path}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A document of the project.
fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docs")
        .join(name);
    std::fs::read_to_string(path).unwrap()
}

/// A layer with two small files that share no span with each other or with `usr/share/unread`: the program, and one with this name. They are
/// few, so that a start that reads them does not have the rest fetched.
fn apart(name: &str) -> Layer {
    Layer::new()
        .file("usr/bin/program", b"program\n")
        .file("usr/share/between", &seeded_noise(200_000, 1))
        .file("usr/share/unread", &seeded_noise(400_000, 2))
        .file("usr/share/more", &seeded_noise(200_000, 3))
        .file(name, b"text\n")
}
