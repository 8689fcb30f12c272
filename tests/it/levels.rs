//! Modules stand in levels, and one uses only what stands below it. The table is the one in the documentation of `src/lib.rs`.

use std::{collections::BTreeSet, fmt, path::Path};

/// A module and its place in the table: level, then the order within the level.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    level: u32,
    module: String,
}

/// Reads the table: levels are set apart by `|`, each starts with its number, modules stand in backticks.
fn table(lib: &str) -> Vec<Row> {
    let text: String = lib
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .skip_while(|line| !line.starts_with(" 0 `"))
        .take_while(|line| !line.starts_with(" Levels"))
        .collect();
    let mut rows = Vec::new();
    for level in text.trim().trim_end_matches('.').split('|') {
        let (number, modules) = level.trim().split_once(' ').unwrap();
        let level = number.parse().unwrap();
        rows.extend(modules.split(',').map(|module| Row {
            level,
            module: module.trim().trim_matches('`').to_owned(),
        }));
    }
    rows
}

/// The place of the longest module name in the table that `path` lies in.
fn place(table: &[Row], path: &[String]) -> Option<usize> {
    let path = path.join("::");
    (0..table.len())
        .filter(|row| {
            path.strip_prefix(&table[*row].module)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        })
        .max_by_key(|row| table[*row].module.len())
}

/// A use that must not be.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    file: String,
    uses: String,
    why: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} uses {}: {}", self.file, self.uses, self.why)
    }
}

/// What a file uses that it must not.
fn check(table: &[Row], file: &str, source: &str) -> BTreeSet<Violation> {
    let module = module_of(file);
    let mut violations = BTreeSet::new();
    // the crate's root, and the program, stand above all
    let Some(own) = (match module.as_slice() {
        [] => return violations,
        module => place(table, module),
    }) else {
        violations.insert(Violation {
            file: file.to_owned(),
            uses: String::new(),
            why: "the module has no level: put it into the table in src/lib.rs".to_owned(),
        });
        return violations;
    };
    for path in uses(&module, source) {
        let why = match place(table, &path) {
            Some(used) if used <= own => continue,
            Some(used) => format!(
                "`{}` (level {}) stands above `{}` (level {})",
                table[used].module, table[used].level, table[own].module, table[own].level
            ),
            None => "it has no level: put it into the table in src/lib.rs".to_owned(),
        };
        violations.insert(Violation {
            file: file.to_owned(),
            uses: path.join("::"),
            why,
        });
    }
    violations
}

/// `nbd/protocol/options.rs` to `nbd`, `protocol`, `options`.
pub fn module_of(file: &str) -> Vec<String> {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    match path {
        "lib" | "main" => Vec::new(),
        path => path.split('/').map(str::to_owned).collect(),
    }
}

/// All paths from the crate's root that a file names: `crate::`, `super::` and `self::`, in `use` and elsewhere, through braces.
fn uses(module: &[String], source: &str) -> Vec<Vec<String>> {
    named(module, source, |_, _| true)
}

/// As [`uses`], without what inline modules of tests name, and without what is handed on (`pub use`).
pub fn own_uses(module: &[String], source: &str) -> Vec<Vec<String>> {
    named(module, source, |before, inline| {
        let is_test = inline.iter().any(|(name, _)| name == "tests");
        !is_test && !is_reexport(before)
    })
}

/// Whether these tokens end with `pub use`, or `pub(...) use`.
pub fn is_reexport(tokens: &[String]) -> bool {
    match tokens {
        [.., is, end] if is == "pub" && end == "use" => true,
        [.., close, end] if close == ")" && end == "use" => {
            let open = tokens.iter().rposition(|token| token == "(");
            open.is_some_and(|open| open > 0 && tokens[open - 1] == "pub")
        }
        _ => false,
    }
}

/// The paths that a `use` at this token names; those of a module's own children need no `self`.
pub fn uses_at(tokens: &[String], at: usize, module: &[String]) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    path(tokens, at, module, &mut paths);
    paths
}

