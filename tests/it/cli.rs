//! The command line, as a person or a script sees it.

mod booted;
mod help;
mod install;
mod package;
mod pages;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    engine::Host,
    soci::make::{GZIP_LAYER, MadeLayout},
    support::{
        noise,
        registry::{Auth, Registry},
        tars::Layer,
    },
};

#[test]
fn wrong_usage_is_told_apart() {
    let host = Host::new();
    for arguments in [
        &[][..],
        &["no-such-command"],
        &["attach", "oci:/x"],
        &["attach", "oci:/x", "/mnt", "--device", "tape"],
        &["inspect", "UPPER CASE"],
        &["inspect", "oci:/x", "--platform", "/"],
        &["inspect", "oci:/x", "--index", "sha256:short"],
        &["serve", "oci:/x"],
        &["serve", "oci:/x", "--listen", "nowhere"],
        &["list", "--log", "=="],
    ] {
        let error = host.fail(arguments, 2);
        assert!(
            !error.is_empty() && !error.contains('\u{1b}'),
            "{arguments:?}: {error}"
        );
    }
}

#[test]
fn each_kind_of_error_has_its_status_and_says_what_to_do() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![Layer::new().file("f", b"f")]);
    let (closed, private) = (Registry::start(), Registry::start());
    let away = closed.reference("app");
    drop(closed);
    private.add_layout("app", layout.path()).unwrap();
    private.set_auth(Auth::Basic {
        user: "me".into(),
        password: "secret".into(),
    });
    let broken = MadeLayout::of(vec![Layer::new().file("f", &noise(5000))]);
    let index: Value =
        serde_json::from_slice(&fs::read(broken.path().join("index.json")).unwrap()).unwrap();
    let manifest = broken.blob_path(&crate::soci::make::digest(&index["manifests"][0]));
    let other = fs::read_to_string(&manifest)
        .unwrap()
        .replace("schemaVersion", "schemaversion");
    fs::write(&manifest, other).unwrap();
    for (arguments, status, words) in [
        (
            vec!["inspect".to_owned(), "oci:/nonexistent".to_owned()],
            3,
            "/nonexistent",
        ),
        (
            vec!["inspect".to_owned(), private.reference("app")],
            4,
            "docker login",
        ),
        (vec!["inspect".to_owned(), away], 5, "127.0.0.1"),
        (
            vec!["inspect".to_owned(), broken.reference("")],
            7,
            "sha256:",
        ),
        (
            vec![
                "index".to_owned(),
                "create".to_owned(),
                layout.reference(""),
            ],
            8,
            "--min-layer-size",
        ),
        (
            vec![
                "serve".into(),
                layout.reference(""),
                "--listen".into(),
                "0.0.0.0:0".into(),
            ],
            2,
            "--allow-remote",
        ),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let error = host.fail(&arguments, status);
        assert!(
            error.starts_with("socinbd: ") && error.contains(words),
            "{arguments:?}: {error}"
        );
        assert!(!error.contains('\u{1b}'), "{error:?}");
    }
}

#[test]
fn the_hosts_of_a_registry_are_those_of_the_directory() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![Layer::new().file("f", b"f")]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let certs = tempfile::tempdir().unwrap();
    let directory = certs.path().join("registry.test");
    fs::create_dir(&directory).unwrap();
    let file = directory.join("hosts.toml");
    let inspect = |dirs: &str| {
        let arguments = ["inspect", "registry.test/app", "--hosts-dir", dirs];
        arguments.map(str::to_owned)
    };
    let dirs = certs.path().display().to_string();
    fs::write(&file, format!("server = \"http://{}\"", registry.host())).unwrap();
    let arguments = inspect(&dirs);
    host.run(&arguments.each_ref().map(String::as_str));
    fs::write(&file, "server = 1").unwrap();
    let missing = format!("{dirs}/missing");
    for (dirs, words) in [
        (&dirs, "hosts.toml: line 1: server"),
        (&missing, "/missing: no such directory"),
    ] {
        let arguments = inspect(dirs);
        let error = host.fail(&arguments.each_ref().map(String::as_str), 2);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn index_create_tells_what_it_makes_and_what_it_skips() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![
        Layer::new().file("large", &noise(200_000)),
        Layer::new().file("small", b"small"),
    ]);
    let image = layout.reference("");
    let arguments = [
        "index",
        "create",
        &image,
        "--min-layer-size",
        "100000",
        "--span-size",
        "65536",
    ];
    let text = host.run(&arguments);
    assert!(
        text.contains("-> ztoc sha256:") && text.contains("ztoc skipped"),
        "{text}"
    );
    let report: Value =
        serde_json::from_str(&host.run(&[&["--json"], &arguments[..]].concat())).unwrap();
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert!(
        text.contains(report["index"].as_str().unwrap()),
        "not the same twice: {text} {report}"
    );
    let error = host.fail(
        &["index", "create", &image, "--min-layer-size", "1000000"],
        8,
    );
    assert!(error.contains("every layer was skipped"), "{error}");
}

