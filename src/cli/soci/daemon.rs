//! The command line of `soci-snapshotter-grpc`.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::PathBuf,
};

use clap::{CommandFactory, Parser, error::ErrorKind};

use super::{config::Config, version::VERSION};
use crate::source::socket_path;

/// The first descriptor that systemd passes (`sd_listen_fds(3)`).
const FIRST_DESCRIPTOR: u32 = 3;
/// The socket of the snapshotter where no other is given, in the runtime directory.
const SOCKET: &str = "snapshotter.sock";
/// The runtime directory where no other is given.
const RUN_DIR: &str = "/run/socinbd";

#[derive(Parser)]
#[command(name = "soci-snapshotter-grpc", version = VERSION)]
struct Grpc {
    /// Socket for containerd; fd:// for that of the socket unit
    #[arg(long, env = "SOCI_SNAPSHOTTER_ADDRESS", hide_env = true)]
    address: Option<PathBuf>,
    /// Configuration of soci-snapshotter-grpc
    #[arg(long, env = "SOCI_SNAPSHOTTER_CONFIG", hide_env = true)]
    config: Option<PathBuf>,
    /// Log level
    #[arg(long, env = "SOCI_SNAPSHOTTER_LOG_LEVEL", hide_env = true)]
    log_level: Option<String>,
    /// State directory
    #[arg(long, env = "SOCI_SNAPSHOTTER_ROOT", hide_env = true)]
    root: Option<PathBuf>,
}

pub(super) fn translated(arguments: Vec<OsString>) -> Result<Vec<OsString>, clap::Error> {
    // options with one hyphen are those of Go
    let with_two = |argument: OsString| match argument.to_str() {
        Some(text) if text.len() > 2 && text.starts_with('-') && !text.starts_with("--") => {
            OsString::from(format!("-{text}"))
        }
        _ => argument,
    };
    let given = Grpc::try_parse_from(arguments.into_iter().map(with_two))?;
    let refused = |what: String| Grpc::command().error(ErrorKind::InvalidValue, what);
    let config = Config::read(given.config.as_deref())
        .map_err(|error| refused(format!("{}\n", error.report())))?;
    let run_dir = env::var_os("SOCINBD_RUN_DIR").map_or_else(|| RUN_DIR.into(), PathBuf::from);
    let hosts_dir = run_dir.join("soci-hosts");
    if config.has_mirrors() {
        config
            .write_mirrors(&hosts_dir)
            .map_err(|error| refused(format!("{}\n", error.report())))?;
    }
    for warning in &config.warnings {
        eprintln!("socinbd: warning: {warning}");
    }
    let mut line: Vec<OsString> = vec!["socinbd".into()];
    let mut option = |name: &str, value: &OsStr| line.extend([name.into(), value.to_owned()]);
    if let Some(root) = &given.root {
        option("--root", root.as_os_str());
    }
    let level = match given.log_level.as_deref() {
        Some("fatal" | "panic") => Some("error"),
        None if config.is_debug() => Some("debug"),
        level => level,
    };
    if let Some(level) = level {
        option("--log", OsStr::new(level));
    }
    line.push("snapshotter".into());
    let address = match given.address {
        Some(address) if address.starts_with("fd:") => Some(activated().ok_or_else(|| {
            refused(
                "--address fd://: there is no socket of a socket unit: start this program by a unit with Type=notify and a socket unit\n"
                    .to_owned(),
            )
        })?),
        address => address,
    };
    // the image service is at the same socket, so both are named
    let named = address.or_else(|| config.has_image_service().then(|| run_dir.join(SOCKET)));
    if let Some(address) = &named {
        line.extend(["--address".into(), socket_path(address).into()]);
    }
    line.extend(["--metrics-names".into(), "both".into()]);
    let address = named.unwrap_or_default();
    line.extend(config.options(&hosts_dir, socket_path(&address)));
    Ok(line)
}

/// The path of the first Unix socket that systemd has passed to this process.
fn activated() -> Option<PathBuf> {
    let number = |name: &str| env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID")? != std::process::id() || env::var_os("NOTIFY_SOCKET").is_none() {
        return None;
    }
    let sockets = fs::read_to_string("/proc/self/net/unix").ok()?;
    let count = number("LISTEN_FDS")?.min(1024);
    (FIRST_DESCRIPTOR..FIRST_DESCRIPTOR.saturating_add(count)).find_map(|descriptor| {
        let link = fs::read_link(format!("/proc/self/fd/{descriptor}")).ok()?;
        let inode = link
            .to_str()?
            .strip_prefix("socket:[")?
            .strip_suffix(']')?
            .to_owned();
        path_of(&sockets, &inode)
    })
}

/// The path of the socket with this inode, in a table of `/proc/net/unix`.
fn path_of(sockets: &str, inode: &str) -> Option<PathBuf> {
    sockets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let found = words.nth(6)?;
        let path = words.next()?;
        (found == inode && path.starts_with('/')).then(|| path.into())
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{all_become, line},
        *,
    };

    #[test]
    fn command_lines_of_the_daemon_become_those_of_this_program() {
        all_become(&[
            (
                "soci-snapshotter-grpc --address /run/s.sock -log-level fatal --root /r",
                "socinbd --root /r --log error snapshotter --address /run/s.sock --metrics-names both --index-policy v2",
            ),
            (
                "soci-snapshotter-grpc --address unix:///run/s.sock",
                "socinbd snapshotter --address /run/s.sock --metrics-names both --index-policy v2",
            ),
            (
                "soci-snapshotter-grpc",
                "socinbd snapshotter --metrics-names both --index-policy v2",
            ),
        ]);
    }

    #[test]
    fn a_configuration_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        let given = format!("soci-snapshotter-grpc --config {}", file.display());
        let said = line(&given).unwrap_err();
        assert!(said.contains("config.toml"), "{said}");
        fs::write(&file, "[cri_keychain]\nenable_keychain = true").unwrap();
        all_become(&[
            (
                &given,
                "socinbd snapshotter --address /run/socinbd/snapshotter.sock --metrics-names both --index-policy v2 --image-service /run/socinbd/snapshotter.sock",
            ),
            (
                &format!("{given} --address /run/s.sock"),
                "socinbd snapshotter --address /run/s.sock --metrics-names both --index-policy v2 --image-service /run/s.sock",
            ),
        ]);
        fs::write(&file, "debug = true\n[pull_modes.soci_v1]\nenable = true").unwrap();
        all_become(&[
            (
                &given,
                "socinbd --log debug snapshotter --metrics-names both --index-policy any",
            ),
            (
                &format!("{given} --log-level warn"),
                "socinbd --log warn snapshotter --metrics-names both --index-policy any",
            ),
        ]);
    }

    #[test]
    fn sockets_of_units() {
        let said = line("soci-snapshotter-grpc --address fd://").unwrap_err();
        assert!(said.contains("socket unit"), "{said}");
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
            0000: 00000002 00000000 00010000 0001 01 4711 /run/a.sock\n\
            0000: 00000002 00000000 00010000 0001 01 4712\n\
            0000: 00000002 00000000 00010000 0001 01 4713 @abstract\n";
        let path = |inode| path_of(table, inode);
        assert_eq!(path("4711"), Some("/run/a.sock".into()));
        assert_eq!(path("4712").or(path("4713")).or(path("1")), None);
    }
}
