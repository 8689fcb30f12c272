//! Requests about the disks and images of the root, and their space.

use std::sync::Arc;

use hyper::{Response, StatusCode};

use super::{
    PinRequest,
    body::{Body, json},
};
use crate::{
    blocking::blocking,
    engine::{
        Engine,
        space::{
            prune::{self, PruneRequest},
            usage,
        },
    },
    error::Result,
};

/// What the root holds.
pub(super) async fn report(engine: &Arc<Engine>) -> Result<Response<Body>> {
    let engine = Arc::clone(engine);
    let report = move || {
        let disks = engine.disks();
        usage::report(
            engine.root(),
            disks.store(),
            disks.images(),
            engine.records(),
        )
    };
    Ok(json(StatusCode::OK, &blocking(report).await?))
}

/// Removes disks that nobody uses.
pub(super) async fn prune(engine: &Arc<Engine>, request: PruneRequest) -> Result<Response<Body>> {
    let engine = Arc::clone(engine);
    let pruned = move || {
        let disks = engine.disks();
        prune::prune(disks.store(), disks.images(), engine.records(), &request)
    };
    Ok(json(StatusCode::OK, &blocking(pruned).await?))
}

/// Pins an image, or unpins it.
pub(super) async fn pin(engine: &Arc<Engine>, request: PinRequest) -> Result<Response<Body>> {
    let engine = Arc::clone(engine);
    let pin = move || {
        engine
            .disks()
            .images()
            .pin(&request.reference, request.pinned)
    };
    Ok(json(StatusCode::OK, &blocking(pin).await?))
}
