//! The kernel's device mapper, in the VM.

use std::{fs::File, os::fd::AsFd, path::Path};

use socinbd::kernel::{
    blockdev,
    dm::{self, MappedDevice},
    loopdev::{self, LoopDevice, LoopOptions},
    mount,
};

use super::{eventually, image_of};
use crate::support::vm::in_vm_together;

fn loop_on(image: &Path) -> (LoopDevice, u64) {
    let file = File::open(image).unwrap();
    let size = file.metadata().unwrap().len();
    let device = loopdev::attach(file.as_fd(), &LoopOptions::default()).unwrap();
    (device, size)
}

fn is_mapped(name: &str) -> bool {
    let mapped = dm::mapped().unwrap();
    mapped.iter().any(|device| device.mapped_name == name)
}

/// All tests of this file.
const ALL: [&str; 2] = [
    "reads_move_to_another_device_under_a_mount",
    "what_cannot_be_made_leaves_nothing",
];

#[test]
fn reads_move_to_another_device_under_a_mount() {
    in_vm_together(&ALL, || {
        assert!(dm::is_available());
        let folder = tempfile::tempdir().unwrap();
        let content = "content ".repeat(10_000);
        let image = image_of(folder.path(), "a.ext4", &[("file", &content)]);
        let copy = folder.path().join("copy");
        std::fs::copy(&image, &copy).unwrap();
        let (first, size) = loop_on(&image);
        let mapped = MappedDevice::new("socinbd-test-move", &first.name(), size).unwrap();
        assert!(is_mapped("socinbd-test-move"));
        assert_eq!(blockdev::size(&mapped.name()).unwrap(), size);
        // unmounted it stays as long as its owner has it
        let path = mapped.node().path().to_owned();
        drop(mount::ext4(&path).unwrap());
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&image).unwrap());

        let mounted = mount::ext4(&path).unwrap();
        assert!(blockdev::is_in_use(&path));
        let file = || {
            use std::os::fd::AsRawFd;
            std::fs::read_to_string(format!("/proc/self/fd/{}/file", mounted.as_raw_fd()))
        };
        let (second, _) = loop_on(&copy);
        mapped.move_to(&second.name(), size).unwrap();
        let number = first.index();
        drop(first);
        assert_eq!(loopdev::backing(number), None, "nothing has it any more");
        std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_eq!(file().unwrap(), content);

        // its owner may go: it stays until it is unmounted, and so does what it stands on
        drop(mapped);
        drop(second);
        std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_eq!(file().unwrap(), content);
        assert!(is_mapped("socinbd-test-move"));
        drop(mounted);
        eventually(|| !is_mapped("socinbd-test-move"));
        eventually(|| loopdev::attached().unwrap().is_empty());
    });
}

#[test]
fn what_cannot_be_made_leaves_nothing() {
    in_vm_together(&ALL, || {
        let folder = tempfile::tempdir().unwrap();
        let image = image_of(folder.path(), "a.ext4", &[("file", "")]);
        let (device, size) = loop_on(&image);
        // longer than what is below
        MappedDevice::new("socinbd-test-long", &device.name(), size + 4096).unwrap_err();
        MappedDevice::new("socinbd-test-none", "loop999", size).unwrap_err();
        MappedDevice::new(&"n".repeat(128), &device.name(), size).unwrap_err();
        MappedDevice::new("with\0nul", &device.name(), size).unwrap_err();
        assert_eq!(dm::mapped().unwrap(), []);

        let mapped = MappedDevice::new("socinbd-test", &device.name(), size).unwrap();
        let taken = MappedDevice::new("socinbd-test", &device.name(), size).unwrap_err();
        assert!(taken.report().contains("making the device socinbd-test"));
        assert!(is_mapped("socinbd-test"), "the first is as it was");
        // a table that cannot be is refused, and the old one stays
        mapped.move_to("loop999", size).unwrap_err();
        mapped.move_to(&device.name(), size + 4096).unwrap_err();
        assert_eq!(
            std::fs::read(mapped.node().path()).unwrap().len() as u64,
            size
        );
        drop(mapped);
        assert_eq!(dm::mapped().unwrap(), []);
        dm::remove("socinbd-test").unwrap();
    });
}
