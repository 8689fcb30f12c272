//! What commands write, and where: standard output, files, sockets. What stood there before is not lost.

use std::{
    fs,
    io::Read as _,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
        process::ExitStatusExt as _,
    },
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    engine::Host,
    soci::make::{MadeLayout, digest, gzip},
    support::{
        noise,
        registry::{Fault, On, Registry, Times},
        succeeds,
        tars::Layer,
        wait,
    },
};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An image with a file of so many bytes, `f`.
fn image_of(size: usize) -> MadeLayout {
    MadeLayout::of(vec![Layer::new().file("f", &noise(size))])
}

#[test]
fn a_full_standard_output_is_an_error_and_no_panic() {
    let (host, layout) = (Host::new(), image_of(5000));
    let image = layout.reference("");
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["doctor"],
        &["doctor", "--json"],
        &["list"],
        &["list", "--json"],
        &["inspect", &image],
        &["index", "list"],
        &["cat", &image, "f"],
    ] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = host.command(arguments).stdout(full).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(
            error.contains("No space left") && !error.contains("panicked"),
            "{arguments:?}: {error}"
        );
    }
}

#[test]
fn a_reader_that_has_enough_of_a_file_is_no_error() {
    let (host, layout) = (Host::new(), image_of(3 << 20));
    let mut child = host
        .command(&["cat", &layout.reference(""), "f"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn what_a_terminal_acts_on_is_shown_and_not_sent() {
    let host = Host::new();
    let mut layout = MadeLayout::new();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "a/b\u{1b}[2J\u{9b}31m",
        "config": layout.blob("application/vnd.oci.empty.v1+json", b"{}"), "layers": [],
    });
    let manifest = layout.blob(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    layout.tag(&manifest, "latest");
    let shown = host.run(&["inspect", &layout.reference("")]);
    assert!(shown.contains("a/b\\u{1b}[2J\\u{9b}31m"), "{shown}");
    assert!(!shown.contains(['\u{1b}', '\u{9b}']), "{shown:?}");
}

#[test]
fn a_socket_takes_the_place_of_no_other_file() {
    let (host, layout) = (Host::new(), image_of(5000));
    let place = host.mountpoint("out").join("socket");
    let serve = |run: &str| -> Vec<String> {
        [
            "serve",
            &layout.reference(""),
            "--socket",
            text(&place),
            "--run",
            run,
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let arguments = serve("true");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    fs::write(&place, "kept").unwrap();
    let error = host.fail(&arguments, 2);
    assert!(error.contains("is not a socket"), "{error}");
    assert_eq!(fs::read_to_string(&place).unwrap(), "kept");
    // one that nobody listens on is of no use to anybody
    fs::remove_file(&place).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&place).unwrap());
    host.run(&arguments);
    assert!(!place.exists());
    // what others have put in the place of ours stays
    let arguments = serve(&format!("rm {0}; echo theirs > {0}", text(&place)));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    host.run(&arguments);
    assert_eq!(fs::read_to_string(&place).unwrap(), "theirs\n");
}

#[test]
fn an_archive_takes_the_place_of_ordinary_files_only() {
    let (host, layout) = (Host::new(), image_of(5000));
    let (image, out) = (layout.reference(""), host.mountpoint("out"));
    let pipe = out.join("pipe");
    succeeds(Command::new("mkfifo").arg(&pipe));
    for (place, words) in [(&pipe, "a pipe"), (&out, "a directory")] {
        for command in ["copy", "convert"] {
            let archive = format!("oci-archive:{}:a", text(place));
            let error = host.fail(&[command, &image, &archive], 2);
            assert!(error.contains(words), "{command}: {error}");
        }
    }
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    // a link keeps leading to its file, which is written anew
    let (file, link) = (out.join("file"), out.join("link"));
    fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink("file", &link).unwrap();
    host.run(&["copy", &image, &format!("oci-archive:{}:a", text(&link))]);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let archive = format!("oci-archive:{}:a", text(&file));
    host.run(&["inspect", &archive]);
}

#[test]
fn a_layer_is_not_overwritten_by_its_ztoc() {
    let host = Host::new();
    let out = host.mountpoint("out");
    let (layer, link) = (out.join("layer"), out.join("link"));
    let bytes = gzip(&Layer::new().file("f", b"f").tar());
    fs::write(&layer, &bytes).unwrap();
    std::os::unix::fs::symlink("layer", &link).unwrap();
    for (from, to) in [(&layer, &layer), (&layer, &link), (&link, &layer)] {
        let error = host.fail(&["ztoc", "create", text(from), "-o", text(to)], 2);
        assert!(error.contains("the layer itself"), "{error}");
    }
    assert_eq!(fs::read(&layer).unwrap(), bytes);
    // a link to another file keeps leading there
    let other = out.join("other");
    fs::write(&other, "").unwrap();
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("other", &link).unwrap();
    host.run(&["ztoc", "create", text(&layer), "-o", text(&link)]);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(fs::metadata(&other).unwrap().size() > 0);
}

#[test]
fn a_copy_that_is_interrupted_leaves_nothing_half() {
    let (host, layout) = (Host::new(), image_of(100_000));
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let layers = layer_of(&layout);
    registry.fail(On::DataOf(layers), Fault::Hang, Times::UntilHealed);
    let image = registry.reference("app");
    for (signal, number) in [("TERM", 15), ("INT", 2), ("HUP", 1)] {
        let out = host.mountpoint(signal);
        for kind in ["oci-archive", "oci"] {
            let to = format!("{kind}:{}:a", text(&out.join(kind)));
            let mut child = host.command(&["copy", &image, &to]).spawn().unwrap();
            wait("a temporary file", || !unfinished(&out).is_empty());
            let pid = child.id().to_string();
            succeeds(Command::new("kill").args([&format!("-{signal}"), &pid]));
            assert_eq!(child.wait().unwrap().signal(), Some(number));
            assert_eq!(unfinished(&out), [""; 0], "{signal}, {kind}");
        }
        assert!(!out.join("oci-archive").exists());
    }
}

#[test]
fn a_mount_point_over_the_kernels_own_files_is_refused() {
    let (host, layout) = (Host::new(), image_of(5000));
    for place in ["/proc", "/dev", "/sys", "/dev/../proc"] {
        let attach = host.command(&["attach", &layout.reference(""), place]);
        // where it is not refused it must not be this machine's
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(attach.get_program())
            .args(attach.get_args())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{place}: {error}");
        assert!(error.contains("hide a kernel file system"), "{error}");
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn folders_that_cannot_do_are_named_with_what_to_do() {
    let (host, layout) = (Host::new(), image_of(5000));
    let (image, mountpoint) = (layout.reference(""), host.mountpoint("mnt"));
    let long = host.mountpoint(&"r".repeat(120));
    for command in [&["list"][..], &["attach", &image, text(&mountpoint)]] {
        let arguments = [command, &["--run-dir", text(&long)]].concat();
        let error = host.fail(&arguments, 2);
        assert!(
            error.contains("--run-dir") && error.contains("too long"),
            "{error}"
        );
    }
    let odd = std::ffi::OsStr::from_bytes(b"/tmp/\xff");
    for flag in ["--root", "--run-dir"] {
        let output = host.command(&["list", flag]).arg(odd).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(flag) && error.contains("UTF-8"), "{error}");
    }
    // in a mount namespace of its own, the root is on an overlay
    let folders = ["lower", "upper", "work", "root"].map(|name| host.mountpoint(name));
    let [lower, upper, work, root] = folders.each_ref().map(|folder| text(folder));
    let mount = format!(
        "mount -t overlay none -o lowerdir={lower},upperdir={upper},workdir={work} {root} && exec \"$@\""
    );
    let attach = host.command(&[
        "attach",
        &image,
        text(&mountpoint),
        "--rw",
        "--foreground",
        "--root",
        root,
    ]);
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &mount,
            "sh",
        ])
        .arg(attach.get_program())
        // without the host's own --root
        .args(attach.get_args().skip(2))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("use a --root on another one"), "{error}");
    assert_eq!(host.left_over(), [""; 0]);
}

/// The only layer of an image.
fn layer_of(layout: &MadeLayout) -> socinbd::oci::Digest {
    let read = |path: &Path| -> serde_json::Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let index = read(&layout.path().join("index.json"));
    let manifest = read(&layout.blob_path(&digest(&index["manifests"][0])));
    digest(&manifest["layers"][0])
}

/// Temporary files below a folder.
fn unfinished(folder: &Path) -> Vec<String> {
    let found = Command::new("find")
        .arg(folder)
        .args(["-name", ".socinbd-*"])
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    found.lines().map(str::to_owned).collect()
}
