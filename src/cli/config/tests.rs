//! Wrong files and the exact message for each; the documented file; the keys against the options.

use std::{ffi::OsString, fs, path::Path};

use clap::ArgMatches;
use proptest::prelude::*;

use super::{
    ConfigFile, PATH, Settings, default_file,
    file::MAX_BYTES,
    keys::{KEYS, NO_KEYS, Scope, TABLES, Type},
};
use crate::{cli::command, engine::verifiers::OnFailure};

fn parse(text: &str) -> Result<ConfigFile, String> {
    ConfigFile::parse(text.as_bytes(), "f", command).map_err(|error| error.report())
}

#[test]
fn each_mistake_has_its_place_and_says_what_is_wanted() {
    for (text, message) in [
        (
            "[daemon]\nidle-exti = 3\n",
            "f:2:1: unknown key \"idle-exti\" in [daemon]; did you mean \"idle-exit\"?",
        ),
        (
            "[daemon]\n  idle_exit = 3\n",
            "f:2:3: unknown key \"idle_exit\" in [daemon]; did you mean \"idle-exit\"?",
        ),
        (
            "[deamon]\nidle-exit = 3\n",
            "f:1:2: unknown table [deamon]; did you mean [daemon]?",
        ),
        (
            "[qqq]\n",
            "f:1:2: unknown table [qqq]; the tables are directories, logging, daemon, disk, metrics, images, snapshotter, registry, verifiers",
        ),
        (
            "[daemon]\ndevice = \"nbd\"\n",
            "f:2:1: unknown key \"device\" in [daemon]; it belongs in [images]",
        ),
        (
            "[daemon]\nqqqq = 1\n",
            "f:2:1: unknown key \"qqqq\" in [daemon]; the keys of this table are idle-exit",
        ),
        (
            "[images]\nindex-exit = 1\n",
            "f:2:1: unknown key \"index-exit\" in [images]; did you mean \"index-policy\"?",
        ),
        (
            "root = \"/x\"\n",
            "f:1:1: unknown key \"root\"; it belongs in [directories]",
        ),
        (
            "qqqq = 1\n",
            "f:1:1: unknown key \"qqqq\"; `socinbd config show --defaults` prints all keys",
        ),
        (
            "daemon = 3\n",
            "f:1:1: daemon is a table: write [daemon], and its keys below",
        ),
        (
            "[[daemon]]\n",
            "f:1:3: daemon is a table: write [daemon], and its keys below",
        ),
        (
            "[daemon]\nidle-exit = \"5m\"\n",
            "f:2:13: daemon.idle-exit = \"5m\": a whole number is wanted",
        ),
        (
            "[daemon]\nidle-exit = 1.5\n",
            "f:2:13: daemon.idle-exit = 1.5: a whole number is wanted",
        ),
        (
            "[daemon]\nidle-exit = true\n",
            "f:2:13: daemon.idle-exit = true: a whole number is wanted",
        ),
        (
            "[daemon]\nidle-exit = { a = 1 }\n",
            "f:2:13: daemon.idle-exit = { a = 1 }: a whole number is wanted",
        ),
        (
            "[daemon]\nidle-exit = -1\n",
            "f:2:13: daemon.idle-exit = -1: a number of at least 0 is wanted",
        ),
        (
            "[daemon]\nidle-exit = 99999999999999999999\n",
            "f:2:13: daemon.idle-exit = 99999999999999999999: number too large to fit in target type",
        ),
        (
            "[images]\ndevice = \"nbdd\"\n",
            "f:2:10: images.device = \"nbdd\": one of auto, nbd, loop, fuse is wanted",
        ),
        (
            "[images]\ndevice = 3\n",
            "f:2:10: images.device = 3: a string is wanted",
        ),
        (
            "[images]\nindex-policy = \"\"\n",
            "f:2:16: images.index-policy = \"\": one of v2, any, none is wanted",
        ),
        (
            "[directories]\nroot = \"var/lib\"\n",
            "f:2:8: directories.root = \"var/lib\": an absolute path as a string is wanted",
        ),
        (
            "[disk]\ndisk-reserve = \"110%\"\n",
            "f:2:16: disk.disk-reserve = \"110%\": a share is a whole number from 0 to 100 with %, e.g. 10%",
        ),
        (
            "[metrics]\nmetrics-address = \"nowhere\"\n",
            "f:2:19: metrics.metrics-address = \"nowhere\": expected an IP address with a port, e.g. 127.0.0.1:9101 or [::]:9101, or unix:/path",
        ),
        (
            "[registry]\nca-cert = \"/x\"\n",
            "f:2:11: registry.ca-cert = \"/x\": a list of absolute paths is wanted",
        ),
        (
            "[registry]\nca-cert = [\"/x\", 3]\n",
            "f:2:18: registry.ca-cert = 3: a list of absolute paths is wanted",
        ),
        (
            "[registry]\nimage-credential-provider-config = \"/x\"\n",
            "f:2:1: registry.image-credential-provider-config needs image-credential-provider-bin-dir too",
        ),
        (
            "[logging]\nlog = \"==\"\n",
            "f:2:7: logging.log = \"==\": a log filter is a level (error, warn, info, debug, trace) or a list like socinbd=debug,warn: invalid filter directive",
        ),
        (
            "[logging]\nlog = \"info\"\nlog = \"warn\"\n",
            "f:3:1: this is not TOML: duplicate key",
        ),
        (
            "[logging\nlog = \"info\"\n",
            "f:1:9: this is not TOML: unclosed table, expected `]`",
        ),
        (
            "[logging]\nlog = info\n",
            "f:2:7: this is not TOML: a string needs quotes",
        ),
        (
            "[directories]\nroot = /x\n",
            "f:2:8: this is not TOML: a string needs quotes",
        ),
        (
            "[daemon]\nidle-exit =\n",
            "f:2:12: this is not TOML: string values must be quoted, expected literal string",
        ),
        (
            "[snapshotter]\nrule = \"disks\"\n",
            "f:2:8: snapshotter.rule = \"disks\": a list of tables is wanted",
        ),
        (
            "[snapshotter]\nrule = [\"disks\"]\n",
            "f:2:9: snapshotter.rule = \"disks\": a list of tables is wanted",
        ),
        (
            "[[snapshotter.rule]]\nimage = \"a/*\"\n",
            "f:1:1: a rule of snapshotter.rule needs pull: lazy, disks or containerd",
        ),
        (
            "[[snapshotter.rule]]\npull = \"disk\"\n",
            "f:2:8: snapshotter.rule = \"disk\": a rule begins with lazy, disks or containerd",
        ),
        (
            "[[snapshotter.rule]]\npull = \"lazy\"\n[[snapshotter.rule]]\npull = \"disks\"\nmax-layer-szie = \"1M\"\nmax-image-size = \"1Q\"\nimage = 3\n",
            "f:5:1: unknown key \"max-layer-szie\" in [[snapshotter.rule]]; did you mean \"max-layer-size\"?\n\
             f:6:18: snapshotter.rule = \"1Q\": max-image-size: a size is a number of bytes, or a number with k, M, G, T, KiB, MiB, GiB or TiB, e.g. 50GiB\n\
             f:7:9: snapshotter.rule = 3: image has to be a string",
        ),
        (
            "[snapshotter]\nrule = [{ pull = \"disks\", size = \"1M\" }]\n",
            "f:2:27: unknown key \"size\" in [[snapshotter.rule]]; the keys of a rule are pull, image, max-image-size, max-layer-size",
        ),
        (
            "[verifiers]\npattern = \"*\"\n",
            "f:1:1: write [[verifiers]], one for each verifier",
        ),
        (
            "[[verifiers]]\npattern = \"*\"\n",
            "f:1:1: a verifier needs program",
        ),
        (
            "[[verifiers]]\npattern = \"\"\nprogram = \"x\"\nargs = [1]\ntime-limit = 0\non-failure = \"no\"\nq = 1\n",
            "f:2:11: verifiers.pattern: a string that is not empty is wanted\n\
             f:3:11: verifiers.program: an absolute path as a string is wanted\n\
             f:4:8: verifiers.args: a list of strings is wanted\n\
             f:5:14: verifiers.time-limit: a whole number of seconds from 1 to 300 is wanted\n\
             f:6:14: verifiers.on-failure: one of refuse, warn is wanted\n\
             f:7:1: unknown key \"q\" in [[verifiers]]; the keys of this table are pattern, program, args, time-limit, on-failure",
        ),
        // all mistakes, in the order of the file
        (
            "[images]\ndevice = 1\n[daemon]\nidle-exit = \"x\"\n",
            "f:2:10: images.device = 1: a string is wanted\nf:4:13: daemon.idle-exit = \"x\": a whole number is wanted",
        ),
    ] {
        assert_eq!(parse(text).map(|_| ()).unwrap_err(), message, "{text}");
    }
    let error = ConfigFile::parse(b"[daemon]\n# \xff\n", "f", command).unwrap_err();
    assert_eq!(error.report(), "f:2:3: this is not UTF-8");
    let many = format!(
        "[daemon]\n{}",
        (0..50).map(|n| format!("q{n} = 1\n")).collect::<String>()
    );
    let error = parse(&many).map(|_| ()).unwrap_err();
    assert_eq!(error.lines().count(), 21);
    assert!(error.ends_with("\nf: and 30 more mistakes"), "{error}");
}

