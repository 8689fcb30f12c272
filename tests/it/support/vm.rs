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
    collections::BTreeMap,
    path::Path,
    process::Command,
    sync::{Arc, Condvar, Mutex, OnceLock},
};

/// Set in the VM, for the tests in it.
const INSIDE: &str = "SOCINBD_IN_VM";

/// The folder that [`in_vm_then`] shares with the VM.
const SHARED: &str = "SOCINBD_SHARED_WITH_VM";

/// The bound of the tests in one VM with its boot, which takes a second; SOCINBD_TEST_VM_SECONDS sets another one. On a machine with idle
/// processors they take a third of it at most.
const BOUND_SECONDS: &str = "480";

/// How many VMs more may run beside each other: each has 2 GiB at most, and a processor. Those of [`in_vm_asleep`] do not count.
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
    run_tests(&["--exact", name_of_test::<F>()]);
}

/// As [`in_vm`], for a test that sleeps for most of its time: its VM may run beside all others.
pub(crate) fn in_vm_asleep<F: FnOnce()>(body: F) {
    if is_vm() {
        return body();
    }
    assert_success(output_of(&["--exact", name_of_test::<F>()], None));
}

/// The output of the tests that have run together, by their module.
static TOGETHER: Mutex<BTreeMap<&str, Arc<OnceLock<String>>>> = Mutex::new(BTreeMap::new());

/// As [`in_vm`], for short tests: those of `names`, all in the module of the calling test, share one VM, in which they run one after the other.
/// A boot takes longer than they do.
pub(crate) fn in_vm_together<F: FnOnce()>(names: &'static [&'static str], body: F) {
    if is_vm() {
        return body();
    }
    let name = name_of_test::<F>();
    let (module, short) = name.rsplit_once("::").unwrap();
    assert!(names.contains(&short), "{name} is not in its list");
    // of those that cargo was asked for
    let is_asked = std::env::args().any(|argument| argument.contains("::"));
    if is_asked {
        return run_tests(&["--exact", name]);
    }
    let run = Arc::clone(TOGETHER.lock().unwrap().entry(module).or_default());
    let output = run.get_or_init(|| {
        let names: Vec<String> = names.iter().map(|it| format!("{module}::{it}")).collect();
        let names = names.iter().map(String::as_str);
        let filter: Vec<&str> = ["--test-threads", "1", "--exact"]
            .into_iter()
            .chain(names)
            .collect();
        output_in_slot(&filter, None).1
    });
    let ok = format!("test {name} ... ok");
    assert!(
        output.lines().any(|line| line == ok),
        "in the VM:\n{output}"
    );
}

/// As [`in_vm`], with a folder in which the VM can leave files; when it has ended, `then` runs on the host with the same folder.
pub(crate) fn in_vm_then<F: FnOnce(&Path)>(body: F, then: impl FnOnce(&Path)) {
    if is_vm() {
        let shared = std::env::var_os(SHARED).unwrap();
        return body(Path::new(&shared));
    }
    let shared = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    run_tests_with(&["--exact", name_of_test::<F>()], Some(shared.path()));
    then(shared.path());
}

/// The name of the test that a closure is written in.
fn name_of_test<F>() -> &'static str {
    // `it::kernel::nbd::device_has_its_size::{{closure}}`
    let path = std::any::type_name::<F>();
    path.split_once("::")
        .and_then(|(_, rest)| rest.strip_suffix("::{{closure}}"))
        .unwrap_or_else(|| panic!("{path} is not a closure of a test"))
}

/// Runs the tests that a filter of the test binary names in the VM; one at least.
pub(crate) fn run_tests(filter: &[&str]) {
    run_tests_with(filter, None);
}

fn run_tests_with(filter: &[&str], shared: Option<&Path>) {
    assert_success(output_in_slot(filter, shared));
}

fn assert_success((is_success, output): (bool, String)) {
    assert!(is_success, "in the VM:\n{output}");
    print!("{output}");
}

fn output_in_slot(filter: &[&str], shared: Option<&Path>) -> (bool, String) {
    let _slot = Slot::wait();
    output_of(filter, shared)
}

/// What a filter of the test binary prints in the VM, and whether at least one test ran and none failed.
fn output_of(filter: &[&str], shared: Option<&Path>) -> (bool, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/vm");
    let bound = std::env::var("SOCINBD_TEST_VM_SECONDS");
    let bound = bound.unwrap_or_else(|_| BOUND_SECONDS.to_owned());
    let mut command = Command::new(script);
    command.args(["run", "--time", &bound]);
    if let Some(shared) = shared {
        command.arg("--writable").arg(shared).env(SHARED, shared);
    }
    let output = command
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(filter)
        .arg("--show-output")
        .env(INSIDE, "1")
        .output()
        .expect("scripts/vm needs bash");
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
    // a filter that names no test is a success of the test binary, but not here
    let ran = stdout.contains("test result: ok.") && !stdout.contains("ok. 0 passed");
    let text = format!("{stdout}\n{stderr}\n{}", output.status);
    (output.status.success() && ran, text)
}
