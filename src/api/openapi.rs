//! The OpenAPI document of the API. Its schemas are derived from the types that requests and answers are made of.

use std::collections::BTreeMap;

use hyper::Method;
use schemars::{
    JsonSchema, SchemaGenerator,
    generate::{Contract, SchemaSettings},
};
use serde_json::{Value, json};

use super::{
    AttachLine, CheckLine, DaemonInfo, Failure, HandOver, PinRequest, RestoreResult,
    control::{LogFilter, Reloaded},
    routes::{ROUTES, Route},
};
use crate::{
    engine::{
        AttachRequest, AttachmentStatus, Explanation, FetchReport, LayerStatus, SnapshotStatus,
        examine::check::CheckRequest,
        space::{
            image_record::ImageRecord,
            prune::{PruneReport, PruneRequest},
            usage::SpaceReport,
        },
    },
    error::Kind,
};

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";

/// The document, in OpenAPI 3.1.
pub fn document() -> Value {
    let mut schemas = Schemas::new();
    let mut paths: BTreeMap<&str, serde_json::Map<String, Value>> = BTreeMap::new();
    for (method, path, route) in ROUTES {
        let described = schemas.describe(route);
        let name = method.as_str().to_ascii_lowercase();
        let operation = described.operation(path, &method, schemas.answer::<Failure>());
        paths.entry(path).or_default().insert(name, operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "socinbd",
            "version": "1",
            "description": "The API of the daemon, HTTP/1.1 on the Unix socket <run-dir>/socinbd.sock. See docs/api.md.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost", "description": "The host name has no meaning" }],
        "paths": paths,
        "components": { "schemas": schemas.definitions() },
    })
}

/// What a route takes and answers.
struct Described {
    summary: &'static str,
    request: Option<Value>,
    /// The media types and the schema of the answer.
    answer: (&'static [&'static str], Value),
    /// Further parameters.
    parameters: Vec<Value>,
}

impl Described {
    fn operation(self, path: &str, method: &Method, failure: Value) -> Value {
        let mut parameters = self.parameters;
        if path.contains("{id}") {
            parameters.insert(
                0,
                json!({
                    "name": "id", "in": "path", "required": true,
                    "description": "The ID of an attachment",
                    "schema": { "type": "string" },
                }),
            );
        }
        let content = |types: &[&str], schema: &Value| -> Value {
            let of_type = |name: &&str| ((*name).to_owned(), json!({ "schema": schema }));
            Value::Object(types.iter().map(of_type).collect())
        };
        let statuses: Vec<String> = Kind::ALL
            .iter()
            .map(|(kind, name)| format!("{} {name}", super::status_of(*kind)))
            .collect();
        let mut operation = json!({
            "summary": self.summary,
            "operationId": format!("{method} {path}"),
            "parameters": parameters,
            "responses": {
                "200": { "description": "Success", "content": content(self.answer.0, &self.answer.1) },
                "default": {
                    "description": format!("Failure; the status is that of its kind: {}", statuses.join(", ")),
                    "content": content(&[JSON], &failure),
                },
            },
        });
        if let Some(request) = self.request {
            operation["requestBody"] =
                json!({ "required": true, "content": content(&[JSON], &request) });
        }
        operation
    }
}

