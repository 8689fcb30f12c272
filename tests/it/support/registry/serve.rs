//! The listeners, and the way of a request.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Request, Response, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::{
    Entry, Fault, Kind, On, Shared, State,
    reply::{Body, full, internal, redirect, refusal, whole},
    request::Asked,
    store::Data,
};

pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>, cdn: bool) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue; // out of descriptors: the next accept says so too
        };
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        {
            let mut state = shared.state();
            state.connections += 1;
            state.most_connections = state.most_connections.max(state.connections);
        }
        tokio::spawn(async move {
            let round_trip = shared.state().link.round_trip;
            super::wait_until(Instant::now() + round_trip).await;
            let service = service_fn(|request| answer(Arc::clone(&shared), request, cdn));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await; // clients that go away are no news here
            shared.state().connections -= 1;
        });
    }
}

pub(super) async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
    cdn: bool,
) -> Result<Response<Body>, Closed> {
    let mut asked = Asked::new(&request, cdn);
    let round_trip = {
        let mut state = shared.state();
        asked.number = state.counters.log.len();
        state.counters.log.push(Entry {
            kind: asked.kind,
            method: asked.method.clone(),
            path: asked.path.clone(),
            query: request.uri().query().unwrap_or("").to_owned(),
            digest: asked.digest,
            range: asked.range.clone(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| {
                    let value = String::from_utf8_lossy(value.as_bytes());
                    (name.as_str().to_owned(), value.into_owned())
                })
                .collect(),
            status: 0,
            bytes: 0,
        });
        state.link.round_trip
    };
    super::wait_until(Instant::now() + round_trip).await;
    let body = match request.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return Err(Closed),
    };
    let reply = respond(&shared, &asked, body).await;
    if let (Ok(reply), Some(entry)) = (&reply, shared.state().counters.log.get_mut(asked.number)) {
        entry.status = reply.status().as_u16();
    }
    reply
}

/// The connection is to end without an answer.
#[derive(Debug)]
pub(super) struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("closed by script")
    }
}

impl std::error::Error for Closed {}

pub(super) async fn respond(
    shared: &Arc<Shared>,
    asked: &Asked,
    body: Bytes,
) -> Result<Response<Body>, Closed> {
    let fault = shared.state().fault(asked);
    let loses_answer = matches!(fault, Some(Fault::LoseAnswer));
    match &fault {
        Some(Fault::Delay(by)) => tokio::time::sleep(*by).await,
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Close) => return Err(Closed),
        Some(Fault::TakePart { bytes }) => {
            let kept = body.slice(..body.len().min(*bytes as usize));
            shared.state().keep(asked, &kept);
            return Err(Closed);
        }
        Some(Fault::Status { code, retry_after }) => {
            let mut reply = refusal(*code, "FAULT", "a fault of the script");
            if let Some(value) = retry_after
                && let Ok(value) = value.parse()
            {
                reply.headers_mut().insert(header::RETRY_AFTER, value);
            }
            return Ok(reply);
        }
        Some(Fault::Answer {
            code,
            headers,
            body,
        }) => {
            let mut reply = Response::builder().status(*code);
            for (name, value) in headers {
                reply = reply.header(name, value);
            }
            return Ok(reply
                .body(full(body.clone()))
                .unwrap_or_else(|_| internal()));
        }
        Some(Fault::Redirect { location }) => {
            let own = format!("http://{}{}", asked.host, asked.path);
            return Ok(redirect(&location.replace("{self}", &own)));
        }
        Some(Fault::Replace {
            content_type,
            body,
            headers,
        }) => {
            let mut reply = Response::builder().header(header::CONTENT_TYPE, content_type);
            for (name, value) in headers {
                reply = reply.header(name, value);
            }
            let body = shared.body(asked, Data::Memory(body.clone()), None, None);
            return Ok(reply.body(body).unwrap_or_else(|_| internal()));
        }
        _ => {}
    }
    if asked.kind == Kind::Cdn {
        return Ok(shared.cdn_blob(asked, fault));
    }
    if asked.kind == Kind::Token {
        return Ok(shared.state().token(asked, &body));
    }
    if let Some(refused) = shared.state().unauthorized(asked, shared.address) {
        return Ok(refused);
    }
    let reply = match (asked.kind, asked.method.as_str()) {
        (Kind::Ping, _) => whole(200, "application/json", "{}"),
        (Kind::Manifest, "GET" | "HEAD") => shared.manifest(asked, fault),
        (Kind::Manifest, "PUT") => shared.state().put_manifest(asked, body),
        (Kind::Manifest, "DELETE") => shared.state().delete_manifest(asked),
        (Kind::Blob, "GET" | "HEAD") => shared.blob(asked, fault),
        (Kind::Referrers, "GET") => shared.state().referrers(asked),
        (Kind::Tags, "GET") => shared.state().list_tags(asked),
        (Kind::Upload, _) => shared.state().upload(asked, &body),
        _ => refusal(404, "UNSUPPORTED", "nothing here"),
    };
    if loses_answer {
        return Err(Closed);
    }
    Ok(reply)
}

impl State {
    /// The fault that the script has for a request, if any.
    pub(super) fn fault(&mut self, asked: &Asked) -> Option<Fault> {
        let redirected = self.redirects.is_some();
        let data = asked.kind == Kind::Cdn || asked.kind == Kind::Blob && !redirected;
        let allowed = asked.kind == Kind::Cdn || self.is_authorized(asked);
        let rule = self.rules.iter_mut().find_map(|rule| {
            let matches = match rule.on {
                On::Any => true,
                On::Kind(kind) => kind == asked.kind,
                On::Data => data && allowed,
                On::DataOf(digest) => data && allowed && asked.digest == Some(digest),
            };
            (matches && rule.times.hits()).then_some(rule)
        })?;
        Some(rule.fault.clone())
    }
}
