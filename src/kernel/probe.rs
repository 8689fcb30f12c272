//! The features of this kernel and machine, for `socinbd doctor`. Reads only: nothing is loaded, mounted or changed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::thread::{CapabilitySet, capabilities};
use serde::{Deserialize, Serialize};

use crate::kernel::{dm, nbd};

/// A feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its name: `nbd`, `overlay`, ...
    pub name: String,
    /// Whether it can be used, perhaps after its module was loaded (which is done when it is needed).
    pub available: bool,
    /// What was found: a version, how the feature is provided, or why it is missing.
    pub detail: String,
    /// What to do if it is not available.
    pub advice: Option<String>,
}

impl Offer {
    /// A feature that can be used.
    pub(crate) fn there(name: &str, detail: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            available: true,
            detail: detail.into(),
            advice: None,
        }
    }

    /// A feature that is missing, and what to do.
    pub(crate) fn missing(
        name: &str,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            available: false,
            detail: detail.into(),
            advice: Some(advice.into()),
        }
    }
}

/// The features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The kernel's release.
    pub kernel: String,
    /// The machine's architecture, as the kernel names it.
    pub machine: String,
    /// All that was looked for.
    pub offers: Vec<Offer>,
}

impl Report {
    /// The feature of this name.
    pub fn offer(&self, name: &str) -> Option<&Offer> {
        self.offers.iter().find(|offer| offer.name == name)
    }

    /// Whether this is there.
    pub fn has(&self, name: &str) -> bool {
        self.offer(name).is_some_and(|offer| offer.available)
    }
}

/// Looks at everything.
pub fn probe() -> Report {
    let uname = rustix::system::uname();
    let kernel = uname.release().to_string_lossy().into_owned();
    let modules = Modules::read(&kernel);
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let file_system = |name: &str| file_system(name, &file_systems, &modules);
    Report {
        machine: uname.machine().to_string_lossy().into_owned(),
        offers: vec![
            user(),
            nbd_offer(&modules),
            loop_offer(&modules),
            device_mapper_offer(&modules),
            fuse_offer(file_system("fuse")),
            ublk_offer(&modules),
            file_system("ext4"),
            overlay_offer(file_system("overlay"), &kernel),
            cgroup(),
            containerd(),
            credentials(),
        ],
        kernel,
    }
}

/// The modules that the kernel of this release could load or has built in.
struct Modules {
    folder: PathBuf,
    loadable: String,
    builtin: String,
}

impl Modules {
    fn read(release: &str) -> Self {
        let folder = Path::new("/lib/modules").join(release);
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        Self {
            loadable: read("modules.dep"),
            builtin: read("modules.builtin"),
            folder,
        }
    }

    /// Where a module that is not loaded comes from: `kernel/drivers/block/nbd.ko.xz: ...`
    fn offer(&self, name: &str, module: &str, package: &str) -> Offer {
        let file = format!("/{module}.ko");
        let lists = |text: &str| {
            text.lines().any(|line| {
                let path = line.split(':').next().unwrap_or_default();
                path.contains(&file)
            })
        };
        if lists(&self.builtin) {
            Offer::there(name, "built into the kernel")
        } else if lists(&self.loadable) {
            Offer::there(name, "a module, loaded when it is needed")
        } else if self.loadable.is_empty() {
            Offer::missing(
                name,
                format!(
                    "not in the kernel, and {} has no modules",
                    self.folder.display()
                ),
                format!(
                    "run a kernel with {module} (CONFIG option or module); a container or a sandbox uses its host's"
                ),
            )
        } else {
            Offer::missing(name, "this kernel has no such module", package.to_owned())
        }
    }
}

fn file_system(name: &str, registered: &str, modules: &Modules) -> Offer {
    let is_registered = registered
        .lines()
        .any(|line| line.split_whitespace().next_back() == Some(name));
    if is_registered {
        Offer::there(name, "in the kernel")
    } else {
        modules.offer(
            name,
            name,
            "install the kernel package of your distribution with all modules",
        )
    }
}