/// The schemas that are used, of requests and of answers: a field with a default may be left out in a request.
struct Schemas {
    requests: SchemaGenerator,
    answers: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let generator = |contract: Contract| {
            let settings = SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
                settings.contract = contract;
            });
            settings.into_generator()
        };
        Self {
            requests: generator(Contract::Deserialize),
            answers: generator(Contract::Serialize),
        }
    }

    fn request<T: JsonSchema>(&mut self) -> Option<Value> {
        Some(self.requests.subschema_for::<T>().to_value())
    }

    fn answer<T: JsonSchema>(&mut self) -> Value {
        self.answers.subschema_for::<T>().to_value()
    }

    fn definitions(mut self) -> BTreeMap<String, Value> {
        let answers = self.answers.take_definitions(true);
        let requests = self.requests.take_definitions(true);
        answers.into_iter().chain(requests).collect()
    }

    fn describe(&mut self, route: Route) -> Described {
        let is_json: &[&str] = &[JSON];
        let plain = |summary, answer| Described {
            summary,
            request: None,
            answer: (is_json, answer),
            parameters: Vec::new(),
        };
        match route {
            Route::Daemon => plain("The identity of the daemon", self.answer::<DaemonInfo>()),
            Route::OpenApi => plain("This document", json!({ "type": "object" })),
            Route::Metrics => Described {
                answer: (
                    &["text/plain", "application/openmetrics-text"],
                    json!({ "type": "string" }),
                ),
                ..plain("The metrics, see docs/metrics.md", Value::Null)
            },
            Route::HandOver => Described {
                request: self.request::<HandOver>(),
                ..plain(
                    "The daemon completes what it has begun, ends, and is followed by another program",
                    self.answer::<()>(),
                )
            },
            Route::List => plain("All attachments", self.answer::<Vec<AttachmentStatus>>()),
            Route::Layers => plain(
                "All layers in use, of attachments and of a snapshotter",
                self.answer::<Vec<LayerStatus>>(),
            ),
            Route::Snapshots => plain(
                "All snapshots of containerd, with their lazy layers",
                self.answer::<Vec<SnapshotStatus>>(),
            ),
            Route::Attach => Described {
                request: self.request::<AttachRequest>(),
                answer: (&[LINES], self.answer::<AttachLine>()),
                ..plain(
                    "Attaches an image. Each line of the answer is one value; the last is `attached`, `failed` or `ending`",
                    Value::Null,
                )
            },
            Route::Mounted => plain(
                "The client has mounted the attachment; from now on it is kept, if the request has asked for it",
                self.answer::<()>(),
            ),
            Route::Release => Described {
                parameters: vec![json!({
                    "name": "keep", "in": "query", "required": false, "allowEmptyValue": true,
                    "description": "A kept attachment stays kept",
                    "schema": { "type": "string", "maxLength": 0 },
                })],
                ..plain(
                    "Releases the devices of an attachment that is not mounted; it is not kept any more",
                    self.answer::<()>(),
                )
            },
            Route::Why => plain(
                "Why an attachment is in its state",
                self.answer::<Explanation>(),
            ),
            Route::Fetches => plain(
                "What was fetched for an attachment, for which files, and what has waited",
                self.answer::<FetchReport>(),
            ),
            Route::Check => Described {
                request: self.request::<CheckRequest>(),
                answer: (&[LINES], self.answer::<CheckLine>()),
                ..plain(
                    "Verifies disks and repairs them. Each line of the answer is one value; the last is `done` or `failed`",
                    Value::Null,
                )
            },
            Route::Restore => plain(
                "Attaches the kept attachments that are not attached",
                self.answer::<Vec<RestoreResult>>(),
            ),
            Route::Space => plain(
                "What the state directory holds",
                self.answer::<SpaceReport>(),
            ),
            Route::Prune => Described {
                request: self.request::<PruneRequest>(),
                ..plain(
                    "Removes disks that nobody uses",
                    self.answer::<PruneReport>(),
                )
            },
            Route::Pin => Described {
                request: self.request::<PinRequest>(),
                ..plain("Pins an image, or unpins it", self.answer::<ImageRecord>())
            },
            Route::Reload => plain(
                "Reads the configuration file again; nothing is changed if it is wrong",
                self.answer::<Reloaded>(),
            ),
            Route::LogFilter => plain("The filter of the log", self.answer::<LogFilter>()),
            Route::SetLogFilter => Described {
                request: self.request::<LogFilter>(),
                ..plain(
                    "Changes the filter of the log until the next reload or restart",
                    self.answer::<LogFilter>(),
                )
            },
        }
    }
}
