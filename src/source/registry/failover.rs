//! Several hosts for one repository: a host that fails is followed by the next, in the order of `hosts.toml`, and those that have failed a
//! short time ago come last.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};

use super::{client::Client, reader::Reader, stream::open};
use crate::{
    error::{Error, Kind, Result},
    oci::{Digest, digest::Hasher},
    source::{
        Limits,
        hosts::{RegistryHost, host::Request, memory},
    },
};

/// A client, and its place in the order of the file.
type Placed = (usize, Arc<Client>);

/// The time limits of a host that others follow: it has one try.
pub(super) fn limits_before_others(limits: Limits) -> Limits {
    Limits {
        control_patience: Duration::ZERO,
        data_patience: Duration::ZERO,
        ..limits
    }
}

/// Those that may be asked for this, in the order in which they are asked.
fn in_order(clients: &[Arc<Client>], request: Request) -> Result<VecDeque<Placed>> {
    let mut allowed: Vec<Placed> = clients
        .iter()
        .cloned()
        .enumerate()
        .filter(|(_, client)| client.host().allows(request))
        .collect();
    if clients.len() > 1 {
        allowed.sort_by_cached_key(|(_, client)| memory::is_last(client.host().root()));
    }
    if allowed.is_empty() {
        let capability = match request {
            Request::Pull => "pull",
            Request::Resolve => "resolve",
            Request::Push => "push",
            Request::Referrers => "referrers",
        };
        let name = clients.first().map_or("", |client| client.name());
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("no host of hosts.toml has the capability {capability:?} for {name}"),
        ));
    }
    Ok(allowed.into())
}

/// The result of the first host that has one.
pub(super) async fn first<T, F>(
    clients: &[Arc<Client>],
    request: Request,
    ask: impl Fn(Arc<Client>) -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut failures = Failures::default();
    for (place, client) in in_order(clients, request)? {
        match ask(Arc::clone(&client)).await {
            Ok(result) => {
                if clients.len() > 1 {
                    memory::answered(client.host().root());
                }
                return Ok(result);
            }
            Err(error) => failures.add(place, &client, error, clients.len() > 1),
        }
    }
    Err(failures.error())
}

/// A list of which a mirror may have a part only: the first that is not empty. Where all that answer have none, it is empty.
pub(super) async fn first_list<T, F>(
    clients: &[Arc<Client>],
    request: Request,
    ask: impl Fn(Arc<Client>) -> F,
) -> Result<Vec<T>>
where
    F: Future<Output = Result<Vec<T>>>,
{
    let mut failures = Failures::default();
    let mut is_answered = false;
    for (place, client) in in_order(clients, request)? {
        // an answer is there, and this host is not waited for
        if is_answered && memory::is_last(client.host().root()) {
            continue;
        }
        match ask(Arc::clone(&client)).await {
            Ok(list) if list.is_empty() => is_answered = true,
            Ok(list) => return Ok(list),
            Err(error) => failures.add(place, &client, error, clients.len() > 1),
        }
    }
    match is_answered {
        true => Ok(Vec::new()),
        false => Err(failures.error()),
    }
}

/// The errors of the hosts so far.
#[derive(Default)]
struct Failures(Vec<(usize, Error)>);

impl Failures {
    fn add(&mut self, place: usize, client: &Client, error: Error, has_others: bool) {
        if has_others {
            note(client.host(), &error);
        }
        self.0.push((place, error));
    }

    /// The error of the host that is the last in the file, which is the registry as a rule; the others are in its text.
    fn error(mut self) -> Error {
        self.0.sort_by_key(|(place, _)| *place);
        let Some((_, last)) = self.0.pop() else {
            return Error::new(Kind::Unavailable, "no host was asked");
        };
        if self.0.is_empty() {
            return last;
        }
        let others: Vec<String> = self.0.iter().map(|(_, error)| error.report()).collect();
        last.context(format!("{}, and then", others.join("; ")))
    }
}

/// Remembers a host that has not answered, or with wrong bytes.
pub(super) fn note(host: &RegistryHost, error: &Error) {
    let is_of_host = matches!(error.kind(), Kind::Unavailable | Kind::Io | Kind::Corrupt);
    if is_of_host && memory::failed(host.root()) {
        tracing::warn!(
            "{} has failed, and other hosts are asked before it for a while: {}",
            host.name(),
            error.report()
        );
    }
}

