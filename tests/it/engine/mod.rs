//! Images attached by the program itself, as a person would, and compared with what an independent unpack makes of them.

mod check;
mod configuration;
mod containerd;
mod daemon;
mod damaged;
mod ends;
mod expiry;
mod failures;
mod fault_matrix;
pub mod hostile;
mod images;
mod interrupted;
mod keeper;
mod kept;
mod killed;
mod lazy;
pub mod lifecycle;
mod mirrors;
mod real;
mod record;
mod replace;
mod shortage;
mod signals;
mod space;
mod stacking;
mod storm;
pub mod systemd;
mod unpack;
mod verifiers;
mod vm;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use rustix::mount::UnmountFlags;
use serde_json::Value;
use tempfile::TempDir;

/// A root, a runtime directory and mount points of their own. What is attached is detached, and the daemon ended, when this is dropped.
pub struct Host {
    folder: TempDir,
}

impl Host {
    pub fn new() -> Self {
        let folder = TempDir::with_prefix("socinbd-test-").unwrap();
        Self { folder }
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// An empty folder to mount on.
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// The program with this host's folders.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_socinbd"));
        command
            .arg("--root")
            .arg(self.root())
            .arg("--run-dir")
            .arg(self.run_dir());
        command
            .args(arguments)
            .env("DOCKER_CONFIG", self.folder.path());
        command
    }

    /// The program with this host's folders, and with limits: the options of prlimit(1).
    pub fn limited(&self, limits: &[&str], arguments: &[&str]) -> Command {
        let command = self.command(arguments);
        let mut limited = Command::new("prlimit");
        limited
            .args(limits)
            .arg(command.get_program())
            .args(command.get_args());
        limited.env("DOCKER_CONFIG", self.folder.path());
        limited
    }

