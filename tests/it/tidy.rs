//! The project's own rules for its files.

use std::{path::Path, process::Command};

use serde_json::Value;

/// Lines of a file in `src/` without its tests. Past this look for the second noun.
const MAX_LINES: usize = 500;

/// All Rust files below a folder of the project, with their paths from there, without generated ones.
pub fn sources(folder: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    files(&root)
        .into_iter()
        .filter(|(path, _)| path.ends_with(".rs"))
        .filter(|(_, source)| !source.starts_with("// This file is @generated"))
        .collect()
}

/// All text files below a folder, by their paths from there, in order.
fn files(root: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                let path = path.strip_prefix(root).unwrap();
                found.push((path.to_str().unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The lines of a file up to its tests.
fn length(source: &str) -> usize {
    source
        .lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .count()
}

#[test]
fn files_are_about_one_noun() {
    let long: Vec<_> = sources("src")
        .iter()
        .map(|(path, source)| (path.clone(), length(source)))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .collect();
    assert!(long.is_empty(), "over {MAX_LINES} lines: {long:?}");
}

#[test]
fn unsafe_stands_only_where_the_design_allows_it() {
    let found: Vec<_> = sources("src")
        .into_iter()
        .filter(|(path, source)| {
            let allowed = path.starts_with("kernel/") || path.starts_with("gzip/");
            !allowed && has_unsafe(source)
        })
        .map(|(path, _)| path)
        .collect();
    assert!(found.is_empty(), "{found:?}");
}

/// Whether code has the keyword: in a comment or in a lint's name it is none.
fn has_unsafe(source: &str) -> bool {
    source
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .any(|line| {
            [
                "unsafe {",
                "unsafe fn",
                "unsafe impl",
                "unsafe extern",
                "unsafe(",
            ]
            .iter()
            .any(|keyword| line.contains(keyword))
        })
}

/// The lines of the project's files that `is_wrong` is true of, each with its file.
fn wrong_lines(is_wrong: impl Fn(&str) -> bool) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut look = |path: &str, text: &str| {
        let lines = text.lines().filter(|line| is_wrong(line));
        found.extend(lines.map(|line| format!("{path}: {line}")));
    };
    for folder in [
        "src", "tests", "benches", "examples", "scripts", "docs", ".ci", ".github",
    ] {
        if !root.join(folder).is_dir() {
            continue;
        }
        for (path, text) in files(&root.join(folder)) {
            look(&format!("{folder}/{path}"), &text);
        }
    }
    for file in [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "Cargo.toml",
    ] {
        let text = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        look(file, &text);
    }
    found.join("\n")
}

/// Paths of the machines that the project is made on mean nothing elsewhere.
#[test]
fn no_file_has_a_path_of_one_machine() {
    let found = wrong_lines(has_machine_path);
    assert!(found.is_empty(), "{found}");
}

/// From where a machine gets packages is that machine's to say, and elsewhere the tools' own defaults.
#[test]
fn no_file_names_a_package_mirror() {
    let found = wrong_lines(has_mirror);
    assert!(found.is_empty(), "{found}");
}

/// Under `pipefail` a script ends with status 141 when a command of a pipe ends before it has read everything.
#[test]
fn scripts_read_their_pipes_to_the_end() {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let found: Vec<_> = files(&scripts)
        .into_iter()
        .filter(|(_, text)| text.contains("pipefail"))
        .flat_map(|(path, text)| {
            let lines = text.lines().filter(|line| leaves_a_pipe(line));
            let lines: Vec<_> = lines.map(|line| format!("{path}: {line}")).collect();
            lines
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Whether a command after a `|` may end before its input does.
fn leaves_a_pipe(line: &str) -> bool {
    let commands = line.split(" | ").skip(1);
    commands.map(str::trim_start).any(|command| {
        let program = command.split(" || ").next().unwrap_or_default();
        let quits = program.starts_with("awk ") && program.contains("exit");
        command.starts_with("head ") || command.starts_with("grep -q") || quits
    })
}

/// What a person reads is plain English: none of these turns is in a message of the outer modules.
#[test]
fn messages_have_none_of_the_turns_that_are_not_english() {
    const TURNS: [&str; 15] = [
        " is no ",
        " are no ",
        " was no ",
        " stands ",
        " is expected",
        " are expected",
        "left alone",
        "folder",
        "passed over",
        "given back",
        "does without",
        "not there",
        " anew",
        " who ",
        "said to have",
    ];
    let outer = [
        "api/", "builder/", "cli/", "engine/", "kernel/", "layer/", "nbd/", "oci/", "soci/",
        "source/",
    ];
    let mut wrong = Vec::new();
    for (path, source) in sources("src") {
        if !outer.iter().any(|folder| path.starts_with(folder)) || path.ends_with("tests.rs") {
            continue;
        }
        let lines = source.lines().take(length(&source));
        for line in lines.filter(|line| !line.trim_start().starts_with("//")) {
            let mut texts = line.split('"').skip(1).step_by(2);
            let is_there =
                |text: &str| text.contains("there is no ") || text.contains("there are no ");
            let has_turn =
                |text: &str| !is_there(text) && TURNS.iter().any(|turn| text.contains(turn));
            if texts.any(has_turn) {
                wrong.push(format!("{path}: {}", line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The documents that are prose, with their paths.
fn documents() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut documents = files(&root.join("docs"));
    documents.retain(|(path, _)| {
        path.ends_with(".md") && !["glossary.md", "requirements.md"].contains(&path.as_str())
    });
    for path in ["README.md", "CONTRIBUTING.md", "SECURITY.md"] {
        let text = std::fs::read_to_string(root.join(path)).unwrap();
        documents.push((path.to_owned(), text));
    }
    documents
}

/// The Rust files that documents name are in the project or in `src`.
#[test]
fn files_that_documents_name_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = 0;
    let mut wrong = Vec::new();
    for (path, text) in documents() {
        for name in text
            .lines()
            .flat_map(|line| line.split('`').skip(1).step_by(2))
        {
            if !name.ends_with(".rs") || !name.contains('/') {
                continue;
            }
            found += 1;
            if !root.join(name).is_file() && !root.join("src").join(name).is_file() {
                wrong.push(format!("{path}: there is no {name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(found > 20, "{found}");
}

/// The turns that documents had and that are not English are in none of them any more.
#[test]
fn documents_have_none_of_the_turns_that_are_not_english() {
    const TURNS: [&str; 7] = [
        " is no ",
        " are no ",
        " was no ",
        " stands ",
        " behind ",
        "hoever ",
        ", for it ",
    ];
    let mut wrong = Vec::new();
    for (path, text) in documents() {
        let lines = text.lines().filter(|line| {
            let line = line.replace("here is no ", "").replace("here are no ", "");
            TURNS.iter().any(|turn| line.contains(turn))
        });
        wrong.extend(lines.map(|line| format!("{path}: {line}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn has_mirror(line: &str) -> bool {
    // put together here, so that this file passes
    let hosts = [
        ["deb", "ian.org"],
        ["ubu", "ntu.com"],
        ["index.", "crates.io"],
        ["static.", "crates.io"],
        ["static.", "rust-lang.org"],
        ["py", "pi.org"],
    ];
    hosts.iter().any(|parts| line.contains(&parts.concat()))
}

fn has_machine_path(line: &str) -> bool {
    // put together here, so that this file passes
    let paths = [["/wo", "rk/"], ["/root/", ".cargo"], ["/root/", ".pyenv"]];
    paths.iter().any(|parts| {
        let path = parts.concat();
        line.match_indices(&path).any(|(at, _)| {
            // what stands before it may make it the end of another word, or a folder in something else
            !line[..at].ends_with(|c: char| c.is_alphanumeric() || "}._-$".contains(c))
        })
    })
}

/// What a package has to say of itself, without the address of a repository.
#[test]
fn the_package_describes_itself() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(env!("CARGO"))
        .current_dir(root)
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = &metadata["packages"][0];
    assert_eq!(package["license"], "Apache-2.0");
    for field in ["description", "rust_version"] {
        assert!(package[field].is_string(), "{field}");
    }
    for field in ["keywords", "categories"] {
        let count = package[field].as_array().unwrap().len();
        assert!((1..=5).contains(&count), "{field}: {count}");
    }
    assert_eq!(package["repository"], Value::Null);
    let readme = package["readme"].as_str().unwrap();
    for file in [
        readme,
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
    ] {
        assert!(root.join(file).is_file(), "{file}");
    }
    let toolchain = std::fs::read_to_string(root.join("rust-toolchain.toml")).unwrap();
    let version = package["rust_version"].as_str().unwrap();
    assert!(
        toolchain.contains(&format!("channel = \"{version}")),
        "{version}"
    );
    // the changelog has this version, released or not
    let changelog = std::fs::read_to_string(root.join("CHANGELOG.md")).unwrap();
    assert!(changelog.contains(package["version"].as_str().unwrap()));
}

/// The index of the documents has each, and every link of a document leads to a file.
#[test]
fn documents_are_listed_and_links_lead_to_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let index = std::fs::read_to_string(root.join("docs/README.md")).unwrap();
    let mut wrong = Vec::new();
    for (path, _) in files(&root.join("docs")) {
        if path != "README.md" && !index.contains(&format!("({path})")) {
            wrong.push(format!("docs/README.md does not list {path}"));
        }
    }
    let documents = files(&root.join("docs"))
        .into_iter()
        .map(|(path, text)| (format!("docs/{path}"), text));
    let top = [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
    ]
    .map(|path| {
        let text = std::fs::read_to_string(root.join(path)).unwrap();
        (path.to_owned(), text)
    });
    for (path, text) in documents.chain(top) {
        let folder = root.join(&path);
        let folder = folder.parent().unwrap();
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', '#']).next())
        {
            if !target.contains("://") && !target.is_empty() && !folder.join(target).exists() {
                wrong.push(format!("{path}: there is no {target}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_not_tidy_is_found() {
    assert_eq!(length(&"line\n".repeat(601)), 601);
    assert_eq!(length("a\n#[cfg(test)]\nmod tests {\n}\n"), 1);
    assert!(has_unsafe("let x = unsafe { f() };"));
    assert!(!has_unsafe("// unsafe { }\n#![deny(unsafe_code)]"));
    let line = ["see /wo", "rk/lab"].concat();
    assert!(has_machine_path(&line));
    let line = ["overlay/wo", "rk/ and ${DIR}/wo", "rk/x"].concat();
    assert!(!has_machine_path(&line));
    assert!(leaves_a_pipe("sort | head -n 10 | cat"));
    assert!(leaves_a_pipe("list | awk '{ print; exit }'"));
    assert!(!leaves_a_pipe("list | awk '{ print }' || exit 1"));
    assert!(!leaves_a_pipe("head -n 1 file | sort"));
    assert!(has_mirror(&["http://deb.deb", "ian.org/debian"].concat()));
}