/// Bytes of a blob in order, from one host after the other: the next one goes on where the last has failed.
pub(super) fn stream(
    clients: &[Arc<Client>],
    digest: &Digest,
    (start, end): (u64, u64),
    size: Option<u64>,
) -> BoxStream<'static, Result<Bytes>> {
    let whole = size.filter(|size| start == 0 && end == *size);
    Failover::begun(clients, digest, (start, end), |failover| Failover {
        size,
        check: whole.map(|_| (Hasher::default(), Vec::new())),
        ..failover
    })
}

/// Like [`stream`], of a range, with this patience for the last host.
pub(super) fn pieces(
    clients: &[Arc<Client>],
    digest: &Digest,
    range: (u64, u64),
    patience: Duration,
) -> BoxStream<'static, Result<Bytes>> {
    Failover::begun(clients, digest, range, |failover| Failover {
        patience: Some(patience),
        ..failover
    })
}

struct Failover {
    waiting: VecDeque<Placed>,
    current: Option<(Placed, BoxStream<'static, Result<Bytes>>)>,
    digest: Digest,
    position: u64,
    end: u64,
    size: Option<u64>,
    /// Of a whole blob: the digest of its bytes so far, and the hosts that have sent them.
    check: Option<(Hasher, Vec<Arc<Client>>)>,
    failures: Failures,
    patience: Option<Duration>,
}

impl Failover {
    /// The bytes of a range, with what `complete` adds.
    fn begun(
        clients: &[Arc<Client>],
        digest: &Digest,
        (start, end): (u64, u64),
        complete: impl FnOnce(Self) -> Self,
    ) -> BoxStream<'static, Result<Bytes>> {
        let waiting = match in_order(clients, Request::Pull) {
            Ok(waiting) => waiting,
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        let failover = Self {
            waiting,
            current: None,
            digest: *digest,
            position: start,
            end,
            size: None,
            check: None,
            failures: Failures::default(),
            patience: None,
        };
        complete(failover).into_stream()
    }

    fn into_stream(self) -> BoxStream<'static, Result<Bytes>> {
        stream::unfold(Some(self), |state| async move {
            let mut state = state?;
            match state.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(state))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        while self.position < self.end {
            let (placed, mut pieces) = match self.current.take() {
                Some(current) => current,
                None => match self.waiting.pop_front() {
                    Some(placed) => {
                        let pieces = self.begin(&placed.1);
                        (placed, pieces)
                    }
                    None => return Err(std::mem::take(&mut self.failures).error()),
                },
            };
            let error = match pieces.next().await {
                Some(Ok(bytes)) => {
                    self.position += bytes.len() as u64;
                    self.check(&placed.1, &bytes)?;
                    self.current = Some((placed, pieces));
                    return Ok(Some(bytes));
                }
                Some(Err(error)) => error,
                None => Error::new(Kind::Corrupt, "the answer ended early"),
            };
            self.failures.add(placed.0, &placed.1, error, true);
        }
        Ok(None)
    }

    /// The bytes from the position on, of this host.
    fn begin(&self, client: &Arc<Client>) -> BoxStream<'static, Result<Bytes>> {
        if let Some(size) = self
            .size
            .filter(|size| self.position == 0 && self.end == *size)
        {
            return open(Arc::clone(client), self.digest, size);
        }
        let mut reader = Reader::new(client, &self.digest, self.position..self.end, self.size);
        if let Some(patience) = self.patience.filter(|_| self.waiting.is_empty()) {
            reader.set_patience(patience);
        }
        reader.into_stream()
    }

    /// Compares a whole blob with its digest before its last bytes are given out. The hosts that have sent wrong bytes are remembered:
    /// which of several it was is not known.
    fn check(&mut self, client: &Arc<Client>, bytes: &[u8]) -> Result<()> {
        let Some((hasher, senders)) = &mut self.check else {
            return Ok(());
        };
        hasher.update(bytes);
        if !senders.last().is_some_and(|last| Arc::ptr_eq(last, client)) {
            senders.push(Arc::clone(client));
        }
        if self.position < self.end {
            return Ok(());
        }
        let found = std::mem::take(hasher).finish();
        if found == self.digest {
            memory::answered(client.host().root());
            return Ok(());
        }
        let names: Vec<&str> = senders.iter().map(|sender| sender.name()).collect();
        let error = Error::new(
            Kind::Corrupt,
            format!(
                "reading blob {} of {}: the content does not match the digest (it has {found}); another host is asked first from now on",
                self.digest,
                names.join(" and ")
            ),
        );
        for sender in senders {
            note(sender.host(), &error);
        }
        Err(error)
    }
}
