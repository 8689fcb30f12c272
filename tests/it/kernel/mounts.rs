use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use socinbd::{
    error::Kind,
    kernel::{
        busy, fdpass,
        loopdev::{self, LoopOptions},
        mount::{
            self, info,
            overlay::{Lower, Overlay, Upper},
        },
    },
};

use super::{eventually, image_of};

fn layer(folder: &Path, name: &str, files: &[(&str, &str)]) -> OwnedFd {
    let image = image_of(folder, name, files);
    let device = loopdev::attach(
        File::open(image).unwrap().as_fd(),
        &LoopOptions {
            name: "socinbd-test:layer".into(),
            ..LoopOptions::default()
        },
    )
    .unwrap();
    mount::ext4(device.path()).unwrap()
}

fn overlay(lowers: Vec<Lower>, by_mount_call: bool) -> Overlay {
    Overlay {
        lowers,
        upper: None,
        devices: false,
        source: "socinbd-test".into(),
        by_mount_call,
    }
}

/// A path below a mount that is attached nowhere.
fn below(mount: &OwnedFd, path: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{path}", mount.as_raw_fd()).into()
}

fn text(mount: &OwnedFd, path: &str) -> String {
    std::fs::read_to_string(below(mount, path)).unwrap()
}

#[test]
fn ext4_is_mounted_nowhere_and_read_only() {
    let folder = tempfile::tempdir().unwrap();
    let mount = layer(folder.path(), "a.ext4", &[("hello", "world")]);
    assert_eq!(text(&mount, "hello"), "world");
    let error = std::fs::write(below(&mount, "hello"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let device = rustix::fs::fstat(&mount).unwrap().st_dev;
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = info::own().unwrap();
    assert!(mounts.iter().all(|mount| mount.device != device));
}

#[test]
fn what_is_no_ext4_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::create_new(folder.path().join("zeros")).unwrap();
    file.set_len(1 << 20).unwrap();
    let device = loopdev::attach(file.as_fd(), &LoopOptions::default()).unwrap();
    let error = mount::ext4(device.path()).unwrap_err();
    assert_eq!(error.kind(), Kind::Kernel);
    let report = error.report();
    assert!(report.contains("Invalid argument"), "{report}");
    assert!(report.contains(&device.name()), "{report}");
}

fn two_layers(by_mount_call: bool) {
    let folder = tempfile::tempdir().unwrap();
    let top = layer(folder.path(), "top", &[("a", "top"), ("d/top", "1")]);
    let bottom = layer(
        folder.path(),
        "bottom",
        &[("a", "bottom"), ("b", "bottom"), ("d/bottom", "2")],
    );
    let root = overlay(vec![Lower::Mount(top), Lower::Mount(bottom)], by_mount_call)
        .mount()
        .unwrap();
    assert_eq!(text(&root, "a"), "top");
    assert_eq!(text(&root, "b"), "bottom");
    assert_eq!(text(&root, "d/top") + &text(&root, "d/bottom"), "12");
    let error = std::fs::write(below(&root, "a"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn two_layers_one_by_one() {
    two_layers(false);
}

#[test]
fn two_layers_by_mount_call() {
    two_layers(true);
}

fn many_layers(by_mount_call: bool) {
    let folder = tempfile::tempdir().unwrap();
    let lowers = (0..127)
        .map(|index| {
            let path = folder
                .path()
                .join(format!("a layer, with a long: name {index}"));
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join(format!("f{index}")), "").unwrap();
            std::fs::write(path.join("all"), index.to_string()).unwrap();
            Lower::Directory(path)
        })
        .collect();
    let root = overlay(lowers, by_mount_call).mount().unwrap();
    assert_eq!(std::fs::read_dir(below(&root, "")).unwrap().count(), 128);
    assert_eq!(text(&root, "all"), "0");
}

#[test]
fn layers_to_127_one_by_one() {
    many_layers(false);
}

#[test]
fn layers_to_127_by_mount_call() {
    many_layers(true);
}

fn writable(by_mount_call: bool, folder_name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join(folder_name);
    let upper = Upper {
        upper: place.join("upper"),
        work: place.join("work"),
    };
    std::fs::create_dir_all(&upper.upper).unwrap();
    std::fs::create_dir(&upper.work).unwrap();
    let root = Overlay {
        upper: Some(upper.clone()),
        ..overlay(
            vec![Lower::Mount(layer(folder.path(), "one", &[("a", "lower")]))],
            by_mount_call,
        )
    }
    .mount()
    .unwrap();
    std::fs::write(below(&root, "a"), "upper").unwrap();
    assert_eq!(text(&root, "a"), "upper");
    assert_eq!(
        std::fs::read_to_string(upper.upper.join("a")).unwrap(),
        "upper"
    );
}

#[test]
fn a_writable_layer() {
    writable(false, "plain");
}

#[test]
fn a_writable_layer_by_mount_call() {
    writable(true, "plain");
}

#[test]
fn a_writable_layer_at_an_awkward_path() {
    let name = format!("a,b:c\\{}/{}", "x".repeat(200), "y".repeat(200));
    writable(false, &name);
    writable(true, &name);
}

#[test]
fn one_layer_alone_is_refused() {
    let error = overlay(vec![Lower::Directory("/".into())], false)
        .mount()
        .unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
}

#[test]
fn a_missing_directory_is_named() {
    let error = overlay(
        vec![
            Lower::Directory("/".into()),
            Lower::Directory("/no such".into()),
        ],
        false,
    )
    .mount()
    .unwrap_err();
    assert!(error.report().contains("/no such"), "{}", error.report());
}

/// An overlay attached at a directory; unmounted when the test ends, however it ends.
struct Attached {
    _folder: tempfile::TempDir,
    point: PathBuf,
}

impl Attached {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let top = layer(folder.path(), "top", &[("file", "x")]);
        let point = folder.path().join("mount point");
        std::fs::create_dir(&point).unwrap();
        let root = overlay(
            vec![
                Lower::Mount(top),
                Lower::Directory(folder.path().join("top.tree")),
            ],
            false,
        )
        .mount()
        .unwrap();
        mount::attach(root.as_fd(), &point).unwrap();
        Self {
            _folder: folder,
            point,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = mount::detach_lazily(&self.point);
    }
}

#[test]
fn attached_and_detached() {
    let attached = Attached::new();
    let seen = info::at(&attached.point).unwrap().unwrap();
    assert_eq!(seen.fs_type, "overlay");
    assert_eq!(seen.source, "socinbd-test");
    assert!(
        seen.has_option("nodev") && seen.has_option("ro"),
        "{seen:?}"
    );
    assert!(mount::is_mount(&attached.point).unwrap());
    assert_eq!(
        std::fs::read_to_string(attached.point.join("file")).unwrap(),
        "x"
    );
    eventually(|| mount::detach(&attached.point).is_ok());
    assert!(!mount::is_mount(&attached.point).unwrap());
    assert_eq!(
        mount::detach(&attached.point).unwrap_err().kind(),
        Kind::NotFound
    );
}

#[test]
fn a_busy_mount_names_who_holds_it() {
    let attached = Attached::new();
    // stands in the mount, waits for the end of its input
    let mut child = Command::new("cat")
        .current_dir(&attached.point)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let file = File::open(attached.point.join("file")).unwrap();

    let error = mount::detach(&attached.point).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(
        error.report().contains(&format!("{} (cat)", child.id())),
        "{}",
        error.report()
    );
    let users = busy::users(&attached.point).unwrap();
    let user = |pid| users.iter().find(|user| user.pid == pid).unwrap();
    assert!(user(child.id()).uses.contains(&busy::Use::WorkingDirectory));
    assert!(user(std::process::id()).uses.contains(&busy::Use::OpenFile));

    drop(child.stdin.take());
    child.wait().unwrap();
    drop(file);
    eventually(|| mount::detach(&attached.point).is_ok());
}

#[test]
fn a_mount_travels_over_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let mount = layer(folder.path(), "a.ext4", &[("hello", "world")]);
    let (here, there) = UnixStream::pair().unwrap();
    fdpass::send(&here, mount.as_fd()).unwrap();
    drop(mount);
    let mount = fdpass::receive(&there).unwrap();
    assert_eq!(text(&mount, "hello"), "world");
    // what comes after it in the stream is untouched
    std::io::Write::write_all(&mut &here, b"rest").unwrap();
    drop(here);
    let mut rest = String::new();
    (&there).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "rest");
    assert_eq!(
        fdpass::receive(&there).unwrap_err().kind(),
        Kind::Unavailable
    );
}

#[test]
fn a_message_without_a_descriptor_is_refused() {
    let (here, there) = UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut &here, b"F").unwrap();
    assert_eq!(fdpass::receive(&there).unwrap_err().kind(), Kind::Corrupt);
}
