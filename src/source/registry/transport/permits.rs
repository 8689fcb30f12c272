//! Limits of the requests and of the bytes that are in flight: for each host, and for the process.
//!
//! Each request has a connection of its own, because HTTP/2 is off. So the limits bound the connections, too: many attaches at once, or a
//! registry that is slow to answer, cause no more of them. A request waits for its permit without a time limit; its own limits begin with it.

use crate::fair_share::{FairShare, Share};

/// Requests at one host. With 64 KiB each and a round trip of 100 ms they fetch 40 MB a second.
const REQUESTS_PER_HOST: u64 = 64;
/// Requests at all hosts.
const REQUESTS: u64 = 256;
/// Bytes at one host: twice what 1 Gbit/s and a round trip of 200 ms need, and twice the fetches in the background.
const BYTES_PER_HOST: u64 = 64 << 20;
/// Bytes at all hosts.
const BYTES: u64 = 128 << 20;

/// What an answer of unknown length counts as: as a rule it is a small document.
pub(in super::super) const DOCUMENT: u64 = 64 << 10;

/// Bytes that have arrived are given back in steps of this size, because each step takes a lock.
const STEP: u64 = 256 << 10;

static IN_FLIGHT: FairShare = FairShare::new(REQUESTS, REQUESTS_PER_HOST);
static BYTES_IN_FLIGHT: FairShare = FairShare::new(BYTES, BYTES_PER_HOST);

/// What is in flight, and what waits for a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestLoad {
    /// Requests in flight.
    pub(crate) requests: u64,
    /// Bytes that were requested and have not arrived.
    pub(crate) bytes: u64,
    /// Requests that wait until they may be sent.
    pub(crate) waiting: u64,
}

/// The requests of this process at the moment.
pub(crate) fn request_load() -> RequestLoad {
    let (requests, wait_for_request) = IN_FLIGHT.counts();
    let (bytes, wait_for_bytes) = BYTES_IN_FLIGHT.counts();
    RequestLoad {
        // those that have a permit and wait for their bytes were not sent
        requests: requests.saturating_sub(wait_for_bytes),
        bytes,
        waiting: wait_for_request + wait_for_bytes,
    }
}

/// Allows one request, until the head of a failure or the end of a body.
pub(super) struct RequestPermit {
    _request: Share<'static>,
    bytes: Share<'static>,
    /// Bytes that have arrived and were not given back.
    arrived: u64,
}

/// Waits until another request, for an answer of this length, may be sent to a host.
pub(super) async fn permit(host: &str, length: u64) -> RequestPermit {
    let request = IN_FLIGHT.acquire(host, 1).await;
    RequestPermit {
        bytes: BYTES_IN_FLIGHT.acquire(host, length).await,
        _request: request,
        arrived: 0,
    }
}

impl RequestPermit {
    /// So many bytes of the answer have arrived.
    pub(super) fn arrived(&mut self, bytes: u64) {
        self.arrived = self.arrived.saturating_add(bytes);
        if self.arrived >= STEP {
            self.bytes.give_back(self.arrived);
            self.arrived = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// All of the shares of a host; the tests of this module have hosts of their own.
    async fn take_all(host: &str, length: u64) -> Vec<RequestPermit> {
        let mut permits = Vec::new();
        while let Some(permit) = permit(host, length).now_or_never() {
            permits.push(permit);
        }
        permits
    }

    #[tokio::test]
    async fn one_host_does_not_use_up_the_requests_of_another() {
        let mut permits = take_all("slow.example", 0).await;
        assert!(!permits.is_empty() && permits.len() as u64 <= REQUESTS_PER_HOST);
        let other = permit("other.example", 0).now_or_never();
        assert!(other.is_some());
        permits.pop();
        assert!(permit("slow.example", 0).now_or_never().is_some());
    }

    #[tokio::test]
    async fn bytes_at_a_host_are_bounded_and_come_back_as_they_arrive() {
        const LENGTH: u64 = 4 << 20;
        let mut permits = take_all("large.example", LENGTH).await;
        let count = permits.len() as u64;
        assert!(count > 0 && count * LENGTH <= BYTES_PER_HOST, "{count}");
        // the other tests of the process have a few requests
        assert!(
            permit("other-large.example", LENGTH)
                .now_or_never()
                .is_some()
        );
        permits[0].arrived(LENGTH / 2);
        assert!(permit("large.example", LENGTH).now_or_never().is_none());
        permits[0].arrived(LENGTH / 2);
        assert!(permit("large.example", LENGTH).now_or_never().is_some());
    }
}
