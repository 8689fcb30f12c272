//! `list --watch`, `why` for devices and fetches, `top`.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use super::{apart, get};
use crate::{
    engine::{
        Host,
        lifecycle::{indexed, one_file_host},
    },
    snapshotter::{
        Snapshotter,
        image::{Container, Image},
    },
    soci::make::MadeLayout,
    support::{registry::Registry, seeded_noise, tars::Layer, wait},
};

#[test]
fn why_names_the_layer_of_a_device() {
    let host = Host::new();
    let layers = [b"one", b"two"].map(|text| Layer::new().file("file", text));
    let layout = indexed(&host, layers.into());
    let mountpoint = host.mountpoint("mnt");
    let attached = host.attach(&layout.reference(""), &mountpoint, &[]);
    let why = |what: &str| -> Value {
        serde_json::from_str(&host.run(&["--json", "why", what])).unwrap()
    };
    let mut asked = 0;
    for layer in attached["layers"].as_array().unwrap() {
        let devices = [&layer["device_path"], &layer["backing"]];
        for device in devices.into_iter().filter_map(Value::as_str) {
            let name = Path::new(device).file_name().unwrap().to_str().unwrap();
            for what in [device, name] {
                let found = why(what);
                assert_eq!(found.as_array().unwrap().len(), 1, "{what}: {found:#}");
                assert_eq!(found[0]["digest"], layer["digest"]);
                assert_eq!(found[0]["attachments"][0]["id"], attached["id"]);
                assert!(
                    host.run(&["why", what])
                        .contains(mountpoint.to_str().unwrap())
                );
                asked += 1;
            }
        }
    }
    assert!(asked >= 4, "{attached:#}");
    let error = host.fail(&["why", "/dev/nbd999"], 3);
    assert!(error.contains("/dev/nbd999 is not a device"), "{error}");
    host.detach(&mountpoint);
}

