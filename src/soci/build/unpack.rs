//! Decompression of a blob to the bytes of its layer, for any compression.

use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use super::error::Error;
use crate::{
    gzip::{
        header,
        scan::{Event, Scanner},
    },
    oci::Packing,
};

/// So many bytes tell how a blob is packed.
pub(super) const MAGIC_SIZE: usize = 4;

/// RFC 8878, 3.1.1.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// RFC 8878, 3.1.2: a skippable frame starts with 0x50 to 0x5f and these.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// Maximum window of a zstd frame, as a power of two: 128 MiB, the default limit of the program zstd.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Bytes of output per step; blocks of zstd are not larger.
const ZSTD_OUTPUT: usize = 128 * 1024;

/// How a blob that starts so is packed. Anything without a magic number is a plain tar, as in containerd's unpack.
pub(super) fn packing(head: &[u8]) -> Packing {
    let skippable = matches!(head, [0x50..=0x5f, rest @ ..] if rest.starts_with(&ZSTD_SKIPPABLE));
    if head.starts_with(&header::MAGIC) {
        Packing::Gzip
    } else if head.starts_with(&ZSTD_MAGIC) || skippable {
        Packing::Zstd
    } else {
        Packing::Plain
    }
}

/// The unsupported compression of a blob that starts with these bytes: other tools have made such layers.
pub(super) fn unreadable(head: &[u8]) -> Option<&'static str> {
    match head {
        [b'B', b'Z', b'h', ..] => Some("bzip2"),
        [0xfd, b'7', b'z', b'X', ..] => Some("xz"),
        [0x04, 0x22, 0x4d, 0x18, ..] => Some("lz4"),
        _ => None,
    }
}

/// The decoder of the blob.
pub(super) enum Unpacker {
    Gzip(Box<Scanner>),
    Zstd(Box<Zstd>),
    Plain,
}

impl Unpacker {
    /// At the start of a blob. The span sizes ([`Scanner::with_sizes`]) matter to gzip only.
    pub(super) fn new<E>(packing: Packing, span_sizes: [Option<u64>; 2]) -> Result<Self, Error<E>> {
        Ok(match packing {
            Packing::Gzip => Self::Gzip(Box::new(Scanner::with_sizes(span_sizes))),
            Packing::Zstd => Self::Zstd(Box::new(Zstd::new()?)),
            Packing::Plain => Self::Plain,
        })
    }

    /// The compression that it decodes.
    pub(super) fn packing(&self) -> Packing {
        match self {
            Self::Gzip(_) => Packing::Gzip,
            Self::Zstd(_) => Packing::Zstd,
            Self::Plain => Packing::Plain,
        }
    }

    /// The next event in `input`, as [`Scanner::next`].
    pub(super) fn next<'e, 'b: 'e, E>(
        &'e mut self,
        input: &mut &'b [u8],
    ) -> Result<Option<Event<'e>>, Error<E>> {
        match self {
            Self::Gzip(scanner) => scanner.next(input).map_err(Error::Gzip),
            Self::Zstd(zstd) => zstd.next(input),
            Self::Plain => {
                let data = std::mem::take(input);
                Ok((!data.is_empty()).then_some(Event::Data(data)))
            }
        }
    }

    /// The end of the blob.
    pub(super) fn finish<E>(self) -> Result<(), Error<E>> {
        match self {
            Self::Gzip(scanner) => scanner.finish().map(drop).map_err(Error::Gzip),
            Self::Zstd(zstd) if !zstd.between_frames => Err(Error::ZstdTruncated {
                compressed_offset: zstd.taken,
            }),
            Self::Zstd(_) | Self::Plain => Ok(()),
        }
    }
}

/// One or several zstd frames.
pub(super) struct Zstd {
    decoder: Decoder<'static>,
    output: Box<[u8]>,
    taken: u64,
    /// The output was full: there may be more without input.
    more: bool,
    between_frames: bool,
}

impl Zstd {
    fn new<E>() -> Result<Self, Error<E>> {
        let start = |source: std::io::Error| Error::Zstd {
            compressed_offset: 0,
            message: source.to_string(),
        };
        let mut decoder = Decoder::new().map_err(start)?;
        decoder
            .set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))
            .map_err(start)?;
        Ok(Self {
            decoder,
            output: vec![0; ZSTD_OUTPUT].into_boxed_slice(),
            taken: 0,
            more: false,
            between_frames: false,
        })
    }

    fn next<E>(&mut self, input: &mut &[u8]) -> Result<Option<Event<'_>>, Error<E>> {
        while !input.is_empty() || self.more {
            let status = self
                .decoder
                .run_on_buffers(input, &mut self.output)
                .map_err(|source| Error::Zstd {
                    compressed_offset: self.taken,
                    message: source.to_string(),
                })?;
            *input = &input[status.bytes_read..];
            self.taken += status.bytes_read as u64;
            self.more = status.bytes_written == self.output.len();
            if status.bytes_read > 0 || status.bytes_written > 0 {
                self.between_frames = status.remaining == 0;
            } else if !input.is_empty() {
                return Err(Error::Zstd {
                    compressed_offset: self.taken,
                    message: "no progress".to_owned(),
                });
            }
            if status.bytes_written > 0 {
                return Ok(Some(Event::Data(&self.output[..status.bytes_written])));
            }
        }
        Ok(None)
    }
}
