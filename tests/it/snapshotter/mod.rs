//! The snapshotter of containerd: its API by a client of the tests, and a real containerd.

mod api;
mod client;
mod connection;
pub mod containerd;
mod content;
mod credentials;
mod cri;
mod devices;
mod idmapped;
pub mod image;
mod image_service;
mod lazy;
pub mod node;
mod proto;
mod pull;
mod scenarios;
mod slow;
mod verifiers;

use std::{
    path::PathBuf,
    process::{Child, Stdio},
};

use client::Client;

use crate::{engine::Host, support::wait};

/// A daemon that is a snapshotter, with folders of its own.
pub struct Snapshotter {
    pub host: Host,
    keeper: Option<Child>,
    options: Vec<String>,
}

impl Snapshotter {
    pub fn start(options: &[&str]) -> Self {
        // the images of the tests are small
        Self::start_by_default(&[options, &["--rule", "lazy"]].concat())
    }

    /// The same, with these rules only.
    pub fn start_by_default(options: &[&str]) -> Self {
        let mut snapshotter = Self {
            host: Host::new(),
            keeper: None,
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        snapshotter.start_again();
        snapshotter
    }

    /// Starts the daemon, which must not run.
    pub fn start_again(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.wait();
        }
        let log = self.host.run_dir().join("daemon.log");
        let fixed = [
            "--log",
            "info",
            "snapshotter",
            "--log-file",
            log.to_str().unwrap(),
        ];
        let options = self.options.iter().map(String::as_str);
        let arguments: Vec<&str> = fixed.into_iter().chain(options).collect();
        std::fs::create_dir_all(self.host.run_dir()).unwrap();
        let keeper = self
            .host
            .command(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.keeper = Some(keeper.unwrap());
        wait("the snapshotter answers", || {
            self.sockets()
                .iter()
                .all(|socket| Client::connect(socket).is_some())
        });
    }

    /// Its sockets.
    fn sockets(&self) -> Vec<PathBuf> {
        let options = self.options.iter().zip(self.options.iter().skip(1));
        let given: Vec<_> = options
            .filter(|(option, _)| *option == "--address")
            .map(|(_, path)| PathBuf::from(path))
            .collect();
        match given.is_empty() {
            true => vec![self.socket()],
            false => given,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.host.run_dir().join("snapshotter.sock")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).expect("it listens")
    }

    /// Ends the daemon, and checks that nothing is left in the kernel.
    pub fn end(mut self) {
        self.end_now();
    }

    fn end_now(&mut self) {
        self.host.end_daemon();
        let status = self.keeper.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.host.log());
        assert_eq!(self.host.left_over(), [""; 0]);
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.host.log());
        }
        self.host.end_at_last();
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.wait();
        }
    }
}
