//! What registries post when an image is pushed. Pure.
//!
//! Known are the notifications of the distribution registry (`application/vnd.docker.distribution.events.v1+json` and `.v2+json`),
//! Harbor's webhooks in both of their formats (its own, and CloudEvents 1.0), and ECR's events as EventBridge delivers them
//! (`ECR Image Action`).

use serde::Deserialize;
use serde_json::Value;

use crate::oci::{Digest, media_type::MANIFESTS};

/// A manifest that was pushed under a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Push {
    /// The registry that the event names, where it names one that is meant for clients.
    pub registry: Option<String>,
    /// The repository, as it stands in the event: not checked.
    pub repository: String,
    /// The tag, as it stands in the event: not checked.
    pub tag: String,
    /// The manifest.
    pub digest: Option<Digest>,
}

/// Why a body is no event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not JSON, or a known event with a field that is missing or of the wrong type.
    #[error("the event cannot be read")]
    Json(#[from] serde_json::Error),
    /// JSON of another kind.
    #[error(
        "the event is of no kind that is known: a distribution registry's notification, a Harbor webhook, or an ECR Image Action of \
         EventBridge"
    )]
    Unknown,
    /// A digest that is none.
    #[error("the event of {repository:?} has the digest {digest:?}, which is none")]
    Digest {
        /// The repository.
        repository: String,
        /// What stands for the digest.
        digest: String,
    },
}

/// The pushes under tags that a body tells of. Events of other actions, and pushes that no tag names (the manifests of a
/// multi-platform image, layers), give none.
pub fn parse(body: &[u8]) -> Result<Vec<Push>, Error> {
    let value: Value = serde_json::from_slice(body)?;
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    if value.get("events").is_some_and(Value::is_array) {
        Envelope::deserialize(&value)?.pushes()
    } else if text("detail-type").is_some() && text("source").is_some() {
        Ecr::deserialize(&value)?.pushes()
    } else if value.get("event_data").is_some() {
        let event = Harbor::deserialize(&value)?;
        event.event_data.pushes(event.kind == "PUSH_ARTIFACT")
    } else if text("specversion").is_some()
        && text("type").is_some_and(|kind| kind.starts_with("harbor."))
    {
        let event = HarborCloudEvent::deserialize(&value)?;
        event.data.pushes(event.kind == "harbor.artifact.pushed")
    } else {
        Err(Error::Unknown)
    }
}

fn digest(repository: &str, text: Option<String>) -> Result<Option<Digest>, Error> {
    text.filter(|text| !text.is_empty())
        .map(|text| {
            text.parse().map_err(|_| Error::Digest {
                repository: repository.chars().take(255).collect(),
                digest: text.chars().take(255).collect(),
            })
        })
        .transpose()
}

/// The distribution registry's envelope.
#[derive(Deserialize)]
struct Envelope {
    events: Vec<DistributionEvent>,
}

