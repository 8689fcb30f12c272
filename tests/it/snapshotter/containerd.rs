//! Real containerds: that of the system, and one that `scripts/containerd` builds: 2.4.2, or what CONTAINERD_VERSION says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
};

use tempfile::TempDir;

use super::{
    Snapshotter,
    client::Client,
    image::{Image, layer_mounts},
};
use crate::support::{noise, registry::Registry, tars::Layer, wait};

/// The programs of a containerd.
#[derive(Clone)]
pub struct Programs {
    /// `None`: those of the system.
    folder: Option<PathBuf>,
    /// Its major and minor version.
    pub version: (u32, u32),
}

/// The folder of the programs that `scripts/containerd` builds.
pub fn built() -> PathBuf {
    folder_of(&[])
}

/// A runc that maps the owners of mounts, which `scripts/containerd` builds too: that of the system may be older.
pub fn runc() -> PathBuf {
    folder_of(&["runc"]).join("runc")
}

fn folder_of(arguments: &[&str]) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/containerd");
    let output = Command::new(script).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/containerd: {error}");
    String::from_utf8(output.stdout).unwrap().trim().into()
}

impl Programs {
    /// Those that `scripts/containerd` builds.
    pub fn built() -> Self {
        Self::of(Some(built()))
    }

    /// Those of the system.
    pub fn of_the_system() -> Self {
        Self::of(None)
    }

    fn of(folder: Option<PathBuf>) -> Self {
        let mut programs = Self {
            folder,
            version: (0, 0),
        };
        let output = programs.command("containerd").arg("--version").output();
        let output = output.expect("this test needs containerd").stdout;
        // containerd github.com/containerd/containerd/v2 v2.4.2 COMMIT
        let output = String::from_utf8(output).unwrap();
        let version = output.split(' ').nth(2).unwrap().trim_start_matches('v');
        let mut numbers = version.split('.').map(|number| number.parse().unwrap());
        programs.version = (numbers.next().unwrap(), numbers.next().unwrap());
        programs
    }

    pub fn command(&self, name: &str) -> Command {
        let Some(folder) = &self.folder else {
            return Command::new(name);
        };
        let mut command = Command::new(folder.join(name));
        // where it finds its shim
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", folder.display()));
        command
    }

    /// crictl, which is built beside them; those of the system have it from there too.
    pub fn crictl(&self) -> Command {
        let folder = self.folder.clone().unwrap_or_else(built);
        Command::new(folder.join("crictl"))
    }

    /// Whether `ctr` passes the labels of an image to the snapshotter.
    fn passes_labels(&self) -> bool {
        self.version >= (2, 1)
    }

    /// Whether CRI takes the directory of the images from `exports`.
    pub fn shows_root(&self) -> bool {
        self.version >= (2, 0)
    }

    /// Whether CRI passes labels when it unpacks an image again.
    pub fn unpacks_again_with_labels(&self) -> bool {
        self.version >= (2, 0)
    }

    /// Whether CRI has volumes of images.
    pub fn has_image_volumes(&self) -> bool {
        self.version >= (2, 1)
    }

    /// Whether it mounts the devices of layers, and maps the owners of such mounts.
    fn mounts_devices(&self) -> bool {
        self.version >= (2, 2)
    }

    /// The capabilities with that of user namespaces.
    pub fn mapping(&self) -> &'static str {
        match self.version >= (2, 4) {
            true => "capabilities = [\"rebase\", \"remap-ids\"]",
            false => "capabilities = [\"remap-ids\"]",
        }
    }

    /// Whether a pod may have users of its own and the network of the node.
    pub fn runs_user_namespaces_on_the_network_of_the_node(&self) -> bool {
        self.version >= (2, 3)
    }

    /// The capabilities that a proxy plugin may have: containerd 2.4 accepts that a layer is staged.
    pub fn capabilities(&self) -> &'static [&'static str] {
        match self.version >= (2, 4) {
            true => &["", "capabilities = [\"rebase\"]"],
            false => &[""],
        }
    }
}