#[test]
fn inspect_says_what_an_attach_then_fetches() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![
        Layer::new().file("large", &noise(300_000)),
        Layer::new().file("small", b"small"),
    ]);
    host.run(&[
        "index",
        "create",
        &layout.reference(""),
        "--min-layer-size",
        "100000",
        "--span-size",
        "65536",
    ]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let image = registry.reference("app");
    let report: Value = serde_json::from_str(&host.run(&["--json", "inspect", &image])).unwrap();
    assert_eq!(report["config"]["cmd"], json!(["/bin/true"]));
    assert_eq!(report["index"]["version"], 1);
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers[0]["ztoc"]["span_size"], 65536);
    assert!(layers[0]["ztoc"]["spans"].as_u64().unwrap() >= 4);
    assert_eq!(layers[1]["ztoc"], json!(null));
    let text = host.run(&["inspect", &image]);
    for word in [
        "before the first read",
        "gzip",
        "SOCI v1",
        &layers[0]["digest"].as_str().unwrap()[7..19],
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    registry.reset_counters();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&image, &mountpoint, &[]);
    let fetched = |digest: &Value| {
        registry
            .counters()
            .blob(&digest.as_str().unwrap().parse().unwrap())
            .bytes
    };
    let sum = fetched(&layers[0]["ztoc"]["digest"]) + fetched(&layers[1]["digest"]);
    assert_eq!(report["before_first_read"], sum);
    assert_eq!(fetched(&layers[0]["digest"]), 0);
    host.detach(&mountpoint);
}

#[test]
fn doctor_tells_what_is_there_and_what_to_do() {
    let host = Host::new();
    let report: Value = serde_json::from_str(&host.run(&["--json", "doctor"])).unwrap();
    let text = host.run(&["doctor"]);
    let offers = report["offers"].as_array().unwrap();
    let offer = |name: &str| {
        offers
            .iter()
            .find(|offer| offer["name"] == name)
            .unwrap_or_else(|| panic!("{name}: {report}"))
    };
    for name in ["fuse", "loop", "overlay", "user"] {
        assert_eq!(
            offer(name)["available"],
            true,
            "these tests run here: {name}"
        );
    }
    for name in ["nbd", "ublk", "containerd"] {
        let offer = offer(name);
        assert!(
            offer["available"] == true || offer["advice"].is_string(),
            "{offer}"
        );
        assert!(
            text.lines().any(|line| line.starts_with(name)),
            "{name}: {text}"
        );
    }
    assert!(text.contains(report["kernel"].as_str().unwrap()));
    assert_eq!(offer("daemon")["available"], false, "none was started");
    let space = offer("space")["detail"].as_str().unwrap();
    assert!(space.ends_with(host.root().to_str().unwrap()), "{space}");
}

#[test]
fn what_is_served_is_the_layers_disk() {
    let (host, other) = (Host::new(), Host::new());
    let layout = MadeLayout::of(vec![
        Layer::new()
            .file("f", &noise(300_000))
            .directory("d", 0o700),
    ]);
    let image = layout.reference("");
    host.run(&[
        "index",
        "create",
        &image,
        "--min-layer-size",
        "0",
        "--span-size",
        "65536",
    ]);
    let folder = host.mountpoint("out");
    let (socket, copy, info) = (
        folder.join("nbd.sock"),
        folder.join("copy"),
        folder.join("info"),
    );
    let command = format!(
        "nbdinfo --size \"$uri\" >{} && nbdcopy \"$uri\" {} && exit 5",
        info.display(),
        copy.display()
    );
    // a package is missing where the status is 127: libnbd-bin
    host.fail(
        &[
            "serve",
            &image,
            "--socket",
            socket.to_str().unwrap(),
            "--run",
            &command,
        ],
        5,
    );
    assert!(!socket.exists());
    // a complete disk of the same layer, on a host that read the file through a mount
    let mountpoint = other.mountpoint("mnt");
    let attachment = other.attach(&image, &mountpoint, &[]);
    fs::read(mountpoint.join("f")).unwrap();
    other.wait_complete(&mountpoint);
    other.detach(&mountpoint);
    let layer = &attachment["layers"][0];
    let hex = |name: &str| {
        layer[name]
            .as_str()
            .unwrap()
            .trim_start_matches("sha256:")
            .to_owned()
    };
    let disk = other
        .root()
        .join("layers/sha256")
        .join(hex("digest"))
        .join(hex("table"))
        .join("disk.ext4");
    let disk = fs::read(disk).unwrap();
    assert!(fs::read(copy).unwrap() == disk);
    assert_eq!(
        fs::read_to_string(info).unwrap().trim(),
        disk.len().to_string()
    );
}

