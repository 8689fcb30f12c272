//! The HTTP server of the builder, and its workers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};

use super::{
    Build,
    build::{BuildFailure, BuildOutcome},
    event,
    metrics::Metrics,
    queue::{Job, Queue},
    rules::{self, Rules, Verdict},
};
use crate::{
    error::{Error, Kind, Result, report},
    oci::Digest,
};

/// Bytes of an event, at most.
const BODY_LIMIT: usize = 1 << 20;
/// Maximum time for receiving a request.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 256;

/// The secret that senders have in their `Authorization` header, alone (as Harbor sends it) or after `Bearer `.
///
/// Only its digest is kept, so that a comparison takes the same time for any wrong value.
pub struct Secret(Digest);

impl Secret {
    /// Makes it from a text; white space around it is ignored.
    pub fn new(text: &str) -> Result<Self> {
        match text.trim() {
            "" => Err(Error::new(Kind::InvalidArgument, "the secret is empty")),
            text => Ok(Self(Digest::of(text.as_bytes()))),
        }
    }

    fn is_in(&self, header: Option<&HeaderValue>) -> bool {
        let Some(text) = header.and_then(|value| value.to_str().ok()) else {
            return false;
        };
        let text = text.strip_prefix("Bearer ").unwrap_or(text).trim();
        Digest::of(text.as_bytes()) == self.0
    }
}

/// The builder.
pub struct Service {
    rules: Rules,
    queue: Queue,
    secret: Option<Secret>,
    metrics: Metrics,
}

/// An answer to a request.
struct HttpAnswer {
    status: StatusCode,
    content_type: &'static str,
    body: String,
}

impl Service {
    /// Without a secret, posts of all senders are accepted.
    pub fn new(rules: Rules, queue: Queue, secret: Option<Secret>) -> Arc<Self> {
        Arc::new(Self {
            rules,
            queue,
            secret,
            metrics: Metrics::new(),
        })
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Answers until it is dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) -> Infallible {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
                continue; // it is never closed
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let service = Arc::clone(&self);
                    tokio::spawn(async move {
                        service.connection(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!("accepting a connection: {}", report(&error));
                    sleep(Duration::from_millis(100)).await; // mostly no descriptor is free
                }
            }
        }
    }

    /// One image after another, for ever. Several workers may run side by side.
    pub async fn work(&self, build: &Build) -> Infallible {
        loop {
            let job = self.queue.next().await;
            let image = format!("{}:{}", job.repository, job.tag);
            let begun = Instant::now();
            let result = build.image(&self.rules, &job).await;
            let time = begun.elapsed();
            let stored = match result {
                Ok(BuildOutcome::Made(done)) => {
                    tracing::info!(image, seconds = time.as_secs_f64(), "{done}");
                    self.metrics.image("made", time);
                    self.queue.done(&job)
                }
                Ok(BuildOutcome::LeftAlone(why)) => {
                    tracing::info!(image, "{why}");
                    self.metrics.image("skipped", time);
                    self.queue.done(&job)
                }
                Err(failure) => self.failed(&job, &image, failure, time),
            };
            if let Err(error) = stored {
                // the job is made once more after a restart, and finds its index there
                tracing::error!(image, error = error.report(), "the queue cannot be written");
                self.queue.later(&job);
            }
        }
    }

