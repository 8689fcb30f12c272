//! Opens a disk from its directory.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock, Weak},
};

use super::{Disk, Services};
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    ext4::RegionTable,
    layer::{
        ahead::{ahead_of_readers::Ahead, fill_decision::Fill},
        read::{
            compact_windows::CompactWindows, health::DiskHealth, reader::SpanReader,
            window_store::WindowStore,
        },
        repair::{from_table, table_repair::TableRepair},
        sources::layer_sources::LayerSources,
        stored::{
            directory::{self, DiskDirectory},
            disk_layout::DiskLayout,
            disk_record::DiskRecord,
            presence::Presence,
            present_spans::Bitmap,
            seal::Damage,
            span_record::SpanRecord,
            span_table::Spans,
            state::DiskState,
            uncached_file::UncachedFile,
        },
        verify::{
            contradictions::Refutation, headers::Headers, non_file_bytes::NonFileBytes,
            progress::LayerCheck, revoked::RevokedSpans, span, verification::Verification,
        },
    },
    units::SpanId,
    ztoc::Compression,
};

impl Disk {
    /// Opens a directory. An error that is [`Damage`]: `from_table` may repair the directory. Another error of kind `Corrupt`: this program
    /// cannot serve the directory, and it has to be removed. `check`: what is checked first.
    pub(in crate::layer) fn open(
        services: &Arc<Services>,
        directory: DiskDirectory,
        check: OpenCheck,
    ) -> Result<Arc<Self>> {
        // the files are opened one after the other; that all are of one directory is looked at once
        let pinned = directory.clone().pinned()?;
        let state = from_table::of_this_version(&directory, directory.state()?)?;
        let damaged = |name, what: &str| {
            let context = directory.path().display().to_string();
            Error::with_source(Kind::Corrupt, context, Damage::new(name, what))
        };
        let file = directory.open(directory::DISK)?;
        let path = directory.path().join(directory::DISK);
        let length = file
            .metadata()
            .or_kind(Kind::Io, || format!("cannot stat {}", path.display()))?
            .len();
        if length != state.disk_size {
            return Err(damaged(
                directory::DISK,
                "its length is not that in `state.json`",
            ));
        }
        let regions = RegionTable::decode(&directory.read(directory::LAYOUT)?)
            .map_err(|error| damaged(directory::LAYOUT, &error.to_string()))?;
        if regions.size() != state.disk_size {
            return Err(damaged(directory::LAYOUT, "it is that of another disk"));
        }
        let facts = directory.stacking()?;
        if check != OpenCheck::New {
            from_table::check_metadata(&directory, &state, &file, &regions)?;
        }
        let is_streamed = state.spans == 0;
        let spans = match is_streamed {
            true => Spans::none(),
            false => Spans::open(directory.open_stored(directory::SPAN_TABLE)?)?,
        };
        let windows = open_windows(services, &pinned, &state, &spans)?;
        if check == OpenCheck::All && !state.complete {
            // before a reader waits for one of them
            let unread = || {
                format!(
                    "cannot read {}",
                    directory.path().join(directory::ZTOC).display()
                )
            };
            for span in (0..spans.count()).map(SpanId) {
                let window = spans.read(span).and_then(|stored| windows.of_ztoc(&stored));
                window.or_kind(Kind::Io, unread)?;
            }
        }
        let headers = match is_streamed {
            true => None,
            false => {
                let headers = Headers::open(directory.open_stored(directory::HEADERS)?);
                Some(headers.or_kind(Kind::Io, || format!("cannot open {}", path.display()))?)
            }
        };
        if spans.count() != state.spans {
            return Err(damaged(
                directory::SPAN_TABLE,
                "it is that of another layer",
            ));
        }
        let bitmap = open_bitmap(&directory, &state)?;
        let mut bare = BTreeSet::new();
        for span in (0..state.spans).map(SpanId) {
            // a span without a region has no data on the disk (tar headers, the end of the tar): no reader waits for it
            let has_none = || regions.in_layer(&spans.uncompressed(span)).next().is_none();
            if !bitmap.get(span) && has_none() {
                bare.insert(span);
                bitmap.set(span);
            }
        }
        let rest = if state.verified {
            directory.remove_rest()?; // a killed daemon may have left it
            None
        } else {
            let (file, is_lost) = directory.open_or_create(directory::REST)?;
            if is_lost {
                tracing::warn!(
                    "{} is missing: the spans that have bytes in it are fetched again before the layer is checked",
                    directory.path().join(directory::REST).display()
                );
                bare.extend(
                    (0..state.spans)
                        .map(SpanId)
                        .filter(|span| bitmap.get(*span)),
                );
            }
            Some(NonFileBytes::new(
                directory.stored(directory::REST, file)?,
                &spans,
                &regions,
            ))
        };
        let revoked = RevokedSpans::open(&pinned, state.spans)?;
        pinned.check_place()?;
        // the machine may have failed before the records were written; in memory they are revoked even if this write fails
        let _ = bitmap.revoke(&revoked.spans());
        let fill = Fill::of(
            &bitmap,
            &spans,
            state.verified,
            services.options().never_whole,
        );
        let reader = SpanReader::new(
            Arc::clone(services),
            DiskLayout::new(regions, spans),
            UncachedFile::new(file),
            Presence::new(bitmap),
            windows,
        );
        reader.set_io_timeout(services.options().io_timeout);
        let sources = LayerSources::open(&pinned, directory::SOURCES, services.hosts());
        let disk = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            services: Arc::clone(services),
            record: DiskRecord::new(pinned, state, facts),
            reader,
            ahead: Ahead::new(fill),
            verification: Verification::new(headers, LayerCheck::new(rest, bare), revoked),
            table_repair: TableRepair::default(),
            sources,
            health: DiskHealth::default(),
            activity: Default::default(),
            log: Default::default(),
            fixed_bytes: OnceLock::new(),
        });
        if check != OpenCheck::New {
            disk.remove_absent();
        }
        disk.measure();
        services.space().opened(disk.as_evictable());
        for span in disk.verification.revoked().spans() {
            let refutation = disk.refutation(span).unwrap_or(Refutation::Window); // a revoked span has a reason
            let reason = span::revoked_reason(&disk, Some(span), refutation);
            disk.health.failed(&[span], &reason);
        }
        Ok(disk)
    }
}

