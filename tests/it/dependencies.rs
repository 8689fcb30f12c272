//! What the project depends on, held against `deny.toml` (which `cargo deny` knows more about: advisories, above all).

use std::{path::Path, process::Command};

use serde_json::Value;
use spdx::Expression;

/// The quoted strings of a line.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('"').skip(1).step_by(2)
}

/// What `deny.toml` says: the licences that it allows, and the crates that it bans.
fn rules() -> (Vec<String>, Vec<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let list = |start: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| *line != start).skip(1);
        let lines = lines.take_while(|line| *line != "]");
        lines.flat_map(quoted).map(str::to_owned).collect()
    };
    (list("allow = ["), list("deny = ["))
}

/// All crates that are built for this platform, those of the tests too.
fn packages() -> Vec<Value> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--all-features", "--filter-platform", &platform])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let mut metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    match metadata["packages"].take() {
        Value::Array(packages) => packages,
        other => panic!("{other}"),
    }
}

/// Why a crate may not be used.
fn refusal(package: &Value, allowed: &[String], banned: &[String]) -> Option<String> {
    let name = package["name"].as_str()?;
    if banned.iter().any(|banned| banned == name) {
        return Some(format!("{name} is banned"));
    }
    // the project itself has no source
    let source = package["source"].as_str();
    if source
        .is_some_and(|source| source != "registry+https://github.com/rust-lang/crates.io-index")
    {
        return Some(format!("{name} comes from {source:?}"));
    }
    let licence = package["license"].as_str().unwrap_or_default();
    let is_allowed = Expression::parse_mode(licence, spdx::ParseMode::LAX).is_ok_and(|licence| {
        licence.evaluate(|asked| allowed.iter().any(|allowed| *allowed == asked.to_string()))
    });
    (!is_allowed).then(|| format!("{name} has the licence {licence:?}"))
}

#[test]
fn crates_have_licences_and_sources_that_are_allowed() {
    let (allowed, banned) = rules();
    assert!(
        allowed.len() > 5 && banned.len() > 3,
        "{allowed:?} {banned:?}"
    );
    let packages = packages();
    assert!(packages.len() > 100, "{} crates", packages.len());
    let refused: Vec<_> = packages
        .iter()
        .filter_map(|package| refusal(package, &allowed, &banned))
        .collect();
    assert!(refused.is_empty(), "{refused:#?}");
}

#[test]
fn other_crates_are_refused() {
    let (allowed, banned) = rules();
    let registry = "registry+https://github.com/rust-lang/crates.io-index";
    let refusal = |name: &str, source: &str, licence: &str| {
        let package = serde_json::json!({"name": name, "source": source, "license": licence});
        refusal(&package, &allowed, &banned)
    };
    assert_eq!(refusal("a", registry, "MIT OR GPL-3.0-only"), None);
    assert_eq!(refusal("a", registry, "MIT/Apache-2.0"), None);
    for (name, source, licence) in [
        ("a", registry, "GPL-3.0-only"),
        ("a", registry, "MIT AND GPL-2.0-or-later"),
        ("a", registry, ""),
        ("a", "git+https://example.com/a", "MIT"),
        ("openssl", registry, "Apache-2.0"),
    ] {
        assert!(
            refusal(name, source, licence).is_some(),
            "{name} {source} {licence}"
        );
    }
}