fn user() -> Offer {
    let name = "user";
    let sets = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    let uid = rustix::process::getuid().as_raw();
    if sets.contains(CapabilitySet::SYS_ADMIN) {
        Offer::there(name, format!("uid {uid} with CAP_SYS_ADMIN: may mount"))
    } else {
        Offer::missing(
            name,
            format!("uid {uid} without CAP_SYS_ADMIN: may not mount"),
            "run as root; `serve`, `index` and `inspect` work without",
        )
    }
}

fn nbd_offer(modules: &Modules) -> Offer {
    match nbd::is_loaded() {
        Ok(true) => Offer::there("nbd", "in the kernel"),
        Ok(false) => {
            let mut offer = modules.offer("nbd", "nbd", "");
            if !offer.available {
                offer.advice = Some(
                    "attach uses FUSE and a loop device instead; the kernel packages of Debian and Ubuntu have nbd (Ubuntu: linux-modules-extra)"
                        .into(),
                );
            }
            offer
        }
        Err(error) => Offer::missing(
            "nbd",
            error.report(),
            "attach uses FUSE and a loop device instead",
        ),
    }
}

fn loop_offer(modules: &Modules) -> Offer {
    if Path::new("/dev/loop-control").exists() {
        Offer::there("loop", "/dev/loop-control")
    } else if Path::new("/sys/class/misc/loop-control").exists() {
        Offer::missing(
            "loop",
            "in the kernel, but /dev/loop-control is missing",
            "give this container the host's /dev",
        )
    } else {
        modules.offer("loop", "loop", "run a kernel with CONFIG_BLK_DEV_LOOP")
    }
}

fn device_mapper_offer(modules: &Modules) -> Offer {
    let name = "device-mapper";
    if dm::is_loaded() {
        return Offer::there(name, dm::CONTROL);
    }
    let mut offer = modules.offer(name, "dm-mod", "");
    if !offer.available {
        offer.advice = Some(
            "optional: with it, complete disks leave the daemon (the kernels of Debian and Ubuntu have it)"
                .into(),
        );
    }
    offer
}

fn fuse_offer(file_system: Offer) -> Offer {
    if file_system.available
        && file_system.detail == "in the kernel"
        && !Path::new("/dev/fuse").exists()
    {
        return Offer::missing(
            "fuse",
            "in the kernel, but /dev/fuse is missing",
            "give this container the host's /dev/fuse",
        );
    }
    file_system
}

fn ublk_offer(modules: &Modules) -> Offer {
    if Path::new("/dev/ublk-control").exists() {
        Offer::there("ublk", "/dev/ublk-control (not used by this version)")
    } else {
        let mut offer = modules.offer("ublk", "ublk_drv", "optional: this version does not use it");
        if !offer.available {
            offer.advice = Some("optional: this version does not use it".into());
        }
        offer
    }
}

/// Since Linux 6.5 layers are added one by one (`lowerdir+`).
fn overlay_offer(mut offer: Offer, kernel: &str) -> Offer {
    if offer.available {
        let how = if release(kernel) >= (6, 5) {
            "layers are added one by one (fsconfig)"
        } else {
            "before Linux 6.5: layers are passed to mount(2)"
        };
        offer.detail = format!("{}; {how}", offer.detail);
    }
    offer
}

/// Major and minor of a kernel release.
fn release(text: &str) -> (u32, u32) {
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn cgroup() -> Offer {
    let name = "cgroup";
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Offer::there(name, "version 2")
    } else if Path::new("/sys/fs/cgroup/memory").exists() {
        Offer::there(name, "version 1")
    } else {
        Offer::missing(
            name,
            "not mounted on /sys/fs/cgroup",
            "only containerd needs it: mount cgroup2 on /sys/fs/cgroup",
        )
    }
}

fn containerd() -> Offer {
    let name = "containerd";
    let socket = Path::new("/run/containerd/containerd.sock");
    let client = output("ctr", &["--version"]);
    match (socket.exists(), client) {
        (true, Some(client)) => Offer::there(name, format!("{}, {client}", socket.display())),
        (true, None) => Offer::there(
            name,
            format!("{}, but its client ctr is missing", socket.display()),
        ),
        (false, Some(client)) => Offer::missing(
            name,
            format!("{client}, but {} does not exist", socket.display()),
            "start containerd, or use `socinbd run`, which does not need it",
        ),
        (false, None) => Offer::missing(
            name,
            "not installed",
            "install containerd, or use `socinbd run`, which does not need it",
        ),
    }
}