/// What is checked when a directory is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::layer) enum OpenCheck {
    /// Nothing: it was just written.
    New,
    /// The metadata of its file system. The windows of its spans, which may be a tenth of the layer, are checked when they are read.
    Metadata,
    /// The windows too: before a reader waits for one of them.
    All,
}

/// The windows of the spans, from the place that the state says.
fn open_windows(
    services: &Services,
    directory: &DiskDirectory,
    state: &DiskState,
    spans: &Spans,
) -> Result<WindowStore> {
    Ok(match (state.spans, state.compact, spans.compression()) {
        (0, ..) => WindowStore::None,
        (_, None, _) => WindowStore::Ztoc(directory.open_stored(directory::ZTOC)?),
        (_, Some(blob), Compression::Gzip) => {
            WindowStore::Compact(CompactWindows::open(directory, blob, services.hosts())?)
        }
        (_, Some(_), Compression::Uncompressed) => WindowStore::None,
    })
}

/// The present spans. If a record is damaged, its span is fetched again; that of a complete disk has no checksum.
fn open_bitmap(directory: &DiskDirectory, state: &DiskState) -> Result<Bitmap> {
    let path = || directory.path().join(directory::SPANS);
    let (lost, effect) = match state.complete {
        true => (
            SpanRecord::Unchecked,
            "have no checksum until `socinbd check`",
        ),
        false => (SpanRecord::Absent, "are fetched again"),
    };
    let (file, _) = directory.open_or_create(directory::SPANS)?;
    let (bitmap, damaged) =
        Bitmap::open(directory.stored(directory::SPANS, file)?, state.spans, lost)
            .or_kind(Kind::Io, || format!("cannot read {}", path().display()))?;
    if damaged > 0 {
        tracing::warn!("{} is damaged: {damaged} spans {effect}", path().display());
    }
    Ok(bitmap)
}
