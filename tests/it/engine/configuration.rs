//! The configuration file of a daemon, and what of it can be changed while images are read.

use std::{
    fs,
    io::Read as _,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use rustix::fs::{Advice, fadvise};
use serde_json::Value;

use super::{Host, lifecycle::one_file_host};
use crate::support::{succeeds, wait};

/// The path of a host's configuration file, with this text.
fn write(host: &Host, text: &str) -> PathBuf {
    let path = host.mountpoint("etc").join("config.toml");
    // a reload must not find half a file
    let new = path.with_added_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, &path).unwrap();
    path
}

fn hang_up(pid: u32) {
    succeeds(Command::new("kill").args(["-HUP", &pid.to_string()]));
}

/// How often the log has a text.
fn count(host: &Host, text: &str) -> usize {
    host.log().matches(text).count()
}

#[test]
fn a_configuration_is_reloaded_while_readers_read() {
    let (host, layout, mountpoint) = one_file_host();
    let path = write(&host, "[logging]\nlog-format = \"json\"\n");
    let file = path.to_str().unwrap();
    host.attach(&layout.reference(""), &mountpoint, &["--config", file]);
    let reload = || host.run(&["--config", file, "config", "reload"]);
    let level = || host.run(&["log-level"]);
    assert_eq!(level(), "info\n");
    let (is_over, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let hello = mountpoint.join("hello");
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let mut content = String::new();
                let mut file = fs::File::open(&hello).unwrap();
                file.read_to_string(&mut content).unwrap();
                assert_eq!(content, "hello\n");
                // not from the page cache, so that the daemon is asked
                fadvise(&file, 0, None, Advice::DontNeed).unwrap();
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let readers_go_on = || {
            let before = reads.load(Ordering::Relaxed);
            wait("readers read", || {
                reads.load(Ordering::Relaxed) > before + 1
            });
        };
        // through the API, and it says what has changed
        write(
            &host,
            "[logging]\nlog = \"socinbd=debug\"\nlog-format = \"json\"\n",
        );
        assert_eq!(reload(), "logging.log = \"socinbd=debug\": applied\n");
        assert_eq!(level(), "socinbd=debug\n");
        assert_eq!(reload(), "nothing has changed for the daemon\n");
        readers_go_on();
        // a hang-up, to the daemon and to what keeps it
        let [serves, keeper] = [host.daemon().unwrap(), host.keeper().unwrap()];
        for (turn, process) in [serves, keeper].into_iter().enumerate() {
            let before = count(&host, "the configuration was read again");
            write(
                &host,
                &format!("[logging]\nlog = \"{}\"\n", ["warn", "info"][turn]),
            );
            // warn does not log what it has done
            hang_up(process);
            wait("the level is another one", || {
                level() == ["warn\n", "info\n"][turn]
            });
            if turn == 1 {
                wait("it is logged", || {
                    count(&host, "the configuration was read again") > before
                });
            }
            readers_go_on();
        }
        // a wrong file changes nothing
        write(&host, "[logging]\nlog = \"debug\"\nlog-fromat = \"json\"\n");
        let mistake = "config.toml:3:1: unknown key \"log-fromat\" in [logging]; did you mean \"log-format\"?";
        let error = host.fail(&["--config", file, "config", "reload"], 2);
        assert!(error.contains(mistake), "{error}");
        hang_up(serves);
        wait("the mistake is logged", || {
            let log = host.log();
            log.contains("the configuration stays as it is") && log.contains("did you mean")
        });
        assert_eq!(level(), "info\n");
        readers_go_on();
        // neither does one that is gone
        fs::remove_file(&path).unwrap();
        hang_up(serves);
        wait("it is logged", || count(&host, "does not exist") > 0);
        assert_eq!(level(), "info\n");
        // the limits of the local disk
        write(
            &host,
            "[disk]\ndisk-limit = \"1GiB\"\ndisk-reserve = \"0%\"\n",
        );
        let told = host.run(&["config", "reload"]);
        assert_eq!(
            told,
            "disk.disk-limit = \"1GiB\": applied\ndisk.disk-reserve = \"0%\": applied\n"
        );
        let used: Value = serde_json::from_str(&host.run(&["--json", "df"])).unwrap();
        let limits = &used["space"]["limits"];
        assert_eq!(limits["limit"], 1 << 30, "{used}");
        assert_eq!(limits["reserve"]["percent"], 0, "{used}");
        write(&host, "");
        host.run(&["config", "reload"]);
        let used: Value = serde_json::from_str(&host.run(&["--json", "df"])).unwrap();
        assert!(used["space"]["limits"]["limit"].is_null(), "{used}");
        readers_go_on();
        // what needs a restart is told, until then
        write(&host, "[metrics]\nmetrics-address = \"127.0.0.1:1\"\n");
        for _ in 0..2 {
            let told = host.run(&["config", "reload"]);
            assert_eq!(
                told,
                "metrics.metrics-address = \"127.0.0.1:1\": needs a restart of the daemon\n"
            );
        }
        assert!(
            host.log()
                .contains("metrics-address = \"127.0.0.1:1\": needs a restart")
        );
        readers_go_on();
        assert_eq!(host.daemon(), Some(serves));
        is_over.store(true, Ordering::Relaxed);
    });
    host.detach(&mountpoint);
    host.end_daemon();
    assert_eq!(host.left_over(), [""; 0]);
    // each line was JSON until the file said otherwise
    let log = host.log();
    let json = log.lines().map(serde_json::from_str::<Value>);
    let first = json.take(3).collect::<Result<Vec<_>, _>>().unwrap();
    assert!(
        first
            .iter()
            .all(|line| line["level"].is_string() && line["timestamp"].is_string())
    );
    assert!(log.contains(" INFO "), "{log}");
}

