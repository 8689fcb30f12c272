//! Reads a layer once, for its indexer and, in the same pass, for the destination of a copy.

use std::collections::HashSet;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    options::{CreateOptions, OnLayerProgress},
    parts::{CompactPart, LayerResult, LayerTable},
    reuse::ReusableIndexes,
};
use crate::{
    engine::transfer::manifests::foreign_layer_left,
    error::{Error, Kind, Result},
    layer::LayerBlob,
    oci::{Digest, Packing, Reference},
    soci::build::{self, Indexed, LayerIndexer, NoSink, Options},
    source::{Copied, Destination, Source},
};

/// Maximum number of pieces of a layer between source and indexer.
const PIECES_AHEAD: usize = 4;

/// The tables to make in one pass over a layer.
#[derive(Clone, Copy)]
struct WantedTables {
    ztoc: bool,
    compact_span_size: Option<u64>,
    /// Whether the destination verifies the layer's digest, so that the indexer need not.
    is_checked: bool,
}

/// Makes the tables of layers.
pub(crate) struct LayerMaker<'a> {
    pub(crate) options: &'a CreateOptions,
    pub(crate) reusable: ReusableIndexes,
    /// Where the layers are copied to, if anywhere.
    pub(crate) destination: Option<&'a Destination>,
    /// Foreign layers, which may be missing at the source.
    pub(crate) foreign: HashSet<Digest>,
    pub(crate) progress: OnLayerProgress<'a>,
}

