//! A registry that is a program of its own.

use std::{
    ffi::OsStr,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::wait;

/// A registry's program, while this lives.
pub struct Served {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub host: String,
    _folder: tempfile::TempDir,
}

impl Served {
    /// Starts `program serve FILE` with an empty folder. `configuration` makes the file's text from that folder and the address.
    pub fn start(
        program: &OsStr,
        missing: &str,
        configuration: impl FnOnce(&Path, &str) -> String,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // a port that was free a moment ago
        let host = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .to_string();
        let text = configuration(&folder.path().join("data"), &host);
        // zot goes by the name's end
        let extension = if text.starts_with('{') { "json" } else { "yml" };
        let config = folder.path().join("config").with_extension(extension);
        std::fs::write(&config, text).expect("write its configuration");
        let child = Command::new(program)
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("this test needs {missing}: {error}"));
        wait(&format!("{} listens", program.display()), || {
            std::net::TcpStream::connect(&host).is_ok()
        });
        Self {
            child,
            host,
            _folder: folder,
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}
