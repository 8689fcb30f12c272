//! Any bytes from an NBD client, from the greeting on or as requests on an export: the server answers or closes, and then serves the next.

#![no_main]

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    ops::Range,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use socinbd::{
    error::Error,
    layer::{Allocation, ServedDisk},
    nbd::{Address, Exports, Limits, Server},
    units::DiskOffset,
};

const SIZE: u64 = 1 << 20;

/// A disk of which every other 64 KiB is absent until an input has asked for it.
#[derive(Default)]
struct Disk {
    /// A bit for each 64 KiB that was asked for.
    asked: AtomicU64,
}

impl Disk {
    /// The bits of the 64 KiB in a range that are absent by themselves.
    fn bits(range: &Range<DiskOffset>) -> u64 {
        let parts = range.start.get() >> 16..range.end.get().div_ceil(1 << 16);
        parts.filter(|part| part & 1 == 1).fold(0, |bits, part| bits | 1 << part)
    }
}

impl ServedDisk for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_present(&self, range: Range<DiskOffset>) -> bool {
        assert!(range.start <= range.end && range.end.get() <= SIZE);
        let bits = Self::bits(&range);
        self.asked.load(Ordering::Relaxed) & bits == bits
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> std::io::Result<()> {
        assert!(offset.get() + buffer.len() as u64 <= SIZE);
        buffer.fill(7);
        Ok(())
    }

    fn make_present(
        self: Arc<Self>,
        range: Range<DiskOffset>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<(), Arc<Error>>> + Send>> {
        assert!(range.end.get() <= SIZE);
        self.asked.fetch_or(Self::bits(&range), Ordering::Relaxed);
        Box::pin(std::future::ready(Ok(())))
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        assert!(range.start < range.end && range.end.get() <= SIZE);
        let length = range.end.get() - range.start.get();
        let half = length.div_ceil(2);
        vec![(half, Allocation::Absent), (length - half, Allocation::Zero)]
            .into_iter()
            .filter(|(length, _)| *length > 0)
            .collect()
    }
}

/// A server for all inputs.
struct Served {
    path: PathBuf,
    disk: Arc<Disk>,
    _server: Server,
    _runtime: tokio::runtime::Runtime,
    _folder: tempfile::TempDir,
}

fn served() -> &'static Served {
    static SERVED: OnceLock<Served> = OnceLock::new();
    SERVED.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (mut exports, disk) = (Exports::new(), Arc::new(Disk::default()));
        let export = Arc::clone(&disk) as Arc<dyn ServedDisk>;
        exports
            .add("disk".to_owned(), "a disk".to_owned(), export)
            .expect("a name");
        let limits = Limits {
            handshake: Duration::from_secs(5),
            ..Limits::default()
        };
        let (path, handle) = (folder.path().join("socket"), runtime.handle().clone());
        let server = Server::listen_unix(&path, Arc::new(exports), handle, limits).expect("a server");
        assert_eq!(server.address(), &Address::Unix(path.clone()));
        Served {
            path,
            disk,
            _server: server,
            _runtime: runtime,
            _folder: folder,
        }
    })
}

/// NBD_FLAG_C_FIXED_NEWSTYLE and NO_ZEROES; then NBD_OPT_STRUCTURED_REPLY, and NBD_OPT_GO for the default export.
const GREETING: [u8; 4] = 3_u32.to_be_bytes();
const STRUCTURED: &[u8] = b"IHAVEOPT\0\0\0\x08\0\0\0\0";
const GO: &[u8] = b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let mut sent = Vec::new();
    if choice & 3 > 0 {
        sent.extend_from_slice(&GREETING);
    }
    if choice & 3 == 3 {
        sent.extend_from_slice(STRUCTURED);
    }
    if choice & 2 > 0 {
        sent.extend_from_slice(GO);
    }
    sent.extend_from_slice(bytes);
    served().disk.asked.store(0, Ordering::Relaxed);
    let mut stream = UnixStream::connect(&served().path).expect("it takes the next client");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // a server that has closed already is as good as one that reads on
    let _ = stream.write_all(&sent).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = [0; 1 << 16];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            // libFuzzer's own alarm
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("neither an answer nor an end: {error}"),
        }
    }
});
