use std::{fs::File, os::fd::AsFd};

use socinbd::{
    error::Kind,
    kernel::{
        blockdev,
        loopdev::{self, LoopOptions},
        mount,
    },
};

use super::{eventually, image_of};

fn named(name: &str) -> LoopOptions {
    LoopOptions {
        name: name.into(),
        ..LoopOptions::default()
    }
}

#[test]
fn a_dropped_device_is_free_again() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_of(folder.path(), "a.ext4", &[("hello", "world")]);
    let file = File::open(&image).unwrap();
    let device = loopdev::attach(file.as_fd(), &named("socinbd-test:dropped")).unwrap();
    assert_eq!(
        blockdev::size(&device.name()).unwrap(),
        file.metadata().unwrap().len()
    );
    let seen = loopdev::attached()
        .unwrap()
        .into_iter()
        .find(|seen| seen.index == device.index())
        .unwrap();
    assert_eq!(seen.name, "socinbd-test:dropped");
    assert_eq!(seen.backing, image);
    assert_eq!(
        std::fs::read(device.path()).unwrap(),
        std::fs::read(&image).unwrap()
    );
    // root may open it for writing all the same
    let mut writer = std::fs::OpenOptions::new()
        .write(true)
        .open(device.path())
        .unwrap();
    let error = std::io::Write::write(&mut writer, b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    drop(writer);

    drop(device);
    assert_not_attached("socinbd-test:dropped");
}

/// The processes that other tests start hold copies of our descriptors for the moment before their exec.
fn assert_not_attached(name: &str) {
    eventually(|| {
        let attached = loopdev::attached().unwrap();
        attached.iter().all(|device| device.name != name)
    });
}

#[test]
fn a_mounted_device_goes_with_its_mount() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_of(folder.path(), "a.ext4", &[("hello", "world")]);
    let device = loopdev::attach(
        File::open(&image).unwrap().as_fd(),
        &named("socinbd-test:mounted"),
    )
    .unwrap();
    let mount = mount::ext4(device.path()).unwrap();
    let index = device.index();
    drop(device);
    assert_eq!(loopdev::backing(index), Some(image));
    drop(mount);
    assert_not_attached("socinbd-test:mounted");
}

#[test]
fn a_device_without_autoclear_stays_until_it_is_detached() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_of(folder.path(), "a.ext4", &[]);
    let options = LoopOptions {
        autoclear: false,
        ..named("socinbd-test:kept")
    };
    let index = loopdev::attach(File::open(&image).unwrap().as_fd(), &options)
        .unwrap()
        .keep();
    assert_eq!(loopdev::name(index).unwrap(), "socinbd-test:kept");
    // the number may be that of another device by now
    loopdev::detach(index, "socinbd-test:other").unwrap();
    assert_eq!(loopdev::name(index).unwrap(), "socinbd-test:kept");
    loopdev::detach(index, "socinbd-test:kept").unwrap();
    assert_not_attached("socinbd-test:kept");
    // one that is free already is no error
    loopdev::detach(index, "socinbd-test:kept").unwrap();
}

#[test]
fn many_at_once_get_a_device_each() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_of(folder.path(), "a.ext4", &[]);
    let file = File::open(&image).unwrap();
    let devices: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| loopdev::attach(file.as_fd(), &named("socinbd-test:many"))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap().unwrap())
            .collect()
    });
    let mut indices: Vec<_> = devices.iter().map(loopdev::LoopDevice::index).collect();
    indices.sort_unstable();
    indices.dedup();
    assert_eq!(indices.len(), 20);
    drop(devices);
    assert_not_attached("socinbd-test:many");
}

#[test]
fn read_ahead_is_set_after_the_request_size() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_of(folder.path(), "a.ext4", &[]);
    let device = loopdev::attach(
        File::open(&image).unwrap().as_fd(),
        &named("socinbd-test:readahead"),
    )
    .unwrap();
    blockdev::set_read_ahead(&device.name(), Some(256), 4).unwrap();
    assert_eq!(blockdev::read_ahead(&device.name()).unwrap(), 4);
}

#[test]
fn a_name_that_does_not_fit_is_refused() {
    let error = loopdev::attach(
        File::open("/dev/null").unwrap().as_fd(),
        &named(&"x".repeat(64)),
    )
    .unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
}
