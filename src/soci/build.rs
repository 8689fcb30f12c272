//! One pass over a layer's blob: digest, diff ID, checkpoints, tar table, span digests, and the files' data as it passes. Pure:
//! bytes are pushed in.

use crate::{
    oci::{Digest, Packing},
    tar::Entry,
};

/// Takes what a layer holds, in the order of its stream.
pub trait LayerSink {
    /// What the sink may fail with.
    type Error;

    /// The `index`-th entry, before its data.
    fn entry(&mut self, index: usize, entry: &Entry) -> Result<(), Self::Error>;

    /// A piece of the data of the `index`-th entry, at this offset in the file (a sparse file's holes are left out).
    fn data(&mut self, index: usize, file_offset: u64, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// A sink that wants nothing.
#[derive(Debug, Default)]
pub struct NoSink;

impl LayerSink for NoSink {
    type Error = std::convert::Infallible;

    fn entry(&mut self, _index: usize, _entry: &Entry) -> Result<(), Self::Error> {
        Ok(())
    }

    fn data(&mut self, _index: usize, _file_offset: u64, _bytes: &[u8]) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// How an index is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the layer between checkpoints, at least; 4 MiB by default.
    pub span_size: u64,
    /// `build_tool_identifier` of the zTOC.
    pub build_tool: String,
    /// Whether a zTOC is wanted at all (a layer that is only streamed to its disk needs none).
    pub ztoc: bool,
}

/// A layer that has passed.
#[derive(Debug)]
pub struct Indexed {
    /// SHA-256 of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// SHA-256 of the whole uncompressed stream.
    pub diff_id: Digest,
    /// Bytes of the uncompressed stream.
    pub uncompressed_size: u64,
    /// The entries in tar order.
    pub entries: Vec<Entry>,
    /// The zTOC's bytes, or why this layer cannot have one (zstd, sparse files, ...). `None` when none was wanted.
    pub ztoc: Option<Result<Vec<u8>, String>>,
}

/// Takes a blob's bytes as they come.
pub struct LayerIndexer<S> {
    sink: S,
}

impl<S: LayerSink> LayerIndexer<S> {
    /// Starts a layer.
    pub fn new(packing: Packing, options: Options, sink: S) -> Self {
        let _ = (packing, options);
        Self { sink }
    }

    /// Takes the next bytes of the blob.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error<S::Error>> {
        let _ = (bytes, &mut self.sink);
        unimplemented!("module soci::build")
    }

    /// The end of the blob.
    pub fn finish(self) -> Result<(Indexed, S), Error<S::Error>> {
        unimplemented!("module soci::build")
    }
}

/// Why a layer could not be read to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error<E> {
    /// The sink failed.
    #[error("the layer's data could not be taken")]
    Sink(E),
}
