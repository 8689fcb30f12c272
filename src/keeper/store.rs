//! The daemon's side of a descriptor store.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::fs::{MemfdFlags, memfd_create};

use super::{
    limits::{MAX_DESCRIPTORS, MAX_NAME_BYTES},
    message::{Message, Name, StoreChange},
    notify::{Notify, is_hung_up},
};
use crate::error::{Error, Kind, Result, ResultExt as _};

/// How long the answer to the question takes whether descriptors are kept.
const PROBE_TIME: Duration = Duration::from_secs(5);
/// The name of the descriptor that the question is asked with.
const PROBE: &str = "probe";

/// Keeps descriptors beyond the death of this daemon, by names: the next daemon inherits them. From any thread.
///
/// Where nobody keeps them all calls succeed and do nothing; [`FdStore::is_kept`] says so.
#[derive(Clone, Debug, Default)]
pub struct FdStore(Option<Arc<Kept>>);

#[derive(Debug)]
struct Kept {
    notify: Arc<Notify>,
    /// How many descriptors are in the store, by their name. Locked while it is changed, so that changes of one name come in order.
    names: Mutex<BTreeMap<Name, usize>>,
}

impl FdStore {
    /// The store of whoever runs this daemon, if there is one. `inherited` is in it.
    pub(super) fn of(notify: Arc<Notify>, inherited: BTreeMap<Name, usize>) -> Result<Self> {
        let store = Self(Some(Arc::new(Kept {
            notify,
            names: Mutex::new(inherited),
        })));
        match store.probe()? {
            true => Ok(store),
            false => Ok(Self::default()),
        }
    }

    /// Whether what is put is kept.
    pub fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Keeps copies of descriptors, all or none, instead of those that were under this name before. They are safe when this returns. The next
    /// daemon inherits those of one name in any order.
    pub fn put(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let Some(kept) = &self.0 else {
            return Ok(());
        };
        let name = Name::new(name)?;
        let mut names = kept.names();
        if names.contains_key(&name) {
            kept.change(StoreChange::Remove(name.clone()), &[])?;
            names.remove(&name);
        }
        // a name counts for each of its descriptors, and with a separator
        let bytes_of = |name: &Name, count: usize| count.saturating_mul(name.as_str().len() + 1);
        let count: usize = names.values().sum();
        let bytes: usize = names
            .iter()
            .map(|(name, count)| bytes_of(name, *count))
            .sum();
        if count + descriptors.len() > MAX_DESCRIPTORS
            || bytes + bytes_of(&name, descriptors.len()) > MAX_NAME_BYTES
        {
            return Err(Error::new(
                Kind::Unavailable,
                format!(
                    "the descriptor store is full: {count} descriptors, their names have {bytes} bytes"
                ),
            ));
        }
        kept.change(StoreChange::Put(name.clone()), descriptors)?;
        names.insert(name, descriptors.len());
        Ok(())
    }

    /// Keeps bytes, in memory, instead of what was under this name before.
    pub fn put_bytes(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if !self.is_kept() {
            return Ok(());
        }
        let keeping = || format!("keeping {name} for the next daemon");
        let memory = memfd_create(name, MemfdFlags::CLOEXEC).or_kind(Kind::Io, keeping)?;
        let mut file = File::from(memory);
        file.write_all(bytes).or_kind(Kind::Io, keeping)?;
        self.put(name, &[file.as_fd()])
    }

    /// Keeps what is under this name no longer.
    pub fn remove(&self, name: &str) -> Result<()> {
        let Some(kept) = &self.0 else {
            return Ok(());
        };
        let name = Name::new(name)?;
        let mut names = kept.names();
        if names.remove(&name).is_some() {
            kept.change(StoreChange::Remove(name), &[])?;
        }
        Ok(())
    }

    /// Whether descriptors are kept: one that is not has been closed when a barrier after it has passed.
    fn probe(&self) -> Result<bool> {
        let failed = || "asking for the descriptor store".to_owned();
        let (end, other_end) = std::io::pipe().or_kind(Kind::Io, failed)?;
        self.put(PROBE, &[other_end.as_fd()])?;
        drop(other_end);
        if let Some(kept) = &self.0 {
            kept.notify.barrier(PROBE_TIME)?;
        }
        let is_kept = !is_hung_up(end.as_fd(), Duration::ZERO).or_kind(Kind::Io, failed)?;
        self.remove(PROBE)?;
        Ok(is_kept)
    }
}

impl Kept {
    fn names(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, usize>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: StoreChange, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let message = Message {
            store: Some(change),
            ..Message::default()
        };
        self.notify.send(&message, descriptors)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixDatagram, thread};

    use super::*;
    use crate::kernel::handover;

