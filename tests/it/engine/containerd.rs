//! `scripts/containerd-mount`: containerd runs a container on an attached image.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use super::{Host, real::RealImage};
use crate::{
    kernel::eventually,
    support::{
        registry::{Fault, Kind, On, Times},
        vm::{is_vm, run_tests},
    },
};

/// A containerd with folders of its own.
pub(super) struct Containerd {
    folder: TempDir,
    process: Child,
}

impl Containerd {
    pub(super) fn start() -> Self {
        let folder = TempDir::with_prefix("containerd-").unwrap();
        let path = |name: &str| folder.path().join(name);
        let config = "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        fs::write(path("config.toml"), config).unwrap();
        let log = fs::File::create(path("log")).unwrap();
        let process = Command::new("containerd")
            .arg("--config")
            .arg(path("config.toml"))
            .arg("--root")
            .arg(path("root"))
            .arg("--state")
            .arg(path("state"))
            .arg("--address")
            .arg(path("socket"))
            .stderr(log)
            .spawn()
            .expect("this test needs containerd");
        let containerd = Self { folder, process };
        eventually(|| containerd.ctr(&["version"]).status.success());
        containerd
    }

    fn address(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(super) fn ctr(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.address());
        command.args(["--namespace", "test"]).args(arguments);
        command.output().expect("this test needs ctr (containerd)")
    }

    /// The script on this host and this containerd.
    fn script(&self, host: &Host, image: &str, command: &[&str]) -> Command {
        // a shell cannot trap what was ignored when it started, as it is below nohup
        let mut script = Command::new("env");
        script
            .arg("--default-signal=HUP,INT,TERM")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/containerd-mount"))
            .args([image, "--"])
            .args(command)
            .env("SOCINBD", env!("CARGO_BIN_EXE_socinbd"))
            .env("SOCINBD_ROOT", host.root())
            .env("SOCINBD_RUN_DIR", host.run_dir())
            .env("CONTAINERD_ADDRESS", self.address())
            .env("CONTAINERD_NAMESPACE", "test")
            .stdin(Stdio::null());
        script
    }

    /// What the script prints and its status.
    fn run(&self, host: &Host, image: &str, command: &[&str]) -> (String, Option<i32>) {
        let output = self.script(host, image, command).output().unwrap();
        let text = [&output.stdout[..], &output.stderr].concat();
        // a client on a slow machine says that it waits
        let is_notice = |line: &&str| line.starts_with("socinbd: waiting for the daemon of ");
        let text = String::from_utf8_lossy(&text);
        let lines = text.split_inclusive('\n').filter(|line| !is_notice(line));
        (lines.collect(), output.status.code())
    }

    /// Nothing of containers, mounts, devices and folders is left.
    fn nothing_left(&self, host: &Host) {
        assert_eq!(host.left_over(), [""; 0]);
        assert_eq!(host.list().len(), 0);
        for what in ["containers", "tasks"] {
            let left = self.ctr(&[what, "ls", "-q"]).stdout;
            assert_eq!(String::from_utf8_lossy(&left), "", "{what}");
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        for entry in fs::read_dir("/run").unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            // another test's may be there
            let ours = name.starts_with("containerd-mount.") && mounts.contains(&name);
            assert!(!ours || !is_vm(), "{name}");
        }
    }
}

impl Containerd {
    /// Runs a container that must print this and end with this status. `ctr` closes its pipes when the program ends, and may drop what is
    /// still in them: an output that lacks its end only is asked for again.
    fn expect(&self, host: &Host, image: &str, command: &[&str], expected: &str, code: i32) {
        for _ in 0..5 {
            let (output, status) = self.run(host, image, command);
            if (output.as_str(), status) == (expected, Some(code)) {
                return;
            }
            let cut = expected.starts_with(&output) && status == Some(code);
            assert!(
                cut,
                "{output:?}, {status:?} instead of {expected:?}, {code}"
            );
        }
        panic!("the output was cut five times");
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = Command::new("kill")
            .arg(self.process.id().to_string())
            .status();
        let _ = self.process.wait();
    }
}

fn indexed(name: &str) -> RealImage {
    RealImage::indexed(name, &["--min-layer-size", "0"]).image
}

#[test]
fn a_container_has_the_images_user_folder_environment_and_command() {
    let (host, containerd) = (Host::new(), Containerd::start());
    let image = indexed("small");
    let registry = image.serve();
    let reference = registry.reference("app");
    let expected = "uid=1(daemon) gid=1(daemon) groups=1(daemon)\n/srv/odd\nhello, world\n";
    containerd.expect(&host, &reference, &[], expected, 0);
    // the entrypoint stays, the arguments are replaced; the writable layer takes what is written; a status comes through
    let command =
        ["echo written >/tmp/file && cat /tmp/file h1; touch /srv/odd/h1 2>/dev/null || exit 7"];
    containerd.expect(&host, &reference, &command, "written\nlinked\n", 7);
    containerd.nothing_left(&host);
}

#[test]
fn a_container_of_an_image_without_a_user_is_roots() {
    let (host, containerd) = (Host::new(), Containerd::start());
    let image = indexed("members");
    let registry = image.serve();
    let reference = registry.reference("app");
    let command = [
        "/bin/sh",
        "-c",
        "id -u; pwd; echo $PATH; echo x >/etc/written && cat /etc/written; exit 3",
    ];
    let expected = "0\n/\n/usr/sbin:/usr/bin:/sbin:/bin\nx\n";
    containerd.expect(&host, &reference, &command, expected, 3);
    containerd.nothing_left(&host);
}

#[test]
fn an_interrupted_container_leaves_nothing() {
    let (host, containerd) = (Host::new(), Containerd::start());
    let image = indexed("small");
    let registry = image.serve();
    for (signal, expected) in [("INT", 130), ("TERM", 143)] {
        let mut script = containerd
            .script(
                &host,
                &registry.reference("app"),
                &["echo started; sleep 1000"],
            )
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(script.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "started\n");
        kill(&script, signal);
        assert_eq!(script.wait().unwrap().code(), Some(expected), "{signal}");
        output.read_to_string(&mut line).unwrap();
        containerd.nothing_left(&host);
    }
}

#[test]
fn an_interrupt_while_it_attaches_leaves_nothing() {
    let (host, containerd) = (Host::new(), Containerd::start());
    let image = indexed("members");
    let registry = image.serve();
    let fault = Fault::Delay(Duration::from_millis(500));
    registry.fail(On::Kind(Kind::Manifest), fault, Times::UntilHealed);
    let mut script = containerd
        .script(&host, &registry.reference("app"), &["/bin/true"])
        .spawn()
        .unwrap();
    eventually(|| registry.counters().kind(Kind::Manifest).requests > 0);
    kill(&script, "TERM");
    assert_eq!(script.wait().unwrap().code(), Some(143));
    containerd.nothing_left(&host);
}

/// The same on the kernel's nbd.
#[test]
fn containers_on_the_kernels_nbd() {
    if !is_vm() {
        // made here, where that takes less
        for name in ["small", "members"] {
            indexed(name);
        }
        let ours = "engine::containerd::";
        run_tests(&[ours, "--skip", "on_the_kernels_nbd", "--test-threads", "1"]);
    }
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill")
        .args([&format!("-{signal}"), &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}
