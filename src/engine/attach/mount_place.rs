//! Finds the mount points of attachments in the kernel's mount tables, and unmounts them.

use std::path::{Path, PathBuf};

use super::{names::mount_source, types::Attachment};
use crate::{
    error::{Error, Kind, Result},
    kernel::{
        self, busy,
        mount::info::{self, Mount},
    },
};

/// The path where an attachment is mounted: its mount point, or the new path after a directory above was renamed. A bind mount of it
/// elsewhere appears later in the table, so it counts only after the first mount is gone.
pub fn place_of(mounts: &[Mount], attachment: &Attachment) -> Option<PathBuf> {
    let source = mount_source(&attachment.id);
    let is_it = |mount: &&Mount| mount.source == source.as_str();
    let is_there = |mount: &&Mount| Some(&mount.mount_point) == attachment.mountpoint.as_ref();
    let at_its_place = mounts.iter().filter(is_it).find(is_there);
    at_its_place
        .or_else(|| mounts.iter().find(is_it))
        .map(|mount| mount.mount_point.clone())
}

/// Unmounts these attachments in this mount namespace. `Busy` names the processes that use one, or the path of a mount that hides one. An
/// attachment that is not mounted is skipped.
pub fn unmount(attachments: &[Attachment]) -> Result<()> {
    let mut left: Vec<&Attachment> = attachments.iter().collect();
    while !left.is_empty() {
        let mounts = info::own()?;
        left.retain(|attachment| place_of(&mounts, attachment).is_some());
        let on_top = left.iter().position(|attachment| {
            let place = place_of(&mounts, attachment);
            place.is_some_and(|place| is_on_top(&mounts, &place, attachment))
        });
        let Some(on_top) = on_top else {
            return match left.first().and_then(|it| place_of(&mounts, it)) {
                Some(place) => Err(hidden(&place)),
                None => Ok(()),
            };
        };
        let attachment = left.remove(on_top);
        if let Some(place) = place_of(&mounts, attachment) {
            kernel::mount::detach(&place)?;
        }
    }
    Ok(())
}

/// Whether the topmost mount at this path is this attachment.
fn is_on_top(mounts: &[Mount], place: &Path, attachment: &Attachment) -> bool {
    info::topmost(mounts, place)
        .is_some_and(|mount| mount.source == mount_source(&attachment.id).as_str())
}

fn hidden(place: &Path) -> Error {
    Error::new(
        Kind::Busy,
        format!(
            "another file system is mounted over the image at {}; unmount that file system first",
            place.display()
        ),
    )
}

/// The processes that use the file system of an attachment, which had this device number when it was mounted. None if the kernel has given
/// the number to another file system: then that of the attachment is gone. The other one may be unmounted between the looks at the
/// processes and at the mounts, so both are looked at twice.
pub(super) fn users(id: &str, device: (u32, u32)) -> Vec<busy::User> {
    let mut users = users_now(id, device);
    if !users.is_empty() {
        let still = users_now(id, device);
        users.retain(|user| still.iter().any(|it| it.pid == user.pid));
    }
    users
}

fn users_now(id: &str, device: (u32, u32)) -> Vec<busy::User> {
    let users = busy::users_of_device(device).unwrap_or_default();
    let source = mount_source(id);
    let is_other = |mount: &Mount| mount.device == device && mount.source != source.as_str();
    let is_gone = || info::everywhere().is_ok_and(|mounts| mounts.iter().any(is_other));
    match users.is_empty() || is_gone() {
        true => Vec::new(),
        false => users,
    }
}

/// Describes the users of an attachment's mount: another mount of it in this mount namespace, or the processes that use its file system.
pub(super) fn who_uses(id: &str, device: Option<(u32, u32)>) -> String {
    let source = mount_source(id);
    let mut own = info::own().unwrap_or_default().into_iter();
    let copy = own.find(|mount| mount.source == source.as_str());
    let by = |mount: Mount| format!("by its mount at {}", mount.mount_point.display());
    if let Some(copy) = copy {
        return by(copy);
    }
    let users = device.map_or_else(Vec::new, |device| users(id, device));
    if !users.is_empty() {
        return format!("by {}", busy::names(&users));
    }
    match info::find_anywhere(&source) {
        Ok(Some(copy)) => by(copy),
        // a process that has exited just now, or that is in another PID namespace
        _ => "by a process that is not visible from here".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::attach::types::tests::attachment;

    fn mounts(lines: &[(&str, &str)]) -> Vec<Mount> {
        let lines = lines.iter().enumerate();
        let text: String = lines
            .map(|(n, (place, id))| {
                format!(
                    "{n} {} 0:{n} / {place} ro - overlay socinbd-{id} ro\n",
                    n + 1
                )
            })
            .collect();
        info::parse(text.as_bytes())
    }

    #[test]
    fn a_mount_is_at_its_place_or_where_a_rename_took_it() {
        let mut attachment = attachment("a");
        attachment.mountpoint = Some("/mnt".into());
        let place = |lines: &[_]| place_of(&mounts(lines), &attachment);
        assert_eq!(place(&[]), None);
        assert_eq!(place(&[("/mnt", "b")]), None);
        let copied = place(&[("/copy", "a"), ("/mnt", "a")]);
        assert_eq!(copied.as_deref(), Some(Path::new("/mnt")));
        let moved = place(&[("/mnt", "b"), ("/new/mnt", "a"), ("/copy", "a")]);
        assert_eq!(moved.as_deref(), Some(Path::new("/new/mnt")));
    }

    #[test]
    fn of_two_attachments_at_a_path_one_is_on_top() {
        let (a, b) = (attachment("a"), attachment("b"));
        // each mount covers the next one
        let mounts = mounts(&[("/mnt", "a"), ("/mnt", "b"), ("/other", "b")]);
        let mnt = Path::new("/mnt");
        assert!(is_on_top(&mounts, mnt, &a) && !is_on_top(&mounts, mnt, &b));
        assert!(is_on_top(&mounts, Path::new("/other"), &b));
    }
}
