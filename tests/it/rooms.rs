//! Files stand in rooms: no folder has more files than one can look over, and no files use each other in a circle.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    levels::{is_reexport, module_of, own_uses, tokens, uses_at},
    tidy::sources,
};

/// Files of one folder, at most; the folders in it are not counted.
const MAX_FILES: usize = 15;

/// A module's path from the crate's root.
type Module = Vec<String>;

/// The modules with a file of their own, and what stands in it.
fn files(sources: &[(String, String)]) -> BTreeMap<Module, &str> {
    let files = sources
        .iter()
        .map(|(file, source)| (module_of(file), source.as_str()));
    files.filter(|(module, _)| !module.is_empty()).collect()
}

/// What `pub use` gives other names to: the new path, and the path that is meant.
fn reexports(files: &BTreeMap<Module, &str>) -> BTreeMap<Module, Module> {
    let mut found = BTreeMap::new();
    for (module, source) in files {
        let tokens = tokens(source);
        for at in 0..tokens.len() {
            if !is_reexport(&tokens[..at]) {
                continue;
            }
            for path in uses_at(&tokens, at, module) {
                if let Some(name) = path.last() {
                    let new = module.iter().chain([name]).cloned().collect();
                    found.insert(new, path);
                }
            }
        }
    }
    found
}

/// The file that a path leads to: through re-exports, and then that of the longest module.
fn file_of<'a>(
    mut path: Module,
    files: &'a BTreeMap<Module, &str>,
    reexports: &BTreeMap<Module, Module>,
) -> Option<&'a Module> {
    for _ in 0..8 {
        let known = (1..=path.len()).rev().find_map(|length| {
            let meant = reexports.get(&path[..length])?;
            Some([meant, &path[length..]].concat())
        });
        match known {
            Some(meant) if meant != path => path = meant,
            _ => break,
        }
    }
    (1..=path.len())
        .rev()
        .find_map(|length| Some(files.get_key_value(&path[..length])?.0))
}

/// What each file uses of the others. What a `mod.rs` hands on is not its own use.
fn arrows(sources: &[(String, String)]) -> BTreeMap<Module, BTreeSet<Module>> {
    let files = files(sources);
    let reexports = reexports(&files);
    let mut arrows = BTreeMap::new();
    for (module, source) in &files {
        if module.last().is_some_and(|name| name == "tests") {
            continue;
        }
        let used = own_uses(module, source).into_iter();
        let used = used.filter_map(|path| file_of(path, &files, &reexports));
        let used: BTreeSet<Module> = used.filter(|used| *used != module).cloned().collect();
        arrows.insert(module.clone(), used);
    }
    arrows
}

/// What is left when all files are taken away that use none of the others that are left, or are used by none.
fn circles(mut arrows: BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<Module, BTreeSet<Module>> {
    loop {
        let before = arrows.len();
        let here: BTreeSet<_> = arrows.keys().cloned().collect();
        let mut used: BTreeSet<Module> = BTreeSet::new();
        for uses in arrows.values_mut() {
            uses.retain(|module| here.contains(module));
            used.extend(uses.iter().cloned());
        }
        arrows.retain(|module, uses| !uses.is_empty() && used.contains(module));
        if arrows.len() == before {
            return arrows;
        }
    }
}

fn shown(circles: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<String> {
    let arrows = circles.iter().flat_map(|(from, uses)| {
        let from = from.join("::");
        uses.iter()
            .map(move |to| format!("{from} -> {}", to.join("::")))
    });
    arrows.collect()
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let arrows = arrows(&sources("src"));
    let count: usize = arrows.values().map(BTreeSet::len).sum();
    assert!(count > 500, "only {count} uses were found");
    let circles = shown(&circles(arrows));
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

#[test]
fn no_folder_has_too_many_files() {
    let mut folders: BTreeMap<String, usize> = BTreeMap::new();
    for (file, _) in sources("src") {
        let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
        *folders.entry(folder.to_owned()).or_default() += 1;
    }
    folders.retain(|_, files| *files > MAX_FILES);
    assert!(folders.is_empty(), "over {MAX_FILES} files: {folders:?}");
}

/// The files of `src` that a section of `docs/README.md` links to, in order, as modules.
fn way(index: &str, heading: &str) -> Vec<Module> {
    let section = index.split("\n## ").find(|text| text.starts_with(heading));
    let links = section.unwrap().split("(../src/").skip(1);
    links
        .map(|link| module_of(link.split(')').next().unwrap()))
        .collect()
}

/// The ways of `docs/README.md` can be walked: each of their files uses one of those before it, or is used by one.
#[test]
fn the_ways_of_a_read_and_of_an_attach_are_as_documented() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let index = std::fs::read_to_string(root.join("docs/README.md")).unwrap();
    let arrows = arrows(&sources("src"));
    // a file's own children need no path that is read here
    let uses = |one: &Module, other: &Module| arrows[one].contains(other) || other.starts_with(one);
    for (heading, least) in [
        ("Path of a read", 15),
        ("Path of an attach", 15),
        ("Path of a Prepare", 11),
    ] {
        let way = way(&index, heading);
        assert!(way.len() > least, "{heading}: {} files", way.len());
        for (at, file) in way.iter().enumerate().skip(1) {
            assert!(
                arrows.contains_key(file),
                "{heading}: no {}",
                file.join("::")
            );
            assert!(
                way[..at].iter().any(|it| uses(it, file) || uses(file, it)),
                "{heading}: {} is apart from the files before it",
                file.join("::")
            );
        }
    }
}

#[test]
fn circles_are_found() {
    let source = |file: &str, source: &str| (file.to_owned(), source.to_owned());
    let sources = [
        source(
            "a/mod.rs",
            "mod one;\nmod two;\npub use one::One;\npub(crate) use self::two::{Two, more::More};",
        ),
        source(
            "a/one.rs",
            "use super::two::Two;\nfn f() { crate::b::g(); }",
        ),
        source("a/two.rs", "use crate::{a::One, b};"),
        source(
            "b.rs",
            "#[cfg(test)]\nmod tests {\n    use crate::a::one;\n}\n",
        ),
        source("c.rs", "use super::a::Two;"),
    ];
    assert_eq!(
        shown(&circles(arrows(&sources))),
        ["a::one -> a::two", "a::two -> a::one"]
    );
}
