//! Kept connections under the kernel's driver: its readers do not notice that servers are killed.
//!
//! `SOCINBD_TEST_KILLS` is the number of kills; 100 without it. More than some hundred need more time than a test in the VM has:
//! `SOCINBD_IN_VM=1 SOCINBD_TEST_KILLS=1000 scripts/vm run --time 3600 -- target/debug/deps/it-... --nocapture --exact NAME`.

use std::{
    fs::File,
    io::Write as _,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use socinbd::{
    kernel::{
        blockdev,
        nbd::{self, NbdDevice, NbdOptions},
    },
    nbd::kept::KeptConnection,
};

use super::kept::{Absent, Random, SIZE, STEPS, ServerProcess, content, owned};
use crate::support::vm::in_vm;

/// The largest request of the device, in KiB.
const LARGEST_KB: u64 = 1008;

fn kills() -> u32 {
    std::env::var("SOCINBD_TEST_KILLS").map_or(100, |text| text.parse().unwrap())
}

/// A device with so many kept connections.
struct Kept {
    folder: tempfile::TempDir,
    content: Vec<u8>,
    connections: Vec<Vec<OwnedFd>>,
    /// Goes first.
    device: Option<NbdDevice>,
    log: usize,
}

impl Kept {
    fn new(connections: usize) -> Self {
        let log = kernel_log().len();
        let folder = tempfile::tempdir().unwrap();
        let content = content(SIZE);
        let mut file = File::create(folder.path().join("disk")).unwrap();
        file.write_all(&content).unwrap();
        let (connections, kernel): (Vec<_>, Vec<_>) = (0..connections)
            .map(|_| {
                let (connection, kernel) = KeptConnection::new().unwrap();
                (owned(&connection), kernel)
            })
            .unzip();
        let options = NbdOptions {
            timeout: Duration::from_secs(120),
            dead: Duration::from_secs(60),
            backend_id: "socinbd-test:kept".into(),
        };
        let mut kept = Self {
            folder,
            content,
            connections,
            device: None,
            log,
        };
        let server = kept.serve(None);
        let device = nbd::connect(SIZE, &kernel, &options).unwrap();
        blockdev::set_read_ahead(&device.name(), Some(LARGEST_KB), LARGEST_KB).unwrap();
        server.kill();
        kept.device = Some(device);
        kept
    }

    fn serve(&self, kill_at: Option<(usize, u32)>) -> ServerProcess {
        let disk = self.folder.path().join("disk");
        ServerProcess::start(&self.connections, &disk, Absent::Third, kill_at)
    }

    /// Four readers, while `kill` kills servers; the last one of which it gives. Prints what they saw.
    fn read_while(&self, what: &str, kill: impl FnOnce() -> ServerProcess) {
        let (stop, reads, longest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|number| {
                    let (stop, reads, longest) = (&stop, &reads, &longest);
                    scope.spawn(move || {
                        let mut random = Random(number);
                        let device = self.device.as_ref().unwrap();
                        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
                        let file = File::options()
                            .read(true)
                            .custom_flags(direct)
                            .open(device.path())
                            .unwrap();
                        let mut buffer = vec![0; (LARGEST_KB as usize + 4) << 10];
                        // direct I/O wants an aligned buffer
                        let start = buffer.as_ptr().align_offset(4096);
                        while !stop.load(Ordering::Relaxed) {
                            let length = match (number + random.below(3)) % 4 {
                                0 => (LARGEST_KB as usize) << 10,
                                1 => 131_072,
                                _ => 4096,
                            };
                            let offset = random.below((SIZE - length as u64) / 4096) * 4096;
                            let began = Instant::now();
                            let place = &mut buffer[start..start + length];
                            file.read_exact_at(place, offset).unwrap();
                            let took = began.elapsed().as_millis() as u64;
                            longest.fetch_max(took, Ordering::Relaxed);
                            assert!(*place == self.content[offset as usize..][..length]);
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            let last = kill();
            let before = reads.load(Ordering::Relaxed);
            let deadline = Instant::now() + Duration::from_secs(30);
            while reads.load(Ordering::Relaxed) < before + 20 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let went_on = reads.load(Ordering::Relaxed) >= before + 20;
            stop.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().unwrap();
            }
            assert!(went_on, "the readers do not go on");
            last.kill();
        });
        println!(
            "{what}: {} reads, the longest took {} ms",
            reads.into_inner(),
            longest.into_inner()
        );
        let log = kernel_log();
        assert!(log[self.log..].is_empty(), "{:?}", &log[self.log..]);
    }
}

/// What the kernel says of nbd and of errors of devices.
pub(crate) fn kernel_log() -> Vec<String> {
    let output = Command::new("dmesg").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines().filter(|line| {
        let is_of_nbd = line.contains("nbd") || line.contains("I/O error");
        // how large it is
        is_of_nbd && !line.contains("capacity") && !line.contains("registered")
    });
    lines.map(str::to_owned).collect()
}

fn killed_at_any_moment(connections: usize) {
    let kept = Kept::new(connections);
    let count = kills();
    kept.read_while(&format!("{count} kills, {connections} connections"), || {
        let mut random = Random(count.into());
        for _ in 0..count {
            let server = kept.serve(None);
            std::thread::sleep(Duration::from_micros(random.below(60_000)));
            server.kill();
        }
        kept.serve(None)
    });
}

#[test]
fn servers_of_one_connection_are_killed_at_any_moment() {
    in_vm(|| killed_at_any_moment(1));
}

#[test]
fn servers_of_two_connections_are_killed_at_any_moment() {
    in_vm(|| killed_at_any_moment(2));
}

#[test]
fn servers_are_killed_at_each_step() {
    in_vm(|| {
        let kept = Kept::new(1);
        let count = kills() / 25;
        let mut random = Random(2);
        for (number, step) in STEPS.iter().enumerate() {
            kept.read_while(&format!("{count} kills at {step:?}"), || {
                for _ in 0..count {
                    let countdown = 1 + random.below(20) as u32;
                    let mut server = kept.serve(Some((number, countdown)));
                    let deadline = Instant::now() + Duration::from_secs(20);
                    while !server.has_ended() {
                        assert!(Instant::now() < deadline, "{step:?} is not reached");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    assert!(server.wait(), "{step:?}");
                }
                kept.serve(None)
            });
        }
    });
}