/// A containerd with folders of its own.
pub struct Containerd {
    pub folder: TempDir,
    programs: Programs,
    process: Option<Child>,
}

/// What is configured besides.
#[derive(Default)]
pub struct Setup<'a> {
    /// Of the proxy plugin.
    pub capabilities: &'a str,
    /// The image of the pods' sandboxes. Without one there is no CRI.
    pub sandbox: Option<&'a str>,
    /// The socket of the snapshotter, if it is not the usual one.
    pub socket: Option<&'a Path>,
    /// The runc of pods, if it is not that of the system.
    pub runc: Option<&'a Path>,
}

impl Containerd {
    /// One whose snapshotter is the one of a test, or, without one, its own for overlayfs.
    pub fn start(snapshotter: Option<&Snapshotter>, programs: &Programs, setup: &Setup) -> Self {
        let folder = TempDir::with_prefix("containerd-").unwrap();
        // a container in a user namespace has its root in it
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        fs::set_permissions(folder.path(), open).unwrap();
        let config = config(folder.path(), snapshotter, programs.version, setup);
        fs::write(folder.path().join("config.toml"), config).unwrap();
        let mut containerd = Self {
            folder,
            process: None,
            programs: programs.clone(),
        };
        containerd.start_again();
        containerd
    }

    /// Starts it, with the state that it had.
    pub fn start_again(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let mut command = self.programs.command("containerd");
        command
            .arg("--config")
            .arg(self.folder.path().join("config.toml"))
            .stderr(log);
        self.process = Some(command.spawn().expect("this test needs containerd"));
        wait("containerd answers", || {
            self.ctr(&["version"]).status.success()
        });
    }

    /// Ends it; what it has started goes on.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = Command::new("kill").arg(process.id().to_string()).status();
            let _ = process.wait();
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    pub fn ctr(&self, arguments: &[&str]) -> Output {
        let mut command = self.programs.command("ctr");
        command
            .arg("--address")
            .arg(self.socket())
            // an option in the arguments counts instead
            .env("CONTAINERD_NAMESPACE", "test")
            .args(arguments);
        command.output().expect("this test needs ctr (containerd)")
    }

