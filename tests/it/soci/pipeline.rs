//! `scripts/pipeline`, as a build pipeline runs it: as an ordinary user.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{engine::Host, support::docker_registry::DockerRegistry};

/// `nobody`, whom every system has.
const USER: (u32, u32) = (65534, 65534);

fn give_away(path: &Path) {
    chown(path, Some(USER.0), Some(USER.1)).unwrap();
}

/// A folder with a Dockerfile, and a file for the image.
fn context(home: &Path) -> PathBuf {
    let context = home.join("app");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("hello"), "hello from a layer\n").unwrap();
    fs::write(
        context.join("Dockerfile"),
        "FROM scratch\nCOPY hello /etc/hello\nCOPY Dockerfile /\nCMD [\"/etc/hello\"]\n",
    )
    .unwrap();
    context
}

/// What a run has not cleared away.
fn left_behind(home: &Path) -> Vec<String> {
    fs::read_dir(home)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("tmp."))
        .collect()
}

#[test]
fn root_attaches_what_was_pushed() {
    let registry = DockerRegistry::start();
    let home = TempDir::new().unwrap();
    let image = format!("{}/team/app:1.0", registry.host);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/pipeline");
    let output = Command::new(script)
        .arg(context(home.path()))
        .args([&image, "/etc/hello"])
        .env("TMPDIR", home.path())
        .env("SOCINBD", env!("CARGO_BIN_EXE_socinbd"))
        .env("SOCINBD_ROOT", home.path().join("root"))
        .env("CONVERT_OPTIONS", "--min-layer-size 0 --compact")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "needs root, buildah and jq (apt-get install buildah jq): {errors}"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "hello from a layer\n",
        "{errors}"
    );
    assert_eq!(left_behind(home.path()), [""; 0], "{errors}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(home.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn an_ordinary_user_builds_converts_pushes_and_reads_back() {
    let registry = DockerRegistry::start();
    let home = TempDir::new().unwrap();
    let context = context(home.path());
    // both must be within that user's reach
    let program = home.path().join("socinbd");
    fs::copy(env!("CARGO_BIN_EXE_socinbd"), &program).unwrap();
    let script = home.path().join("pipeline");
    fs::copy(
        concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/pipeline"),
        &script,
    )
    .unwrap();
    for path in [&program, &script] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let run_dir = home.path().join("run");
    fs::create_dir(&run_dir).unwrap();
    for path in [home.path(), &context, &run_dir] {
        give_away(path);
    }
    let image = format!("{}/team/app:1.0", registry.host);
    let output = Command::new("setpriv")
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
        .arg(&script)
        .arg(&context)
        .args([&image, "/etc/hello"])
        .current_dir(home.path())
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("HOME", home.path())
        .env("TMPDIR", home.path())
        .env("XDG_RUNTIME_DIR", &run_dir)
        .env("SOCINBD", &program)
        .env("SOCINBD_ROOT", home.path().join("root"))
        .env("CONVERT_OPTIONS", "--min-layer-size 0")
        .output()
        .expect("this test needs setpriv (apt-get install util-linux)");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "needs buildah and jq (apt-get install buildah jq), and user namespaces: {errors}"
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "hello from a layer\n",
        "{errors}"
    );
    assert!(errors.contains("SOCI index sha256:"), "{errors}");
    assert_eq!(left_behind(home.path()), [""; 0], "{errors}");

    // another host finds it lazy
    let host = Host::new();
    let inspected = host.run(&["--json", "inspect", &image]);
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["index"]["version"], 2);
}