#[derive(Deserialize)]
struct DistributionEvent {
    action: String,
    target: DistributionTarget,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DistributionTarget {
    #[serde(default)]
    media_type: String,
    digest: Option<String>,
    repository: String,
    #[serde(default)]
    tag: String,
}

impl Envelope {
    fn pushes(self) -> Result<Vec<Push>, Error> {
        let is_image = |kind: &str| MANIFESTS.contains(&kind);
        let pushed = self.events.into_iter().filter(|event| {
            event.action == "push"
                && !event.target.tag.is_empty()
                && is_image(&event.target.media_type)
        });
        pushed
            .map(|DistributionEvent { target, .. }| {
                Ok(Push {
                    // `request.host` is how that one client reached it, through whatever stands between
                    registry: None,
                    digest: digest(&target.repository, target.digest)?,
                    repository: target.repository,
                    tag: target.tag,
                })
            })
            .collect()
    }
}

/// ECR's event in EventBridge's envelope.
#[derive(Deserialize)]
struct Ecr {
    source: String,
    account: String,
    region: String,
    #[serde(rename = "detail-type")]
    detail_type: String,
    detail: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct EcrDetail {
    action_type: String,
    result: String,
    repository_name: String,
    image_digest: Option<String>,
    #[serde(default)]
    image_tag: String,
}

impl Ecr {
    fn pushes(self) -> Result<Vec<Push>, Error> {
        if self.source != "aws.ecr" {
            return Err(Error::Unknown);
        }
        if self.detail_type != "ECR Image Action" {
            return Ok(Vec::new()); // scans, replications
        }
        let detail = EcrDetail::deserialize(self.detail)?;
        if detail.action_type != "PUSH" || detail.result != "SUCCESS" || detail.image_tag.is_empty()
        {
            return Ok(Vec::new());
        }
        let suffix = match self.region.starts_with("cn-") {
            true => "amazonaws.com.cn",
            false => "amazonaws.com",
        };
        Ok(vec![Push {
            registry: Some(format!("{}.dkr.ecr.{}.{suffix}", self.account, self.region)),
            digest: digest(&detail.repository_name, detail.image_digest)?,
            repository: detail.repository_name,
            tag: detail.image_tag,
        }])
    }
}

/// Harbor's own format.
#[derive(Deserialize)]
struct Harbor {
    #[serde(rename = "type")]
    kind: String,
    event_data: HarborData,
}

/// The same in a CloudEvent.
#[derive(Deserialize)]
struct HarborCloudEvent {
    #[serde(rename = "type")]
    kind: String,
    data: HarborData,
}

#[derive(Deserialize)]
struct HarborData {
    #[serde(default)]
    resources: Vec<HarborResource>,
    repository: Option<HarborRepository>,
}

#[derive(Deserialize)]
struct HarborResource {
    digest: Option<String>,
    #[serde(default)]
    tag: String,
    resource_url: Option<String>,
}

#[derive(Deserialize)]
struct HarborRepository {
    repo_full_name: String,
}

impl HarborData {
    fn pushes(self, pushed: bool) -> Result<Vec<Push>, Error> {
        let Some(HarborRepository { repo_full_name }) = self.repository.filter(|_| pushed) else {
            return Ok(Vec::new());
        };
        self.resources
            .into_iter()
            // where there is no tag Harbor writes the digest in its place
            .filter(|resource| !resource.tag.is_empty() && !resource.tag.contains(':'))
            .map(|resource| {
                let registry = resource
                    .resource_url
                    .as_deref()
                    .and_then(|url| url.split_once('/'));
                Ok(Push {
                    registry: registry.map(|(host, _)| host.to_owned()),
                    repository: repo_full_name.clone(),
                    digest: digest(&repo_full_name, resource.digest)?,
                    tag: resource.tag,
                })
            })
            .collect()
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
            digest: Some(DIGEST.parse().unwrap()),
        }
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
        assert_eq!(parse(body.as_bytes()).unwrap(), [push(None), push(None)]);
        assert_eq!(parse(br#"{"events":[]}"#).unwrap(), []);
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
            assert_eq!(
                parse(body.as_bytes()).unwrap(),
                [push(Some("harbor.example:8443"))]
            );
        }
        for body in [own("PULL_ARTIFACT"), cloud("harbor.artifact.deleted")] {
            assert_eq!(parse(body.as_bytes()).unwrap(), []);
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
        assert_eq!(
            parse(body("PUSH", "us-west-2").as_bytes()).unwrap(),
            [push(Some(host))]
        );
        let host = "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn";
        assert_eq!(
            parse(body("PUSH", "cn-north-1").as_bytes()).unwrap(),
            [push(Some(host))]
        );
        assert_eq!(parse(body("DELETE", "us-west-2").as_bytes()).unwrap(), []);
    }

    #[test]
    fn what_is_no_event_is_an_error() {
        assert!(matches!(parse(b"{"), Err(Error::Json(_))));
        assert!(matches!(parse(b"{}"), Err(Error::Unknown)));
        assert!(matches!(parse(b"[]"), Err(Error::Unknown)));
        assert!(matches!(parse(br#"{"events":[{}]}"#), Err(Error::Json(_))));
        assert!(matches!(
            parse(br#"{"event_data":{},"type":7}"#),
            Err(Error::Json(_))
        ));
        let other = br#"{"source":"aws.s3","detail-type":"Object Created","account":"1","region":"r","detail":{}}"#;
        assert!(matches!(parse(other), Err(Error::Unknown)));
        let text = format!(
            r#"{{"events":[{{"action":"push","target":{{"mediaType":"{OCI_MANIFEST}","repository":"a","tag":"b","digest":"sha256:12"}}}}]}}"#
        );
        assert!(matches!(parse(text.as_bytes()), Err(Error::Digest { .. })));
    }
}
