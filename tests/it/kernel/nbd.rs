//! The kernel's nbd driver, in the VM.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use socinbd::{
    error::Kind,
    kernel::{
        blockdev, mount,
        nbd::{self, DeadLinks, LinkEvent, NbdOptions},
    },
};

use super::{eventually, image_of};
use crate::support::vm::in_vm_together;

fn options(backend_id: &str) -> NbdOptions {
    NbdOptions {
        timeout: Duration::from_secs(5),
        dead: Duration::from_secs(60),
        backend_id: backend_id.into(),
    }
}

/// The least of an NBD server: transmission, reads only.
struct Server {
    stop: UnixStream,
    thread: JoinHandle<()>,
}

impl Server {
    fn start(data: &Arc<Vec<u8>>) -> (OwnedFd, Self) {
        let (kernel, stream) = nbd::socket_pair().unwrap();
        let stop = stream.try_clone().unwrap();
        let data = data.clone();
        let thread = std::thread::spawn(move || {
            // ends with the connection
            let _ = Self::serve(stream, &data);
        });
        (kernel, Self { stop, thread })
    }

    fn serve(mut stream: UnixStream, data: &[u8]) -> io::Result<()> {
        loop {
            let mut request = [0; 28];
            stream.read_exact(&mut request)?;
            assert_eq!(request[..4], 0x2560_9513_u32.to_be_bytes());
            let kind = u16::from_be_bytes(request[6..8].try_into().unwrap());
            let offset = u64::from_be_bytes(request[16..24].try_into().unwrap()) as usize;
            let length = u32::from_be_bytes(request[24..28].try_into().unwrap()) as usize;
            // anything but a read is a disconnect
            if kind != 0 {
                return Ok(());
            }
            let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
            reply.extend_from_slice(&0u32.to_be_bytes());
            reply.extend_from_slice(&request[8..16]);
            reply.extend_from_slice(&data[offset..offset + length]);
            stream.write_all(&reply)?;
        }
    }

    fn kill(self) {
        self.stop.shutdown(std::net::Shutdown::Both).unwrap();
        self.thread.join().unwrap();
    }
}

fn servers(data: &Arc<Vec<u8>>, count: usize) -> (Vec<OwnedFd>, Vec<Server>) {
    (0..count).map(|_| Server::start(data)).unzip()
}

/// Reads past the page cache.
fn read_direct(device: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(device)?;
    // direct I/O wants an aligned buffer
    let mut buffer = vec![0; length + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[start..start + length], offset)?;
    Ok(buffer[start..start + length].to_vec())
}

/// All tests of this file.
const ALL: [&str; 7] = [
    "a_device_from_connection_to_mount",
    "a_dead_connection_is_told_and_replaced",
    "reconfigure_of_another_ones_device_is_refused",
    "more_devices_than_the_driver_came_with",
    "a_device_is_opened_without_a_node_in_dev",
    "a_kept_device_stays_until_it_is_disconnected",
    "a_refused_connect_leaves_nothing",
];

#[test]
fn a_device_from_connection_to_mount() {
    in_vm_together(&ALL, || {
        let folder = tempfile::tempdir().unwrap();
        let image = image_of(folder.path(), "a.ext4", &[("hello", "world")]);
        let data = Arc::new(std::fs::read(image).unwrap());
        let (sockets, servers) = servers(&data, 2);
        let device =
            nbd::connect(data.len() as u64, &sockets, &options("socinbd-test:one")).unwrap();
        drop(sockets);
        assert_eq!(blockdev::size(&device.name()).unwrap(), data.len() as u64);
        assert_eq!(device.path(), Path::new(&format!("/dev/{}", device.name())));
        let connected = nbd::connected().unwrap();
        assert_eq!(connected.len(), 1);
        assert_eq!(connected[0].index, device.index());
        assert_eq!(connected[0].backend_id.as_deref(), Some("socinbd-test:one"));
        assert!(connected[0].pid.is_some());
        assert!(std::fs::read(device.path()).unwrap() == *data);
        let queue = Path::new("/sys/block").join(device.name());
        let read = |file: &str| std::fs::read_to_string(queue.join(file)).unwrap();
        assert_eq!(read("ro").trim(), "1");
        assert_eq!(read("queue/logical_block_size").trim(), "4096");
        blockdev::set_read_ahead(&device.name(), Some(1 << 20), 16).unwrap();
        assert_eq!(blockdev::read_ahead(&device.name()).unwrap(), 16);
        assert_eq!(
            read("queue/max_sectors_kb"),
            read("queue/max_hw_sectors_kb"),
            "more than the device can do is cut to what it can"
        );

        let mount = mount::ext4(device.path()).unwrap();
        let path = format!("/proc/self/fd/{}/hello", mount.as_raw_fd());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "world");
        drop(mount);

        drop(device);
        eventually(|| nbd::connected().unwrap().is_empty());
        for server in servers {
            server.thread.join().unwrap();
        }
    });
}

