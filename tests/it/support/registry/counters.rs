//! What was asked and sent.

use std::{collections::BTreeMap, ops::Range};

use hyper::Method;
use socinbd::oci::Digest;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `/v2/`.
    Ping,
    /// A manifest, by tag or digest.
    Manifest,
    /// A blob at the registry itself, also when the answer is a redirect.
    Blob,
    /// A blob at the second listener, where redirects lead.
    Cdn,
    /// The token service.
    Token,
    /// The referrers API.
    Referrers,
    /// The list of tags.
    Tags,
    /// Blob uploads.
    Upload,
    /// Anything else.
    Other,
}

/// One request, as it came and as it was answered.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it is about.
    pub kind: Kind,
    /// The method.
    pub method: Method,
    /// The path, without its query.
    pub path: String,
    /// The query.
    pub query: String,
    /// The blob's or manifest's digest, where the path has one.
    pub digest: Option<Digest>,
    /// The range asked for; its end is exclusive, `u64::MAX` where it is open.
    pub range: Option<Range<u64>>,
    /// All headers of the request, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The status sent; 0 where none was.
    pub status: u16,
    /// Bytes of the body handed to the connection.
    pub bytes: u64,
}

impl Entry {
    pub(super) fn is_data(&self) -> bool {
        self.kind == Kind::Cdn
            || self.kind == Kind::Blob && !(300..400).contains(&self.status) && self.status != 401
    }
}

/// Requests and bytes of one thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests.
    pub requests: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
}

/// What was asked and sent since the start, or since [`Registry::reset_counters`].
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Every request, in the order in which they came.
    pub log: Vec<Entry>,
}

impl Counters {
    /// Of all requests.
    pub fn total(&self) -> Count {
        self.of(|_| true)
    }

    /// Of one kind.
    pub fn kind(&self, kind: Kind) -> Count {
        self.of(|entry| entry.kind == kind)
    }

    /// Of one blob, at both listeners, without the redirects.
    pub fn blob(&self, digest: &Digest) -> Count {
        self.of(|entry| {
            entry.is_data() && entry.digest == Some(*digest) && entry.method == Method::GET
        })
    }

    /// Of all blobs, at both listeners, without the redirects.
    pub fn blobs(&self) -> Count {
        self.of(|entry| entry.is_data() && entry.method == Method::GET)
    }

    /// The ranges asked of one blob where its bytes were sent, in order; requests without a range are left out.
    pub fn ranges(&self, digest: &Digest) -> Vec<Range<u64>> {
        self.log
            .iter()
            .filter(|entry| entry.is_data() && entry.digest == Some(*digest))
            .filter_map(|entry| entry.range.clone())
            .collect()
    }

    pub(super) fn of(&self, which: impl Fn(&Entry) -> bool) -> Count {
        let mut count = Count::default();
        for entry in self.log.iter().filter(|entry| which(entry)) {
            count.requests += 1;
            count.bytes += entry.bytes;
        }
        count
    }
}