#[test]
fn the_layers_of_a_snapshotter_are_seen_with_their_devices_and_mounts() {
    let registry = Registry::start();
    let layers = vec![
        Layer::new().file("one", b"one"),
        Layer::new().file("two", b"two"),
    ];
    let image = Image::push(&registry, "app", layers, true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top) = image.pull(&snapshotter, "default");
    let container = Container::start(&snapshotter, "first", &top);
    assert_eq!(container.root.read("one"), "one");
    let host = &snapshotter.host;
    let layers: Vec<Value> = serde_json::from_str(&get(host, &[], "/v1/layers")).unwrap();
    assert_eq!(layers.len(), 2);
    for layer in &layers {
        assert_eq!(layer["attachments"], Value::Array(Vec::new()));
        let text = host.run(&["why", layer["devices"][0].as_str().unwrap()]);
        assert!(text.contains(layer["digest"].as_str().unwrap()), "{text}");
        let place = layer["mounts"][0].as_str().unwrap();
        assert!(
            text.contains(&format!("mounted alone at {place}")),
            "{text}"
        );
    }
    let terminal = Terminal::run(host, &["top"], (100, 10), "");
    let shown = terminal.wait_for("layer ");
    let rows = shown
        .lines()
        .filter(|line| line.starts_with("layer "))
        .count();
    assert_eq!(rows, 2, "{shown}");
    drop(terminal);
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn snapshots_are_listed_and_explained() {
    let registry = Registry::start();
    let layers = || {
        vec![
            Layer::new().file("one", b"one"),
            Layer::new().file("two", b"two"),
        ]
    };
    let image = Image::push(&registry, "app", layers(), true);
    let other = vec![Layer::new().file("plain", b"plain")];
    let plain = Image::push(&registry, "plain", other, false);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let host = &snapshotter.host;
    let (_, top) = image.pull(&snapshotter, "default");
    let why_not_mounted = host.run(&["why", &image.chain[1].to_string()]);
    assert!(
        why_not_mounted.contains(": not mounted"),
        "{why_not_mounted}"
    );
    let container = Container::start(&snapshotter, "first", &top);
    let list = host.run(&["list", "--snapshots"]);
    assert_eq!(list.lines().count(), 4, "{list}");
    assert!(
        list.contains(&image.reference) && list.contains("default/9/first"),
        "{list}"
    );
    // by each of its names the snapshot of the container is explained with all of its layers
    let number = list
        .lines()
        .find(|line| line.contains("default/9/first"))
        .and_then(|line| line.split(' ').next()?.rsplit_once('/'))
        .unwrap()
        .1;
    let root = container.root.path().to_str().unwrap();
    let by_set = format!("snapshotter/{number}");
    for what in ["default/9/first", "first", number, &by_set, root] {
        let text = host.run(&["why", what]);
        let heading = format!("snapshot snapshotter/{number} (active): default/9/first");
        assert_eq!(text.lines().next(), Some(&*heading), "{what}");
        for blob in &image.blobs {
            assert!(text.contains(&format!("layer {blob} (")), "{what}: {text}");
        }
        let json: Value = serde_json::from_str(&host.run(&["--json", "why", what])).unwrap();
        assert_eq!(json[0].as_array().unwrap().len(), 3, "{what}: {json:#}");
        assert_eq!(json[0][1]["layer"]["chain_id"], image.chain[1].to_string());
    }
    // why a layer is not lazy
    let (_, extracted) = plain.pull(&snapshotter, "default");
    let text = host.run(&["why", &extracted]);
    assert!(
        text.contains("extracted by containerd: ") && text.contains("no index has a table"),
        "{text}"
    );
    let error = host.fail(&["why", "absent"], 3);
    assert!(error.contains("list --snapshots"), "{error}");
    container.end();
    // also without a daemon
    host.kill_daemon();
    assert_eq!(host.run(&["list", "--snapshots"]).lines().count(), 4);
    let text = host.run(&["why", &top]);
    assert!(text.contains(": not mounted"), "{text}");
    let mut snapshotter = snapshotter;
    snapshotter.start_again();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn why_shows_which_files_have_caused_which_fetches() {
    let host = Host::new();
    let files = apart("evil\x1b[2J");
    let layout = indexed(&host, vec![files]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    fs::read(mountpoint.join("usr/bin/program")).unwrap();
    fs::read(mountpoint.join("evil\x1b[2J")).unwrap();
    let image = registry.reference("app");
    let text = host.run(&["why", &image, "--fetches"]);
    assert!(
        text.contains("usr/bin/program\n") && text.contains("evil\\u{1b}[2J\n"),
        "{text}"
    );
    assert!(!text.contains("usr/share/unread"), "{text}");
    let report: Value =
        serde_json::from_str(&host.run(&["--json", "why", &image, "--fetches"])).unwrap();
    let layer = &report[0]["layers"][0];
    let unread = &layer["unread"];
    assert_eq!(
        (&unread["files"], &unread["all_files"]),
        (&1.into(), &5.into())
    );
    assert_eq!(unread["largest"][0]["path"], "usr/share/unread");
    let causes = layer["fetches"].as_array().unwrap().iter();
    let causes: Vec<_> = causes.filter(|fetch| fetch["reason"] == "read").collect();
    assert!(
        causes.iter().all(|fetch| fetch["cause"].is_string()),
        "{layer:#}"
    );
    host.detach(&mountpoint);
}

#[test]
fn a_watched_list_follows_changes_and_ends_with_its_reader() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let watch = |options: &[&str]| -> Child {
        let mut command = host.command(&[options, &["list", "--watch"]].concat());
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut json = watch(&["--json"]);
    let mut lines = BufReader::new(json.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()[0]["reference"], layout.reference(""));
    let mut text = watch(&[]);
    let mut printed = BufReader::new(text.stdout.take().unwrap()).lines();
    assert!(printed.next().unwrap().unwrap().starts_with("MOUNTPOINT"));
    host.detach(&mountpoint);
    while next() != Value::Array(Vec::new()) {}
    // the table is printed once more, as nothing is attached
    while !printed.next().unwrap().unwrap().starts_with("MOUNTPOINT") {}
    drop((lines, printed));
    for child in [&mut json, &mut text] {
        wait("the command has ended", || {
            child.try_wait().unwrap().is_some()
        });
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_list_is_watched_on_a_terminal() {
    let (host, layout, mountpoint) = one_file_host();
    let terminal = Terminal::run(&host, &["list", "--watch"], (100, 10), "");
    terminal.wait_for("MOUNTPOINT");
    host.attach(&layout.reference(""), &mountpoint, &[]);
    terminal.wait_for(mountpoint.to_str().unwrap());
    host.detach(&mountpoint);
    wait("the image is gone", || {
        !terminal.shown(false).contains(mountpoint.to_str().unwrap())
    });
    terminal.tmux(&["send-keys", "q"]);
    let shown = terminal.wait_for("ended 0");
    assert!(!shown.contains("MOUNTPOINT"), "{shown}");
}

/// A terminal of tmux(1), which ends with this.
struct Terminal {
    socket: tempfile::TempDir,
}

impl Terminal {
    /// Runs a command in a shell in a terminal of this size. The shell says `ended` and the exit status.
    fn run(host: &Host, arguments: &[&str], size: (u32, u32), environment: &str) -> Self {
        let terminal = Self {
            socket: tempfile::tempdir().unwrap(),
        };
        let command = host.command(arguments);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: String = words
            .map(|word| format!("'{}' ", word.to_str().unwrap()))
            .collect();
        let script = format!("trap : INT; {environment} {words}; echo ended $?; exec sleep 600");
        let (columns, rows) = (size.0.to_string(), size.1.to_string());
        let mut arguments = vec!["new-session", "-d", "-x", &columns, "-y", &rows];
        arguments.push(&script);
        terminal.tmux(&arguments);
        terminal
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .args(["-f", "/dev/null", "-S"])
            .arg(self.socket.path().join("tmux"))
            .args(arguments)
            .env("TERM", "xterm-256color")
            .output()
            .expect("this test needs tmux (scripts/setup test installs it)");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the terminal shows; with `colours` as escape sequences.
    fn shown(&self, colours: bool) -> String {
        let colours: &[&str] = if colours { &["-e"] } else { &[] };
        self.tmux(&[&["capture-pane", "-p"], colours].concat())
    }

    fn wait_for(&self, text: &str) -> String {
        let mut shown = String::new();
        wait(text, || {
            shown = self.shown(false);
            shown.contains(text)
        });
        shown
    }

    /// The processes of the program in this terminal.
    fn programs(&self) -> String {
        let pane = self.tmux(&["list-panes", "-F", "#{pane_pid}"]);
        let children = Command::new("pgrep")
            .args(["-P", pane.trim(), "-f", " top"])
            .output()
            .expect("this test needs pgrep (procps)");
        String::from_utf8_lossy(&children.stdout).into_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

/// A host with an image of a large file, attached from a registry. Only reads fetch from it, however long the test takes.
fn large_file_host() -> (Host, MadeLayout, Registry, std::path::PathBuf) {
    let host = Host::new();
    let layout = indexed(
        &host,
        vec![Layer::new().file("noise", &seeded_noise(4 << 20, 9))],
    );
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(
        &registry.reference("app"),
        &mountpoint,
        &["--fill", "never"],
    );
    (host, layout, registry, mountpoint)
}

#[test]
fn top_shows_rates_while_an_image_is_read_and_quits_with_q() {
    let (host, _layout, registry, mountpoint) = large_file_host();
    // a frame stays as long, so that it is seen on a slow machine
    let terminal = Terminal::run(&host, &["top", "--interval", "10"], (120, 12), "");
    let shown = terminal.wait_for("1 images");
    assert!(
        shown.contains("READS/S") && shown.contains("lazy"),
        "{shown}"
    );
    assert!(shown.contains(&registry.reference("app")), "{shown}");
    fs::read(mountpoint.join("noise")).unwrap();
    // the frame after the read: bytes were fetched since the one before
    let mut shown = String::new();
    wait("a rate is shown", || {
        shown = terminal.shown(false);
        let row = shown.lines().nth(3).unwrap_or_default();
        row.contains("MiB") || row.contains("KiB")
    });
    assert!(shown.lines().all(|line| line.chars().count() <= 120));
    // a smaller terminal has fewer columns, and no line is broken
    terminal.tmux(&["resize-window", "-x", "40", "-y", "6"]);
    wait("the columns fit", || {
        !terminal.shown(false).contains("SPANS")
    });
    assert!(terminal.shown(true).contains('\x1b'), "colours");
    terminal.tmux(&["resize-window", "-x", "100", "-y", "12"]);
    terminal.tmux(&["send-keys", "q"]);
    let shown = terminal.wait_for("ended 0");
    assert!(
        !shown.contains("READS/S"),
        "the screen of the shell is back: {shown}"
    );
    // what is typed is shown again: the terminal is as it was
    terminal.tmux(&["send-keys", "hello"]);
    terminal.wait_for("hello");
    host.detach(&mountpoint);
}

#[test]
fn top_ends_with_ctrl_c_and_with_its_terminal_and_has_no_colour_if_asked() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let terminal = Terminal::run(&host, &["top"], (90, 10), "NO_COLOR=1");
    terminal.wait_for("1 images");
    assert!(
        !terminal.shown(true).contains('\x1b'),
        "{:?}",
        terminal.shown(true)
    );
    terminal.tmux(&["send-keys", "C-c"]);
    let shown = terminal.wait_for("ended 130");
    assert!(!shown.contains("1 images"), "{shown}");
    drop(terminal);

    let terminal = Terminal::run(&host, &["top"], (90, 10), "");
    terminal.wait_for("1 images");
    let program = terminal.programs();
    let process = format!("/proc/{}", program.trim());
    assert!(Path::new(&process).exists(), "{program:?}");
    drop(terminal);
    wait("top has ended with its terminal", || {
        !Path::new(&process).exists()
    });
    host.detach(&mountpoint);

    let error = host.fail(&["top"], 2);
    assert!(error.contains("needs a terminal"), "{error}");
}
