//! A limit that hosts share, so that one that does not answer does not use up what the others need.
//!
//! A host may have half of what the other hosts leave: one host alone has half, two have a third each, and something is always left for one
//! more. The requests of one host are served in their order; hosts take turns.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// A larger amount counts as this part of the total: otherwise it would wait until its host has nothing else.
const LARGEST: u64 = 16;

/// A limit, and what is in use of it.
pub(crate) struct FairShare {
    total: u64,
    most: u64,
    state: Mutex<ShareState>,
}

struct ShareState {
    in_use: u64,
    waiting: u64,
    /// Hosts with something in use, or with requests that wait.
    hosts: BTreeMap<String, HostState>,
}

#[derive(Default)]
struct HostState {
    in_use: u64,
    queue: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// An amount that is in use until it is given back or dropped.
pub(crate) struct Share<'a> {
    of: &'a FairShare,
    host: String,
    amount: u64,
}

/// A request that waits. When it is dropped, it waits no more.
struct Waiting<'a> {
    of: &'a FairShare,
    host: &'a str,
    amount: u64,
    granted: oneshot::Receiver<()>,
}

impl FairShare {
    /// `most`: the maximum for one host.
    pub(crate) const fn new(total: u64, most: u64) -> Self {
        Self {
            total,
            most,
            state: Mutex::new(ShareState {
                in_use: 0,
                waiting: 0,
                hosts: BTreeMap::new(),
            }),
        }
    }

