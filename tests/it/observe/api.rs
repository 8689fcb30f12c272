//! The API as its documents describe it, asked with curl.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use serde_json::Value;
use socinbd::api::{openapi, routes::ROUTES};

use super::{command, curl, document, get};
use crate::{
    engine::{Host, lifecycle::indexed},
    snapshotter::{
        Snapshotter,
        image::{Container, Image},
    },
    support::{registry::Registry, tars::Layer, wait},
};

#[test]
fn the_openapi_document_is_that_of_this_program() {
    let stored: Value = serde_json::from_str(&document("openapi.json")).unwrap();
    assert!(
        stored == openapi::document(),
        "write it with `cargo run --example openapi > docs/openapi.json`"
    );
}

#[test]
fn each_route_is_in_both_documents_and_no_other() {
    let known: BTreeSet<String> = ROUTES
        .iter()
        .map(|(method, path, _)| format!("{method} {path}"))
        .collect();
    assert_eq!(known.len(), ROUTES.len(), "no route is there twice");
    let prose = document("api.md");
    let rows = prose.lines().filter_map(|line| line.strip_prefix("| `"));
    let listed: BTreeSet<String> = rows
        .map(|row| row.split('`').next().unwrap().to_owned())
        .collect();
    assert_eq!(listed, known);
    let openapi: Value = serde_json::from_str(&document("openapi.json")).unwrap();
    let described: BTreeSet<String> = openapi["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, operations)| {
            let methods = operations.as_object().unwrap().keys();
            methods.map(move |method| format!("{} {path}", method.to_uppercase()))
        })
        .collect();
    assert_eq!(described, known);
}

/// The parts of a value that a schema does not describe, and the required fields that it lacks.
fn faults(value: &Value, schema: &Value, document: &Value, path: &str) -> Vec<String> {
    let mut described = BTreeSet::new();
    let mut found = check(value, schema, document, path, &mut described);
    if let (Value::Object(fields), false) = (value, schema["additionalProperties"].is_object()) {
        let fields = fields.keys().filter(|field| !described.contains(*field));
        found.extend(fields.map(|field| format!("{path}/{field} is not described")));
    }
    found
}

/// As [`faults`], except fields that are not described, since several schemas together may describe an object.
fn check(
    value: &Value,
    schema: &Value,
    document: &Value,
    path: &str,
    described: &mut BTreeSet<String>,
) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(name) = schema["$ref"].as_str() {
        let target = document.pointer(name.trim_start_matches('#')).unwrap();
        found.extend(check(value, target, document, path, described));
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        found.extend(check(value, part, document, path, described));
    }
    for one in ["anyOf", "oneOf"] {
        let Some(choices) = schema[one].as_array() else {
            continue;
        };
        let mut failed = Vec::new();
        let fits = choices.iter().any(|choice| {
            let mut of_choice = BTreeSet::new();
            let wrong = check(value, choice, document, path, &mut of_choice);
            let is_right = wrong.is_empty();
            match is_right {
                true => described.extend(of_choice),
                false => failed.extend(wrong),
            }
            is_right
        });
        if !fits {
            found.push(format!("{path} fits none of {one}: {failed:?}"));
        }
    }
    if let Some(constant) = schema.get("const")
        && constant != value
    {
        found.push(format!("{path} is not {constant}"));
    }
    if let Some(values) = schema["enum"].as_array()
        && !values.contains(value)
    {
        found.push(format!("{path} is none of {values:?}"));
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let is_of = |name: &&str| match *name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{path}: {other}"),
    };
    if !types.is_empty() && !types.iter().any(is_of) {
        found.push(format!("{path} is none of {types:?}: {value}"));
        return found;
    }
    if let Value::Object(fields) = value {
        for name in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap()) {
                found.push(format!("{path} has no {name}"));
            }
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            described.insert(name.clone());
            if let Some(field) = fields.get(name) {
                found.extend(faults(field, property, document, &format!("{path}/{name}")));
            }
        }
    }
    if let Value::Array(items) = value {
        for (number, item) in items.iter().enumerate() {
            let of_item = match schema["prefixItems"].as_array() {
                Some(prefix) => prefix.get(number),
                None => schema.get("items"),
            };
            match of_item {
                Some(of_item) => {
                    found.extend(faults(item, of_item, document, &format!("{path}/{number}")));
                }
                None => found.push(format!("{path}/{number} is not described")),
            }
        }
    }
    found
}

/// A path of the API, and the template of it in the document.
struct Asked<'a> {
    host: &'a Host,
    document: Value,
}

impl Asked<'_> {
    /// Asks, and compares each value of the answer with the schema.
    fn ask(&self, method: &str, template: &str, id: &str, body: Option<&str>) -> Vec<Value> {
        let data: Vec<&str> = body.into_iter().flat_map(|body| ["-d", body]).collect();
        let path = template.replace("{id}", id);
        let text = get(self.host, &[&["-X", method], &data[..]].concat(), &path);
        let operation = &self.document["paths"][template][method.to_lowercase()];
        let content = &operation["responses"]["200"]["content"];
        let (_, content) = content.as_object().unwrap().iter().next().unwrap();
        let values: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        for value in &values {
            let wrong = faults(value, &content["schema"], &self.document, "");
            assert!(
                wrong.is_empty(),
                "{method} {template}: {wrong:#?}\n{value:#}"
            );
        }
        values
    }
}