fn named(
    module: &[String],
    source: &str,
    counts: impl Fn(&[String], &[(String, usize)]) -> bool,
) -> Vec<Vec<String>> {
    let tokens = tokens(source);
    let mut paths = Vec::new();
    // inline modules that are open, with the depth of braces inside of each
    let mut inline: Vec<(String, usize)> = Vec::new();
    let mut depth = 0;
    let mut at = 0;
    while at < tokens.len() {
        match tokens[at].as_str() {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if inline.last().is_some_and(|(_, inside)| depth < *inside) {
                    inline.pop();
                }
            }
            "mod" if tokens.get(at + 2).is_some_and(|token| token == "{") => {
                depth += 1;
                inline.push((tokens[at + 1].clone(), depth));
                at += 2;
            }
            "crate" | "super" | "self" if tokens.get(at + 1).is_some_and(|token| token == "::") => {
                let mut here = module.to_vec();
                here.extend(inline.iter().map(|(name, _)| name.clone()));
                // `pub(in super::..)` and the like name modules too; `a::super` is no Rust
                let mut found = Vec::new();
                let before = &tokens[..at];
                at = path(&tokens, at, &here, &mut found);
                if counts(before, &inline) {
                    paths.append(&mut found);
                }
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    paths
}

/// Follows a path from `at`, through its braces, and returns where it ends.
fn path(tokens: &[String], at: usize, here: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    let mut path = here.to_vec();
    let mut at = at;
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("crate") => path.clear(),
            Some("super") => {
                path.pop();
            }
            Some("self") => {}
            Some("{") => return braces(tokens, at + 1, &path, paths),
            Some("*") => {
                at += 1;
                break;
            }
            Some(name) if is_name(name) => path.push(name.to_owned()),
            _ => break,
        }
        at += 1;
        if tokens.get(at).is_none_or(|token| token != "::") {
            break;
        }
        at += 1;
        // `collect::<T>` is no path any more
        if tokens.get(at).is_some_and(|token| token == "<") {
            break;
        }
    }
    paths.push(path);
    at
}

