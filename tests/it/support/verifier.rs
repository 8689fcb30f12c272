//! A verifier of images, as a shell script.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use socinbd::oci::Digest;
use tempfile::TempDir;

/// A verifier that accepts what [`TestVerifier::accept`] names, and a configuration file with it.
pub struct TestVerifier {
    folder: TempDir,
}

impl TestVerifier {
    /// For images of a pattern.
    pub fn new(pattern: &str) -> Self {
        let verifier = Self {
            folder: TempDir::with_prefix("socinbd-verifier-").unwrap(),
        };
        let at = |name: &str| verifier.file(name).display().to_string();
        verifier.set_script(&format!(
            r#"cat > {}
echo "$2 $4" >> {}
grep -q "^$4\$" {} && echo signed && exit 0
echo "no signature for $4"
exit 1"#,
            at("descriptor"),
            at("asked"),
            at("accepted")
        ));
        fs::write(verifier.file("accepted"), "").unwrap();
        verifier.configure(pattern, "");
        verifier
    }

    /// What it does.
    pub fn set_script(&self, script: &str) {
        let program = self.file("verifier");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// Writes the configuration file, with more keys.
    pub fn configure(&self, pattern: &str, more: &str) {
        let program = self.file("verifier").display().to_string();
        let config =
            format!("[[verifiers]]\npattern = {pattern:?}\nprogram = {program:?}\n{more}\n");
        fs::write(self.config(), config).unwrap();
    }

    /// The configuration file.
    pub fn config(&self) -> String {
        self.file("config.toml").display().to_string()
    }

    /// Accepts a manifest from now on.
    pub fn accept(&self, digest: &Digest) {
        let accepted = fs::read_to_string(self.file("accepted")).unwrap();
        fs::write(self.file("accepted"), format!("{accepted}{digest}\n")).unwrap();
    }

    /// The names and the digests that it was asked for, each once.
    pub fn asked(&self) -> Vec<String> {
        let asked = fs::read_to_string(self.file("asked")).unwrap_or_default();
        let mut asked: Vec<String> = asked.lines().map(str::to_owned).collect();
        asked.sort();
        asked.dedup();
        asked
    }

    /// A file of its folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
