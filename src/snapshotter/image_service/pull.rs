//! What is read of a pull: `PullImageRequest` of the CRI (`k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`), with the fields that are needed.
//! The request itself is passed on as it came.

use std::fmt;

use prost::Message;

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::Reference,
    source::pull_credentials::{self, Pull, PullAuth},
};

/// The length of what is before a message of gRPC: a byte that says whether it is compressed, and the length of the message.
const PREFIX: usize = 5;

/// `PullImageRequest`.
#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

/// `ImageSpec`.
#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// `AuthConfig`. Its `Debug` has no secret.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig").finish_non_exhaustive()
    }
}

/// Notes the credentials of a pull; `None`: it has none. `body`: that of the request.
pub(super) fn begin(body: &[u8]) -> Result<Option<Pull>> {
    let request = parse(body)?;
    let Some(auth) = request.auth.filter(|auth| *auth != AuthConfig::default()) else {
        return Ok(None);
    };
    let image = request.image.unwrap_or_default().image;
    let image: Reference = image
        .parse()
        .or_kind(Kind::InvalidArgument, || "the image of a pull".to_owned())?;
    let auth = PullAuth {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    };
    pull_credentials::begin(&image, auth)
}

/// The message of a body that has one.
fn parse(body: &[u8]) -> Result<PullImageRequest> {
    let wrong = |what: &str| Error::new(Kind::InvalidArgument, format!("a pull: {what}"));
    let (prefix, message) = body
        .split_at_checked(PREFIX)
        .ok_or_else(|| wrong("the request has no message"))?;
    let [is_compressed, length @ ..] = prefix else {
        return Err(wrong("the request has no message"));
    };
    if *is_compressed != 0 {
        return Err(Error::new(
            Kind::Unsupported,
            "a pull: the request is compressed",
        ));
    }
    let length = length
        .iter()
        .fold(0, |length, byte| length << 8 | usize::from(*byte));
    if length != message.len() {
        return Err(wrong("the request is not one message"));
    }
    // the error of prost has names of fields, and no values
    PullImageRequest::decode(message).or_kind(Kind::InvalidArgument, || "a pull".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn framed(message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap();
        [&[0], &length.to_be_bytes()[..], message].concat()
    }

    #[test]
    fn fields_that_are_not_known_are_left_out() {
        let request = PullImageRequest {
            image: Some(ImageSpec {
                image: "registry.example/app:1".to_owned(),
            }),
            auth: Some(AuthConfig {
                username: "user".to_owned(),
                password: "hunter22".to_owned(),
                ..AuthConfig::default()
            }),
        };
        assert!(!format!("{request:?}").contains("hunter22"));
        // a sandbox configuration, and a field of a later version
        let more = [0x1a, 2, 0x0a, 0, 0xfa, 0x3f, 1, b'x'];
        let body = framed(&[&request.encode_to_vec()[..], &more].concat());
        assert_eq!(parse(&body).unwrap(), request);
        assert!(begin(&body).unwrap().is_some());
    }

    #[test]
    fn pulls_without_credentials_and_wrong_requests_are_told_apart() {
        let anonymous = PullImageRequest {
            image: Some(ImageSpec {
                image: "!".to_owned(),
            }),
            auth: Some(AuthConfig::default()),
        };
        assert!(
            begin(&framed(&anonymous.encode_to_vec()))
                .unwrap()
                .is_none()
        );
        assert!(begin(&framed(&[])).unwrap().is_none());
        let mut compressed = framed(&[]);
        compressed[0] = 1;
        let long = [&framed(&[])[..], &[0]].concat();
        for body in [&b""[..], b"\0\0\0\0", &compressed, &long, &framed(&[0xff])] {
            assert!(begin(body).is_err(), "{body:?}");
        }
        let of = |image: &str| {
            let request = PullImageRequest {
                image: Some(ImageSpec {
                    image: image.to_owned(),
                }),
                auth: Some(AuthConfig {
                    username: "user".to_owned(),
                    ..AuthConfig::default()
                }),
            };
            begin(&framed(&request.encode_to_vec()))
        };
        for image in ["", "!", "oci:/etc", "oci-archive:/x.tar"] {
            assert!(of(image).is_err(), "{image}");
        }
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(message in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = begin(&framed(&message));
            let _ = begin(&message);
        }
    }
}