/// The inside of a path's braces; returns what comes after them.
fn braces(
    tokens: &[String],
    mut at: usize,
    base: &[String],
    paths: &mut Vec<Vec<String>>,
) -> usize {
    while let Some(token) = tokens.get(at) {
        at = match token.as_str() {
            "}" => return at + 1,
            "as" => at + 2,
            "{" => braces(tokens, at + 1, base, paths),
            token if is_name(token) || token == "*" => path(tokens, at, base, paths),
            _ => at + 1,
        };
    }
    at
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Names, `::` and single characters; without comments, strings and characters in quotes.
pub fn tokens(source: &str) -> Vec<String> {
    let characters: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let starts = |at: usize, text: &str| {
        text.chars()
            .enumerate()
            .all(|(index, c)| characters.get(at + index) == Some(&c))
    };
    while let Some(&c) = characters.get(at) {
        if starts(at, "//") {
            while characters.get(at).is_some_and(|c| *c != '\n') {
                at += 1;
            }
        } else if starts(at, "/*") {
            let mut open = 0;
            while at < characters.len() {
                if starts(at, "/*") {
                    open += 1;
                    at += 2;
                } else if starts(at, "*/") {
                    open -= 1;
                    at += 2;
                    if open == 0 {
                        break;
                    }
                } else {
                    at += 1;
                }
            }
        } else if let Some(end) = raw_string(&characters, at) {
            at = end;
        } else if c == '"' {
            at += 1;
            while characters.get(at).is_some_and(|c| *c != '"') {
                at += if characters[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if c == '\'' {
            // a character, or a lifetime
            if characters.get(at + 1) == Some(&'\\') {
                at += 3;
                while characters.get(at).is_some_and(|c| *c != '\'') {
                    at += 1;
                }
                at += 1;
            } else if characters.get(at + 2) == Some(&'\'') {
                at += 3;
            } else {
                at += 1;
            }
        } else if c.is_alphanumeric() || c == '_' {
            let start = at;
            while characters
                .get(at)
                .is_some_and(|c| c.is_alphanumeric() || *c == '_')
            {
                at += 1;
            }
            tokens.push(characters[start..at].iter().collect());
        } else if starts(at, "::") {
            tokens.push("::".to_owned());
            at += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
            at += 1;
        }
    }
    tokens
}

/// Where a raw string (`r"`, `r#"`, `br"`) that starts here ends.
fn raw_string(characters: &[char], at: usize) -> Option<usize> {
    if at > 0 && (characters[at - 1].is_alphanumeric() || characters[at - 1] == '_') {
        return None;
    }
    let mut position = at;
    if characters.get(position) == Some(&'b') {
        position += 1;
    }
    if characters.get(position) != Some(&'r') {
        return None;
    }
    position += 1;
    let hashes = characters[position..]
        .iter()
        .take_while(|c| **c == '#')
        .count();
    position += hashes;
    if characters.get(position) != Some(&'"') {
        return None;
    }
    position += 1;
    while position < characters.len() {
        if characters[position] == '"'
            && characters[position + 1..]
                .iter()
                .take_while(|c| **c == '#')
                .count()
                >= hashes
        {
            return Some(position + 1 + hashes);
        }
        position += 1;
    }
    Some(position)
}

/// What levels 0 to 2 must not name: I/O, clocks, threads, async.
const IMPURE: &[&[&str]] = &[
    &["std", "env", "args"],
    &["std", "env", "current_dir"],
    &["std", "env", "var"],
    &["std", "env", "var_os"],
    &["std", "fs"],
    &["std", "net", "TcpListener"],
    &["std", "net", "TcpStream"],
    &["std", "net", "ToSocketAddrs"],
    &["std", "net", "UdpSocket"],
    &["std", "os"],
    &["std", "process"],
    &["std", "thread"],
    &["std", "time", "Instant"],
    &["std", "time", "SystemTime"],
    &["hyper"],
    &["neli"],
    &["reqwest"],
    &["rustix"],
    &["tempfile"],
    &["tokio"],
];

/// What a file of the pure levels names and must not. Its tests may.
fn impure(source: &str) -> BTreeSet<String> {
    let code = match source.find("#[cfg(test)]\nmod ") {
        Some(end) => &source[..end],
        None => source,
    };
    let tokens = tokens(code);
    let mut paths = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let starts_path = at == 0 || tokens[at - 1] != "::";
        let goes_on = tokens.get(at + 1).is_some_and(|token| token == "::");
        if starts_path && goes_on && IMPURE.iter().any(|path| path[0] == token) {
            path(&tokens, at, &[], &mut paths);
        }
    }
    paths
        .iter()
        .filter(|path| {
            IMPURE.iter().any(|impure| {
                path.iter()
                    .zip(*impure)
                    .all(|(name, impure)| name == impure)
                    && path.len() >= impure.len()
            })
        })
        .map(|path| path.join("::"))
        .collect()
}

fn lib() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap()
}

#[test]
fn no_module_uses_one_above_it() {
    let table = table(&lib());
    let sources = super::tidy::sources("src");
    assert!(sources.len() > 30, "{} files", sources.len());
    let violations: Vec<_> = sources
        .iter()
        .flat_map(|(file, source)| check(&table, file, source))
        .map(|violation| violation.to_string())
        .collect();
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn the_pure_levels_have_no_io_no_clock_and_no_async() {
    let table = table(&lib());
    let mut found = Vec::new();
    for (file, source) in super::tidy::sources("src") {
        let row = place(&table, &module_of(&file));
        if row.is_some_and(|row| table[row].level <= 2) {
            found.extend(
                impure(&source)
                    .iter()
                    .map(|path| format!("{file} names {path}")),
            );
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The crate's whole table is read: each module of `src/lib.rs` has its row.
#[test]
fn every_module_has_a_level() {
    let lib = lib();
    let table = table(&lib);
    let modules: Vec<_> = lib
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert!(modules.len() > 10, "{modules:?}");
    for module in modules {
        assert!(place(&table, &[module.to_owned()]).is_some(), "{module}");
    }
    let level = |module: &str| {
        let path: Vec<_> = module.split("::").map(str::to_owned).collect();
        table[place(&table, &path).unwrap()].level
    };
    assert_eq!(level("units"), 0);
    assert_eq!((level("ext4::format::inode"), level("ext4::dir")), (1, 2));
    assert_eq!(
        (level("nbd::protocol::options"), level("nbd::server")),
        (1, 4)
    );
}

#[test]
fn violations_are_found() {
    let table = table(
        "//! Text.\n//! 0 `units`, `error` | 1 `oci`, `nbd::protocol` |\n//! 2 `tree` | 4 `nbd`.\n//! Levels are",
    );
    assert_eq!(table.len(), 6);
    for (file, source, expected) in [
        (
            "tree/mod.rs",
            "use crate::{error::Error, oci::Digest};",
            &[][..],
        ),
        ("tree/mod.rs", "use crate::nbd::Server;", &["nbd::Server"]),
        // another module of the same name's beginning is not meant
        ("tree/mod.rs", "use crate::nbdx::Server;", &["nbdx::Server"]),
        (
            "tree/mod.rs",
            "use crate::{units, nbd::{self, protocol::{A, B}, server::*}};",
            &["nbd", "nbd::server"],
        ),
        (
            "tree/mod.rs",
            "fn f() -> crate::nbd::Server { todo!() }",
            &["nbd::Server"],
        ),
        (
            "tree/mod.rs",
            "// crate::nbd::A\n/* crate::nbd::B /* */ crate::nbd::B */ const C: &str = \"crate::nbd::C\";",
            &[],
        ),
        (
            "tree/mod.rs",
            "const C: &str = r#\"\" crate::nbd::C\"#; const D: char = '\"'; use crate::nbd::D;",
            &["nbd::D"],
        ),
        (
            "tree/walk.rs",
            "use super::{super::nbd::A, B};",
            &["nbd::A"],
        ),
        (
            "tree/walk.rs",
            "mod tests { use super::super::B; use super::super::super::nbd::A; } use super::C;",
            &["nbd::A"],
        ),
        (
            "nbd/protocol.rs",
            "use super::stream::Stream; use crate::nbd::protocol::options;",
            &["nbd::stream::Stream"],
        ),
        (
            "nbd/protocol/options.rs",
            "use super::A; use super::super::B;",
            &["nbd::B"],
        ),
        (
            "nbd/server.rs",
            "use super::{protocol::*, stream::Stream}; use crate::{tree::Tree, oci};",
            &[],
        ),
        // within a level the order of the table counts
        ("units.rs", "use crate::error::Error;", &["error::Error"]),
        ("error.rs", "use crate::units::DiskOffset;", &[]),
        ("lib.rs", "pub use crate::nbd::Server;", &[]),
        ("other.rs", "", &[""]),
    ] {
        let found: Vec<_> = check(&table, file, source)
            .into_iter()
            .map(|violation| violation.uses)
            .collect();
        assert_eq!(found, expected, "{file}: {source}");
    }
}

#[test]
fn impure_names_are_found() {
    for (source, expected) in [
        (
            "use std::{fmt, io, ops::Range}; fn f(path: &std::path::Path) {}",
            &[][..],
        ),
        (
            "use std::{fmt, fs::{self, File}};",
            &["std::fs", "std::fs::File"],
        ),
        (
            "let now = std::time::Instant::now();",
            &["std::time::Instant::now"],
        ),
        ("use std::time::Duration;", &[]),
        ("use tokio::sync::mpsc;", &["tokio::sync::mpsc"]),
        ("use my::tokio::x; // tokio::y", &[]),
        ("fn f() {}\n#[cfg(test)]\nmod tests { use std::fs; }", &[]),
    ] {
        let found: Vec<_> = impure(source).into_iter().collect();
        assert_eq!(found, expected, "{source}");
    }
}
