//! The client side of the daemon's API, for the command line.

use std::{os::fd::OwnedFd, path::PathBuf};

use hyper::{Method, body::Incoming};
use tokio::io::AsyncWriteExt as _;

pub use super::connection::Client;
use super::{
    AttachLine, CheckLine, HandOver, PinRequest, RestoreResult,
    connection::{ANSWER_TIME, RequestError, connect},
    control::{LogFilter, Reloaded},
    mounts_socket,
};
use crate::{
    engine::{
        AttachRequest, Attachment, AttachmentStatus, Explanation, FetchReport, LayerStatus,
        OpenEvent, SnapshotStatus,
        examine::check::{CheckEvent, CheckRequest},
        space::{
            image_record::ImageRecord,
            prune::{PruneReport, PruneRequest},
            usage::SpaceReport,
        },
    },
    error::{Error, Kind, Result, ResultExt},
};

/// An attachment that waits to be mounted. The daemon takes it back when this is dropped, or its process dies, before
/// [`Client::mounted`].
pub struct Offer {
    /// The attachment.
    pub attachment: Attachment,
    /// The daemon sees its end.
    _answer: Incoming,
}

/// The answer to an attach.
pub enum AttachAnswer {
    /// It is attached.
    Offer(Box<Offer>),
    /// The daemon attaches nothing any more: the next one has to be asked.
    Ending,
    /// The daemon has ended. The next one removes what was begun.
    Lost(Error),
}

impl Client {
    /// All attachments.
    pub async fn attachments(&self) -> Result<Vec<AttachmentStatus>> {
        self.get("/v1/attachments").await
    }

    /// Why an attachment is as it is.
    pub async fn why(&self, id: &str) -> Result<Explanation> {
        self.get(&format!("/v1/attachments/{id}/why")).await
    }

    /// All layers in use.
    pub async fn layers(&self) -> Result<Vec<LayerStatus>> {
        self.get("/v1/layers").await
    }

