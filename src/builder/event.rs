//! The events that registries post when an image is pushed. Pure.
//!
//! Supported are the notifications of the distribution registry (`application/vnd.docker.distribution.events.v1+json` and `.v2+json`),
//! Harbor's webhooks in both formats (its own, and CloudEvents 1.0), and ECR's events as EventBridge delivers them (`ECR Image Action`).

use serde::Deserialize;
use serde_json::Value;

use crate::oci::media_type::MANIFESTS;

/// A manifest that was pushed under a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Push {
    /// The registry of the event, if the event has one that is meant for clients.
    pub registry: Option<String>,
    /// The repository, unchecked.
    pub repository: String,
    /// The tag, unchecked.
    pub tag: String,
}

/// The events of a body. Each is judged by itself.
#[derive(Debug, Default)]
pub struct Events {
    /// The pushes under tags.
    pub pushes: Vec<Push>,
    /// How many others there are: of other actions, and pushes that no tag names (the manifests of a multi-platform image, layers).
    pub others: usize,
    /// Why some of them cannot be read.
    pub unreadable: Vec<Error>,
}

impl Events {
    fn add(&mut self, read: Result<Option<Push>, serde_json::Error>) {
        match read {
            Ok(Some(push)) => self.pushes.push(push),
            Ok(None) => self.others += 1,
            Err(error) => self.unreadable.push(error.into()),
        }
    }
}

/// Why a body is not an event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not JSON, or a known event with a missing field or a field of the wrong type.
    #[error("the event is malformed")]
    Json(#[from] serde_json::Error),
    /// JSON of another kind.
    #[error(
        "the event is of no kind that is known: a distribution registry's notification, a Harbor webhook, or an ECR Image Action of \
         EventBridge"
    )]
    Unknown,
}

/// Parses a body; an error if it is neither an event nor a list of events.
pub fn parse(body: &[u8]) -> Result<Events, Error> {
    let value: Value = serde_json::from_slice(body)?;
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let mut events = Events::default();
    if let Some(batch) = value.get("events").and_then(Value::as_array) {
        for event in batch {
            events.add(distribution(event));
        }
    } else if !text("detail-type").is_empty() && text("source") == "aws.ecr" {
        events.add(ecr(&value));
    } else if let Some(data) = value.get("event_data") {
        harbor(data, text("type") == "PUSH_ARTIFACT", &mut events);
    } else if !text("specversion").is_empty() && text("type").starts_with("harbor.") {
        let data = value.get("data").unwrap_or(&Value::Null);
        harbor(data, text("type") == "harbor.artifact.pushed", &mut events);
    } else {
        return Err(Error::Unknown);
    }
    Ok(events)
}

/// An event of the distribution registry, which sends them in batches.
fn distribution(event: &Value) -> Result<Option<Push>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Event {
        action: String,
    }
    #[derive(Deserialize)]
    struct Pushed {
        target: Target,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Target {
        media_type: Option<String>,
        repository: String,
        tag: Option<String>,
    }
    if Event::deserialize(event)?.action != "push" {
        return Ok(None); // what else there is of it may look as it likes
    }
    let Pushed { target } = Pushed::deserialize(event)?;
    let is_image = |kind: String| MANIFESTS.contains(&kind.as_str());
    if !target.media_type.is_some_and(is_image) {
        return Ok(None);
    }
    let tag = target.tag.filter(|tag| !tag.is_empty());
    Ok(tag.map(|tag| Push {
        // `request.host` is the name under which that one client reached the registry, through any proxy in between
        registry: None,
        repository: target.repository,
        tag,
    }))
}

/// ECR's event in EventBridge's envelope.
fn ecr(event: &Value) -> Result<Option<Push>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Event {
        account: String,
        region: String,
        detail: Detail,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Detail {
        action_type: String,
        result: String,
        repository_name: String,
        image_tag: Option<String>,
    }
    if event["detail-type"] != "ECR Image Action" {
        return Ok(None); // scans, replications
    }
    let Event {
        account,
        region,
        detail,
    } = Event::deserialize(event)?;
    if detail.action_type != "PUSH" || detail.result != "SUCCESS" {
        return Ok(None);
    }
    let suffix = match region.starts_with("cn-") {
        true => "amazonaws.com.cn",
        false => "amazonaws.com",
    };
    let tag = detail.image_tag.filter(|tag| !tag.is_empty());
    Ok(tag.map(|tag| Push {
        registry: Some(format!("{account}.dkr.ecr.{region}.{suffix}")),
        repository: detail.repository_name,
        tag,
    }))
}