    /// A command of `ctr` that must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.ctr(arguments);
        assert!(
            output.status.success(),
            "ctr {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The configuration of a containerd of this version.
fn config(
    folder: &Path,
    snapshotter: Option<&Snapshotter>,
    version: (u32, u32),
    setup: &Setup,
) -> String {
    let path = |name: &str| folder.join(name).display().to_string();
    let is_old = version.0 < 2;
    let name = snapshotter.map_or("overlayfs", |_| "soci");
    let disabled = match (setup.sandbox, is_old) {
        (Some(_), _) => "",
        (None, true) => "\"io.containerd.grpc.v1.cri\"",
        (None, false) => {
            "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\""
        }
    };
    let mut config = format!(
        "version = {}\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [{disabled}]\n[grpc]\naddress = {:?}\n",
        if is_old { 2 } else { 3 },
        path("root"),
        path("state"),
        path("socket"),
    );
    if let Some(snapshotter) = snapshotter {
        config += &format!(
            "[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = {:?}\n{}\n\
            [proxy_plugins.soci.exports]\nroot = {:?}\nenable_remote_snapshot_annotations = \"true\"\n",
            setup
                .socket
                .map_or_else(|| snapshotter.socket(), Path::to_owned),
            setup.capabilities,
            snapshotter.host.root(),
        );
    }
    if version >= (2, 1) {
        config += &format!(
            "[plugins.\"io.containerd.transfer.v1.local\"]\nmax_concurrent_unpacks = 4\n\
            [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n\
            platform = \"linux/amd64\"\nsnapshotter = {name:?}\n"
        );
    }
    let Some(sandbox) = setup.sandbox else {
        return config;
    };
    // Two containerds must not share the socket of NRI; AppArmor and the right to lower an OOM score may be missing. The pods use the network of
    // this machine, so no network plugin is there.
    if version >= (1, 7) {
        config += &format!(
            "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\nsocket_path = {:?}\n",
            path("nri.sock")
        );
    }
    let (images, containers, runtime) = match is_old {
        true => {
            let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
            (cri.to_owned(), format!("{cri}.containerd"), cri.to_owned())
        }
        false => {
            let images = "plugins.\"io.containerd.cri.v1.images\"".to_owned();
            let runtime = "plugins.\"io.containerd.cri.v1.runtime\"".to_owned();
            (images.clone(), images, runtime)
        }
    };
    let annotations = format!("snapshotter = {name:?}\ndisable_snapshot_annotations = false\n");
    config += &match is_old {
        true => format!("[{images}]\nsandbox_image = {sandbox:?}\n"),
        false => format!(
            "[{images}]\n{annotations}[{images}.pinned_images]\nsandbox = {sandbox:?}\n[{runtime}]\n"
        ),
    };
    config += "disable_apparmor = true\nrestrict_oom_score_adj = true\n";
    config += &format!(
        "[{runtime}.cni]\nconf_dir = {:?}\n",
        path("no-network-plugins")
    );
    if let Some(runc) = setup.runc {
        config += &format!(
            "[{runtime}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
            [{runtime}.containerd.runtimes.runc.options]\nBinaryName = {runc:?}\n"
        );
    }
    if is_old {
        config += &format!("[{containers}]\n{annotations}");
    }
    config
}

fn layers() -> Vec<Layer> {
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    vec![
        Layer::new()
            .directory("bin", 0o755)
            .program("bin/busybox", &busybox)
            .file("data/big", &noise(3_000_000))
            .file("etc/tag", b"lower"),
        Layer::new().file("etc/tag", b"upper"),
    ]
}

impl Containerd {
    fn pull(&self, image: &Image) {
        let pull = ["image", "pull", "--plain-http", "--snapshotter", "soci"];
        self.run(&[&pull[..], &[&image.reference]].concat());
    }

    /// Removes an image, and waits until nothing is left of it.
    fn remove(&self, image: &Image, snapshotter: &Snapshotter) {
        self.run(&["image", "rm", "--sync", &image.reference]);
        wait("garbage collection removes the snapshots", || {
            snapshotter.client().names(&[]).is_empty()
        });
        wait("the devices are gone", || {
            snapshotter.host.left_over().is_empty()
        });
    }
}

/// A container of an image that sleeps.
struct Sleeper<'a> {
    containerd: &'a Containerd,
    name: String,
}

impl<'a> Sleeper<'a> {
    fn start(containerd: &'a Containerd, image: &Image, options: &[&str]) -> Self {
        // runc has the containers of all containerds of this machine in one directory
        let folder = containerd.folder.path().file_name().unwrap();
        let name = format!("sleeper.{}", folder.to_str().unwrap());
        let run = ["run", "-d", "--snapshotter", "soci"];
        let program = [&image.reference, &name, "/bin/busybox", "sleep", "600"];
        containerd.run(&[&run[..], options, &program[..]].concat());
        Self { containerd, name }
    }

    fn exec(&self, command: &[&str]) -> String {
        // by a file: `ctr` may lose the output of a short command that it copies itself
        let log = self.containerd.folder.path().join("exec.log");
        let _ = fs::remove_file(&log);
        let uri = format!("file://{}", log.display());
        let exec = ["task", "exec", "--exec-id", "exec", "--log-uri", &uri];
        let program = [&self.name, "/bin/busybox"];
        self.containerd
            .run(&[&exec[..], &program, command].concat());
        fs::read_to_string(&log).unwrap()
    }

