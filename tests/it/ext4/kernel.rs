//! Disks mounted by the kernel.

use super::fixture::Layer;

#[test]
fn an_empty_layer_is_an_empty_file_system() {
    let disk = Layer::default().disk();
    disk.check();
    let mount = disk.mount();
    assert_eq!(std::fs::read_dir(mount.path()).unwrap().count(), 0);
}

#[test]
fn a_layer_of_one_file_has_that_file() {
    let mut layer = Layer::default();
    layer.file("hello", "world\n");
    let disk = layer.disk();
    disk.check();
    let mount = disk.mount();
    let text = std::fs::read_to_string(mount.path().join("hello")).unwrap();
    assert_eq!(text, "world\n");
}
