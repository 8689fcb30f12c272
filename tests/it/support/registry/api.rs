//! What changes a repository, and its lists.

use bytes::Bytes;
use hyper::{Method, Response, header};
use serde_json::{Value, json};
use socinbd::oci::Digest;

use super::{
    INDEX, Referrers, State,
    reply::{Body, created, empty, full, internal, refusal, whole},
    request::Asked,
    store::Data,
};

impl State {
    pub(super) fn put_manifest(&mut self, asked: &Asked, body: Bytes) -> Response<Body> {
        let digest = Digest::of(&body);
        if asked.digest.is_some_and(|named| named != digest) {
            return refusal(400, "DIGEST_INVALID", "other bytes than the digest's");
        }
        let tag = asked.digest.is_none().then_some(asked.rest.as_str());
        let named = self.repositories.get(&asked.repository);
        let named = named.and_then(|repository| repository.tags.get(tag?));
        if self.keeps_tags && named.is_some_and(|named| *named != digest) {
            let message = format!(
                "The image tag '{}' already exists in the '{}' repository and cannot be overwritten because the tag is immutable.",
                asked.rest, asked.repository
            );
            return refusal(400, "TAG_INVALID", &message);
        }
        let subject = serde_json::from_slice::<Value>(&body)
            .ok()
            .and_then(|manifest| manifest["subject"]["digest"].as_str().map(str::to_owned));
        self.repositories
            .entry(asked.repository.clone())
            .or_default()
            .put_manifest(&asked.content_type, body, tag);
        let mut reply = Response::builder()
            .status(201)
            .header("docker-content-digest", digest.to_string())
            .header(
                header::LOCATION,
                format!("/v2/{}/manifests/{digest}", asked.repository),
            );
        if let Some(subject) = subject
            && self.referrers_api != Referrers::Absent
        {
            reply = reply.header("oci-subject", subject);
        }
        reply.body(empty()).unwrap_or_else(|_| internal())
    }

    pub(super) fn delete_manifest(&mut self, asked: &Asked) -> Response<Body> {
        let mut removed = false;
        if let (Some(digest), Some(repository)) =
            (asked.digest, self.repositories.get_mut(&asked.repository))
        {
            removed = repository.manifests.remove(&digest).is_some();
            repository.order.retain(|other| *other != digest);
            repository.tags.retain(|_, other| *other != digest);
        }
        match removed {
            true => whole(202, "text/plain", ""),
            false => refusal(404, "MANIFEST_UNKNOWN", "no such manifest"),
        }
    }

    pub(super) fn list_tags(&mut self, asked: &Asked) -> Response<Body> {
        match self.repositories.get(&asked.repository) {
            Some(repository) => whole(
                200,
                "application/json",
                &json!({ "name": asked.repository, "tags": repository.tags.keys().collect::<Vec<_>>() })
                    .to_string(),
            ),
            None => refusal(404, "NAME_UNKNOWN", "no such repository"),
        }
    }

    pub(super) fn referrers(&mut self, asked: &Asked) -> Response<Body> {
        let Referrers::Present {
            per_answer,
            filters,
        } = self.referrers_api
        else {
            return whole(404, "text/plain", "404 page not found\n");
        };
        let Some(repository) = self.repositories.get(&asked.repository) else {
            return refusal(404, "NAME_UNKNOWN", "no such repository");
        };
        let Some(subject) = asked.digest else {
            return refusal(400, "DIGEST_INVALID", "a subject's digest is needed");
        };
        let mut found = repository.referrers(&subject);
        let wanted = asked.query.get("artifactType");
        if let (true, Some(wanted)) = (filters, wanted) {
            found.retain(|descriptor| descriptor["artifactType"] == wanted.as_str());
        }
        let from: usize = asked
            .query
            .get("from")
            .and_then(|from| from.parse().ok())
            .unwrap_or(0);
        let total = found.len();
        let mut answer: Vec<Value> = found.drain(from.min(total)..).collect();
        let mut reply = Response::builder().header(header::CONTENT_TYPE, INDEX);
        if filters && wanted.is_some() {
            reply = reply.header("oci-filters-applied", "artifactType");
        }
        if per_answer > 0 && answer.len() > per_answer {
            answer.truncate(per_answer);
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            if let Some(wanted) = wanted {
                query.append_pair("artifactType", wanted);
            }
            query.append_pair("from", &(from + per_answer).to_string());
            let next = format!(
                "</v2/{}/referrers/{subject}?{}>; rel=\"next\"",
                asked.repository,
                query.finish()
            );
            reply = reply.header(header::LINK, next);
        }
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": answer });
        let body = full(index.to_string().into());
        reply.body(body).unwrap_or_else(|_| internal())
    }

    /// Keeps a part of an upload's body.
    pub(super) fn keep(&mut self, asked: &Asked, body: &[u8]) {
        let upload = asked
            .rest
            .parse()
            .ok()
            .and_then(|id: u64| self.uploads.get_mut(&id));
        if let Some(so_far) = upload {
            so_far.extend_from_slice(body);
        }
    }

    pub(super) fn upload(&mut self, asked: &Asked, body: &[u8]) -> Response<Body> {
        let repository = asked.repository.clone();
        let id: Option<u64> = asked.rest.parse().ok();
        let id = match (asked.method.as_str(), id) {
            ("POST", None) => {
                if let Some(digest) = asked.query.get("mount").and_then(|text| text.parse().ok()) {
                    let from = asked
                        .query
                        .get("from")
                        .and_then(|from| self.repositories.get(from));
                    if let Some(data) = from.and_then(|from| from.blobs.get(&digest)).cloned() {
                        let into = self.repositories.entry(repository.clone()).or_default();
                        into.blobs.insert(digest, data);
                        return created(&repository, &digest);
                    }
                }
                self.next_number += 1;
                self.uploads.insert(self.next_number, Vec::new());
                self.next_number
            }
            (_, Some(id)) if self.uploads.contains_key(&id) => id,
            _ => return refusal(404, "BLOB_UPLOAD_UNKNOWN", "no such upload"),
        };
        let Some(so_far) = self.uploads.get_mut(&id) else {
            return internal();
        };
        if asked.upload_from.is_some_and(|from| from != so_far.len()) {
            return refusal(416, "RANGE_INVALID", "the upload is elsewhere");
        }
        so_far.extend_from_slice(body);
        let length = so_far.len();
        if let Some(expected) = asked.query.get("digest") {
            let bytes = self.uploads.remove(&id).unwrap_or_default();
            let digest = Digest::of(&bytes);
            if digest.to_string() != *expected {
                return refusal(400, "DIGEST_INVALID", "other bytes than the digest's");
            }
            let into = self.repositories.entry(repository.clone()).or_default();
            into.blobs.insert(digest, Data::Memory(bytes.into()));
            return created(&repository, &digest);
        }
        let status = if asked.method == Method::GET {
            204
        } else {
            202
        };
        Response::builder()
            .status(status)
            .header(
                header::LOCATION,
                format!("/v2/{repository}/blobs/uploads/{id}"),
            )
            .header("docker-upload-uuid", id.to_string())
            .header(header::RANGE, format!("0-{}", length.saturating_sub(1)))
            .body(empty())
            .unwrap_or_else(|_| internal())
    }
}
