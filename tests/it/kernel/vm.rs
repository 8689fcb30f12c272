use crate::support::vm::{is_vm, run_tests};

/// Loop, FUSE, mounts and overlays once more, on the VM's kernel: newer than most hosts', and not this host's.
#[test]
fn the_rest_holds_on_another_kernel() {
    if !is_vm() {
        run_tests(&[
            "kernel::",
            "--skip",
            "kernel::nbd",
            "--skip",
            "kernel::dm",
            // written for the host's kernel: see the rows of FUSE in docs/requirements.md
            "--skip",
            "kernel::fuse_kept",
            "--skip",
            "kernel::vm",
        ]);
    }
}
