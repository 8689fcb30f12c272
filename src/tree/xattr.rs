//! Which of a tar entry's PAX records become xattrs.

use std::collections::BTreeMap;

use super::{Error, shown};
use crate::tar::{Entry, EntryKind};

/// The key under which GNU tar, Go and Docker write xattrs. `LIBARCHIVE.xattr.*` is not read, as containerd does not.
const PAX_PREFIX: &[u8] = b"SCHILY.xattr.";
/// Marks a directory that hides what lower layers have there.
pub(super) const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// What overlayfs would take for its own: an image must not say it.
const OVERLAY_PREFIXES: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The xattrs of an entry by their full names, with values as they stand in the tar, empty ones too.
pub(super) fn of(entry: &Entry) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
    let mut xattrs = BTreeMap::new();
    for (key, value) in &entry.pax {
        let Some(name) = key.strip_prefix(PAX_PREFIX) else {
            continue;
        };
        if !settable(name, entry.kind) {
            continue;
        }
        if name.contains(&0) {
            return Err(Error::ZeroByte {
                path: shown(&entry.name),
            });
        }
        xattrs.insert(name.to_vec(), value.clone());
    }
    Ok(xattrs)
}

/// Whether an unpack on Linux would set it. Where the kernel answers EOPNOTSUPP containerd goes on without it: other namespaces
/// (`com.apple.*` is common), ACLs of symlinks. `user.*` is for files and directories only; elsewhere it could be listed but not read.
fn settable(name: &[u8], kind: EntryKind) -> bool {
    if OVERLAY_PREFIXES.iter().any(|own| name.starts_with(own)) {
        return false;
    }
    let has_user = matches!(kind, EntryKind::Regular | EntryKind::Directory);
    match name {
        b"system.posix_acl_access" | b"system.posix_acl_default" => kind != EntryKind::Symlink,
        [b'u', b's', b'e', b'r', b'.', rest @ ..] => has_user && !rest.is_empty(),
        _ => [&b"trusted."[..], b"security."]
            .iter()
            .any(|space| name.len() > space.len() && name.starts_with(space)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_that_a_kind_of_file_has_are_kept() {
        use EntryKind::{Directory, Fifo, Regular, Symlink};
        for (name, kind, kept) in [
            ("user.a", Regular, true),
            ("user.a", Directory, true),
            ("user.a", Symlink, false),
            ("user.a", Fifo, false),
            ("user.", Regular, false),
            ("trusted.a", Symlink, true),
            ("security.capability", Regular, true),
            ("system.posix_acl_access", Fifo, true),
            ("system.posix_acl_access", Symlink, false),
            ("system.other", Regular, false),
            ("com.apple.quarantine", Regular, false),
            ("trusted.overlay.opaque", Directory, false),
            ("user.overlay.redirect", Directory, false),
            ("trusted.overlays", Directory, true),
            ("", Regular, false),
        ] {
            assert_eq!(settable(name.as_bytes(), kind), kept, "{name} {kind:?}");
        }
    }
}
