//! POSIX ACLs: from the form in which setxattr(2) takes them, and tar files hold them, to the one that ext4 stores
//! (`include/uapi/linux/posix_acl_xattr.h`, `fs/ext4/acl.h`, and `fs/posix_acl.c` for what is valid).

const XATTR_VERSION: u32 = 2;
const DISK_VERSION: u32 = 1;
const XATTR_ENTRY_BYTES: usize = 8;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// No user or group has it.
const NO_ID: u32 = u32::MAX;

struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// Not an ACL: setxattr(2) would refuse it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Invalid;

/// What ext4 stores for an access ACL of a file with this mode; `None` where it says no more than the mode.
///
/// An unpack sets the mode after the xattrs, and with it the entries that stand for the owner, the mask (or the group), and others.
pub(super) fn access(value: &[u8], mode: u16) -> Result<Option<Vec<u8>>, Invalid> {
    let mut entries = parse(value)?;
    let has_mask = entries.iter().any(|entry| entry.tag == MASK);
    for entry in &mut entries {
        match entry.tag {
            USER_OBJ => entry.permissions = mode >> 6 & 7,
            MASK => entry.permissions = mode >> 3 & 7,
            GROUP_OBJ if !has_mask => entry.permissions = mode >> 3 & 7,
            OTHER => entry.permissions = mode & 7,
            _ => {}
        }
    }
    let says_more = entries
        .iter()
        .any(|entry| matches!(entry.tag, USER | GROUP | MASK));
    Ok(says_more.then(|| store(&entries)))
}

/// What ext4 stores for a directory's default ACL; `None` for one without entries.
pub(super) fn default(value: &[u8]) -> Result<Option<Vec<u8>>, Invalid> {
    let entries = parse(value)?;
    Ok((!entries.is_empty()).then(|| store(&entries)))
}

fn parse(value: &[u8]) -> Result<Vec<AclEntry>, Invalid> {
    let (version, rest) = value.split_first_chunk::<4>().ok_or(Invalid)?;
    let (entries, left) = rest.as_chunks::<XATTR_ENTRY_BYTES>();
    if u32::from_le_bytes(*version) != XATTR_VERSION || !left.is_empty() {
        return Err(Invalid);
    }
    let entries: Vec<AclEntry> = entries
        .iter()
        .map(|&[t0, t1, p0, p1, i0, i1, i2, i3]| AclEntry {
            tag: u16::from_le_bytes([t0, t1]),
            permissions: u16::from_le_bytes([p0, p1]),
            id: u32::from_le_bytes([i0, i1, i2, i3]),
        })
        .collect();
    if !entries.is_empty() {
        check(&entries)?;
    }
    Ok(entries)
}

/// The order and number of entries that the kernel asks for: owner, users, group, groups, mask (needed if there are users or groups),
/// others.
fn check(entries: &[AclEntry]) -> Result<(), Invalid> {
    let mut expected = USER_OBJ;
    let mut needs_mask = false;
    for entry in entries {
        if entry.permissions > 7 {
            return Err(Invalid);
        }
        expected = match (entry.tag, expected) {
            (USER_OBJ, USER_OBJ) => USER,
            (USER, USER) | (GROUP, GROUP) if entry.id != NO_ID => {
                needs_mask = true;
                expected
            }
            (GROUP_OBJ, USER) => GROUP,
            (MASK, GROUP) => OTHER,
            (OTHER, OTHER) => 0,
            (OTHER, GROUP) if !needs_mask => 0,
            _ => return Err(Invalid),
        };
    }
    if expected == 0 { Ok(()) } else { Err(Invalid) }
}

fn store(entries: &[AclEntry]) -> Vec<u8> {
    let mut out = DISK_VERSION.to_le_bytes().to_vec();
    for entry in entries {
        out.extend_from_slice(&entry.tag.to_le_bytes());
        out.extend_from_slice(&entry.permissions.to_le_bytes());
        if matches!(entry.tag, USER | GROUP) {
            out.extend_from_slice(&entry.id.to_le_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut out = XATTR_VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&permissions.to_le_bytes());
            out.extend_from_slice(&id.to_le_bytes());
        }
        out
    }

    const MINIMAL: [(u16, u16, u32); 3] = [
        (USER_OBJ, 7, NO_ID),
        (GROUP_OBJ, 5, NO_ID),
        (OTHER, 5, NO_ID),
    ];

    #[test]
    fn an_acl_is_stored_in_the_short_form_with_the_modes_bits() {
        let acl = value(&[
            (USER_OBJ, 7, NO_ID),
            (USER, 6, 70_000),
            (GROUP_OBJ, 5, NO_ID),
            (MASK, 7, NO_ID),
            (OTHER, 7, NO_ID),
        ]);
        let expected = [
            &[1, 0, 0, 0][..],
            &[1, 0, 6, 0],
            &[2, 0, 6, 0, 0x70, 0x11, 1, 0],
            &[4, 0, 5, 0],
            &[0x10, 0, 4, 0],
            &[0x20, 0, 0, 0],
        ]
        .concat();
        assert_eq!(access(&acl, 0o640), Ok(Some(expected)));
    }

    #[test]
    fn an_acl_that_says_no_more_than_the_mode_is_not_stored() {
        assert_eq!(access(&value(&MINIMAL), 0o755), Ok(None));
        assert_eq!(access(&value(&[]), 0o755), Ok(None));
        assert_eq!(default(&value(&[])), Ok(None));
        assert!(default(&value(&MINIMAL)).unwrap().is_some());
    }

    #[test]
    fn what_the_kernel_refuses_is_refused() {
        let [owner, group, other] = MINIMAL;
        let user = (USER, 7, 1);
        let mask = (MASK, 7, NO_ID);
        for bad in [
            vec![owner],
            vec![owner, other],
            vec![group, owner, other],
            vec![owner, user, group, other],
            vec![owner, group, mask, mask, other],
            vec![owner, (USER, 7, NO_ID), group, mask, other],
            vec![(USER_OBJ, 8, NO_ID), group, other],
            vec![owner, group, other, other],
            vec![owner, group, (0x40, 0, 0), other],
        ] {
            assert_eq!(default(&value(&bad)), Err(Invalid), "{bad:?}");
        }
        assert_eq!(access(&value(&MINIMAL)[..27], 0), Err(Invalid));
        assert_eq!(access(&[3, 0, 0, 0], 0), Err(Invalid));
        assert_eq!(access(b"", 0), Err(Invalid));
    }
}
