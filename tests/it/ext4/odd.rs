//! One layer with every odd kind of file.

use socinbd::tar::{EntryKind, Timestamp};

use super::fixture::{Layer, xattr};

/// USER_OBJ rw-, USER 70000 rwx, GROUP_OBJ r--, GROUP 7 --x, MASK rwx, OTHER r--: as setxattr(2) takes it.
pub const ACL: [u8; 52] = *b"\x02\0\0\0\
    \x01\0\x06\0\xff\xff\xff\xff\
    \x02\0\x07\0\x70\x11\x01\0\
    \x04\0\x04\0\xff\xff\xff\xff\
    \x08\0\x01\0\x07\0\0\0\
    \x10\0\x07\0\xff\xff\xff\xff\
    \x20\0\x04\0\xff\xff\xff\xff";

/// `cap_net_raw+ep` (version 2).
const CAPABILITY: [u8; 20] = *b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The layer; every entry is one that an unpack can make in this order.
pub fn layer() -> Layer {
    let mut layer = Layer::default();
    let root = layer.dir("./");
    (root.mode, root.uid) = (0o1711, 5);
    files(&mut layer);
    times(&mut layer);
    links(&mut layer);
    devices(&mut layer);
    xattrs(&mut layer);
    names(&mut layer);
    replaced(&mut layer);
    layer.file("no/entry/names/these", "x");
    layer.add(EntryKind::Regular, "white/.wh.out");
    layer.dir("opaque");
    layer.add(EntryKind::Regular, "opaque/.wh..wh..opq");
    layer
}

fn files(layer: &mut Layer) {
    layer.dir("files");
    for size in [0, 1, 511, 4095, 4096, 4097, 100_000] {
        let content: Vec<u8> = (0..size).map(|n| (n / 7) as u8).collect();
        layer.file(format!("files/{size}"), content);
    }
    layer.file("files/setuid", "#!").mode = 0o6755;
    layer.file("files/none", "secret").mode = 0o100_000;
    layer.dir("files/sticky").mode = 0o1777;
    let big = layer.file("files/ids", "x");
    (big.uid, big.gid) = (4_000_000_000, 65_536);
    layer.sparse("files/holes", 10_000_000, &[]);
    layer.sparse(
        "files/sparse",
        3_000_001,
        &[
            (0, b"first"),
            (8190, b"over a block's end"),
            (3_000_000, b"!"),
        ],
    );
    let pieces: Vec<(u64, &[u8])> = (0..1500).map(|n| (n * 8192 + n, &b"piece"[..])).collect();
    layer.sparse("files/many pieces", 13_000_000, &pieces);
}

fn times(layer: &mut Layer) {
    layer.dir("times");
    for (name, seconds, nanoseconds) in [
        ("before all", -3_000_000_000, 5),
        ("1901", -0x8000_0000, 0),
        ("1901 and more", -0x8000_0000 + 1, 999_999_999),
        ("1960", -315_619_200, 1),
        ("just before 1970", -1, 999_999_999),
        ("1970", 0, 0),
        ("2038", 0x7fff_ffff, 3),
        ("after 2038", 0x8000_0000, 4),
        ("2106", 0x1_0000_0007, 5),
        ("2446", 15_032_385_534, 6),
        ("after all", 15_032_385_536, 7),
    ] {
        layer.file(format!("times/{name}"), "").mtime = Some(Timestamp {
            seconds,
            nanoseconds,
        });
    }
}

fn links(layer: &mut Layer) {
    layer.dir("links");
    for length in [1, 59, 60, 61, 4000, 4095] {
        layer.symlink(format!("links/{length}"), &"target/".repeat(600)[..length]);
    }
    layer.symlink("links/bytes", b"\xff\xfe/\x80");
    layer.hardlink("links/to a file", "files/4097");
    layer.hardlink("links/to a symlink", "links/60");
    layer.add(EntryKind::Fifo, "links/fifo");
    layer.hardlink("links/to a fifo", "./links//fifo");
}

fn devices(layer: &mut Layer) {
    layer.dir("dev");
    for (major, minor) in [(1, 3), (8, 255), (8, 256), (259, 7), (4095, 1_048_575)] {
        layer.device(
            EntryKind::Char,
            &format!("dev/c{major}-{minor}"),
            major,
            minor,
        );
        layer.device(
            EntryKind::Block,
            &format!("dev/b{major}-{minor}"),
            major,
            minor,
        );
    }
}

fn xattrs(layer: &mut Layer) {
    layer.dir("xattrs");
    xattr(layer.file("xattrs/inside", "x"), "user.a", "b");
    xattr(layer.file("xattrs/empty value", "x"), "user.empty", "");
    let capability = layer.file("xattrs/capability", "x");
    xattr(capability, "security.capability", CAPABILITY);
    for n in 0..3 {
        let name = format!("xattrs/same block {n}");
        xattr(layer.file(name, "x"), "user.block", [7; 1000]);
    }
    let many = layer.file("xattrs/many", "x");
    for n in 0..40 {
        xattr(many, &format!("user.{n}"), n.to_string());
    }
    xattr(many, "trusted.t", b"\0\xff\0");
    xattr(many, "user.long", [b'v'; 2000]);
    xattr(layer.symlink("xattrs/symlink", "x"), "trusted.s", "x");
    xattr(
        layer.device(EntryKind::Char, "xattrs/device", 1, 3),
        "trusted.s",
        [b'x'; 500],
    );
    let acl = layer.file("xattrs/acl", "x");
    acl.mode = 0o674;
    xattr(acl, "system.posix_acl_access", ACL);
    // an unpack sets the mode last: the mask follows it
    let acl = layer.file("xattrs/acl with another mode", "x");
    acl.mode = 0o600;
    xattr(acl, "system.posix_acl_access", ACL);
    let minimal = layer.file("xattrs/acl like a mode", "x");
    xattr(
        minimal,
        "system.posix_acl_access",
        b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff",
    );
    let dir = layer.dir("xattrs/default acl");
    xattr(dir, "system.posix_acl_default", ACL);
    xattr(dir, "system.posix_acl_access", ACL);
    dir.mode = 0o771;
}

fn names(layer: &mut Layer) {
    layer.dir("names");
    layer.file(format!("names/{}", "n".repeat(255)), "");
    layer.file(b"names/\xff\xfe \n\t\\\"", "");
    layer.file("names/...", "");
    layer.file("names/.wh", "");
    layer.dir("names/hashed");
    for n in 0..2000 {
        layer.file(format!("names/hashed/{n}"), "");
        let bytes = [&b"names/hashed/\x80\xe9"[..], n.to_string().as_bytes()].concat();
        layer.file(bytes, "");
    }
    let deep = "d/".repeat(200);
    layer.file(format!("{deep}file"), "deep");
}

fn replaced(layer: &mut Layer) {
    layer.dir("replaced");
    layer.file("replaced/file", "old");
    layer.file("replaced/file", "new content");
    layer.file("replaced/to dir", "old");
    layer.dir("replaced/to dir");
    layer.file("replaced/to dir/below", "x");
    layer.dir("replaced/to file");
    layer.file("replaced/to file/below", "gone");
    layer.file("replaced/to file", "x");
    xattr(layer.dir("replaced/dir"), "user.old", "x");
    layer.file("replaced/dir/stays", "x");
    layer.dir("replaced/dir/").mode = 0o700;
}
