//! The spans of a list of files, from which prefetch artifacts are made. Pure.

use std::collections::HashMap;

use super::prefetch::Prefetch;
use crate::{
    tar::{Entry, EntryKind},
    ztoc::SpanTable,
};

/// The result for a list of files.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// A prefetch artifact per layer, in the order of the layers; `None` if no file of the layer was requested.
    pub layers: Vec<Option<Prefetch>>,
    /// Files that no layer has, as they were named.
    pub missing: Vec<String>,
}

/// Finds the spans of these files. `tables` are those of the layers of the image, the lowest first, if a layer has one: from its zTOC or
/// from a compact index. If several layers have a file, the topmost is used. Hard links lead to their file within the layer; symbolic
/// links are not followed.
pub fn spans_of(files: &[String], tables: &[Option<(&[Entry], &SpanTable)>]) -> Listed {
    let mut wanted: HashMap<Vec<u8>, &String> = files
        .iter()
        .map(|file| (clean(file.as_bytes()), file))
        .collect();
    let mut layers = vec![None; tables.len()];
    for (table, found) in tables.iter().zip(&mut layers).rev() {
        let Some((entries, spans)) = table else {
            continue;
        };
        // of two entries with one name the later one is used
        let entries: HashMap<Vec<u8>, &Entry> = entries
            .iter()
            .map(|entry| (clean(&entry.name), entry))
            .collect();
        let mut runs = Vec::new();
        wanted.retain(|name, _| {
            let Some(mut entry) = entries.get(name).copied() else {
                return true;
            };
            if entry.kind == EntryKind::Hardlink {
                match entries.get(&clean(&entry.linkname)) {
                    Some(target) => entry = target,
                    None => return true,
                }
            }
            let start = entry.data_offset;
            if entry.kind == EntryKind::Regular
                && let Some(end) = start.checked_add(entry.size)
            {
                runs.push(spans.covering(start..end));
            }
            false
        });
        *found = Prefetch::of_runs(runs);
    }
    let mut missing: Vec<String> = files.to_vec();
    missing.retain(|file| wanted.contains_key(&clean(file.as_bytes())));
    Listed { layers, missing }
}

/// A name as Go's `filepath.Clean("/" + name)` makes it, without the slash.
pub fn clean(name: &[u8]) -> Vec<u8> {
    let mut components: Vec<&[u8]> = Vec::new();
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(components.pop()),
            component => components.push(component),
        }
    }
    components.join(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned() {
        for (name, cleaned) in [
            ("/bin/app", "bin/app"),
            ("./bin//app", "bin/app"),
            ("/opt/../opt/x/", "opt/x"),
            ("../..", ""),
        ] {
            assert_eq!(clean(name.as_bytes()), cleaned.as_bytes(), "{name}");
        }
    }

    #[test]
    fn what_no_layer_has_is_said() {
        let listed = spans_of(&["/a".to_owned()], &[None]);
        assert_eq!(listed.missing, ["/a"]);
        assert_eq!(listed.layers, [None]);
    }
}
