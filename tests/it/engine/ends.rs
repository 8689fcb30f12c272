//! How attachments and daemons end: by hand, by a signal, by a reboot, and under another name.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
};

use serde_json::json;
use socinbd::{api::client::Client, kernel::mount::info};

use super::{
    Host,
    lifecycle::{indexed, one_file_host, sitting_in},
};
use crate::support::{noise, succeeds, tars::Layer, unmount, wait};

/// Waits until the first attachment is unmounted: for a moment another test's mount namespace may have a copy of it.
fn wait_unmounted(host: &Host) {
    wait("it is unmounted", || host.list()[0]["state"] == "unmounted");
}

#[test]
fn after_an_unmount_by_hand_list_says_so() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
    unmount(&mountpoint);
    wait_unmounted(&host);
    let listed = host.list();
    assert_eq!(listed[0]["mountpoint"], mountpoint.to_str().unwrap());
    let table = host.run(&["list"]);
    assert!(
        table.contains("unmounted") && table.contains("detach"),
        "{table}"
    );
    assert!(
        host.run(&["why", mountpoint.to_str().unwrap()])
            .contains("unmounted")
    );
    // another one at its place goes first; both go
    host.attach(&layout.reference(""), &mountpoint, &[]);
    assert_eq!(host.list().len(), 2);
    host.detach(&mountpoint);
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_was_unmounted_and_is_in_use_names_its_user() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let user = sitting_in(&mountpoint);
    succeeds(Command::new("umount").arg("-l").arg(&mountpoint));
    wait_unmounted(&host);
    let listed = host.list();
    let why = listed[0]["why"].to_string();
    assert!(why.contains(&format!("{} (sleep)", user.id())), "{why}");
    drop(user);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_mount_point_below_a_renamed_folder_has_both_names() {
    let (host, layout, old) = one_file_host();
    for by_old_name in [false, true] {
        let parent = host.mountpoint("old");
        let mountpoint = host.mountpoint("old/mnt");
        host.attach(&layout.reference(""), &mountpoint, &[]);
        let renamed = parent.with_file_name("new");
        fs::rename(&parent, &renamed).unwrap();
        let present = renamed.join("mnt");
        let listed = host.list();
        assert_eq!(listed[0]["mountpoint"], present.to_str().unwrap());
        assert_eq!(listed[0]["attached_at"], mountpoint.to_str().unwrap());
        assert_eq!(listed[0]["state"], "lazy");
        for name in [&present, &mountpoint] {
            host.run(&["why", name.to_str().unwrap()]);
        }
        // also when its daemon has died
        if by_old_name {
            host.kill_daemon();
            assert_eq!(host.list()[0]["mountpoint"], present.to_str().unwrap());
        }
        host.detach(if by_old_name { &mountpoint } else { &present });
        assert_eq!(host.list(), [json!(null); 0]);
        assert_eq!(host.left_over(), [""; 0]);
        fs::remove_dir_all(renamed).unwrap();
    }
    // the old name is another one's now: it means that one
    let parent = host.mountpoint("old");
    let mountpoint = host.mountpoint("old/mnt");
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let present = parent.with_file_name("new").join("mnt");
    fs::rename(&parent, parent.with_file_name("new")).unwrap();
    host.mountpoint("old/mnt");
    let second = host.attach(&layout.reference(""), &mountpoint, &[]);
    host.detach(&mountpoint);
    let listed = host.list();
    assert_eq!(listed.len(), 1);
    assert_ne!(listed[0]["id"], second["id"]);
    assert!(present.join("hello").exists());
    host.detach(&present);
    assert_eq!(host.left_over(), [""; 0]);
    drop(old);
}