#[test]
fn a_pipe_gets_no_escape_codes_and_no_progress() {
    let host = Host::new();
    let layout = MadeLayout::of(vec![Layer::new().file("f", &noise(100_000))]);
    let mountpoint = host.mountpoint("mnt");
    let (image, place) = (layout.reference(""), mountpoint.to_str().unwrap());
    let output = host.output(&["--log", "debug", "attach", &image, place]);
    assert!(output.status.success());
    let log = fs::read(host.run_dir().join("daemon.log")).unwrap();
    for (name, bytes) in [
        ("stdout", &output.stdout),
        ("stderr", &output.stderr),
        ("daemon.log", &log),
    ] {
        assert!(
            !bytes.is_empty() && !bytes.contains(&0x1b),
            "{name}: {}",
            String::from_utf8_lossy(bytes)
        );
    }
    host.detach(&mountpoint);
    let output = host.output(&["attach", &image, place]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    host.detach(&mountpoint);
}

/// A layout with an image of busybox and this configuration.
fn busybox(config: Value) -> MadeLayout {
    let program =
        fs::read("/bin/busybox").expect("/bin/busybox: install the package busybox-static");
    let tar = Layer::new()
        .directory("bin", 0o755)
        .program("bin/busybox", &program)
        .symlink("bin/sh", "busybox")
        .directory("srv", 0o755)
        .directory("etc", 0o755)
        .file(
            "etc/passwd",
            b"root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
        )
        .file("etc/group", b"web:x:34:\n")
        .tar();
    let mut layout = MadeLayout::new();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [socinbd::oci::Digest::of(&tar)]},
    });
    let config = layout.blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let layer = layout.blob(GZIP_LAYER, &crate::soci::make::gzip(&tar));
    let manifest = layout.manifest(&config, &[layer]);
    layout.tag(&manifest, "latest");
    layout
}

#[test]
fn run_follows_the_images_configuration() {
    let host = Host::new();
    let layout = busybox(json!({
        "Env": ["GREETING=hello"], "User": "web", "WorkingDir": "/srv",
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["exit 3"],
    }));
    let image = layout.reference("");
    host.run(&["index", "create", &image, "--min-layer-size", "0"]);
    host.fail(&["run", &image], 3);
    let script = "echo $GREETING $(busybox id -u):$(busybox id -g) $(busybox pwd)";
    let said = host.run(&["run", &image, "--", script]);
    assert_eq!(said, "hello 33:34 /srv\n");
    let said = host.run(&[
        "run",
        &image,
        "-e",
        "GREETING=bye",
        "-u",
        "0",
        "-w",
        "/etc",
        "--",
        script,
    ]);
    assert_eq!(said, "bye 0:0 /etc\n");
    host.fail(
        &["run", &image, "--entrypoint", "/bin/busybox", "--", "false"],
        1,
    );
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn run_writes_a_page_about_the_start_of_its_program() {
    let host = Host::new();
    let layout = busybox(json!({"Entrypoint": ["/bin/sh", "-c"]}));
    let image = layout.reference("");
    host.run(&["index", "create", &image, "--min-layer-size", "0"]);
    let page = host.mountpoint("pages").join("start.html");
    let path = page.to_str().unwrap();
    host.fail(&["run", &image, "--report", path, "--", "exit 3"], 3);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("<code>bin/busybox</code>"), "{html}");
    assert_eq!(host.list(), [json!(null); 0]);
    // the status is that of the program, also if there is no place for the page
    let nowhere = host.mountpoint("pages").join("none/start.html");
    let path = nowhere.to_str().unwrap();
    let error = host.fail(&["run", &image, "--report", path, "--", "exit 4"], 4);
    assert!(error.contains("there is no report"), "{error}");
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn run_passes_signals_on() {
    let host = Host::new();
    let layout = busybox(json!({"Entrypoint": ["/bin/sh", "-c"]}));
    let image = layout.reference("");
    let script = "trap 'exit 9' TERM; echo ready; while :; do busybox sleep 1 & wait $!; done";
    let mut child = host
        .command(&["run", &image, "--", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(9));
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), host.list()), ("", vec![]));
    assert_eq!(host.left_over(), [""; 0]);
}