impl LayerMaker<'_> {
    /// Makes the tables of a layer, and copies the layer if there is a destination.
    pub(crate) async fn layer(
        &self,
        source: &Source,
        layer: &LayerBlob,
    ) -> Result<(LayerResult, Option<Copied>)> {
        match self.one(source, layer).await {
            Err(error) if error.kind() == Kind::NotFound => match self.without(layer) {
                Some(made) => Ok((made, None)),
                None => Err(error),
            },
            done => done,
        }
        .map_err(|error| error.context(format!("layer {}", layer.digest)))
    }

    /// The result of a layer that is missing at the source; `None` if that is an error.
    fn without(&self, layer: &LayerBlob) -> Option<LayerResult> {
        if self.foreign.contains(&layer.digest) {
            let absent = self.destination.map(|_| foreign_layer_left(&layer.digest));
            let reason = "foreign layer that is missing at the source".to_owned();
            return Some(LayerResult {
                absent,
                ..LayerResult::nothing(reason)
            });
        }
        // A layout may be as incomplete as the source. A registry must be complete, because others rely on it.
        let to = self.destination?.reference();
        let is_layout = !matches!(to, Reference::Registry { .. });
        let reason = self.too_small(layer).filter(|_| is_layout)?;
        Some(LayerResult {
            absent: Some(format!(
                "layer {} is missing at the source, so the image at {to} is incomplete and cannot be started",
                layer.digest
            )),
            ..LayerResult::nothing(reason)
        })
    }

    async fn one(
        &self,
        source: &Source,
        layer: &LayerBlob,
    ) -> Result<(LayerResult, Option<Copied>)> {
        if layer.size == 0 {
            return self.empty(source, layer).await;
        }
        if let Some(reason) = self.no_ztoc(layer) {
            return Ok((
                LayerResult::nothing(reason),
                self.copy(source, layer).await?,
            ));
        }
        let (ztoc, compact) = self.reusable_parts(layer).await;
        let wanted = WantedTables {
            ztoc: ztoc.is_none(),
            compact_span_size: match compact {
                Some(_) => None,
                None => self.options.compact_span_size,
            },
            is_checked: false,
        };
        let mut made = LayerResult {
            ztoc: ztoc.ok_or_else(|| "no zTOC was made".to_owned()),
            compact: compact.map(Ok),
            ..LayerResult::nothing(String::new())
        };
        if !wanted.ztoc && wanted.compact_span_size.is_none() {
            return Ok((made, self.copy(source, layer).await?));
        }
        let (indexed, copied) = self.index(source, layer, wanted).await?;
        if indexed.digest != layer.digest {
            return Err(Error::new(
                Kind::Corrupt,
                format!("its content has the digest {}", indexed.digest),
            ));
        }
        made.diff_id = indexed.diff_id;
        if let Some(ztoc) = indexed.ztoc {
            made.ztoc = ztoc.map(|bytes| LayerTable {
                digest: Digest::of(&bytes),
                bytes: bytes.into(),
                reused: false,
                prefetch: None,
            });
        }
        if let Some(compact) = indexed.compact {
            made.compact = Some(compact.map(|blob| CompactPart::of(layer.digest, blob)));
        }
        Ok((made, copied))
    }

    /// A layer of size 0.
    async fn empty(
        &self,
        source: &Source,
        layer: &LayerBlob,
    ) -> Result<(LayerResult, Option<Copied>)> {
        let digest = Digest::of(b"");
        if layer.digest != digest {
            let text = "its size is 0, but its digest is not that of empty content";
            return Err(Error::new(Kind::Corrupt, text));
        }
        let made = LayerResult {
            diff_id: Some(digest),
            ..LayerResult::nothing("empty layer".to_owned())
        };
        Ok((made, self.copy(source, layer).await?))
    }

    /// The existing zTOC and compact index part of a layer, if they can be reused.
    async fn reusable_parts(&self, layer: &LayerBlob) -> (Option<LayerTable>, Option<CompactPart>) {
        if self.options.force {
            return (None, None);
        }
        let ztoc = match self.reusable.ztoc(layer, self.options.span_size).await {
            Some(bytes) => {
                let digest = Digest::of(&bytes);
                Some(LayerTable {
                    digest,
                    bytes,
                    reused: true,
                    prefetch: self.reusable.list(&layer.digest, &digest).await,
                })
            }
            None => None,
        };
        let compact = match self.options.compact_span_size {
            Some(span_size) => self.reusable.compact(layer, span_size).await,
            None => None,
        };
        (ztoc, compact)
    }

    /// Why a layer gets no zTOC, if that is clear without reading it.
    fn no_ztoc(&self, layer: &LayerBlob) -> Option<String> {
        let zstd = || "zstd: a zTOC can describe gzip and plain tar only".to_owned();
        let is_zstd = layer.packing == Packing::Zstd;
        self.too_small(layer).or_else(|| is_zstd.then(zstd))
    }

    fn too_small(&self, layer: &LayerBlob) -> Option<String> {
        let least = self.options.min_layer_size;
        let size = layer.size;
        (size < least).then(|| format!("size {size} is less than min-layer-size {least}"))
    }

    async fn copy(&self, source: &Source, layer: &LayerBlob) -> Result<Option<Copied>> {
        match self.destination {
            None => Ok(None),
            Some(to) => to
                .copy_blob(source, &layer.digest, layer.size, None)
                .await
                .map(Some),
        }
    }

    /// Reads a layer into an indexer and, if the destination does not have it, to the destination.
    async fn index(
        &self,
        source: &Source,
        layer: &LayerBlob,
        wanted: WantedTables,
    ) -> Result<(Indexed, Option<Copied>)> {
        let mut copied = None;
        if let Some(to) = self.destination {
            let (sender, receiver) = mpsc::channel::<Bytes>(PIECES_AHEAD);
            let copy = async {
                let mut sender = Some(sender);
                // called at most once; later calls get a closed channel
                let mut tap = || sender.take().unwrap_or_else(|| mpsc::channel(1).0);
                to.copy_blob(source, &layer.digest, layer.size, Some(&mut tap))
                    .await
            };
            let (done, indexed) = tokio::join!(
                copy,
                self.listen(
                    layer,
                    WantedTables {
                        is_checked: true,
                        ..wanted
                    },
                    receiver
                )
            );
            let done = done?;
            if done == Copied::Uploaded {
                return Ok((indexed?, Some(done)));
            }
            copied = Some(done);
        }
        let mut pieces = source.stream(&layer.digest, layer.size).await?;
        let (sender, receiver) = mpsc::channel::<Bytes>(PIECES_AHEAD);
        let read = async {
            while let Some(piece) = pieces.next().await {
                if sender.send(piece?).await.is_err() {
                    break; // the indexer has failed and returns its error
                }
            }
            drop(sender);
            Ok(())
        };
        let (read, indexed) = tokio::join!(read, self.listen(layer, wanted, receiver));
        read?;
        Ok((indexed?, copied))
    }

    /// Passes the pieces to an indexer on its own thread, and reports the progress.
    async fn listen(
        &self,
        layer: &LayerBlob,
        wanted: WantedTables,
        mut pieces: mpsc::Receiver<Bytes>,
    ) -> Result<Indexed> {
        let Some(mut piece) = pieces.recv().await else {
            return Err(Error::new(Kind::Io, "the source has sent no data"));
        };
        let (sender, thread) = self.indexer(layer, wanted);
        let mut done: u64 = 0;
        loop {
            done = done.saturating_add(piece.len() as u64);
            if sender.send(piece).await.is_err() {
                break;
            }
            (self.progress)(layer.digest, done, layer.size);
            match pieces.recv().await {
                Some(next) => piece = next,
                None => break,
            }
        }
        drop(sender);
        drop(pieces); // so that a failed indexer does not block the sender
        match thread.await {
            Ok(Ok(indexed)) => Ok(indexed),
            Ok(Err(error)) => Err(Error::with_source(
                error.kind(),
                "cannot decode the layer",
                error,
            )),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::new(Kind::Io, "the program is shutting down")),
            },
        }
    }

    fn indexer(
        &self,
        layer: &LayerBlob,
        wanted: WantedTables,
    ) -> (
        mpsc::Sender<Bytes>,
        JoinHandle<Result<Indexed, build::Error<std::convert::Infallible>>>,
    ) {
        let options = Options {
            span_size: self.options.span_size,
            build_tool: self.options.build_tool.clone(),
            ztoc: wanted.ztoc,
            compact_span_size: wanted.compact_span_size,
            diff_id: true,
            checked_digest: wanted.is_checked.then_some(layer.digest),
        };
        let mut indexer = LayerIndexer::new(layer.packing, options, NoSink);
        let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES_AHEAD);
        let thread = tokio::task::spawn_blocking(move || {
            while let Some(piece) = receiver.blocking_recv() {
                indexer.write(&piece)?;
            }
            indexer.finish().map(|(indexed, NoSink)| indexed)
        });
        (sender, thread)
    }
}