/// The first line of a program's output; `None` if the program does not exist.
fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().next().unwrap_or(program).to_owned())
}

/// The location of Docker's credentials. The values are not read.
fn credentials() -> Offer {
    let name = "credentials";
    let config = docker_config();
    let Some(path) = config else {
        return Offer::missing(
            name,
            "neither DOCKER_CONFIG nor HOME is set",
            "optional: without it pulls are anonymous; set one of them",
        );
    };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Offer::missing(
                name,
                format!("{} does not exist", path.display()),
                "optional: without it pulls are anonymous; run `docker login`",
            );
        }
        Err(error) => {
            return Offer::missing(
                name,
                format!("{}: {error}", path.display()),
                "make it readable",
            );
        }
    };
    let Ok(config) = serde_json::from_slice::<DockerConfig>(&text) else {
        return Offer::missing(
            name,
            format!("{} is not a Docker configuration", path.display()),
            "repair it",
        );
    };
    let helpers: Vec<_> = config
        .cred_helpers
        .into_values()
        .chain(config.creds_store)
        .map(|helper| format!("docker-credential-{helper}"))
        .collect();
    match helpers.iter().find(|helper| !is_program(helper)) {
        Some(helper) => Offer::missing(
            name,
            format!("{} names {helper}, which is not in PATH", path.display()),
            format!("install {helper}"),
        ),
        None => Offer::there(
            name,
            format!(
                "{}: {} registries, {} helpers",
                path.display(),
                config.auths.len(),
                helpers.len()
            ),
        ),
    }
}

#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct DockerConfig {
    auths: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
    cred_helpers: std::collections::BTreeMap<String, String>,
    creds_store: Option<String>,
}

fn docker_config() -> Option<PathBuf> {
    let folder = match std::env::var_os("DOCKER_CONFIG") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder),
        _ => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
    };
    Some(folder.join("config.json"))
}

fn is_program(name: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(name).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(release("6.1.0-37-amd64"), (6, 1));
        assert_eq!(release("6.18.44"), (6, 18));
        assert_eq!(release("7.2"), (7, 2));
        assert_eq!(release(""), (0, 0));
        assert!(release("6.18") > (6, 5));
    }

    #[test]
    fn modules_are_loaded_built_in_or_missing() {
        let modules = Modules {
            folder: "/lib/modules/x".into(),
            loadable: "kernel/drivers/block/nbd.ko.xz:\nkernel/fs/overlayfs/overlay.ko: kernel/lib/nothing.ko\n".into(),
            builtin: "kernel/fs/ext4/ext4.ko\n".into(),
        };
        assert!(modules.offer("nbd", "nbd", "").available);
        assert!(modules.offer("overlay", "overlay", "").available);
        assert_eq!(
            modules.offer("ext4", "ext4", "").detail,
            "built into the kernel"
        );
        // what another one depends on is listed on a line of its own
        let missing = modules.offer("nothing", "nothing", "do this");
        assert!(!missing.available);
        assert_eq!(missing.advice.as_deref(), Some("do this"));
        assert!(file_system("proc", "nodev\tsysfs\nnodev\tproc\n\text3\n", &modules).available);
        assert!(file_system("ext3", "nodev\tsysfs\nnodev\tproc\n\text3\n", &modules).available);
        assert!(!file_system("ext2", "\text3\n", &modules).available);
    }

    #[test]
    fn what_is_missing_comes_with_advice() {
        let report = probe();
        assert!(!report.kernel.is_empty());
        for offer in &report.offers {
            assert_eq!(offer.advice.is_none(), offer.available, "{offer:?}");
        }
        for name in [
            "user",
            "nbd",
            "loop",
            "device-mapper",
            "fuse",
            "ublk",
            "ext4",
            "overlay",
            "cgroup",
            "containerd",
            "credentials",
        ] {
            assert!(report.offer(name).is_some(), "{name}");
        }
    }
}
