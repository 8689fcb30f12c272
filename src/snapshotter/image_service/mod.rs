//! The image service of the CRI, in front of containerd's: requests are passed on, and the credentials of pulls are noted.
//!
//! containerd does not tell a snapshotter the credentials of a pull. So the kubelet is pointed at this service (`imageServiceEndpoint`), which
//! passes its requests and containerd's answers on as they are ([`proxy`]). Of a pull it reads the image and the credentials beside
//! ([`pull`]).

mod proxy;
mod pull;

pub(super) use proxy::ImageServiceProxy;
pub(crate) use proxy::take_over_credentials;
