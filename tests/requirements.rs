//! Reads `docs/requirements.md`: each row names the test or the command that shows a requirement, and its state.
//!
//! A row whose state is `done` names tests that exist, are not ignored and, where `SOCINBD_TEST_LOG` names the output of a whole test
//! run, ran well in it.

use std::{collections::BTreeMap, fs, path::Path};

/// One row.
struct Row {
    line: usize,
    requirement: String,
    shown_by: Vec<String>,
    state: String,
}

fn rows() -> Vec<Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/requirements.md");
    let text = fs::read_to_string(path).expect("docs/requirements.md");
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let cells: Vec<&str> = line
            .trim()
            .trim_matches('|')
            .split('|')
            .map(str::trim)
            .collect();
        let [requirement, shown_by, state] = cells.as_slice() else {
            continue;
        };
        if *requirement == "requirement" || requirement.starts_with("---") {
            continue;
        }
        let shown_by = shown_by
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect();
        rows.push(Row {
            line: number + 1,
            requirement: (*requirement).to_owned(),
            shown_by,
            state: (*state).to_owned(),
        });
    }
    assert!(
        rows.len() > 20,
        "docs/requirements.md has only {} rows",
        rows.len()
    );
    rows
}

/// The functions with `#[test]` in a source file's text, and whether they are ignored.
fn tests_in(text: &str) -> BTreeMap<String, bool> {
    let mut tests = BTreeMap::new();
    let (mut is_test, mut ignored) = (false, false);
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            (is_test, ignored) = (true, false);
        } else if line.starts_with("#[ignore") {
            ignored = true;
        } else if let Some(rest) = line
            .strip_prefix("fn ")
            .or_else(|| line.strip_prefix("async fn "))
        {
            if is_test {
                let name = rest.split(['(', '<']).next().unwrap_or_default();
                tests.insert(name.to_owned(), ignored);
            }
            (is_test, ignored) = (false, false);
        }
    }
    tests
}

/// Whether a test of this path (`it::topic::name`, `lib::module::tests::name`) stands in the sources; `Err` says what is wrong.
fn look_up(test: &str) -> Result<(), String> {
    let parts: Vec<&str> = test.split("::").collect();
    let (Some(&binary), Some(&name)) = (parts.first(), parts.last()) else {
        return Err("no test's name".into());
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(if binary == "lib" {
        "src"
    } else {
        "tests/it"
    });
    let modules: Vec<&str> = parts[1..parts.len() - 1]
        .iter()
        .copied()
        .filter(|&part| part != "tests")
        .collect();
    // proptest! and nested modules in one file: the deepest file that exists on the module path holds it
    for depth in (0..=modules.len()).rev() {
        let stem = modules[..depth]
            .iter()
            .fold(root.clone(), |path, module| path.join(module));
        for file in [
            stem.with_extension("rs"),
            stem.join("mod.rs"),
            stem.join("tests.rs"),
            stem.join("lib.rs"),
            stem.join("main.rs"),
        ] {
            let Ok(text) = fs::read_to_string(&file) else {
                continue;
            };
            match tests_in(&text).get(name) {
                Some(false) => return Ok(()),
                Some(true) => return Err("it is ignored".into()),
                None => {}
            }
        }
    }
    Err("there is no such test".into())
}

#[test]
fn every_named_test_exists_and_is_not_ignored() {
    let mut wrong = Vec::new();
    for row in rows() {
        assert!(
            ["done", "partly", "open"].contains(&row.state.as_str()),
            "docs/requirements.md:{}: the state is done, partly or open, not {:?}",
            row.line,
            row.state
        );
        if row.state == "done" && row.shown_by.is_empty() {
            wrong.push(format!(
                "line {}: {:?} is done, and nothing shows it",
                row.line, row.requirement
            ));
        }
        for shown in row.shown_by {
            if shown.starts_with("it::") || shown.starts_with("lib::") {
                if let Err(error) = look_up(&shown) {
                    wrong.push(format!("line {}: {shown}: {error}", row.line));
                }
            } else {
                let program = shown.split_whitespace().next().unwrap_or_default();
                if program.starts_with("scripts/")
                    && !Path::new(env!("CARGO_MANIFEST_DIR")).join(program).exists()
                {
                    wrong.push(format!("line {}: there is no {program}", row.line));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "docs/requirements.md:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_named_test_ran_well() {
    // without a log of a whole run there is nothing to say; scripts/test gives one
    let Some(log) = std::env::var_os("SOCINBD_TEST_LOG") else {
        return;
    };
    let log = fs::read_to_string(log).expect("the test log");
    let mut wrong = Vec::new();
    for row in rows() {
        for shown in row.shown_by {
            let Some(name) = shown
                .strip_prefix("it::")
                .or_else(|| shown.strip_prefix("lib::"))
            else {
                continue;
            };
            let line = log.lines().find_map(|line| {
                line.strip_prefix("test ")?
                    .strip_prefix(name)?
                    .strip_prefix(" ... ")
            });
            if line != Some("ok") {
                wrong.push(format!(
                    "line {}: {shown}: {}",
                    row.line,
                    line.unwrap_or("did not run")
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "docs/requirements.md:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn a_missing_and_an_ignored_test_are_found() {
    assert!(look_up("it::levels::there_is_no_test_of_this_name").is_err());
    // in src/tree/tests.rs
    look_up("lib::tree::tests::paths_are_cleaned_and_parents_implied").unwrap();
    let tests = tests_in(
        "#[test]\nfn a() {}\n#[test]\n#[ignore = \"slow\"]\nfn b() {}\nfn c() {}\n#[test]\nfn d() {}",
    );
    assert_eq!(
        tests.into_iter().collect::<Vec<_>>(),
        [("a".into(), false), ("b".into(), true), ("d".into(), false)]
    );
}