    /// All snapshots of containerd.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotStatus>> {
        self.patiently(self.ask(Method::GET, "/v1/snapshots")).await
    }

    /// What was fetched for an attachment.
    pub async fn fetches(&self, id: &str) -> Result<FetchReport> {
        let path = format!("/v1/attachments/{id}/fetches");
        self.patiently(self.ask(Method::GET, &path)).await
    }

    /// Attaches an image; `event` receives the progress. The mount can be fetched with [`Client::mount`] as long as the offer is kept.
    pub async fn attach(
        &self,
        request: &AttachRequest,
        event: &(dyn Fn(OpenEvent) + Sync),
    ) -> Result<AttachAnswer> {
        let body = serde_json::to_vec(request)
            .or_kind(Kind::InvalidArgument, || "writing the request".into())?;
        let asked = async {
            let sent = self.send(Method::POST, "/v1/attachments", body).await;
            match sent {
                Err(RequestError::Lost(error)) => Ok(Err(error)),
                sent => sent.map(Ok).map_err(RequestError::into_error),
            }
        };
        let mut response = match self.soon(asked).await? {
            Ok(response) => response.into_body(),
            Err(lost) => return Ok(AttachAnswer::Lost(lost)),
        };
        let mut pending = Vec::new();
        while let Some(line) = self.next_line(&mut response, &mut pending).await? {
            match line {
                AttachLine::Progress(progress) => event(progress),
                AttachLine::Attached(attachment) => {
                    return Ok(AttachAnswer::Offer(Box::new(Offer {
                        attachment: *attachment,
                        _answer: response,
                    })));
                }
                AttachLine::Failed(failure) => return Err(failure.into_error()),
                AttachLine::Ending => return Ok(AttachAnswer::Ending),
            }
        }
        Ok(AttachAnswer::Lost(Error::new(
            Kind::Unavailable,
            "the daemon closed the connection before the image was attached; see its log",
        )))
    }

    /// Checks disks; `event` receives the progress.
    pub async fn check(
        &self,
        request: &CheckRequest,
        event: &(dyn Fn(CheckEvent) + Sync),
    ) -> Result<()> {
        let body = serde_json::to_vec(request)
            .or_kind(Kind::InvalidArgument, || "writing the request".into())?;
        let asked = async {
            let sent = self.send(Method::POST, "/v1/disks/check", body).await;
            sent.map_err(RequestError::into_error)
        };
        let mut response = self.soon(asked).await?.into_body();
        let mut pending = Vec::new();
        while let Some(line) = self.next_line(&mut response, &mut pending).await? {
            match line {
                CheckLine::Event(happened) => event(happened),
                CheckLine::Done => return Ok(()),
                CheckLine::Failed(failure) => return Err(failure.into_error()),
            }
        }
        Err(Error::new(
            Kind::Unavailable,
            "the daemon closed the connection before the check was complete; see its log",
        ))
    }

    /// What the root of the daemon holds.
    pub async fn space(&self) -> Result<SpaceReport> {
        self.patiently(self.ask(Method::GET, "/v1/disks")).await
    }

    /// Removes disks that nobody uses.
    pub async fn prune(&self, request: &PruneRequest) -> Result<PruneReport> {
        self.post("/v1/disks/prune", request).await
    }

    /// Pins an image, or unpins it.
    pub async fn pin(&self, request: &PinRequest) -> Result<ImageRecord> {
        self.post("/v1/images/pin", request).await
    }

    /// Makes the daemon read its configuration file again.
    pub async fn reload(&self) -> Result<Reloaded> {
        self.post("/v1/config/reload", &()).await
    }

    /// The filter of the daemon's log.
    pub async fn log_filter(&self) -> Result<LogFilter> {
        self.get("/v1/log").await
    }

    /// Changes the filter of the daemon's log; the new one.
    pub async fn set_log_filter(&self, filter: &LogFilter) -> Result<LogFilter> {
        self.post("/v1/log", filter).await
    }

    /// The descriptor of an attachment's mount. Only once.
    pub async fn mount(&self, id: &str) -> Result<OwnedFd> {
        let path = mounts_socket(&self.run_dir);
        let asking = || format!("requesting a mount at {}", path.display());
        let asked = async {
            let mut socket = connect(&path).await?;
            socket.write_all(format!("{id}\n").as_bytes()).await?;
            socket.readable().await?;
            let socket = socket.into_std()?;
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(ANSWER_TIME))?;
            Ok::<_, std::io::Error>(socket)
        };
        let asked = async { asked.await.or_kind(Kind::Unavailable, asking) };
        crate::kernel::fdpass::receive(&self.soon(asked).await?)
    }

    /// Tells the daemon that the caller has mounted.
    pub async fn mounted(&self, id: &str) -> Result<()> {
        let path = format!("/v1/attachments/{id}/mounted");
        self.soon(self.ask(Method::POST, &path)).await
    }

    /// Asks the daemon to end, and to be followed by this program. `Ok`: all that it has begun is complete.
    pub async fn hand_over(&self, program: PathBuf) -> Result<()> {
        self.post("/v1/hand-over", &HandOver { program }).await
    }

    /// Gives an attachment's devices back. It is not kept any more.
    pub async fn release(&self, id: &str) -> Result<()> {
        let path = format!("/v1/attachments/{id}");
        self.patiently(self.ask(Method::DELETE, &path)).await
    }

    /// As [`Client::release`], but a kept attachment stays kept.
    pub async fn release_for_now(&self, id: &str) -> Result<()> {
        let path = format!("/v1/attachments/{id}?keep");
        self.patiently(self.ask(Method::DELETE, &path)).await
    }

    /// Attaches the kept attachments that are not attached. One result for each kept attachment.
    pub async fn restore(&self) -> Result<Vec<RestoreResult>> {
        self.patiently(self.ask(Method::POST, "/v1/restore")).await
    }
}
