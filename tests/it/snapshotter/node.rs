//! A node as Kubernetes has it, without Kubernetes: a containerd with CRI, which crictl asks as the kubelet does.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};

use super::{
    Snapshotter,
    containerd::{Containerd, Programs, Setup},
    image::Image,
};
use crate::support::{registry::Registry, tars::Layer, wait};

/// The namespace of the network: that of the node. So no network plugin is needed.
const OF_THE_NODE: u32 = 2;
const OF_THE_POD: u32 = 0;

/// The users of a pod: those of the node, or those of a user namespace of its own (`hostUsers: false`), where root is this user of the node.
pub type Users = Option<u32>;

/// The namespaces of a pod and its containers.
fn namespaces(users: Users) -> Value {
    let Some(first) = users else {
        return json!({"network": OF_THE_NODE});
    };
    let map = json!([{"host_id": first, "container_id": 0, "length": 65536}]);
    json!({
        "network": OF_THE_NODE,
        "userns_options": {"mode": OF_THE_POD, "uids": map, "gids": map},
    })
}

/// A containerd with CRI, and what it has of pods.
pub struct Node {
    pub containerd: Containerd,
    programs: Programs,
    /// The control group of its pods.
    group: String,
}

/// The image of sandboxes: one that waits for ever.
pub fn sandbox(registry: &Registry) -> Image {
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    // images of the tests run /bin/true
    let layer = Layer::new()
        .directory("bin", 0o755)
        .program("bin/busybox", &busybox)
        .program(
            "bin/true",
            b"#!/bin/busybox sh\nexec /bin/busybox sleep 1000000\n",
        );
    Image::push(registry, "pause", vec![layer], false)
}

/// The lowest layer of an image for pods: a program, and all places that a runtime mounts on, so that it makes none.
pub fn base() -> Layer {
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    let mut layer = Layer::new();
    for place in ["bin", "dev", "etc", "proc", "sys", "volume"] {
        layer = layer.directory(place, 0o755);
    }
    for file in ["hostname", "hosts", "resolv.conf"] {
        layer = layer.file(&format!("etc/{file}"), b"");
    }
    layer.program("bin/busybox", &busybox)
}

impl Node {
    /// One whose snapshotter is the one of a test, or, without one, containerd's own for overlayfs.
    pub fn start(
        snapshotter: Option<&Snapshotter>,
        programs: &Programs,
        capabilities: &str,
        sandbox: &Image,
    ) -> Self {
        let setup = Setup {
            capabilities,
            ..Setup::default()
        };
        Self::start_as(snapshotter, programs, setup, sandbox)
    }