    /// What runs a daemon and keeps descriptors, or does not; it ends with the first datagram that is `STOPPING=1`, and gives the texts of
    /// all others.
    fn served(keeps: bool, daemon: impl FnOnce(Arc<Notify>)) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = UnixDatagram::bind(&path).unwrap();
        rustix::net::sockopt::set_socket_passcred(&socket, true).unwrap();
        let manager = thread::spawn(move || {
            let (mut kept, mut texts) = (Vec::new(), Vec::new());
            loop {
                let Some(datagram) = handover::receive(&socket, 4096).unwrap() else {
                    thread::yield_now();
                    continue;
                };
                assert_eq!(datagram.sender, std::process::id());
                match String::from_utf8(datagram.bytes).unwrap().as_str() {
                    "STOPPING=1\n" => return texts,
                    "BARRIER=1\n" => assert_eq!(datagram.descriptors.len(), 1),
                    text => {
                        if keeps {
                            kept.extend(datagram.descriptors);
                        }
                        texts.push(text.replace('\n', " ").trim_end().to_owned());
                    }
                }
            }
        });
        let notify = Arc::new(Notify::to(path.as_os_str()).unwrap());
        daemon(Arc::clone(&notify));
        notify.stopping();
        manager.join().unwrap()
    }

    #[test]
    fn what_is_put_under_a_name_replaces_what_it_had() {
        let texts = served(true, |notify| {
            let inherited = BTreeMap::from([(Name::new("old").unwrap(), 1)]);
            let store = FdStore::of(notify, inherited).unwrap();
            assert!(store.is_kept());
            let file = File::open("/dev/null").unwrap();
            store.put("a", &[file.as_fd()]).unwrap();
            store.put("a", &[file.as_fd()]).unwrap();
            store.put("old", &[file.as_fd()]).unwrap();
            store.remove("a").unwrap();
            store.remove("a").unwrap();
            assert!(store.put("a:b", &[file.as_fd()]).is_err());
        });
        let put = |name| format!("FDSTORE=1 FDPOLL=0 FDNAME={name}");
        let remove = |name| format!("FDSTOREREMOVE=1 FDNAME={name}");
        let expected = [
            put("probe"),
            remove("probe"),
            put("a"),
            remove("a"),
            put("a"),
            remove("old"),
            put("old"),
            remove("a"),
        ];
        assert_eq!(texts, expected);
    }

    #[test]
    fn a_manager_that_keeps_nothing_is_found_out() {
        let texts = served(false, |notify| {
            let store = FdStore::of(notify, BTreeMap::new()).unwrap();
            assert!(!store.is_kept());
            store
                .put("a", &[File::open("/dev/null").unwrap().as_fd()])
                .unwrap();
        });
        assert_eq!(texts.len(), 2, "{texts:?}");
    }

    #[test]
    fn a_store_takes_no_more_than_can_be_inherited() {
        served(true, |notify| {
            let store = FdStore::of(notify, BTreeMap::new()).unwrap();
            let file = File::open("/dev/null").unwrap();
            let name = |number| format!("{number:0>255}");
            let full = (0..).find_map(|number| {
                let error = store.put(&name(number), &[file.as_fd()]).err()?;
                Some((number, error))
            });
            let (number, error) = full.unwrap();
            assert_eq!(number, MAX_NAME_BYTES / 256);
            assert!(error.report().contains("is full"), "{}", error.report());
            store.remove(&name(0)).unwrap();
            store.put(&name(number), &[file.as_fd()]).unwrap();
        });
    }

    #[test]
    fn a_manager_that_has_gone_is_an_error_and_one_that_is_back_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = UnixDatagram::bind(&path).unwrap();
        let notify = Notify::to(path.as_os_str()).unwrap();
        notify.ready();
        drop(first);
        let alive = Message {
            is_ready: true,
            ..Message::default()
        };
        assert!(notify.send(&alive, &[]).is_err());
        notify.watchdog(); // nothing but a line in the log
        std::fs::remove_file(&path).unwrap();
        let second = UnixDatagram::bind(&path).unwrap();
        notify.send(&alive, &[]).unwrap();
        let mut text = [0; 100];
        let length = second.recv(&mut text).unwrap();
        assert_eq!(&text[..length], b"READY=1\n");
    }

    #[test]
    fn an_abstract_name_is_an_address() {
        use std::os::linux::net::SocketAddrExt as _;
        let name = format!("socinbd-test-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Notify::to(format!("@{name}").as_ref()).unwrap().ready();
        let mut text = [0; 100];
        let length = socket.recv(&mut text).unwrap();
        assert_eq!(&text[..length], b"READY=1\n");
        assert!(Notify::to("relative".as_ref()).is_err());
    }
}
