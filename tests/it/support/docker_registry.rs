//! Debian's `docker-registry`: no referrers API.

use std::process::{Child, Command, Stdio};

use super::wait;

/// Debian's registry, while this lives.
pub struct DockerRegistry {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub host: String,
    _folder: tempfile::TempDir,
}

impl DockerRegistry {
    /// Starts it with an empty folder; it lets manifests be removed.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// With more of a configuration (YAML).
    pub fn start_with(more: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // a port that was free a moment ago
        let host = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .to_string();
        let config = folder.path().join("config.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/data\n  delete:\n    enabled: true\nhttp:\n  addr: {host}\nlog:\n  level: error\n{more}",
            folder.path().display()
        );
        std::fs::write(&config, text).expect("write its configuration");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this test needs docker-registry (apt-get install docker-registry)");
        wait("docker-registry listens", || {
            std::net::TcpStream::connect(&host).is_ok()
        });
        Self {
            child,
            host,
            _folder: folder,
        }
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}