#[test]
fn verifiers_are_read_in_the_order_of_the_file() {
    let text = "[[verifiers]]\npattern = \"a/*\"\nprogram = \"/bin/a\"\n\
        [[verifiers]]\npattern = \"*\"\nprogram = \"/bin/b\"\nargs = [\"-k\", \"x\"]\ntime-limit = 300\non-failure = \"warn\"\n";
    let daemon = ["socinbd", "daemon"];
    let (mut settings_now, _) = settings(&daemon, text, true);
    let [one, two] = settings_now.verifiers() else {
        panic!("{:?}", settings_now.verifiers());
    };
    assert_eq!((one.pattern.as_str(), one.time_limit), ("a/*", 10));
    assert_eq!(one.on_failure, OnFailure::Refuse);
    assert_eq!((two.args.join(" ").as_str(), two.time_limit), ("-k x", 300));
    assert_eq!(two.on_failure, OnFailure::Warn);
    let (before, _) = settings(&daemon, "", true);
    let changes = settings_now.changes_since(&before);
    assert_eq!(changes.applied, ["verifiers has 2 entries"]);
}

#[test]
fn only_a_regular_file_of_limited_length_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let read = |name: &str| ConfigFile::read(&at(name), command).map_err(|it| it.report());
    assert!(read("none").unwrap().is_none());
    fs::write(at("file"), "[daemon]\nidle-exit = 0x1_0\n").unwrap();
    std::os::unix::fs::symlink("file", at("link")).unwrap();
    let file = read("link").unwrap().unwrap();
    assert_eq!(file.entries[0].values, ["16"]);
    fs::create_dir(at("directory")).unwrap();
    let mode = rustix::fs::Mode::from(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), mode).unwrap();
    std::os::unix::fs::symlink("/dev/zero", at("device")).unwrap();
    for name in ["directory", "fifo", "device"] {
        let error = read(name).map(|_| ()).unwrap_err();
        assert!(error.contains("not a regular file"), "{name}: {error}");
    }
    fs::write(at("long"), vec![b'#'; MAX_BYTES as usize + 1]).unwrap();
    let error = read("long").map(|_| ()).unwrap_err();
    assert!(error.contains("the limit is"), "{error}");
}