    /// Runs the program, whatever its status.
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the program, which must succeed; its standard output.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(
            output.status.success(),
            "socinbd {arguments:?}: {}\n{}{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log(),
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the program, which must fail with this status; its standard error.
    pub fn fail(&self, arguments: &[&str], status: i32) -> String {
        let output = self.output(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            output.status.code(),
            Some(status),
            "socinbd {arguments:?}: {error}"
        );
        error
    }

    /// Attaches an image; what `--json` prints.
    pub fn attach(&self, image: &str, mountpoint: &Path, options: &[&str]) -> Value {
        let mountpoint = mountpoint.to_str().unwrap();
        let arguments = [&["--json", "attach"], options, &[image, mountpoint]].concat();
        serde_json::from_str(&self.run(&arguments)).unwrap()
    }

    /// Detaches what the test itself does not use any more. A process that another thread starts has its files open for a moment (between
    /// fork and exec), and the mount is busy meanwhile.
    pub fn detach(&self, mountpoint: &Path) {
        /// The exit status of a command that found something in use.
        const BUSY: i32 = 6;
        let detach = || self.output(&["detach", mountpoint.to_str().unwrap()]);
        let mut output = detach();
        let begun = Instant::now();
        while output.status.code() == Some(BUSY) && begun.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(50));
            output = detach();
        }
        assert!(
            output.status.success(),
            "{}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log(),
        );
    }

    /// What `list --json` prints.
    pub fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.run(&["--json", "list"])).unwrap()
    }

    /// Waits until all of what is attached there is present and has been checked.
    pub fn wait_complete(&self, mountpoint: &Path) {
        let is_complete = || {
            let all = self.list();
            let here = all
                .iter()
                .find(|it| it["mountpoint"] == *mountpoint.to_str().unwrap());
            here.unwrap()["state"] == "complete"
        };
        crate::support::wait("the layers are checked", is_complete);
    }

    /// The processes of `socinbd daemon` and `socinbd snapshotter`: those that serve, or those that keep one.
    fn processes(&self, keep: bool) -> Option<u32> {
        let root = self.root();
        let of_this_root = |path: &Path| {
            let name = fs::read(path.join("comm")).unwrap_or_default();
            if !name.starts_with(b"socinbd") {
                return false;
            }
            let arguments = fs::read(path.join("cmdline")).unwrap_or_default();
            let arguments: Vec<&[u8]> = arguments.split(|&byte| byte == 0).collect();
            let is_daemon = |it: &&[u8]| *it == b"daemon" || *it == b"snapshotter";
            arguments.iter().any(is_daemon)
                && arguments.contains(&root.as_os_str().as_encoded_bytes())
                && (name == b"socinbd-keeper\n") == keep
        };
        let processes = fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().path());
        processes
            .filter(|path| of_this_root(path))
            .find_map(|path| path.file_name()?.to_str()?.parse().ok())
    }

    /// The process of the daemon that serves, if one runs.
    pub fn daemon(&self) -> Option<u32> {
        self.processes(false)
    }

    /// The process that starts the next daemon, if one runs.
    pub fn keeper(&self) -> Option<u32> {
        self.processes(true)
    }

    /// Kills the daemon without a chance to clean up, and before it what would start another one; waits until both are gone.
    pub fn kill_daemon(&self) {
        let daemon = self.daemon().expect("a daemon runs");
        if let Some(keeper) = self.keeper() {
            self.signal(keeper, "KILL");
        }
        self.signal(daemon, "KILL");
    }

    /// Kills the daemon that serves; its keeper starts the next one.
    pub fn kill_served_by_keeper(&self) {
        self.signal(self.daemon().expect("a daemon runs"), "KILL");
    }

    /// Ends the daemon as a service manager does, and waits until its keeper is gone too.
    pub fn end_daemon(&self) {
        self.signal(self.daemon().expect("a daemon runs"), "TERM");
        crate::support::wait("the keeper is gone", || self.keeper().is_none());
    }

    /// Ends the daemon of a test that is over, or kills it if the test fails: it ends alone, and a panic here would end all others too.
    pub fn end_at_last(&self) {
        if std::thread::panicking() {
            for process in [self.keeper(), self.daemon()].into_iter().flatten() {
                let kill = ["-KILL", &process.to_string()];
                let _ = Command::new("kill").args(kill).status();
            }
        } else if self.daemon().is_some() {
            self.end_daemon();
        }
    }

    /// Sends a signal that ends a process, and waits until it is gone.
    fn signal(&self, pid: u32, signal: &str) {
        let _ = Command::new("kill")
            .args([&format!("-{signal}"), &pid.to_string()])
            .status();
        let process = PathBuf::from(format!("/proc/{pid}"));
        let stat = || fs::read_to_string(process.join("stat")).unwrap_or_default();
        let threads = || fs::read_dir(process.join("task")).map_or(0, Iterator::count);
        // a zombie's devices are gone as well, when its other threads are; whoever started it may not have waited for it
        crate::support::wait("the daemon is gone", || {
            !process.exists() || (stat().contains(") Z ") && threads() <= 1)
        });
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.run_dir().join("daemon.log")).unwrap_or_default()
    }

    /// Mounts, devices and daemons that belong to this host; none after everything is detached.
    pub fn left_over(&self) -> Vec<String> {
        let place = self.folder.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut found: Vec<String> = mounts
            .lines()
            .filter(|line| line.contains(place))
            .map(str::to_owned)
            .collect();
        for device in socinbd::kernel::loopdev::attached().unwrap() {
            if device.name.starts_with(&self.identifier()) {
                found.push(format!("/dev/loop{}", device.index));
            }
        }
        for device in socinbd::kernel::nbd::connected().unwrap() {
            if device
                .backend_id
                .is_some_and(|id| id.starts_with(&self.identifier()))
            {
                found.push(format!("/dev/nbd{}", device.index));
            }
        }
        for device in socinbd::kernel::dm::mapped().unwrap() {
            if device.mapped_name.starts_with(&self.identifier()) {
                found.push(format!("/dev/{}", device.name));
            }
        }
        for records in ["attachments", "layer-mounts"] {
            let records = fs::read_dir(self.root().join(records));
            let records = records.into_iter().flatten();
            found.extend(records.map(|entry| entry.unwrap().path().display().to_string()));
        }
        found
    }

    /// Unmounts an image whose daemon has died, and waits until nothing uses the loop devices of its layers: a copy of the mount in the mount
    /// namespace of another program, which has left it behind, may end a moment later.
    pub fn unmount_dead(&self, mountpoint: &Path) {
        crate::support::unmount(mountpoint);
        crate::support::wait("nothing uses the layers", || {
            let devices = socinbd::kernel::loopdev::attached().unwrap();
            let mut own = devices
                .iter()
                .filter(|device| device.name.starts_with(&self.identifier()));
            !own.any(|device| socinbd::kernel::blockdev::is_used(&format!("loop{}", device.index)))
        });
    }

    /// How this host's devices start their names in the kernel.
    fn identifier(&self) -> String {
        let root = self.root().canonicalize().unwrap_or_else(|_| self.root());
        let tag = socinbd::oci::Digest::of(root.as_os_str().as_encoded_bytes()).hex();
        format!("socinbd-{}-", &tag[..8])
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.folder.path()).unwrap().flatten() {
            while rustix::mount::unmount(entry.path(), UnmountFlags::DETACH).is_ok() {}
        }
        self.end_at_last();
    }
}