    /// The same with more that is configured.
    pub fn start_as<'a>(
        snapshotter: Option<&Snapshotter>,
        programs: &Programs,
        setup: Setup<'a>,
        sandbox: &'a Image,
    ) -> Self {
        let setup = Setup {
            sandbox: Some(&sandbox.reference),
            ..setup
        };
        let containerd = Containerd::start(snapshotter, programs, &setup);
        // instead of the file of this machine
        fs::write(containerd.folder.path().join("crictl.yaml"), "").unwrap();
        let name = containerd.folder.path().file_name().unwrap();
        let node = Self {
            group: format!("/{}", name.to_str().unwrap()),
            programs: programs.clone(),
            containerd,
        };
        node.wait();
        node
    }

    /// Waits until CRI answers.
    pub fn wait(&self) {
        wait("CRI answers", || {
            let answered = self.output(&["info"]);
            answered.status.success()
        });
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let endpoint = format!("unix://{}", self.containerd.socket().display());
        let mut command = self.programs.crictl();
        command
            .arg("--config")
            .arg(self.containerd.folder.path().join("crictl.yaml"))
            .args(["--runtime-endpoint", &endpoint])
            .args(["--image-endpoint", &endpoint])
            .args(["--timeout", "60s"])
            .args(arguments);
        command.output().expect("scripts/containerd builds crictl")
    }

    /// A command of crictl that must succeed; what it prints.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(
            output.status.success(),
            "crictl {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.containerd.log()
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// What `-o json` prints.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let arguments = [arguments, &["--output", "json"]].concat();
        serde_json::from_str(&self.run(&arguments)).unwrap()
    }

    /// The references of the images that the node has.
    pub fn images(&self) -> Vec<String> {
        let images = self.json(&["images"]);
        let images = images["images"].as_array().unwrap().iter();
        let tags = images.flat_map(|image| image["repoTags"].as_array().unwrap());
        tags.map(|tag| tag.as_str().unwrap().to_owned()).collect()
    }

    fn file(&self, name: &str, content: &Value) -> PathBuf {
        let path = self.containerd.folder.path().join(name);
        fs::write(&path, content.to_string()).unwrap();
        path
    }

    fn pod_file(&self, users: Users) -> PathBuf {
        let name = users.map_or("pod".to_owned(), |first| format!("pod-{first}"));
        let pod = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
            "linux": {
                "cgroup_parent": self.group,
                "security_context": {"namespace_options": namespaces(users)},
            },
        });
        self.file(&format!("{name}.json"), &pod)
    }

    /// Starts a pod; its ID.
    pub fn pod(&self) -> String {
        self.pod_of(None)
    }

    /// Starts a pod with these users; its ID.
    pub fn pod_of(&self, users: Users) -> String {
        self.run(&["runp", self.pod_file(users).to_str().unwrap()])
    }

    /// Starts a container in a pod, which waits; its ID.
    pub fn container(&self, pod: &str, name: &str, image: &str, mounts: &Value) -> String {
        self.container_of(None, pod, name, image, mounts)
    }

    /// Starts a container in a pod with these users, which waits; its ID.
    pub fn container_of(
        &self,
        users: Users,
        pod: &str,
        name: &str,
        image: &str,
        mounts: &Value,
    ) -> String {
        let [container, pod_file] = self.container_files(users, name, image, mounts);
        let (container, pod_file) = (container.to_str().unwrap(), pod_file.to_str().unwrap());
        let id = self.run(&["create", pod, container, pod_file]);
        self.run(&["start", &id]);
        id
    }

    /// The error of a container that must not be created.
    pub fn fail_to_create(&self, pod: &str, name: &str, image: &str) -> String {
        self.try_create(pod, name, image).unwrap_err()
    }

    /// The ID of a container, or the error if it could not be created.
    pub fn try_create(&self, pod: &str, name: &str, image: &str) -> Result<String, String> {
        let [container, pod_file] = self.container_files(None, name, image, &json!([]));
        let (container, pod_file) = (container.to_str().unwrap(), pod_file.to_str().unwrap());
        let output = self.output(&["create", pod, container, pod_file]);
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    fn container_files(
        &self,
        users: Users,
        name: &str,
        image: &str,
        mounts: &Value,
    ) -> [PathBuf; 2] {
        let container = json!({
            "metadata": {"name": name, "attempt": 1},
            "image": {"image": image},
            "command": ["/bin/busybox"],
            "args": ["sleep", "1000000"],
            "mounts": mounts,
            "linux": {"security_context": {"namespace_options": namespaces(users)}},
        });
        let file = self.file(&format!("container-{name}.json"), &container);
        [file, self.pod_file(users)]
    }

    /// What a command in a container prints.
    pub fn exec(&self, container: &str, command: &[&str]) -> String {
        let exec = ["exec", "--sync", container, "/bin/busybox"];
        self.run(&[&exec[..], command].concat())
    }

    /// The root of a container.
    pub fn root_of(&self, container: &str) -> PathBuf {
        let tasks = "state/io.containerd.runtime.v2.task/k8s.io";
        let folder = self.containerd.folder.path().join(tasks);
        folder.join(container).join("rootfs")
    }

    /// Removes all pods and images.
    pub fn remove_all(&self) {
        self.run(&["rmp", "--all", "--force"]);
        self.run(&["rmi", "--all"]);
    }

    /// Mounts, processes and control groups that are left of its pods.
    pub fn left_over(&self) -> Vec<String> {
        let folder = self.containerd.folder.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut found: Vec<String> = mounts
            .lines()
            .filter(|line| line.contains(folder))
            .map(str::to_owned)
            .collect();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let group = fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
            let is_shim = command.contains("containerd-shim") && command.contains(folder);
            if is_shim || group.contains(&self.group) {
                found.push(command);
            }
        }
        found
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.containerd.log());
        }
        let _ = self.output(&["rmp", "--all", "--force"]);
        // the kubelet removes the control groups of its pods
        for kind in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(kind.path().join(&self.group[1..]));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.group[1..]));
    }
}

/// The bytes of a tar of a directory, without what is mounted in it.
pub fn tar_of(root: &Path) -> Vec<u8> {
    let mut names: Vec<_> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    let tar = Command::new("tar")
        .args(["--create", "--one-file-system", "--sort=name"])
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*"])
        // no times that reads change, and no process number
        .arg("--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f")
        .arg("--directory")
        .arg(root)
        .args(names)
        .output()
        .unwrap();
    // what is mounted on a file is told, and left out
    let error = String::from_utf8_lossy(&tar.stderr);
    assert!(tar.status.success(), "{error}");
    tar.stdout
}
