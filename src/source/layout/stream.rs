//! A blob that is received in pieces, written to a file and checked on the way.

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc};

use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt as _};
use tokio::sync::mpsc;

use crate::blocking::blocking;
use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::{Digest, digest::Hasher},
};

/// A blob on its way here.
pub(in crate::source) struct Incoming {
    pub(in crate::source) digest: Digest,
    pub(in crate::source) size: u64,
    pub(in crate::source) pieces: BoxStream<'static, Result<Bytes>>,
    /// A receiver that gets the pieces too; if it goes away, the blob is written without it.
    pub(in crate::source) tap: Option<mpsc::Sender<Bytes>>,
}

/// Writes a blob at this place of the file; to no file where it is there already. An error when its pieces have another digest or size
/// than said.
pub(super) async fn write(file: Option<(Arc<File>, u64)>, blob: Incoming) -> Result<()> {
    let Incoming {
        digest,
        size,
        mut pieces,
        mut tap,
    } = blob;
    let mut hasher = Hasher::default();
    let mut done: u64 = 0;
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        let next = done
            .checked_add(piece.len() as u64)
            .filter(|next| *next <= size)
            .ok_or_else(|| {
                Error::new(Kind::Corrupt, format!("more bytes than its size of {size}"))
            })?;
        if let Some(listener) = &tap
            && listener.send(piece.clone()).await.is_err()
        {
            tap = None;
        }
        let file = file.clone();
        hasher = blocking(move || {
            let mut hasher = hasher;
            hasher.update(&piece);
            if let Some((file, start)) = file {
                let at = start
                    .checked_add(done)
                    .ok_or_else(|| Error::new(Kind::Unsupported, "an offset out of range"))?;
                file.write_all_at(&piece, at)
                    .or_kind(Kind::Io, || format!("writing at byte {at}"))?;
            }
            Ok(hasher)
        })
        .await?;
        done = next;
    }
    let found = hasher.finish();
    if done != size || found != digest {
        return Err(Error::new(
            Kind::Corrupt,
            format!("its source has {done} bytes with the digest {found}; expected {size} bytes"),
        ));
    }
    Ok(())
}