    /// Temporary failures are retried. An image that is missing may be about to arrive and is looked for a few times; then a missing tag
    /// is dropped, because it may have been deleted, and for everything else the job is kept with the reason.
    fn failed(&self, job: &Job, image: &str, failure: BuildFailure, time: Duration) -> Result<()> {
        let delayed = |error: &Error| {
            tracing::warn!(
                image,
                error = error.report(),
                "no index was made; the image will be retried"
            );
            self.metrics.image("delayed", time);
        };
        match failure {
            BuildFailure::Passing(error) => {
                delayed(&error);
                self.queue.later(job);
                Ok(())
            }
            BuildFailure::NoTag(error) | BuildFailure::Incomplete(error)
                if self.queue.look_again(job) =>
            {
                delayed(&error);
                Ok(())
            }
            BuildFailure::NoTag(error) => {
                tracing::warn!(
                    image,
                    "the tag does not exist; no index is made: {}",
                    error.report()
                );
                self.metrics.image("skipped", time);
                self.queue.done(job)
            }
            BuildFailure::Incomplete(error) | BuildFailure::Lasting(error) => {
                let report = error.report();
                tracing::error!(image, error = report, "no index can be made");
                self.metrics.image("failed", time);
                self.queue.give_up(job, &report)
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let service = service_fn(move |request| {
            let service = Arc::clone(&self);
            async move { service.answer(request).await }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(REQUEST_TIME);
        if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
            tracing::debug!(%error, "a client disconnected");
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let answer = self.route(request).await;
        let unauthorized = answer.status == StatusCode::UNAUTHORIZED;
        let mut response = Response::new(Full::new(Bytes::from(answer.body)));
        *response.status_mut() = answer.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
        if unauthorized {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        Ok(response)
    }

    async fn route<B>(&self, request: Request<B>) -> HttpAnswer
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => {
                HttpAnswer::json(StatusCode::OK, &json!(self.queue.counts()))
            }
            (&Method::GET, "/metrics") => HttpAnswer {
                status: StatusCode::OK,
                content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                body: self.metrics.text(self.queue.counts()),
            },
            (&Method::POST, "/" | "/events") => self.post(request).await,
            (_, "/" | "/events" | "/healthz" | "/metrics") => HttpAnswer::error(
                StatusCode::METHOD_NOT_ALLOWED,
                "POST events to /events; GET /healthz and /metrics",
            ),
            _ => HttpAnswer::error(StatusCode::NOT_FOUND, "POST events to /events"),
        }
    }

    async fn post<B>(&self, request: Request<B>) -> HttpAnswer
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        if let Some(secret) = &self.secret
            && !secret.is_in(request.headers().get(AUTHORIZATION))
        {
            return self.refuse(
                StatusCode::UNAUTHORIZED,
                "the Authorization header does not have the secret of this builder",
            );
        }
        let body = Limited::new(request.into_body(), BODY_LIMIT).collect();
        let body = match timeout(REQUEST_TIME, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                return self.refuse(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    &format!("the event is longer than {BODY_LIMIT} bytes"),
                );
            }
            Ok(Err(error)) => {
                return self.refuse(
                    StatusCode::BAD_REQUEST,
                    &format!("the event was cut short: {error}"),
                );
            }
            Err(_) => {
                return self.refuse(
                    StatusCode::REQUEST_TIMEOUT,
                    "the event did not arrive in time",
                );
            }
        };
        self.take(&body)
    }

    /// Takes a body of events. If one of them is valid, the body is accepted whatever the others are: the sender would otherwise repeat
    /// all of them for ever.
    fn take(&self, body: &[u8]) -> HttpAnswer {
        let events = match event::parse(body) {
            Ok(events) => events,
            Err(error) => return self.refuse(StatusCode::BAD_REQUEST, &report(&error)),
        };
        let (mut jobs, mut ignored) = (Vec::new(), events.others);
        let unreadable = events.unreadable.iter();
        let mut refused: Vec<_> = unreadable
            .map(|error| (StatusCode::BAD_REQUEST, report(error)))
            .collect();
        for push in &events.pushes {
            match self.rules.judge(push) {
                Ok(Verdict::Wanted(job)) => jobs.push(job),
                Ok(Verdict::Ignored(why)) => {
                    tracing::debug!(
                        repository = push.repository,
                        tag = push.tag,
                        "ignored: {why}"
                    );
                    ignored += 1;
                }
                Err(error) => {
                    let status = match error {
                        rules::Error::OtherRegistry { .. } => StatusCode::FORBIDDEN,
                        rules::Error::NoImage(_) => StatusCode::UNPROCESSABLE_ENTITY,
                    };
                    refused.push((status, report(&error)));
                }
            }
        }
        if let (Some((status, why)), true) = (refused.first(), jobs.is_empty() && ignored == 0) {
            return self.refuse(*status, why);
        }
        if let Err(error) = self.queue.add(&jobs) {
            tracing::error!(error = error.report(), "an event cannot be queued");
            return HttpAnswer::error(StatusCode::SERVICE_UNAVAILABLE, &error.report());
        }
        for _ in &refused {
            self.metrics.event("refused");
        }
        if let Some((_, why)) = refused.first() {
            tracing::warn!(
                refused = refused.len(),
                "a request with several events was accepted, without those that were refused; the first: {why}"
            );
        }
        let outcome = if jobs.is_empty() {
            "ignored"
        } else {
            "accepted"
        };
        self.metrics.event(outcome);
        HttpAnswer::json(
            StatusCode::ACCEPTED,
            &json!({ "queued": jobs, "ignored": ignored, "refused": refused.len() }),
        )
    }

    fn refuse(&self, status: StatusCode, why: &str) -> HttpAnswer {
        self.metrics.event("refused");
        tracing::warn!(status = status.as_u16(), "an event was refused: {why}");
        HttpAnswer::error(status, why)
    }
}

impl HttpAnswer {
    fn json(status: StatusCode, value: &serde_json::Value) -> Self {
        Self {
            status,
            content_type: "application/json",
            body: value.to_string(),
        }
    }

    fn error(status: StatusCode, text: &str) -> Self {
        Self::json(status, &json!({ "error": text }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{builder::rules::Target, engine::open::platforms::Platforms, soci::index::Version};

    #[tokio::test]
    async fn a_tag_that_is_gone_is_done_with_and_what_stays_incomplete_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let rules = Rules {
            registry: "registry.example".to_owned(),
            repositories: vec![],
            tags: vec![],
            platforms: Platforms::Host,
            version: Version::V2,
            target: Target::Replace,
        };
        let service = Service::new(rules, Queue::open(folder.path()).unwrap(), None);
        for (failure, failed) in [
            (BuildFailure::NoTag as fn(Error) -> BuildFailure, 0),
            (BuildFailure::Incomplete, 1),
        ] {
            let job = Job {
                repository: "team/app".to_owned(),
                tag: format!("{failed}"),
            };
            service.queue.add(std::slice::from_ref(&job)).unwrap();
            assert_eq!(service.queue.next().await, job);
            let mut looks = 0;
            while service.queue.counts().waiting + service.queue.counts().running > 0 {
                looks += 1;
                let error = failure(Error::new(Kind::NotFound, "it is not there"));
                let stored = service.failed(&job, "image", error, Duration::ZERO);
                stored.unwrap();
            }
            assert!(looks > 1, "it is looked for again");
            assert_eq!(service.queue.counts().failed, failed);
        }
    }
}
