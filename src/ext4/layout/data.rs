//! Places the data of all entries on the disk, in tar order.

use super::super::{BLOCK_SIZE, DataPlacer, DataRegion, Error};
use crate::{
    tar::{Entry, EntryKind},
    tree::shown,
};

/// Where the data of all entries is.
pub(super) struct Data {
    /// For each entry the first block of its data; 0 where it has none.
    pub(super) starts: Vec<u32>,
    pub(super) regions: Vec<DataRegion>,
    /// The block after the last.
    pub(super) end: u64,
}

impl Data {
    pub(super) fn place(entries: &[Entry]) -> Result<Self, Error> {
        let mut placer = DataPlacer::default();
        let mut starts = vec![0; entries.len()];
        let mut regions = vec![];
        for (index, entry) in entries.iter().enumerate() {
            if entry.kind != EntryKind::Regular || entry.size == 0 {
                continue;
            }
            let disk = placer.place(entry.size)?;
            starts[index] = (disk.get() / BLOCK_SIZE) as u32;
            let beyond = || Error::DataBeyondLayer {
                path: shown(&entry.name),
            };
            let Some(segments) = &entry.sparse else {
                let region = DataRegion::new(disk, entry.data_offset, entry.size);
                regions.push(region.ok_or_else(beyond)?);
                continue;
            };
            let mut file_end = 0;
            for segment in segments.iter().filter(|segment| segment.length > 0) {
                let end = segment.file_offset.checked_add(segment.length);
                if segment.file_offset < file_end || end.is_none_or(|end| end > entry.size) {
                    return Err(Error::SparseSegment {
                        path: shown(&entry.name),
                        offset: segment.file_offset,
                    });
                }
                file_end = segment.file_offset + segment.length;
                let region = disk
                    .checked_add(segment.file_offset)
                    .and_then(|disk| DataRegion::new(disk, segment.layer_offset, segment.length));
                regions.push(region.ok_or_else(beyond)?);
            }
        }
        Ok(Self {
            starts,
            regions,
            end: placer.end(),
        })
    }
}