#[test]
fn a_dead_connection_is_told_and_replaced() {
    in_vm_together(&ALL, || {
        let data: Vec<u8> = (0..1 << 20).map(|index: u32| (index / 5) as u8).collect();
        let data = Arc::new(data);
        let mut links = DeadLinks::watch().unwrap();
        let (sockets, old) = servers(&data, 2);
        let device =
            nbd::connect(data.len() as u64, &sockets, &options("socinbd-test:dead")).unwrap();
        assert!(read_direct(device.path(), 0, 65536).unwrap() == data[..65536]);
        assert_eq!(links.next(Some(Duration::ZERO)).unwrap(), []);

        for server in old {
            server.kill();
        }
        let mut dead = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        while dead.len() < 2 && Instant::now() < deadline {
            dead.extend(links.next(Some(Duration::from_secs(1))).unwrap());
        }
        assert_eq!(dead, [LinkEvent::Dead(device.index()); 2]);

        // a read that finds no connection waits for the new ones
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| read_direct(device.path(), 65536, 65536));
            let (sockets, _new) = servers(&data, 2);
            nbd::reconfigure(device.index(), &sockets, &options("socinbd-test:dead")).unwrap();
            assert!(reader.join().unwrap().unwrap() == data[65536..][..65536]);
        });
    });
}

#[test]
fn reconfigure_of_another_ones_device_is_refused() {
    in_vm_together(&ALL, || {
        let data = Arc::new(vec![0; 1 << 20]);
        let (sockets, _servers) = servers(&data, 1);
        let device = nbd::connect(1 << 20, &sockets, &options("socinbd-test:mine")).unwrap();
        let (sockets, _servers) = servers(&data, 1);
        nbd::reconfigure(device.index(), &sockets, &options("socinbd-test:other")).unwrap_err();
    });
}

#[test]
fn more_devices_than_the_driver_came_with() {
    in_vm_together(&ALL, || {
        let data = Arc::new(vec![7; 1 << 20]);
        let connect = |number: usize| {
            let (sockets, servers) = servers(&data, 1);
            let device = nbd::connect(
                1 << 20,
                &sockets,
                &options(&format!("socinbd-test:{number}")),
            )
            .unwrap();
            (device, servers)
        };
        let devices: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20)
                .map(|number| scope.spawn(move || connect(number)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(nbd::connected().unwrap().len(), 20);
        for (device, _) in &devices {
            assert!(read_direct(device.path(), 4096, 4096).unwrap() == [7; 4096]);
        }
        drop(devices);
        eventually(|| nbd::connected().unwrap().is_empty());
    });
}

#[test]
fn a_device_is_opened_without_a_node_in_dev() {
    in_vm_together(&ALL, || {
        let folder = tempfile::tempdir().unwrap();
        let image = image_of(folder.path(), "a.ext4", &[("hello", "world")]);
        let data = Arc::new(std::fs::read(image).unwrap());
        for index in 0..16 {
            std::fs::remove_file(format!("/dev/nbd{index}")).unwrap();
        }
        let (sockets, _servers) = servers(&data, 1);
        let device = nbd::connect(data.len() as u64, &sockets, &options("x")).unwrap();
        assert!(device.path().starts_with("/proc/self/fd"));
        assert!(std::fs::read(device.path()).unwrap() == *data);
        let mount = mount::ext4(device.path()).unwrap();
        let path = format!("/proc/self/fd/{}/hello", mount.as_raw_fd());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "world");
    });
}

#[test]
fn a_kept_device_stays_until_it_is_disconnected() {
    in_vm_together(&ALL, || {
        let data = Arc::new(vec![0; 1 << 20]);
        let (sockets, _servers) = servers(&data, 1);
        let index = nbd::connect(1 << 20, &sockets, &options("socinbd-test:kept"))
            .unwrap()
            .keep();
        assert_eq!(nbd::connected().unwrap()[0].index, index);
        nbd::disconnect(index).unwrap();
        eventually(|| nbd::connected().unwrap().is_empty());
        // neither one that is free, nor one that never was, is an error
        nbd::disconnect(index).unwrap();
        nbd::disconnect(4000).unwrap();
    });
}

#[test]
fn a_refused_connect_leaves_nothing() {
    in_vm_together(&ALL, || {
        let (file, _) = tempfile::NamedTempFile::new().unwrap().into_parts();
        let error = nbd::connect(1 << 20, &[file.into()], &options("x")).unwrap_err();
        assert_eq!(error.kind(), Kind::Kernel, "{}", error.report());
        assert_eq!(nbd::connected().unwrap(), []);
    });
}