#[test]
fn a_daemon_follows_one_that_died_although_the_file_is_wrong() {
    let (host, layout, mountpoint) = one_file_host();
    let path = write(&host, "[logging]\nlog = \"socinbd=debug\"\n");
    let file = path.to_str().unwrap();
    host.attach(&layout.reference(""), &mountpoint, &["--config", file]);
    write(&host, "[logging]\nlog = info\n");
    for _ in 0..2 {
        host.kill_served_by_keeper();
        wait("another daemon serves", || host.daemon().is_some());
        assert_eq!(host.run(&["log-level"]), "socinbd=debug\n");
        assert_eq!(fs::read(mountpoint.join("hello")).unwrap(), b"hello\n");
        let log = host.log();
        assert!(
            log.contains("the configuration of the daemon before is used")
                && log.contains("config.toml:2:7: this is not TOML: a string needs quotes"),
            "{log}"
        );
    }
    write(&host, "");
    host.kill_served_by_keeper();
    wait("another daemon serves", || host.daemon().is_some());
    assert_eq!(host.run(&["log-level"]), "info\n");
    host.detach(&mountpoint);
    host.end_daemon();
    // the first start of a daemon does not guess
    write(&host, "[logging]\nlog = info\n");
    let error = host.fail(&["--config", file, "daemon"], 2);
    assert!(error.contains("config.toml:2:7: "), "{error}");
}

#[test]
fn an_idle_daemon_ends_when_a_reload_says_so() {
    let (host, layout, mountpoint) = one_file_host();
    let path = write(&host, "[daemon]\nidle-exit = 3600\n");
    let file = path.to_str().unwrap();
    host.attach(&layout.reference(""), &mountpoint, &["--config", file]);
    host.detach(&mountpoint);
    assert!(host.daemon().is_some());
    write(&host, "[daemon]\nidle-exit = 1\n");
    let told = host.run(&["--config", file, "config", "reload"]);
    assert_eq!(told, "daemon.idle-exit = 1: applied\n");
    wait("it has ended", || {
        host.daemon().is_none() && host.keeper().is_none()
    });
}

