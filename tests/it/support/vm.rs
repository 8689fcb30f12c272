//! Tests on a kernel with nbd: the test binary starts itself again inside the VM of `scripts/vm`.
//!
//! ```ignore
//! #[test]
//! fn device_has_its_size() {
//!     in_vm(|| { /* as root, on a kernel with nbd */ });
//! }
//! ```
//!
//! On the host the test starts the VM with the test's own name; in it the body runs. A test that needs the program `socinbd` finds it
//! as on the host (`CARGO_BIN_EXE_socinbd`): the host's file tree is the VM's root, read-only; `TMPDIR` is a tmpfs. Where the VM is not
//! installed the test fails, and says how to install it.

use std::{
    path::Path,
    process::Command,
    sync::{Condvar, Mutex},
    time::Duration,
};

/// Set in the VM, for the tests in it.
const INSIDE: &str = "SOCINBD_IN_VM";

/// The bound of one test in the VM with its boot, which takes a second.
const BOUND: Duration = Duration::from_secs(240);

/// How many VMs more may run beside each other: each has 2 GiB at most, and a processor.
static FREE: Mutex<u32> = Mutex::new(3);
static FREED: Condvar = Condvar::new();

/// One of [`FREE`], for as long as this is there.
struct Slot;

impl Slot {
    fn wait() -> Self {
        let free = FREE.lock().unwrap();
        *FREED.wait_while(free, |free| *free == 0).unwrap() -= 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *FREE.lock().unwrap() += 1;
        FREED.notify_one();
    }
}

/// Whether this is the VM.
pub(crate) fn is_vm() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs the body of the calling test in the VM. Call it with a closure written in the test itself: its name is the test's.
pub(crate) fn in_vm<F: FnOnce()>(body: F) {
    if is_vm() {
        return body();
    }
    // `it::kernel::nbd::device_has_its_size::{{closure}}`
    let path = std::any::type_name::<F>();
    let name = path
        .split_once("::")
        .and_then(|(_, rest)| rest.strip_suffix("::{{closure}}"))
        .unwrap_or_else(|| panic!("{path} is no closure of a test"));
    run_tests(&["--exact", name]);
}

/// Runs the tests that a filter of the test binary names in the VM; one at least.
pub(crate) fn run_tests(filter: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/vm");
    let slot = Slot::wait();
    let output = Command::new(script)
        .args(["run", "--time", &BOUND.as_secs().to_string(), "--"])
        .arg(std::env::current_exe().unwrap())
        .args(filter)
        .env(INSIDE, "1")
        .output()
        .expect("scripts/vm needs bash");
    drop(slot);
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    // a filter that names no test is a success of the test binary, but not here
    let ran = stdout.contains("test result: ok.") && !stdout.contains("ok. 0 passed");
    assert!(
        output.status.success() && ran,
        "in the VM, {}:\n{stdout}\n{stderr}",
        output.status
    );
}