    /// Waits until a host may use this amount more.
    pub(crate) async fn acquire(&self, host: &str, amount: u64) -> Share<'_> {
        let amount = amount.min((self.total / LARGEST).max(1));
        if let Some(granted) = self.take_or_queue(host, amount) {
            let mut waiting = Waiting {
                of: self,
                host,
                amount,
                granted,
            };
            // the sender is in the queue until it has sent
            let _ = (&mut waiting.granted).await;
        }
        Share {
            of: self,
            host: host.to_owned(),
            amount,
        }
    }

    /// `None`: the amount is in use from now on.
    fn take_or_queue(&self, host: &str, amount: u64) -> Option<oneshot::Receiver<()>> {
        let mut state = self.lock();
        let ShareState {
            in_use,
            waiting,
            hosts,
        } = &mut *state;
        let of_host = hosts.entry(host.to_owned()).or_default();
        if of_host.queue.is_empty() && self.fits(of_host.in_use, *in_use, amount) {
            of_host.in_use += amount;
            *in_use += amount;
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        of_host.queue.push_back((amount, sender));
        *waiting += 1;
        // the requests before it may have been dropped
        self.grant(&mut state);
        Some(receiver)
    }

    /// The amount in use, and the number of requests that wait.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.in_use, state.waiting)
    }

    fn fits(&self, of_host: u64, of_all: u64, amount: u64) -> bool {
        let others = of_all - of_host; // a part of the sum
        let most = self.most.min(self.total.saturating_sub(others) / 2);
        let is_first = of_host == 0;
        of_all + amount <= self.total && (is_first || of_host + amount <= most)
    }

    /// Serves the requests that fit, one of each host in turn.
    fn grant(&self, state: &mut ShareState) {
        let ShareState {
            in_use,
            waiting,
            hosts,
        } = state;
        let mut has_granted = *waiting > 0;
        while has_granted {
            has_granted = false;
            for host in hosts.values_mut() {
                while host.queue.pop_front_if(|it| it.1.is_closed()).is_some() {}
                let is_next = |it: &mut (u64, _)| self.fits(host.in_use, *in_use, it.0);
                let Some((amount, sender)) = host.queue.pop_front_if(is_next) else {
                    continue;
                };
                // a receiver is dropped under the lock, after it was closed
                if sender.send(()).is_ok() {
                    host.in_use += amount;
                    *in_use += amount;
                    *waiting -= 1;
                }
                has_granted = true;
            }
        }
    }

    /// Ends the use of an amount by a host, and serves what fits now.
    fn end_use(&self, mut state: MutexGuard<'_, ShareState>, host: &str, amount: u64) {
        state.in_use -= amount; // it was added before, as that of the host
        if let Some(of_host) = state.hosts.get_mut(host) {
            of_host.in_use -= amount;
        }
        self.grant(&mut state);
        let is_idle =
            |it: &HostState| it.in_use == 0 && it.queue.iter().all(|one| one.1.is_closed());
        if state.hosts.get(host).is_some_and(is_idle) {
            state.hosts.remove(host);
        }
    }

    fn lock(&self) -> MutexGuard<'_, ShareState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share<'_> {
    /// Gives a part back; not more than there is.
    pub(crate) fn give_back(&mut self, amount: u64) {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        self.of.end_use(self.of.lock(), &self.host, amount);
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.give_back(self.amount);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.granted.is_terminated() {
            return;
        }
        // under the lock nothing is granted meanwhile
        let mut state = self.of.lock();
        let granted = match self.granted.try_recv() {
            Ok(()) => self.amount,
            Err(_) => {
                self.granted.close();
                state.waiting -= 1;
                0
            }
        };
        self.of.end_use(state, self.host, granted);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// What can be had at once.
    fn take<'a>(of: &'a FairShare, host: &str, amount: u64) -> Option<Share<'a>> {
        of.acquire(host, amount).now_or_never()
    }

    /// Takes until no more can be had; the amount.
    fn take_all<'a>(of: &'a FairShare, host: &str, shares: &mut Vec<Share<'a>>) -> u64 {
        let before = shares.len();
        shares.extend(std::iter::from_fn(|| take(of, host, 1)));
        (shares.len() - before) as u64
    }

    #[test]
    fn a_host_has_half_of_what_the_others_leave() {
        let share = FairShare::new(120, 1000);
        let mut shares = Vec::new();
        for (host, expected) in [("a", 60), ("b", 30), ("c", 15), ("d", 7), ("e", 4)] {
            assert_eq!(take_all(&share, host, &mut shares), expected, "{host}");
        }
        // when one has less, the others may have more
        shares.drain(..60);
        assert_eq!(take_all(&share, "b", &mut shares), 17);
        drop(shares);
        assert_eq!(share.counts(), (0, 0));
        assert!(share.lock().hosts.is_empty());
    }

    #[test]
    fn one_host_has_no_more_than_its_maximum_and_a_large_amount_counts_as_less() {
        let share = FairShare::new(320, 50);
        let mut shares = Vec::new();
        assert_eq!(take_all(&share, "a", &mut shares), 50);
        drop(shares);
        let large = take(&share, "a", u64::MAX).unwrap();
        assert_eq!(share.counts().0, 20);
        drop(large);
    }

    #[tokio::test]
    async fn requests_of_a_host_are_served_in_their_order_and_hosts_take_turns() {
        let share = FairShare::new(2, 1);
        let (a, b) = (take(&share, "a", 1), take(&share, "b", 1));
        let order = Mutex::new(Vec::new());
        let ask = |host: &'static str, number: u32| {
            let (share, order) = (&share, &order);
            async move {
                let _share = share.acquire(host, 1).await;
                order.lock().unwrap().push((host, number));
            }
        };
        let begin = async {
            tokio::task::yield_now().await;
            assert_eq!(share.counts(), (2, 5));
            drop((a, b));
        };
        tokio::join!(
            ask("a", 1),
            ask("a", 2),
            ask("a", 3),
            ask("b", 1),
            ask("b", 2),
            begin
        );
        let order = order.into_inner().unwrap();
        let of = |host| order.iter().filter(move |it| it.0 == host).map(|it| it.1);
        assert!(of("a").eq([1, 2, 3]) && of("b").eq([1, 2]), "{order:?}");
        let last_of_b = order.iter().position(|it| *it == ("b", 2)).unwrap();
        assert!(last_of_b < 4, "{order:?}");
        assert!(share.lock().hosts.is_empty());
    }

    #[test]
    fn who_waits_no_more_holds_up_nobody() {
        let share = FairShare::new(64, 64);
        let mut shares = Vec::new();
        take_all(&share, "a", &mut shares);
        let mut large = Box::pin(share.acquire("a", 2));
        let mut small = Box::pin(share.acquire("a", 1));
        assert!((&mut large).now_or_never().is_none() && (&mut small).now_or_never().is_none());
        shares.pop();
        assert!((&mut small).now_or_never().is_none(), "it is the second");
        drop(large);
        assert_eq!(share.counts().1, 0);
        // dropped after it was granted and before it has seen it
        drop(small);
        assert_eq!(share.counts(), (31, 0));
        shares[0].give_back(1);
        shares[0].give_back(1);
        assert_eq!(share.counts(), (30, 0), "not more than there is");
        drop(shares);
        assert!(share.lock().hosts.is_empty());
    }
}