fn settings(arguments: &[&str], text: &str, is_daemon: bool) -> (Settings, ArgMatches) {
    let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    let mut settings = Settings::new(arguments, None, is_daemon);
    let matches = settings
        .matches(parse(text).unwrap(), command, None)
        .unwrap();
    (settings, matches)
}

/// The value of an option of the command.
fn value(matches: &ArgMatches, id: &str) -> Vec<String> {
    let (_, command) = matches.subcommand().unwrap();
    let raw = command.get_raw(id).into_iter().flatten();
    raw.map(|value| value.to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_command_line_is_above_the_file_and_the_file_above_the_default() {
    let text = "[directories]\nroot = \"/file\"\n[logging]\nlog = \"trace\"\n[images]\ndevice = \"fuse\"\nfill = \"delayed\"\n\
        [registry]\nca-cert = [\"/a\", \"/b\"]\n[daemon]\nidle-exit = 7\n";
    let (_, attach) = settings(&["socinbd", "attach", "i", "/m"], text, false);
    assert_eq!(value(&attach, "root"), ["/file"]);
    assert_eq!(value(&attach, "run_dir"), ["/run/socinbd"]);
    assert_eq!(value(&attach, "device"), ["fuse"]);
    assert_eq!(value(&attach, "fill"), ["delayed"]);
    assert_eq!(value(&attach, "ca_cert"), ["/a", "/b"]);
    // the log of the daemon is not that of other commands
    assert_eq!(value(&attach, "log"), ["warn"]);
    let line = [
        "socinbd",
        "--root",
        "/line",
        "attach",
        "i",
        "/m",
        "--device=nbd",
        "--ca-cert=/c",
    ];
    let (of_line, attach) = settings(&line, text, false);
    assert_eq!(value(&attach, "root"), ["/line"]);
    assert_eq!(value(&attach, "device"), ["nbd"]);
    assert_eq!(value(&attach, "ca_cert"), ["/c"]);
    assert!(of_line.is_explicit("root") && !of_line.is_explicit("run-dir"));
    let (_, daemon) = settings(&["socinbd", "daemon"], text, true);
    assert_eq!(value(&daemon, "log"), ["trace"]);
    assert_eq!(value(&daemon, "idle_exit"), ["7"]);
    let (_, daemon) = settings(&["socinbd", "daemon"], "", true);
    assert_eq!(value(&daemon, "log"), ["info"]);
    assert_eq!(value(&daemon, "idle_exit"), [""; 0]);
}

#[test]
fn rules_are_tables_of_the_file() {
    let text = "[[snapshotter.rule]]\npull = \"lazy\"\n\
        [[snapshotter.rule]]\npull = \"disks\"\nimage = \"registry.example/*\"\nmax-image-size = \"1GiB\"\n";
    let (of_file, snapshotter) = settings(&["socinbd", "snapshotter"], text, true);
    let rules = ["lazy", "disks,image=registry.example/*,max-image-size=1GiB"];
    assert_eq!(value(&snapshotter, "rule"), rules);
    let (_, snapshotter) = settings(&["socinbd", "snapshotter", "--rule=containerd"], text, true);
    assert_eq!(value(&snapshotter, "rule"), ["containerd"]);
    // both forms of TOML
    let inline = "[snapshotter]\nrule = [{ pull = \"lazy\" }, { pull = \"disks\", image = \"registry.example/*\", max-image-size = \"1GiB\" }]\n";
    let (_, snapshotter) = settings(&["socinbd", "snapshotter"], inline, true);
    assert_eq!(value(&snapshotter, "rule"), rules);
    let mut now = settings(&["socinbd", "snapshotter"], "", true).0;
    let changes = now.changes_since(&of_file);
    assert_eq!(changes.needs_restart, ["snapshotter.rule has no value"]);
    let mut back = settings(&["socinbd", "snapshotter"], text, true).0;
    let none = settings(&["socinbd", "snapshotter"], "", true).0;
    assert_eq!(
        back.changes_since(&none).needs_restart,
        [
            "snapshotter.rule = [{ pull = \"lazy\" }, { pull = \"disks\", image = \"registry.example/*\", max-image-size = \"1GiB\" }]"
        ]
    );
}

#[test]
fn what_a_reload_cannot_change_is_told_until_the_restart() {
    let daemon = ["socinbd", "daemon", "--log-format=json"];
    let read = |text: &str| settings(&daemon, text, true).0;
    let before = read("[daemon]\nidle-exit = 7\n");
    let other = "[directories]\nroot = \"/other\"\n[logging]\nlog = \"debug\"\nlog-format = \"text\"\n\
        [images]\ndevice = \"fuse\"\n";
    let mut now = read(other);
    let changes = now.changes_since(&before);
    // the command line has the format
    assert_eq!(
        changes.applied,
        ["logging.log = \"debug\"", "daemon.idle-exit has no value"]
    );
    assert_eq!(changes.needs_restart, ["directories.root = \"/other\""]);
    let mut again = read(other);
    let changes = again.changes_since(&now);
    assert_eq!(changes.applied, [""; 0]);
    assert_eq!(changes.needs_restart, ["directories.root = \"/other\""]);
    let mut back = read("[logging]\nlog = \"debug\"\n");
    assert_eq!(back.changes_since(&again).needs_restart, [""; 0]);
}

#[test]
fn each_key_is_an_option_and_each_option_of_the_daemon_a_key() {
    let program = command();
    let daemons = ["daemon", "snapshotter"].map(|name| program.find_subcommand(name).unwrap());
    let has = |command: &clap::Command, name: &str| {
        let is_it = |option: &clap::Arg| option.get_long() == Some(name);
        command.get_arguments().any(is_it)
    };
    for key in &KEYS {
        let option = key
            .option(&program)
            .unwrap_or_else(|| panic!("{}", key.path()));
        assert!(TABLES.iter().any(|table| table.name == key.table));
        if key.scope == Scope::Daemon {
            let mut all = daemons.into_iter().chain([&program]);
            assert!(all.any(|command| has(command, key.name)), "{}", key.path());
        }
        // one name has one meaning in all commands
        for command in program.get_subcommands() {
            for other in command.get_arguments() {
                if other.get_long() == Some(key.name) {
                    let (help, other) = (option.get_help(), other.get_help());
                    let texts = [help, other].map(|help| help.unwrap().to_string());
                    assert_eq!(texts[0], texts[1], "{} of {}", key.name, command.get_name());
                }
            }
        }
    }
    let daemons = daemons.iter().flat_map(|daemon| daemon.get_arguments());
    for option in program.get_arguments().chain(daemons) {
        let name = option.get_long().unwrap();
        let is_key = KEYS.iter().any(|key| key.name == name);
        let is_no_key = NO_KEYS.iter().any(|(no, _)| *no == name);
        assert!(
            is_key != is_no_key,
            "--{name} of daemon is a key, or has a reason why not"
        );
    }
}

#[test]
fn the_documented_file_sets_nothing_and_shows_the_defaults() {
    let program = command();
    let text = default_file::text(&program);
    let longest = text.lines().map(|line| line.chars().count()).max();
    assert!(longest <= Some(140), "{longest:?}: {text}");
    assert!(parse(&text).unwrap().entries.is_empty());
    // each key, and with its comment taken away its default
    let set: String = text
        .lines()
        .filter_map(|line| match line.strip_prefix('#') {
            Some(key) if key.starts_with("[[") || !key.starts_with(' ') && key.contains(" = ") => {
                Some(format!("{key}\n"))
            }
            Some(_) => None,
            None => Some(format!("{line}\n")),
        })
        .collect();
    let file = parse(&set).unwrap();
    let names: Vec<&str> = file.entries.iter().map(|entry| entry.key.name).collect();
    assert_eq!(names, KEYS.each_ref().map(|key| key.name));
    assert_eq!(file.verifiers.len(), 1);
    for entry in &file.entries {
        let option = entry.key.option(&program).unwrap();
        if let Some(default) = entry.key.default(option) {
            assert_eq!(entry.key.toml(&entry.values), default);
        }
    }
}

#[test]
fn the_documents_have_each_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let text = fs::read_to_string(path).unwrap();
    let section = text.split("\n## Keys\n").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows: Vec<&str> = section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert_eq!(rows, default_file::rows(&command()));
    assert!(text.contains(PATH));
}

/// Pieces of files.
fn pieces() -> impl Strategy<Value = String> {
    let tables = TABLES.iter().map(|table| format!("[{}]\n", table.name));
    let keys = KEYS.iter().map(|key| format!("{} = ", key.name));
    let others = [
        "\"/a\"\n",
        "3\n",
        "[\"/a\"]\n",
        "[",
        "]",
        "=",
        "\"",
        "\n",
        "'''",
        "{",
        "}",
        "1e9\n",
        "\\u",
        "#",
        ".",
        "é",
    ];
    let pieces: Vec<String> = tables
        .chain(keys)
        .chain(others.map(str::to_owned))
        .collect();
    proptest::collection::vec(proptest::sample::select(pieces), 0..12).prop_map(|all| all.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_a_configuration_or_mistakes_with_places(
        bytes in prop_oneof![pieces().prop_map(String::into_bytes), proptest::collection::vec(any::<u8>(), 0..200)]
    ) {
        match ConfigFile::parse(&bytes, "f", command) {
            Ok(file) => {
                for entry in &file.entries {
                    prop_assert!(!entry.values.is_empty());
                    if matches!(entry.key.value, Type::Path | Type::Paths) {
                        prop_assert!(entry.values.iter().all(|value| value.starts_with('/')));
                    }
                }
                // what the file has is taken by the options
                let mut settings = Settings::new(["socinbd", "daemon"].map(OsString::from).to_vec(), None, true);
                settings.matches(file, command, None).unwrap();
            }
            Err(error) => {
                for line in error.report().lines() {
                    prop_assert!(line.starts_with("f:"), "{}", line);
                }
            }
        }
    }
}