#[test]
fn what_the_daemon_answers_about_snapshots_is_what_the_document_says() {
    let registry = Registry::start();
    let image = Image::push(&registry, "app", vec![Layer::new().file("a", b"a")], true);
    let snapshotter = Snapshotter::start(&["--unproven", "lazy"]);
    let (_, top) = image.pull(&snapshotter, "default");
    let container = Container::start(&snapshotter, "first", &top);
    let asked = Asked {
        host: &snapshotter.host,
        document: serde_json::from_str(&document("openapi.json")).unwrap(),
    };
    let snapshots = asked.ask("GET", "/v1/snapshots", "", None).remove(0);
    let kinds: Vec<_> = snapshots.as_array().unwrap().iter().collect();
    assert_eq!(kinds.len(), 2, "{snapshots:#}");
    let layer = &kinds[0]["layer"];
    assert_eq!(layer["chain_id"], image.chain[0].to_string());
    assert_eq!(layer["mounted"]["digest"], image.blobs[0].to_string());
    assert_eq!(
        (&kinds[1]["kind"], &kinds[1]["parent"]),
        (&"active".into(), &kinds[0]["name"])
    );
    container.end();
    snapshotter.client().remove_all();
    snapshotter.end();
}

#[test]
fn what_the_daemon_answers_is_what_the_document_says() {
    let host = Host::new();
    let files = Layer::new()
        .file("hello", b"hello\n")
        .file("unread", &vec![7; 300_000]);
    let layout = indexed(&host, vec![files]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    std::fs::read(mountpoint.join("hello")).unwrap();
    let document = serde_json::from_str(&get(&host, &[], "/v1/openapi.json")).unwrap();
    let asked = Asked {
        host: &host,
        document,
    };
    asked.ask("GET", "/v1/daemon", "", None);
    let attachments = asked.ask("GET", "/v1/attachments", "", None);
    assert_eq!(attachments[0][0]["counters"]["waits"], 1);
    let id = attachments[0][0]["id"].as_str().unwrap();
    asked.ask("GET", "/v1/attachments/{id}/why", id, None);
    let fetches = asked.ask("GET", "/v1/attachments/{id}/fetches", id, None);
    let fetch = &fetches[0]["layers"][0]["fetches"][0];
    assert_eq!(
        (&fetch["cause"], &fetch["reason"]),
        (&"hello".into(), &"read".into())
    );
    assert_eq!(fetches[0]["layers"][0]["waits"][0]["path"], "hello");
    let layers = asked.ask("GET", "/v1/layers", "", None);
    assert_eq!(layers[0][0]["attachments"][0]["id"], id);
    asked.ask("GET", "/v1/disks", "", None);
    asked.ask("POST", "/v1/disks/prune", "", Some(r#"{"dry_run":true}"#));
    let pin = serde_json::json!({"reference": registry.reference("app"), "pinned": true});
    asked.ask("POST", "/v1/images/pin", "", Some(&pin.to_string()));
    let checked = asked.ask("POST", "/v1/disks/check", "", Some(r#"{"layers":null}"#));
    assert_eq!(checked.last(), Some(&Value::from("done")));
    asked.ask("POST", "/v1/restore", "", None);
    asked.ask("POST", "/v1/attachments/{id}/mounted", id, None);
    let request = serde_json::json!({
        "reference": registry.reference("app"), "access": {}, "platform": null,
        "index": {"digest": null}, "device": "auto", "writable": false,
        "allow_devices": false, "mountpoint": null,
    });
    let schema = &asked.document["paths"]["/v1/attachments"]["post"]["responses"]["200"];
    let schema = &schema["content"]["application/x-ndjson"]["schema"];
    let body = request.to_string();
    let mut client = command(&host, &["-N", "-d", &body], "/v1/attachments")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let is_attached = lines.map_while(Result::ok).any(|line| {
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            faults(&value, schema, &asked.document, ""),
            [""; 0],
            "{line}"
        );
        value["attached"].is_object()
    });
    assert!(is_attached, "the last line has the attachment");
    // the client disconnects: the image was attached, and is released as it was not mounted
    client.kill().unwrap();
    client.wait().unwrap();
    wait("it is released", || host.list().len() == 1);

    let refused = curl(&host, &["-w", " %{http_code}"], "/v1/nothing");
    let refused = String::from_utf8(refused.stdout).unwrap();
    let (body, status) = refused.rsplit_once(' ').unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!((status, &body["kind"]), ("404", &"not_found".into()));
    let failure = serde_json::json!({"$ref": "#/components/schemas/Failure"});
    assert_eq!(faults(&body, &failure, &asked.document, ""), [""; 0]);

    std::process::Command::new("umount")
        .arg(&mountpoint)
        .status()
        .unwrap();
    asked.ask("DELETE", "/v1/attachments/{id}", id, None);
}
