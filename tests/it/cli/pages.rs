//! The manual pages and shell completions that `examples/pages.rs` writes.

use std::{collections::BTreeSet, fs, process::Command};

use super::help::commands;

#[path = "../../../examples/pages.rs"]
pub(super) mod writer;

#[test]
fn each_command_has_a_manual_page_that_man_formats_without_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    writer::write(folder.path()).unwrap();
    let pages = folder.path().join("man/man1");
    let written: BTreeSet<String> = fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let commands = commands();
    let expected: BTreeSet<String> = commands
        .iter()
        .map(|(words, _)| format!("{}.1", words.replace(' ', "-")))
        .collect();
    assert_eq!(written, expected);
    for (words, command) in &commands {
        let page = pages.join(format!("{}.1", words.replace(' ', "-")));
        let output = Command::new("groff")
            .args(["-man", "-ww", "-Tascii", "-P-cbou", "-rLL=200n", "-rHY=0"])
            .arg(&page)
            .output()
            .expect("groff: install the package groff-base");
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && warnings.is_empty(),
            "{words}: {warnings}"
        );
        let text = String::from_utf8_lossy(&output.stdout);
        for heading in [
            "NAME",
            "SYNOPSIS",
            "DESCRIPTION",
            "GLOBAL OPTIONS",
            "EXAMPLES",
        ] {
            assert!(
                text.lines().any(|line| line == heading),
                "{words}: {heading}: {text}"
            );
        }
        let example = text.lines().skip_while(|line| *line != "EXAMPLES");
        let mut example = example.filter(|line| line.trim_start().starts_with(words.as_str()));
        assert!(example.next().is_some(), "{words}: {text}");
        for argument in command.get_arguments() {
            if let Some(long) = argument.get_long() {
                assert!(
                    text.contains(&format!("--{long}")),
                    "{words} --{long}: {text}"
                );
            }
        }
    }
}

#[test]
fn completions_know_each_command() {
    let folder = tempfile::tempdir().unwrap();
    writer::write(folder.path()).unwrap();
    for name in ["socinbd.bash", "socinbd.fish", "_socinbd"] {
        let text = fs::read_to_string(folder.path().join("completions").join(name)).unwrap();
        for (words, _) in commands() {
            let word = words.split(' ').next_back().unwrap();
            assert!(text.contains(word), "{name}: {words}");
        }
    }
    // bash is on every machine that runs these tests: it completes a command's name and an option's
    let completed = |words: &str| {
        let script = format!(
            "source \"$0\"; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _socinbd socinbd \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash")
            .args(["-c", &script])
            .arg(folder.path().join("completions/socinbd.bash"))
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(completed("socinbd att"), "attach\n");
    assert_eq!(
        completed("socinbd index create --build-t"),
        "--build-tool\n"
    );
}
