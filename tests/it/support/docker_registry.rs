//! Debian's `docker-registry`: no referrers API.

use std::ffi::OsString;

use super::served::Served;

/// Debian's registry, while this lives; or another version of it, where the environment variable `DOCKER_REGISTRY` names its program.
pub struct DockerRegistry {
    /// `127.0.0.1:PORT`.
    pub host: String,
    _served: Served,
}

impl DockerRegistry {
    /// Starts it with an empty folder; it lets manifests be removed.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// With more of a configuration (YAML).
    pub fn start_with(more: &str) -> Self {
        let program = std::env::var_os("DOCKER_REGISTRY")
            .filter(|program| !program.is_empty())
            .unwrap_or_else(|| OsString::from("docker-registry"));
        let missing = "docker-registry (apt-get install docker-registry)";
        let served = Served::start(&program, missing, |data, host| {
            format!(
                "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {host}\nlog:\n  level: error\n{more}",
                data.display()
            )
        });
        Self {
            host: served.host.clone(),
            _served: served,
        }
    }
}