/// Harbor's event, in its own format or in a CloudEvent: the data is the same.
fn harbor(data: &Value, is_push: bool, events: &mut Events) {
    #[derive(Deserialize)]
    struct Data {
        #[serde(default)]
        resources: Vec<Value>,
        repository: Repository,
    }
    #[derive(Deserialize)]
    struct Repository {
        repo_full_name: String,
    }
    #[derive(Deserialize)]
    struct Resource {
        tag: Option<String>,
        resource_url: Option<String>,
    }
    if !is_push {
        return events.add(Ok(None));
    }
    let data = match Data::deserialize(data) {
        Ok(data) => data,
        Err(error) => return events.add(Err(error)),
    };
    for resource in &data.resources {
        events.add(Resource::deserialize(resource).map(|resource| {
            // if there is no tag, Harbor writes the digest in its place
            let is_tag = |tag: &String| !tag.is_empty() && !tag.contains(':');
            let registry = resource.resource_url.as_deref();
            let registry = registry.and_then(|url| url.split_once('/'));
            resource.tag.filter(is_tag).map(|tag| Push {
                registry: registry.map(|(host, _)| host.to_owned()),
                repository: data.repository.repo_full_name.clone(),
                tag,
            })
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::media_type::{DOCKER_LIST, OCI_MANIFEST};

    const DIGEST: &str = "sha256:e7cd73b5d0e5f3e4a4b2d1c7b1e1a2f3e4a4b2d1c7b1e1a2f3e4a4b2d1c7b1e1";

    fn push(registry: Option<&str>) -> Push {
        Push {
            registry: registry.map(str::to_owned),
            repository: "team/app".to_owned(),
            tag: "1.2".to_owned(),
        }
    }

    /// The pushes of a body all of whose events can be read.
    fn pushes(body: &str) -> Vec<Push> {
        let events = parse(body.as_bytes()).unwrap();
        assert!(events.unreadable.is_empty(), "{:?}", events.unreadable);
        events.pushes
    }

    #[test]
    fn a_distribution_registry_s_notification() {
        let event = |action: &str, media_type: &str, tag: &str| {
            format!(
                r#"{{"id":"320678d8","timestamp":"2026-03-09T14:44:26.402973972-08:00","action":"{action}","target":{{"mediaType":"{media_type}","size":708,"digest":"{DIGEST}","length":708,"repository":"team/app","url":"http://192.0.2.1:5000/v2/team/app/manifests/{DIGEST}"{tag}}},"request":{{"id":"6df24a34","addr":"192.0.2.1:42961","host":"192.0.2.1:5000","method":"PUT","useragent":"curl/7.38.0"}},"actor":{{}},"source":{{"addr":"xtal.local:5000","instanceID":"a53db899"}}}}"#
            )
        };
        let tag = r#","tag":"1.2""#;
        let body = format!(
            r#"{{"events":[{},{},{},{},{}]}}"#,
            event("push", OCI_MANIFEST, tag),
            event("pull", OCI_MANIFEST, tag),
            event("push", OCI_MANIFEST, ""),
            event("push", "application/octet-stream", ""),
            event("push", DOCKER_LIST, tag),
        );
        assert_eq!(pushes(&body), [push(None), push(None)]);
        assert_eq!(pushes(r#"{"events":[]}"#), []);
    }

    #[test]
    fn harbor_s_webhooks_in_both_formats() {
        let data = format!(
            r#"{{"resources":[{{"digest":"{DIGEST}","tag":"1.2","resource_url":"harbor.example:8443/team/app:1.2"}},{{"digest":"{DIGEST}","tag":"{DIGEST}","resource_url":"harbor.example:8443/team/app@{DIGEST}"}}],"repository":{{"date_created":1586922308,"name":"app","namespace":"team","repo_full_name":"team/app","repo_type":"private"}}}}"#
        );
        let own = |kind: &str| {
            format!(
                r#"{{"type":"{kind}","occur_at":1586922308,"operator":"admin","event_data":{data}}}"#
            )
        };
        let cloud = |kind: &str| {
            format!(
                r#"{{"specversion":"1.0","id":"4b2f89a6","source":"/projects/1/webhook/policies/15","type":"{kind}","datacontenttype":"application/json","time":"2026-04-03T06:26:12Z","data":{data},"operator":"admin"}}"#
            )
        };
        for body in [own("PUSH_ARTIFACT"), cloud("harbor.artifact.pushed")] {
            assert_eq!(pushes(&body), [push(Some("harbor.example:8443"))]);
        }
        for body in [own("PULL_ARTIFACT"), cloud("harbor.artifact.deleted")] {
            assert_eq!(pushes(&body), []);
        }
    }

    #[test]
    fn ecr_s_events_through_eventbridge() {
        let body = |action: &str, region: &str| {
            format!(
                r#"{{"version":"0","id":"13cde686","detail-type":"ECR Image Action","source":"aws.ecr","account":"123456789012","time":"2026-11-16T01:54:34Z","region":"{region}","resources":[],"detail":{{"result":"SUCCESS","repository-name":"team/app","image-digest":"{DIGEST}","action-type":"{action}","image-tag":"1.2"}}}}"#
            )
        };
        let host = "123456789012.dkr.ecr.us-west-2.amazonaws.com";
        assert_eq!(pushes(&body("PUSH", "us-west-2")), [push(Some(host))]);
        let host = "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn";
        assert_eq!(pushes(&body("PUSH", "cn-north-1")), [push(Some(host))]);
        assert_eq!(pushes(&body("DELETE", "us-west-2")), []);
    }

    #[test]
    fn what_is_no_event_is_an_error() {
        assert!(matches!(parse(b"{"), Err(Error::Json(_))));
        assert!(matches!(parse(b"{}"), Err(Error::Unknown)));
        assert!(matches!(parse(b"[]"), Err(Error::Unknown)));
        assert!(matches!(
            parse(br#"{"source":"aws.ecr"}"#),
            Err(Error::Unknown)
        ));
        let other = br#"{"source":"aws.s3","detail-type":"Object Created","account":"1","region":"r","detail":{}}"#;
        assert!(matches!(parse(other), Err(Error::Unknown)));
    }

    #[test]
    fn an_event_that_cannot_be_read_does_not_spoil_the_others() {
        let target = format!(r#""mediaType":"{OCI_MANIFEST}","repository":"team/app""#);
        let good = format!(r#"{{"action":"push","target":{{{target},"tag":"1.2"}}}}"#);
        let bad = [
            "{}".to_owned(),
            "7".to_owned(),
            "null".to_owned(),
            r#"{"action":"push"}"#.to_owned(),
            r#"{"action":"push","target":{"tag":"1.2"}}"#.to_owned(),
            format!(r#"{{"action":"push","target":{{{target},"tag":{{}}}}}}"#),
        ];
        let others = [
            r#"{"action":"pull"}"#.to_owned(),
            r#"{"action":"delete","target":{"digest":7}}"#.to_owned(),
            format!(r#"{{"action":"push","target":{{{target},"tag":null}}}}"#),
            r#"{"action":"push","target":{"mediaType":null,"repository":"team/app","tag":"1.2"}}"#
                .to_owned(),
        ];
        let all = [
            &bad[..],
            std::slice::from_ref(&good),
            &others,
            std::slice::from_ref(&good),
        ]
        .concat();
        let events = parse(format!(r#"{{"events":[{}]}}"#, all.join(",")).as_bytes()).unwrap();
        assert_eq!(events.pushes, [push(None), push(None)]);
        assert_eq!((events.unreadable.len(), events.others), (6, 4));

        let body = r#"{"type":"PUSH_ARTIFACT","event_data":{"resources":[{"tag":7},{"tag":"1.2"},{"tag":null}],"repository":{"repo_full_name":"team/app"}}}"#;
        let events = parse(body.as_bytes()).unwrap();
        assert_eq!(events.pushes, [push(None)]);
        assert_eq!((events.unreadable.len(), events.others), (1, 1));
        for body in [
            r#"{"type":"PUSH_ARTIFACT","event_data":{}}"#,
            r#"{"source":"aws.ecr","detail-type":"ECR Image Action","detail":7}"#,
        ] {
            assert_eq!(
                parse(body.as_bytes()).unwrap().unreadable.len(),
                1,
                "{body}"
            );
        }
        for body in [
            r#"{"type":7,"event_data":{}}"#,
            r#"{"type":"QUOTA_EXCEED","event_data":{"resources":"none"}}"#,
            r#"{"source":"aws.ecr","detail-type":"ECR Image Scan","detail":7}"#,
        ] {
            assert_eq!(parse(body.as_bytes()).unwrap().others, 1, "{body}");
        }
    }
}
