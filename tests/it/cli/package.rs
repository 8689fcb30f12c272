//! The Debian package and the manifest for Kubernetes.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use super::pages::writer;

#[test]
fn the_debian_package_is_installed_used_removed_and_purged_in_a_bare_root() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = tempfile::tempdir().unwrap();
    writer::write(pages.path()).unwrap();
    let output = Command::new(root.join("scripts/deb"))
        .arg(env!("CARGO_BIN_EXE_socinbd"))
        .arg(pages.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/deb: {error}");
    let deb = String::from_utf8(output.stdout).unwrap();
    let deb = root.join(deb.trim());
    let contents = Command::new("dpkg-deb")
        .arg("--contents")
        .arg(&deb)
        .output()
        .unwrap();
    let contents = String::from_utf8(contents.stdout).unwrap();
    for path in [
        "./usr/bin/socinbd",
        "./lib/systemd/system/socinbd.service",
        "./lib/systemd/system/socinbd.socket",
        "./etc/socinbd/config.toml",
        "./usr/share/man/man1/socinbd-install.1.gz",
        "./usr/share/bash-completion/completions/socinbd",
        "./usr/share/doc/socinbd/copyright",
    ] {
        let line = contents.lines().find(|line| line.ends_with(path));
        let line = line.unwrap_or_else(|| panic!("{path}: {contents}"));
        assert!(line.contains(" root/root "), "{line}");
    }
    std::fs::remove_file(deb).unwrap();
}

#[test]
fn the_manifest_for_kubernetes_names_what_is_there() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kubernetes/install.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let documents: Vec<Value> = text
        .split("\n---\n")
        .map(|document| serde_saphyr::from_str(document).unwrap())
        .collect();
    let kinds: Vec<_> = documents.iter().map(|document| &document["kind"]).collect();
    assert_eq!(kinds, ["Namespace", "DaemonSet"]);
    let (namespace, set) = (&documents[0], &documents[1]);
    assert_eq!(set["metadata"]["namespace"], namespace["metadata"]["name"]);
    let template = &set["spec"]["template"];
    assert_eq!(
        set["spec"]["selector"]["matchLabels"],
        template["metadata"]["labels"]
    );
    let pod = &template["spec"];
    // nsenter into process 1 needs both
    assert_eq!(pod["hostPID"], true);
    let init = &pod["initContainers"][0];
    assert_eq!(init["securityContext"]["privileged"], true);
    let names = |list: &Value| -> BTreeSet<String> {
        let list = list.as_array().unwrap().iter();
        list.map(|one| one["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&init["volumeMounts"]), names(&pod["volumes"]));
    let script = init["command"][2].as_str().unwrap();
    let checked = Command::new("sh")
        .args(["-n", "-c", script])
        .status()
        .unwrap();
    assert!(checked.success(), "{script}");
    // the program is copied to where it is started
    let folder = pod["volumes"][0]["hostPath"]["path"].as_str().unwrap();
    let mounted = init["volumeMounts"][0]["mountPath"].as_str().unwrap();
    assert_eq!(mounted, format!("/host{folder}"));
    assert!(
        script.contains(&format!(" {mounted}/socinbd\n")),
        "{script}"
    );
    let start = format!("exec nsenter --target 1 --mount -- {folder}/socinbd install\n");
    assert!(script.ends_with(&start), "{script}");
    let commands = socinbd::cli::command();
    assert!(
        commands
            .get_subcommands()
            .any(|command| command.get_name() == "install")
    );
}