#[test]
fn the_configuration_is_checked_and_shown_with_its_sources() {
    let host = Host::new();
    let path = write(
        &host,
        "[directories]\nroot = \"/file\"\n[daemon]\nidle-exit = 9\n",
    );
    let file = path.to_str().unwrap();
    let socinbd = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_socinbd"));
        command.args(arguments).env("SOCINBD_LOG", "trace");
        command.env_remove("SOCINBD_CONFIG").output().unwrap()
    };
    let text = |arguments: &[&str]| {
        let output = socinbd(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let checked = text(&["config", "check", file]);
    assert_eq!(checked, format!("{file} is correct\n"));
    let line = [
        "--config",
        file,
        "--run-dir",
        "/line",
        "--json",
        "config",
        "show",
    ];
    let shown: Vec<Value> = serde_json::from_str(&text(&line)).unwrap();
    let of = |key: &str| {
        let shown = shown.iter().find(|shown| shown["key"] == key).unwrap();
        let field = |name: &str| shown[name].to_string().replace('"', "");
        [field("value"), field("source"), field("place")]
    };
    assert_eq!(
        of("directories.root"),
        ["/file", "file", &format!("{file}:2")]
    );
    assert_eq!(of("directories.run-dir"), ["/line", "command line", "null"]);
    assert_eq!(of("logging.log"), ["trace", "environment", "SOCINBD_LOG"]);
    assert_eq!(of("daemon.idle-exit"), ["9", "file", &format!("{file}:4")]);
    assert_eq!(of("images.device"), ["auto", "default", "null"]);
    assert_eq!(of("snapshotter.unproven")[1], "default");
    assert_ne!(of("snapshotter.unproven")[0], "null");
    assert_eq!(of("registry.auth-file"), ["null", "default", "null"]);
    // what is shown is a file with the same values
    let shown = text(&["--config", file, "config", "show"]);
    let again = write(&host, &shown);
    text(&["config", "check", again.to_str().unwrap()]);
    assert!(shown.contains("\nidle-exit = 9  # file ("), "{shown}");
    let defaults = text(&["config", "show", "--defaults"]);
    let documented = write(&host, &defaults);
    text(&["config", "check", documented.to_str().unwrap()]);
    // the command says what is wrong, and its status too
    write(
        &host,
        "[daemon]\nidle-exit = \"9\"\n[images]\ndevice = \"tape\"\n",
    );
    // `list` is one of the commands that go on, with a warning
    for arguments in [
        &["config", "check", file][..],
        &["--config", file, "restore"],
    ] {
        let output = socinbd(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        let expected = format!(
            "socinbd: {file}:2:13: daemon.idle-exit = \"9\": a whole number is wanted\n\
             {file}:4:10: images.device = \"tape\": one of auto, nbd, loop, fuse is wanted\n"
        );
        assert_eq!(
            (output.status.code(), error),
            (Some(2), expected),
            "{arguments:?}"
        );
    }
    for arguments in [
        &["config", "check", "/none"][..],
        &["--config", "/none", "list"],
    ] {
        let output = socinbd(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(3) && error.contains("/none does not exist"),
            "{error}"
        );
    }
}

#[test]
fn what_is_attached_is_seen_and_taken_down_although_the_file_is_wrong() {
    let (host, layout, mountpoint) = one_file_host();
    host.attach(&layout.reference(""), &mountpoint, &[]);
    let [root, run_dir] = [host.root(), host.run_dir()];
    let directories = format!(
        "[directories]\nroot = {:?}\nrun-dir = {:?}\n",
        root.to_str().unwrap(),
        run_dir.to_str().unwrap()
    );
    let mistake = format!("{directories}[images]\ndevise = \"fuse\"\n");
    let path = write(&host, &mistake);
    let file = path.to_str().unwrap();
    // the directories are those of the file
    let socinbd = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_socinbd"));
        command.args(["--config", file]).args(arguments);
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let place = "config.toml:5:1: unknown key \"devise\" in [images]; did you mean \"device\"?";
    for arguments in [
        &["list"][..],
        &["df"],
        &["log-level"],
        &["why", mountpoint.to_str().unwrap()],
    ] {
        let (status, told, error) = socinbd(arguments);
        assert_eq!(status, Some(0), "{arguments:?}: {error}");
        assert!(error.contains(place), "{arguments:?}: {error}");
        assert!(arguments[0] != "list" || told.contains("mnt"), "{told}");
    }
    // what uses the file does not guess
    for arguments in [
        &["prune", "--dry-run"][..],
        &["restore"],
        &["run", "i", "--", "x"],
    ] {
        let (status, _, error) = socinbd(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {error}");
    }
    // a file that is not TOML names no directories
    write(&host, "[directories\n");
    let error = host.fail(&["--config", file, "prune"], 2);
    assert!(error.contains("this is not TOML"), "{error}");
    let detach = ["--config", file, "detach", mountpoint.to_str().unwrap()];
    let output = host.output(&detach);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert!(error.contains("this is not TOML"), "{error}");
    assert_eq!(host.list().len(), 0);
    // a file that was named and is not there is a mistake of the command line
    fs::remove_file(&path).unwrap();
    host.fail(&["--config", file, "list"], 3);
}
