//! Makes the disk of a layer without a table: the whole blob is downloaded once, verified, and unpacked to the disk in the same pass.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};

use super::{
    entry_table, import,
    stream_sink::{self, DiskSink},
    streams::StreamProgress,
};
use crate::{
    blocking::blocking,
    error::{Error, Kind, Result, ResultExt as _},
    ext4::Layout,
    layer::{
        disk::Disk,
        services::Services,
        sources::layer_sources::LayerSources,
        space::measure::allocated_file,
        store::Store,
        stored::{
            directory::{self, DiskDraft},
            pieces,
            state::DiskState,
        },
        types::LayerBlob,
    },
    oci::Digest,
    soci::build::{self, Indexed, LayerIndexer},
    source::Source,
    tree::Tree,
};

/// Maximum number of pieces of the blob between the network and the thread that unpacks.
const QUEUE_LENGTH: usize = 32;

impl Store {
    /// The disk of a layer without a table: streamed once, indexed in the same pass, and complete at the end. `progress` gets the number of
    /// compressed bytes so far. Concurrent callers share one stream per layer.
    pub async fn streamed(
        self: &Arc<Self>,
        layer: &LayerBlob,
        source: &Source,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Arc<Disk>> {
        self.services().enter();
        loop {
            let (mut receiver, sender) = self.streams.join((layer.digest, layer.diff_id));
            if let Some(sender) = sender {
                let store = Arc::clone(self);
                let (layer, source) = (layer.clone(), source.clone());
                self.services().spawn(async move {
                    let outcome = tokio::select! {
                        outcome = store.find_or_stream(&layer, &source, &sender) => outcome,
                        () = sender.closed() => return,
                    };
                    sender
                        .send_modify(|progress| progress.outcome = Some(outcome.map_err(Arc::new)));
                });
            }
            loop {
                let (bytes, outcome) = {
                    let state = receiver.borrow_and_update();
                    (state.bytes, state.outcome.clone())
                };
                progress(bytes);
                match outcome {
                    Some(Ok(disk)) => return Ok(disk),
                    Some(Err(error)) => {
                        let context = format!("layer {} could not be unpacked", layer.digest);
                        return Err(Error::with_source(error.kind(), context, error));
                    }
                    None => {}
                }
                if receiver.changed().await.is_err() {
                    break; // it was cancelled without waiters: start a new one
                }
            }
        }
    }

    async fn find_or_stream(
        self: &Arc<Self>,
        layer: &LayerBlob,
        source: &Source,
        progress: &watch::Sender<StreamProgress>,
    ) -> Result<Arc<Disk>> {
        let store = Arc::clone(self);
        let known = (layer.clone(), source.clone());
        let disk = blocking(move || {
            let (layer, source) = known;
            let disk = store.verified(&layer)?;
            if let Some(disk) = &disk {
                disk.sources().add(&source)?;
            }
            Ok(disk)
        });
        if let Some(disk) = disk.await? {
            return Ok(disk);
        }
        let streamed =
            source.with_right_bytes(|source| stream(self.services(), layer, source, progress));
        let (draft, table) = streamed.await?;
        let store = Arc::clone(self);
        let layer = layer.digest;
        blocking(move || store.publish(draft, &layer, &table)).await
    }
}

/// Bytes of a disk that is streamed for which room is made at once.
const RESERVED_AT_ONCE: u64 = 1 << 20;

/// The pieces for the thread that unpacks. A queue that ends without [`StreamPiece::End`] was cancelled.
enum StreamPiece {
    Bytes(Bytes),
    End,
}

/// Streams a layer once more whose disk exists. Returns the new draft and its table.
pub(crate) async fn once_more(disk: &Disk, source: &Source) -> Result<(DiskDraft, Digest)> {
    let (progress, _) = watch::channel(StreamProgress::default());
    stream(disk.services(), disk.layer(), source.clone(), &progress).await
}

/// Downloads the blob from the source to a draft of its disk.
async fn stream(
    services: &Arc<Services>,
    layer: &LayerBlob,
    source: Source,
    progress: &watch::Sender<StreamProgress>,
) -> Result<(DiskDraft, Digest)> {
    let mut blob = source.stream(&layer.digest, layer.size).await?;
    let (pieces, queue) = mpsc::channel(QUEUE_LENGTH);
    let unpacking = {
        let (services, layer) = (Arc::clone(services), layer.clone());
        blocking(move || unpack(&services, &layer, &source, queue))
    };
    let reading = async move {
        let mut bytes = 0;
        while let Some(piece) = blob.next().await {
            let piece = piece?;
            bytes += piece.len() as u64;
            if pieces.send(StreamPiece::Bytes(piece)).await.is_err() {
                return Ok(()); // the receiver returns the error
            }
            progress.send_modify(|progress| progress.bytes = bytes);
        }
        let _ = pieces.send(StreamPiece::End).await; // if this fails, the receiver returns the error
        Ok(())
    };
    let (read, unpacked) = tokio::join!(reading, unpacking);
    read?;
    unpacked
}

/// Unpacks the blob to a new disk, and verifies it. Blocks.
fn unpack(
    services: &Services,
    layer: &LayerBlob,
    source: &Source,
    mut queue: mpsc::Receiver<StreamPiece>,
) -> Result<(DiskDraft, Digest)> {
    let draft = DiskDraft::new(&services.new_directory())?;
    let directory = draft.directory();
    let write = || import::cannot_write(directory, directory::DISK);
    let options = build::Options {
        span_size: 4 << 20,
        build_tool: String::new(),
        ztoc: false,
        compact_span_size: None,
        diff_id: true,
        checked_digest: None,
    };
    let sink = DiskSink::new(directory.create(directory::DISK)?);
    let mut indexer = LayerIndexer::new(layer.packing, options, sink);
    let path = directory.path().join(directory::DISK);
    let (mut reserved, mut reservations) = (0, Vec::new());
    loop {
        // the disk is counted when it is published
        let missing = allocated_file(&path).saturating_sub(reserved);
        if missing >= RESERVED_AT_ONCE {
            reserved += missing;
            let reservation = services.space().reserve(missing);
            reservations.push(reservation.or_kind(Kind::Io, write)?);
        }
        match queue.blocking_recv() {
            Some(StreamPiece::Bytes(bytes)) => indexer
                .write(&bytes)
                .map_err(|error| unpack_error(error, write))?,
            Some(StreamPiece::End) => break,
            None => return Err(Error::new(Kind::Unavailable, "the download was cancelled")),
        }
    }
    let (indexed, sink) = indexer
        .finish()
        .map_err(|error| unpack_error(error, write))?;
    check(layer, &indexed)?;

    let table = entry_table::digest(&indexed.entries);
    let tree = Tree::build(&indexed.entries)
        .or_kind(Kind::Unsupported, || "its files make no tree".to_owned())?;
    let mut layout = Layout::new(&tree, &indexed.entries, table.bytes())
        .or_kind(Kind::Unsupported, || "its files do not fit ext4".to_owned())?;
    let regions = import::used_regions(&mut layout, &tree, &indexed.entries)?;
    let disk = sink.finish(&regions).or_kind(Kind::Io, write)?;
    import::write_metadata(disk, &layout).or_kind(Kind::Io, write)?;
    pieces::write(directory, &directory.open(directory::DISK)?)?;
    directory.write(directory::SPANS, &[])?;
    directory.write(directory::SOURCES, &LayerSources::encode_one(source))?;
    import::write_common(directory, &regions, &import::stacking_facts(tree))?;
    let mut state = DiskState::new(layer, table, regions.size(), 0);
    state.complete = true;
    state.verified = true;
    directory.write(directory::STATE, &state.encode())?;
    Ok((draft, table))
}

/// Compares the blob with the image: its size, its digest, and its diff ID.
fn check(layer: &LayerBlob, found: &Indexed) -> Result<()> {
    let wrong = |what: &str, found: &dyn std::fmt::Display, expected: &dyn std::fmt::Display| {
        Err(Error::new(
            Kind::Corrupt,
            format!("its {what} is {found}, and not {expected}"),
        ))
    };
    if found.size != layer.size {
        return wrong("size", &found.size, &layer.size);
    }
    if found.digest != layer.digest {
        return wrong("digest", &found.digest, &layer.digest);
    }
    match &found.diff_id {
        Some(diff_id) if *diff_id != layer.diff_id => wrong("diff ID", diff_id, &layer.diff_id),
        _ => Ok(()),
    }
}

fn unpack_error(error: build::Error<stream_sink::Error>, write: impl FnOnce() -> String) -> Error {
    use stream_sink::Error as Sink;
    match error {
        build::Error::Sink(Sink::Write(error)) => Error::with_source(Kind::Io, write(), error),
        build::Error::Sink(Sink::Place(error)) => {
            Error::with_source(Kind::Unsupported, "its files do not fit ext4", error)
        }
        error => Error::with_source(Kind::Corrupt, "it cannot be read to its end", error),
    }
}