#[test]
fn what_is_mounted_over_an_image_stays() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let path = mountpoint.to_str().unwrap();
    succeeds(Command::new("mount").args(["-t", "tmpfs", "none", path]));
    let error = host.fail(&["detach", path], 6);
    assert!(error.contains("mounted over"), "{error}");
    let top = info::at(&mountpoint).unwrap().unwrap();
    assert_eq!(top.fs_type, "tmpfs");
    unmount(&mountpoint);
    // and so does what is bound elsewhere
    let copy = host.mountpoint("copy");
    succeeds(Command::new("mount").args(["--bind", path, copy.to_str().unwrap()]));
    let error = host.fail(&["detach", path], 6);
    assert!(error.contains(copy.to_str().unwrap()), "{error}");
    assert!(copy.join("hello").exists());
    unmount(&copy);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_was_written_is_removed_after_a_reboot() {
    let (host, layout, mountpoint) = one_file_host();
    let attachments = host.root().join("attachments");
    for _ in 0..2 {
        host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
        fs::write(mountpoint.join("written"), noise(100_000)).unwrap();
        // daemons, mounts and the runtime directory do not outlive one
        host.kill_daemon();
        host.unmount_dead(&mountpoint);
        fs::remove_dir_all(host.run_dir()).unwrap();
        assert_eq!(fs::read_dir(&attachments).unwrap().count(), 1);
    }
    let attached = host.attach(&layout.reference(""), &mountpoint, &[]);
    let left: Vec<_> = fs::read_dir(&attachments).unwrap().collect();
    assert_eq!(left.len(), 1);
    let left = left[0].as_ref().unwrap().file_name();
    assert_eq!(left, attached["id"].as_str().unwrap());
    assert_eq!(host.list().len(), 1);
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}

