//! What several topics use.

pub mod compare;
pub mod credential_plugin;
pub mod docker_registry;
pub mod log_writes;
pub mod registry;
pub mod served;
pub mod tars;
pub mod verifier;
pub mod vm;
pub mod zot;
pub mod ztocs;

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Runs another project's program, which must be there and succeed.
pub fn succeeds(command: &mut std::process::Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error} (scripts/setup test installs it)"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A folder below the target folder that `make` fills, once for each build of the program: what takes long and is the same in several tests.
/// A test in the VM calls this outside of its closure: so it is made on the host, where it takes less, and the VM sees it.
pub fn made_once(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if vm::is_vm() {
        return folder;
    }
    let lock = fs::File::create(folder.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let build = fs::metadata(env!("CARGO_BIN_EXE_socinbd")).unwrap();
    let build = format!("{:?}", build.modified().unwrap());
    let made_by = folder.join("made-by");
    if fs::read_to_string(&made_by).is_ok_and(|it| it == build) {
        return folder;
    }
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    make(&folder);
    fs::write(made_by, build).unwrap();
    folder
}

/// Unmounts what the test itself does not use any more. A process that another thread starts has its files open for a moment (between
/// fork and exec), and the mount is busy meanwhile. A program of another test that makes a mount namespace, as a container runtime does, has
/// a copy of the mount until it ends or has changed its root; this waits for it too.
pub fn unmount(mountpoint: &std::path::Path) {
    // as in proc_pid_mountinfo(5): the file system's device, the directory that is mounted, the mount point
    let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(mountpoint).unwrap());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let copy = format!(" {major}:{minor} / {} ", mountpoint.display());
    wait("the mount is idle", || {
        rustix::mount::unmount(mountpoint, rustix::mount::UnmountFlags::empty()).is_ok()
    });
    wait("no other mount namespace has the mount", || {
        let mut seen = std::collections::BTreeSet::new();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        !processes.map(|process| process.path()).any(|process| {
            // of many processes in one namespace the first
            if std::fs::read_link(process.join("ns/mnt")).is_ok_and(|space| !seen.insert(space)) {
                return false;
            }
            let mounts = std::fs::read_to_string(process.join("mountinfo"));
            mounts.is_ok_and(|mounts| mounts.contains(&copy))
        })
    });
}

/// Reads a file, and of one with holes its data only.
pub fn read_sparse(path: &Path) -> Vec<u8> {
    let file = fs::File::open(path).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    each_data(&file, |start, end| {
        let data = &mut bytes[start as usize..end as usize];
        file.read_exact_at(data, start).unwrap();
    });
    bytes
}

/// Copies a folder of folders and files, with holes where the files have them.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&from, &to);
            continue;
        }
        let [from, to] = [fs::File::open(from), fs::File::create(to)].map(Result::unwrap);
        let metadata = from.metadata().unwrap();
        to.set_len(metadata.len()).unwrap();
        to.set_permissions(metadata.permissions()).unwrap();
        each_data(&from, |start, end| {
            let mut bytes = vec![0; (end - start) as usize];
            from.read_exact_at(&mut bytes, start).unwrap();
            to.write_all_at(&bytes, start).unwrap();
        });
    }
    let permissions = fs::metadata(from).unwrap().permissions();
    fs::set_permissions(to, permissions).unwrap();
}

/// Passes the start and the end of each part that is not a hole.
fn each_data(file: &fs::File, mut pass: impl FnMut(u64, u64)) {
    use rustix::fs::{SeekFrom, seek};
    let mut end = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(end)) {
            Err(rustix::io::Errno::NXIO) => return,
            start => start.unwrap(),
        };
        end = seek(file, SeekFrom::Hole(start)).unwrap();
        pass(start, end);
    }
}

/// Bytes that do not compress, the same at each run and others for another seed.
pub fn seeded_noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; length];
    // eight at a time: tests are not optimized
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let next = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
        word.copy_from_slice(&next[..word.len()]);
    }
    bytes
}

/// Fills a buffer with bytes that tell their place; `offset` is that of the buffer, a multiple of 8.
pub fn place_telling(offset: u64, buffer: &mut [u8]) {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut word = (offset / 8).wrapping_mul(STEP);
    for place in buffer.as_chunks_mut().0 {
        *place = word.to_be_bytes();
        word = word.wrapping_add(STEP);
    }
}

/// Bytes that do not compress.
pub fn noise(length: usize) -> Vec<u8> {
    seeded_noise(length, 1)
}

/// The pauses between two looks at a condition: short at first, and long at last, as a look may be a process. Looking without a pause
/// would take from what is waited for the time that it needs.
pub fn pauses() -> impl Iterator<Item = Duration> {
    let longer = |pause: &Duration| Some((*pause * 3 / 2).min(Duration::from_millis(50)));
    std::iter::successors(Some(Duration::from_millis(1)), longer)
}

/// Waits for a condition, and says which did not come within a minute.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        for pause in pauses() {
            if condition() {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting)
        .await
        .unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// As [`until`], for tests that block.
#[track_caller]
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    for pause in pauses() {
        if condition() {
            return;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(pause);
    }
}