    fn end(self) {
        self.containerd.run(&["task", "rm", "--force", &self.name]);
        self.containerd.run(&["container", "rm", &self.name]);
    }
}

/// Pulls an image, runs a container of it, kills the daemon under another one, and removes all.
fn pulled_and_run(containerd: &Containerd, snapshotter: &Snapshotter, image: &Image, lazy: usize) {
    containerd.pull(image);
    let committed = snapshotter.client().list(&["kind==committed"]).unwrap();
    assert_eq!(committed.len(), 2, "{committed:?}");
    // runc has the containers of all containerds of this machine in one directory
    let of_this_test = image.reference.replace([':', '/'], ".");
    let run = |name: &str, command: &[&str]| {
        let name = format!("{name}.{of_this_test}");
        let run = [
            "run",
            "--rm",
            "--snapshotter",
            "soci",
            &image.reference,
            &name,
        ];
        containerd.run(&[&run[..], &["/bin/busybox"], command].concat())
    };
    assert_eq!(run("first", &["cat", "/etc/tag"]), "upper");
    assert_eq!(layer_mounts(&snapshotter.host).len(), lazy);
    snapshotter.host.kill_served_by_keeper();
    assert_eq!(
        run("second", &["wc", "-c", "/data/big"]).trim(),
        "3000000 /data/big"
    );
    containerd.remove(image, snapshotter);
}

#[test]
fn containerd_2_4_pulls_an_indexed_image_lazily() {
    let programs = Programs::built();
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    for capabilities in programs.capabilities() {
        let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
        let setup = Setup {
            capabilities,
            ..Setup::default()
        };
        let containerd = Containerd::start(Some(&snapshotter), &programs, &setup);
        registry.reset_counters();
        let lazy = if programs.passes_labels() { 2 } else { 0 };
        pulled_and_run(&containerd, &snapshotter, &image, lazy);
        let fetched = registry.counters().blob(&image.blobs[0]);
        assert!(
            lazy == 0 || fetched.requests > 1,
            "by ranges, and not as a pull: {fetched:?}"
        );
        drop(containerd);
        snapshotter.end();
    }
}

#[test]
fn an_image_that_was_converted_is_pulled_lazily() {
    let programs = Programs::built();
    let registry = Registry::start();
    let mut image = Image::push(&registry, "app", layers(), false);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let converted = registry.reference("app:converted");
    let sizes = ["--min-layer-size", "0", "--span-size", "65536"];
    let convert = ["convert", &image.reference, &converted];
    snapshotter.host.run(&[&convert[..], &sizes].concat());
    image.reference = converted;
    let containerd = Containerd::start(Some(&snapshotter), &programs, &Setup::default());
    let lazy = if programs.passes_labels() { 2 } else { 0 };
    pulled_and_run(&containerd, &snapshotter, &image, lazy);
    drop(containerd);
    snapshotter.end();
}

#[test]
fn the_containerd_of_the_system_pulls_an_image_without_labels_as_usual() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let snapshotter = Snapshotter::start(&[]);
    let programs = Programs::of_the_system();
    let containerd = Containerd::start(Some(&snapshotter), &programs, &Setup::default());
    pulled_and_run(&containerd, &snapshotter, &image, 0);
    drop(containerd);
    snapshotter.end();
}

#[test]
fn containerd_2_4_gets_an_image_without_an_index_on_disks() {
    let programs = Programs::built();
    let registry = Registry::start();
    let image = Image::push(&registry, "disks", layers(), false);
    for capabilities in programs.capabilities() {
        let snapshotter = Snapshotter::start(&["--rule", "disks"]);
        let setup = Setup {
            capabilities,
            ..Setup::default()
        };
        let containerd = Containerd::start(Some(&snapshotter), &programs, &setup);
        let disks = if programs.passes_labels() { 2 } else { 0 };
        pulled_and_run(&containerd, &snapshotter, &image, disks);
        drop(containerd);
        snapshotter.end();
    }
}