/// A daemon finds out by the number of a file system whether a dead attachment is in use.
#[test]
fn a_file_system_with_the_number_of_an_attachment_that_is_gone_does_not_count_as_it() {
    let (host, layout, mountpoint) = one_file_host();
    let attachments = host.root().join("attachments");
    let place = host.mountpoint("place");
    let mut in_use = Vec::new();
    // a mount of another test may get the number first
    let is_reused = (0..100).any(|_| {
        host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
        let number = fs::metadata(&mountpoint).unwrap().dev();
        host.kill_daemon();
        host.unmount_dead(&mountpoint);
        // the kernel gives the lowest number that is free
        for _ in 0..20 {
            succeeds(
                Command::new("mount")
                    .args(["-t", "tmpfs", "none"])
                    .arg(&place),
            );
            in_use.push(File::create(place.join("open")).unwrap());
            if fs::metadata(&place).unwrap().dev() >= number {
                break;
            }
        }
        fs::metadata(&place).unwrap().dev() == number
    });
    assert!(is_reused, "no file system had the number of the attachment");
    let other = host.mountpoint("other");
    let attached = host.attach(&layout.reference(""), &other, &[]);
    let left = fs::read_dir(&attachments).unwrap().map(|it| it.unwrap());
    let left: Vec<_> = left.map(|it| it.file_name()).collect();
    assert_eq!(left, [attached["id"].as_str().unwrap()]);
    assert_eq!(host.list().len(), 1);
    host.detach(&other);
    drop(in_use);
    while info::at(&place).unwrap().is_some() {
        unmount(&place);
    }
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_was_written_stays_while_it_is_in_use() {
    let (host, layout, mountpoint) = one_file_host();
    let other = host.mountpoint("other");
    let attached = host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
    fs::write(mountpoint.join("written"), b"written").unwrap();
    let upper = host.root().join("attachments");
    let upper = upper.join(attached["id"].as_str().unwrap()).join("upper");
    host.kill_daemon();
    fs::remove_dir_all(host.run_dir()).unwrap();
    // mounted; then mounted nowhere, with a file open
    let written = File::open(mountpoint.join("written")).unwrap();
    for is_mounted in [true, false] {
        if !is_mounted {
            succeeds(Command::new("umount").arg("-l").arg(&mountpoint));
        }
        host.attach(&layout.reference(""), &other, &[]);
        assert!(upper.join("written").exists(), "{is_mounted}");
        let states: Vec<_> = host.list().iter().map(|it| it["state"].clone()).collect();
        assert!(states.contains(&json!("dead")), "{states:?}");
        host.detach(&other);
        host.end_daemon();
    }
    host.attach(&layout.reference(""), &other, &[]);
    let error = host.fail(&["detach", mountpoint.to_str().unwrap()], 6);
    assert!(error.contains("in use"), "{error}");
    let mut read = [0; 7];
    written.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"written");
    drop(written);
    host.detach(&mountpoint);
    assert!(!upper.exists());
    host.detach(&other);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn what_was_written_stays_while_it_is_mounted_whatever_its_record_says() {
    let (host, layout, mountpoint) = one_file_host();
    let attached = host.attach(&layout.reference(""), &mountpoint, &["--rw"]);
    fs::write(mountpoint.join("written"), b"written").unwrap();
    let folder = host.root().join("attachments");
    let folder = folder.join(attached["id"].as_str().unwrap());
    host.kill_daemon();
    fs::write(folder.join("record.json"), b"{").unwrap();
    let other = host.mountpoint("other");
    host.attach(&layout.reference(""), &other, &[]);
    assert!(folder.join("upper/written").exists());
    assert_eq!(fs::read(mountpoint.join("written")).unwrap(), b"written");
    // when it is not mounted any more, nobody can come to it
    unmount(&mountpoint);
    host.detach(&other);
    host.end_daemon();
    host.attach(&layout.reference(""), &other, &[]);
    assert!(!folder.exists());
    host.detach(&other);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_daemon_that_is_ending_attaches_nothing_and_its_successor_does() {
    let host = Host::new();
    let content = noise(1_000_000);
    let layout = indexed(&host, vec![Layer::new().file("f", &content)]);
    let (busy, mountpoint) = (host.mountpoint("busy"), host.mountpoint("mnt"));
    host.attach(&layout.reference(""), &busy, &[]);
    // it is looked at for a while before its daemon leaves it
    let user = sitting_in(&busy);
    succeeds(Command::new("umount").arg("-l").arg(&busy));
    let first = host.daemon().unwrap();
    succeeds(Command::new("kill").args(["-TERM", &first.to_string()]));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Client::new(&host.run_dir());
    let info = || runtime.block_on(client.daemon()).unwrap();
    wait("the daemon is shutting down", || {
        info().is_some_and(|it| it.is_ending)
    });
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let second = info().unwrap();
    assert_ne!(second.pid, first);
    assert!(!second.is_ending);
    assert!(fs::read(mountpoint.join("f")).unwrap() == content);
    drop(user);
    host.detach(&mountpoint);
    host.detach(&busy);
    assert_eq!(host.left_over(), [""; 0]);
}

#[test]
fn a_daemon_that_is_ended_gives_back_what_has_no_mount_point() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Client::new(&host.run_dir());
    let request = super::interrupted::request(&layout.reference(""), None);
    let offer = runtime.block_on(client.attach(&request, &|_| {})).unwrap();
    assert_eq!(host.list().len(), 2);
    host.end_daemon();
    assert_eq!(host.list(), [json!(null); 0]);
    assert_eq!(host.left_over(), [""; 0]);
    drop(offer);
}

#[test]
fn a_daemon_whose_sockets_were_removed_is_found_again() {
    let (host, layout, mountpoint) = one_file_host();
    for removed in [
        &["socinbd.sock"][..],
        &["mounts.sock"],
        &["socinbd.sock", "mounts.sock"],
    ] {
        host.attach(&layout.reference(""), &mountpoint, &[]);
        let daemon = host.daemon();
        for name in removed {
            fs::remove_file(host.run_dir().join(name)).unwrap();
        }
        wait("its sockets are there", || {
            ["socinbd.sock", "mounts.sock"]
                .iter()
                .all(|name| host.run_dir().join(name).exists())
        });
        assert_eq!(host.list()[0]["state"], "lazy");
        assert_eq!(host.daemon(), daemon);
        host.detach(&mountpoint);
    }
    assert_eq!(host.left_over(), [""; 0]);
}
