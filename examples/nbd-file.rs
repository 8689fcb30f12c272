//! Serves one file over NBD: the server of `socinbd::nbd` without images, spans and registries.
//!
//!     cargo run --release --example nbd-file -- FILE SOCKET
//!
//! Ends when its standard input does, and prints what its clients asked for.

use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use futures_util::future::BoxFuture;
use socinbd::{
    error::Error,
    layer::{Allocation, ServedDisk},
    nbd::{Exports, Limits, Server},
    units::DiskOffset,
};

struct Plain {
    file: File,
    size: u64,
}

impl ServedDisk for Plain {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_present(&self, _range: Range<DiskOffset>) -> bool {
        true
    }

    fn read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset.get())
    }

    fn try_read_present(&self, offset: DiskOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let whole = &mut [io::IoSliceMut::new(buffer)];
        let nowait = rustix::io::ReadWriteFlags::NOWAIT;
        let done = match rustix::io::preadv2(&self.file, whole, offset.get(), nowait) {
            Err(rustix::io::Errno::AGAIN) => return Ok(false),
            Ok(count) => count,
            Err(_) => 0,
        };
        let rest = offset.get() + done as u64;
        self.file
            .read_exact_at(&mut buffer[done..], rest)
            .map(|()| true)
    }

    fn make_present(
        self: Arc<Self>,
        _range: Range<DiskOffset>,
    ) -> BoxFuture<'static, Result<(), Arc<Error>>> {
        Box::pin(async { Ok(()) })
    }

    fn allocation(&self, range: Range<DiskOffset>) -> Vec<(u64, Allocation)> {
        vec![(range.end.get() - range.start.get(), Allocation::Present)]
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(file), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: nbd-file FILE SOCKET".into());
    };
    let file = File::open(file)?;
    let size = file.metadata()?.len();
    let exports = Arc::new(Exports::single(Arc::new(Plain { file, size })));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .build()?;
    let server = Server::listen_unix(
        Path::new(&socket),
        Arc::clone(&exports),
        runtime.handle().clone(),
        Limits::default(),
    )
    .map_err(|error| error.report())?;
    io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    println!("{:?}", exports.counters().get());
    Ok(())
}