#[test]
fn containerd_2_4_mounts_devices_and_nothing_of_ours_is_in_the_mount_table() {
    let programs = Programs::built();
    if !programs.mounts_devices() {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let registry = Registry::start();
    let image = Image::push(&registry, "devices", layers(), true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--layer-mounts", "containerd"]);
    let containerd = Containerd::start(Some(&snapshotter), &programs, &Setup::default());
    containerd.pull(&image);
    let sleeper = Sleeper::start(&containerd, &image, &[]);
    assert_eq!(sleeper.exec(&["cat", "/etc/tag"]), "upper");
    let root = snapshotter.host.root().canonicalize().unwrap();
    let below = |mount: &socinbd::kernel::mount::info::Mount| mount.is_below(&root);
    let everywhere = socinbd::kernel::mount::info::everywhere().unwrap();
    let ours: Vec<_> = everywhere.into_iter().filter(below).collect();
    assert_eq!(ours, []);
    snapshotter.host.kill_served_by_keeper();
    let size = sleeper.exec(&["wc", "-c", "/data/big"]);
    assert_eq!(size.trim(), "3000000 /data/big");
    sleeper.end();
    // as before, with the daemon killed while nothing is mounted
    snapshotter.host.kill_served_by_keeper();
    let sleeper = Sleeper::start(&containerd, &image, &[]);
    assert_eq!(sleeper.exec(&["cat", "/etc/tag"]), "upper");
    sleeper.end();
    containerd.remove(&image, &snapshotter);
    drop(containerd);
    snapshotter.end();
}

#[test]
fn containerd_2_4_runs_idmapped_containers() {
    let programs = Programs::built();
    if !programs.mounts_devices() {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let registry = Registry::start();
    let image = Image::push(&registry, "idmapped", layers(), true);
    for mounter in ["daemon", "containerd"] {
        let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--layer-mounts", mounter]);
        let setup = Setup {
            capabilities: programs.mapping(),
            ..Setup::default()
        };
        let containerd = Containerd::start(Some(&snapshotter), &programs, &setup);
        containerd.pull(&image);
        let user_namespace = [
            "--uidmap",
            "0:100000:65536",
            "--gidmap",
            "0:200000:65536",
            "--remap-labels",
        ];
        let sleeper = Sleeper::start(&containerd, &image, &user_namespace);
        let map = sleeper.exec(&["cat", "/proc/self/uid_map"]);
        assert_eq!(
            map.split_whitespace().collect::<Vec<_>>(),
            ["0", "100000", "65536"]
        );
        // those of the image
        for (file, expected) in [
            ("/", "0 0"),
            ("/bin", "1000 2000"),
            ("/etc/tag", "1000 2000"),
        ] {
            let owner = sleeper.exec(&["stat", "-c", "%u %g", file]);
            assert_eq!(owner.trim(), expected, "{file}, {mounter}");
        }
        // root of the container may change what the image's root has
        sleeper.exec(&["chown", "7:8", "/etc/tag"]);
        let owner = sleeper.exec(&["stat", "-c", "%u %g", "/etc/tag"]);
        assert_eq!(owner.trim(), "7 8");
        sleeper.end();
        containerd.remove(&image, &snapshotter);
        drop(containerd);
        snapshotter.end();
    }
}

#[test]
fn two_containerds_one_daemon() {
    let programs = Programs::built();
    let registry = Registry::start();
    let image = Image::push(&registry, "app", layers(), true);
    let other = Image::push(&registry, "other", vec![Layer::new().file("a", b"a")], true);
    let folder = TempDir::new().unwrap();
    let sockets = ["first.sock", "second.sock"].map(|name| folder.path().join(name));
    let mut options = vec!["--unproven", "lazy"];
    for socket in &sockets {
        options.extend(["--address", socket.to_str().unwrap()]);
    }
    let snapshotter = Snapshotter::start(&options);
    let snapshots = |socket: &Path| {
        let client = Client::connect(socket).expect("it listens");
        client.names(&[])
    };
    let capabilities = programs.capabilities();
    let containerds = sockets.each_ref().map(|socket| {
        let setup = Setup {
            capabilities: capabilities[capabilities.len() - 1],
            socket: Some(socket),
            ..Setup::default()
        };
        Containerd::start(Some(&snapshotter), &programs, &setup)
    });
    let [first, second] = &containerds;
    let [of_first, of_second] = sockets.each_ref().map(|socket| move || snapshots(socket));

    first.pull(&image);
    registry.reset_counters();
    second.pull(&image);
    if programs.passes_labels() {
        let fetched = registry.counters().blob(&image.blobs[0]);
        assert_eq!(fetched.requests, 0, "the disk of the first one is used");
    }
    let sleepers = containerds
        .each_ref()
        .map(|it| Sleeper::start(it, &image, &[]));
    snapshotter.host.kill_served_by_keeper();
    for sleeper in &sleepers {
        assert_eq!(sleeper.exec(&["cat", "/etc/tag"]), "upper");
    }

    // garbage collection of the second one, while the first one has snapshots that the second one does not know
    let before = of_first();
    assert_eq!(before.len(), 3, "{before:?}");
    second.pull(&other);
    second.run(&["image", "rm", "--sync", &other.reference]);
    wait("the snapshots of the second one are collected", || {
        of_second().len() == 3
    });
    assert_eq!(of_first(), before);

    // and that of the first one, of the same image, with the daemon killed again
    let before = of_second();
    let [sleeper, still] = sleepers;
    sleeper.end();
    first.run(&["image", "rm", "--sync", &image.reference]);
    snapshotter.host.kill_served_by_keeper();
    wait("the first one has no snapshots", || of_first().is_empty());
    assert_eq!(of_second(), before);
    let size = still.exec(&["wc", "-c", "/data/big"]);
    assert_eq!(size.trim(), "3000000 /data/big");
    still.end();
    let again = Sleeper::start(second, &image, &[]);
    assert_eq!(again.exec(&["cat", "/etc/tag"]), "upper");
    again.end();
    second.run(&["image", "rm", "--sync", &image.reference]);
    wait("the second one has no snapshots", || of_second().is_empty());
    wait("the devices are gone", || {
        snapshotter.host.left_over().is_empty()
    });
    drop(containerds);
    snapshotter.end();
}

#[test]
fn containerd_2_4_runs_an_image_of_130_layers() {
    let programs = Programs::built();
    if !programs.mounts_devices() {
        return; // CONTAINERD_VERSION names an earlier one
    }
    let registry = Registry::start();
    let small = (0..128).map(|number: usize| {
        let file = format!("layers/{number}");
        Layer::new()
            .file(&file, number.to_string().as_bytes())
            .file("layers/last", number.to_string().as_bytes())
    });
    let image = Image::push(
        &registry,
        "deep",
        layers().into_iter().chain(small).collect(),
        true,
    );
    for mounter in ["daemon", "containerd"] {
        let snapshotter = Snapshotter::start(&["--unproven", "lazy", "--layer-mounts", mounter]);
        let setup = Setup {
            capabilities: programs.mapping(),
            ..Setup::default()
        };
        let containerd = Containerd::start(Some(&snapshotter), &programs, &setup);
        containerd.pull(&image);
        let lazy = snapshotter.client().names(&["kind==committed"]).len();
        assert_eq!(lazy, 130);
        let maps = ["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"];
        let maps = [&maps[..], &["--remap-labels"]].concat();
        for options in [&[][..], &maps] {
            let sleeper = Sleeper::start(&containerd, &image, options);
            assert_eq!(sleeper.exec(&["cat", "/layers/last"]), "127");
            for number in ["0", "64", "127"] {
                assert_eq!(sleeper.exec(&["cat", &format!("/layers/{number}")]), number);
            }
            assert_eq!(sleeper.exec(&["cat", "/etc/tag"]), "upper");
            sleeper.end();
        }
        containerd.remove(&image, &snapshotter);
        drop(containerd);
        snapshotter.end();
    }
}
