//! The command lines of `soci`. Its images are those of containerd, and its indexes are in containerd's content store, or in the state
//! directory with `--content-store soci`.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use clap::{Command, CommandFactory, Parser, Subcommand, ValueEnum, error::ErrorKind};

use super::version::VERSION;

#[derive(Parser)]
#[command(name = "soci", version = VERSION)]
struct Soci {
    /// Socket of containerd
    #[arg(long, short, env = "CONTAINERD_ADDRESS", hide_env = true)]
    address: Option<OsString>,
    /// Namespace of containerd
    #[arg(
        long,
        short,
        env = "CONTAINERD_NAMESPACE",
        hide_env = true,
        default_value = "default"
    )]
    namespace: String,
    /// Where indexes are stored
    #[arg(long, value_enum, default_value = "containerd")]
    content_store: Store,
    /// State directory
    #[arg(long)]
    root: Option<PathBuf>,
    /// Accepted: each request has limits of its own
    #[arg(long)]
    timeout: Option<OsString>,
    /// Log more
    #[arg(long)]
    debug: bool,
    #[command(subcommand)]
    command: SociCommand,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Store {
    Containerd,
    Soci,
}

#[derive(Subcommand)]
enum SociCommand {
    #[command(external_subcommand)]
    Named(Vec<OsString>),
}

/// What becomes of an option of `soci`.
enum Meaning {
    /// It is one of this program.
    Same,
    /// It has another name here, and a value.
    Renamed(&'static str),
    /// It gives credentials, which this option of `push` takes.
    Login(&'static str),
    /// It has no counterpart, and is left out; with its value, if it has one.
    Dropped { has_value: bool },
    /// It is an error, with advice.
    Refused(&'static str),
}

fn meaning(name: &str) -> Meaning {
    match name {
        "--tlscacert" => Meaning::Renamed("--ca-cert"),
        "--snapshotter" => Meaning::Dropped { has_value: true },
        // certificates are always verified; hosts.toml of a registry has the exceptions
        "--skip-verify" | "-k" | "--http-dump" | "--http-trace" => {
            Meaning::Dropped { has_value: false }
        }
        "--user" | "-u" => Meaning::Login("--user"),
        "--refresh" => Meaning::Login("--refresh"),
        "--tlscert" | "--tlskey" => {
            Meaning::Refused("name the client certificate in hosts.toml (--hosts-dir)")
        }
        _ => Meaning::Same,
    }
}

/// An image of containerd or one of the registry, as the words of a command name it.
enum Place {
    Containerd,
    Registry,
}

/// `own` is the definition of the command line of this program.
pub(super) fn translated(
    arguments: Vec<OsString>,
    mut own: Command,
) -> Result<Vec<OsString>, clap::Error> {
    let soci = Soci::try_parse_from(arguments)?;
    let SociCommand::Named(words) = &soci.command;
    let text = |at: usize| words.get(at).and_then(|word| word.to_str());
    let (meant, used): (&[&str], usize) = match (text(0).unwrap_or_default(), text(1)) {
        ("create", _) => (&["index", "create"], 1),
        ("push", _) => (&["index", "push"], 1),
        ("convert", _) => (&["convert"], 1),
        ("index", Some("list" | "ls")) => (&["index", "list"], 2),
        ("index", Some("info")) => (&["index", "info"], 2),
        ("index", Some("rm" | "remove")) => (&["index", "rm"], 2),
        ("ztoc", Some("list" | "ls")) => (&["ztoc", "list"], 2),
        ("ztoc", Some("info")) => (&["ztoc", "info"], 2),
        ("ztoc", Some("get-file")) => (&["ztoc", "get-file"], 2),
        ("prefetch", Some("list" | "ls")) => (&["prefetch", "list"], 2),
        ("prefetch", Some("info")) => (&["prefetch", "info"], 2),
        ("rebuild-db", _) => {
            return Err(refused(
                "`soci rebuild-db`: there is no database: indexes are found in their content store\n",
            ));
        }
        (name @ ("index" | "ztoc" | "prefetch"), _) => (
            match name {
                "index" => &["index"],
                "ztoc" => &["ztoc"],
                _ => &["prefetch"],
            },
            1,
        ),
        (other, _) => {
            let what =
                format!("`soci {other}` has no counterpart here: use socinbd (`socinbd --help`)\n");
            return Err(refused(&what));
        }
    };
    own.build();
    let command = meant
        .iter()
        .try_fold(&own, |command, name| command.find_subcommand(name));
    let (options, positional) = split(words.get(used..).unwrap_or_default(), command)?;
    let mut line: Vec<OsString> = vec!["socinbd".into()];
    if soci.debug {
        line.push("--log=debug".into());
    }
    if let Some(root) = &soci.root {
        line.extend(["--root".into(), root.into()]);
    }
    line.extend(meant.iter().map(OsString::from));
    soci.finish(meant, options, positional, line)
}

impl Soci {
    /// Adds the options and the images of the command.
    fn finish(
        &self,
        meant: &[&str],
        mut options: Vec<OsString>,
        positional: Vec<OsString>,
        mut line: Vec<OsString>,
    ) -> Result<Vec<OsString>, clap::Error> {
        let places: &[Place] = match meant {
            ["convert"] if take(&mut options, "--standalone") => {
                let has_format = options.iter().any(|option| {
                    let option = option.to_string_lossy();
                    option == "--format" || option.starts_with("--format=")
                });
                if !has_format {
                    options.push("--format=oci-archive".into());
                }
                line.extend(options.into_iter().chain(positional));
                return Ok(line);
            }
            ["convert"] => &[Place::Containerd, Place::Containerd],
            ["index", "create"] => &[Place::Containerd],
            ["index", "push"] => &[Place::Containerd, Place::Registry],
            _ if self.content_store == Store::Soci || meant.len() == 1 => {
                line.extend(options.into_iter().chain(positional));
                return Ok(line);
            }
            _ => return Ok(self.of_store(meant, options, positional, line)),
        };
        line.extend(self.address());
        match meant {
            ["index", "create"] if self.content_store == Store::Soci => line.push("--local".into()),
            ["index", "push"] => line.push("--keep-tag".into()),
            _ => {}
        }
        line.extend(options);
        // `push` names its image once, which is in both places
        let last = positional.last().cloned();
        let named = positional.into_iter().map(Some).chain([match meant {
            ["index", "push"] => last,
            _ => None,
        }]);
        for (number, word) in named.flatten().enumerate() {
            match places.get(number) {
                Some(Place::Containerd) => line.push(self.image(Some(&word))),
                Some(Place::Registry) | None => line.push(word),
            }
        }
        Ok(line)
    }

    /// A command that looks at indexes in containerd's content store: of one image, or of the whole namespace.
    fn of_store(
        &self,
        meant: &[&str],
        options: Vec<OsString>,
        positional: Vec<OsString>,
        mut line: Vec<OsString>,
    ) -> Vec<OsString> {
        line.extend(self.address());
        let mut image = None;
        let mut options = options.into_iter();
        while let Some(option) = options.next() {
            let text = option.to_string_lossy();
            match text.split_once('=') {
                Some(("--ref" | "--image-ref", value)) => image = Some(value.into()),
                None if text == "--ref" || text == "--image-ref" => image = options.next(),
                _ => line.push(option),
            }
        }
        let is_of_image = image.is_some();
        let at = self.image(image.as_deref());
        match meant {
            ["index", "list"] => line.push(at),
            ["index", "rm"] if is_of_image => line.extend(["--ref".into(), at]),
            _ => line.extend(["--at".into(), at]),
        }
        line.extend(positional);
        line
    }

    fn address(&self) -> Vec<OsString> {
        match &self.address {
            Some(address) => vec!["--containerd-address".into(), address.clone()],
            None => Vec::new(),
        }
    }

    /// The reference of an image in the namespace, or of the namespace.
    fn image(&self, name: Option<&OsStr>) -> OsString {
        let mut reference = OsString::from(format!("containerd://{}", self.namespace));
        if let Some(name) = name {
            reference.push("/");
            reference.push(name);
        }
        reference
    }
}

fn refused(what: &str) -> clap::Error {
    Soci::command().error(ErrorKind::InvalidSubcommand, what)
}

/// Takes an option without a value from a list, if it is there.
fn take(options: &mut Vec<OsString>, name: &str) -> bool {
    let before = options.len();
    options.retain(|option| option != name);
    options.len() < before
}

/// The options of a command, as this program has them, and its other words.
fn split(
    words: &[OsString],
    command: Option<&Command>,
) -> Result<(Vec<OsString>, Vec<OsString>), clap::Error> {
    let (mut options, mut positional) = (Vec::new(), Vec::new());
    let mut words = words.iter().cloned();
    while let Some(word) = words.next() {
        let Some(text) = word
            .to_str()
            .filter(|text| text.starts_with('-') && *text != "-")
        else {
            positional.push(word);
            continue;
        };
        if text == "--" {
            positional.extend(words);
            break;
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        if name == "--hosts-dir" {
            options.extend(hosts_dirs(
                &value.or_else(|| words.next()).unwrap_or_default(),
            ));
            continue;
        }
        match meaning(name) {
            Meaning::Same => {
                let next = match value {
                    None if takes_value(command, name) => words.next(),
                    _ => None,
                };
                options.extend([word].into_iter().chain(next));
            }
            Meaning::Renamed(name) => {
                let value = value.or_else(|| words.next());
                options.extend([OsString::from(name)].into_iter().chain(value));
            }
            Meaning::Login(option) => {
                if command.is_none_or(|command| command.get_name() != "push") {
                    return Err(refused(&format!(
                        "`{name}` is an option of `soci push` only: log in with `docker login` or `nerdctl login`, or set DOCKER_CONFIG\n"
                    )));
                }
                let value = value.or_else(|| words.next()).unwrap_or_default();
                let mut option = OsString::from(format!("{option}="));
                option.push(value);
                options.push(option);
            }
            Meaning::Dropped { has_value } => {
                if has_value && value.is_none() {
                    words.next();
                }
            }
            Meaning::Refused(advice) => {
                return Err(refused(&format!("`{name}` is not supported: {advice}\n")));
            }
        }
    }
    Ok((options, positional))
}

/// Whether an option of a command of this program has a value in the next word.
fn takes_value(command: Option<&Command>, name: &str) -> bool {
    let found = command.and_then(|command| {
        command.get_arguments().find(|option| {
            let long = name.strip_prefix("--");
            let short = name.strip_prefix('-').and_then(|rest| {
                let mut letters = rest.chars();
                letters.next().filter(|_| letters.next().is_none())
            });
            (long.is_some() && option.get_long() == long)
                || (short.is_some() && option.get_short() == short)
        })
    });
    found
        .is_some_and(|option| option.get_action().takes_values() && !option.is_require_equals_set())
}

/// nerdctl gives all of its directories in one value, also those that do not exist.
fn hosts_dirs(value: &OsStr) -> Vec<OsString> {
    let value = value.to_string_lossy();
    let there = value.split(',').filter(|folder| Path::new(folder).is_dir());
    there
        .flat_map(|folder| ["--hosts-dir".into(), folder.into()])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{all_become, line};

    #[test]
    fn command_lines_of_soci_become_those_of_this_program() {
        all_become(&[
            (
                "soci --address /run/c.sock --namespace k8s.io create --platform linux/amd64 --span-size 4194304 r/app:1",
                "socinbd index create --containerd-address /run/c.sock --platform linux/amd64 --span-size 4194304 containerd://k8s.io/r/app:1",
            ),
            (
                "soci --content-store soci --root /r create -f r/app:1",
                "socinbd --root /r index create --local -f containerd://default/r/app:1",
            ),
            (
                "/usr/local/bin/soci -n k8s.io push --all-platforms --plain-http --skip-verify --snapshotter soci --tlscacert /ca.pem --hosts-dir /no-such-directory,/etc,/usr r/app:1",
                "socinbd index push --keep-tag --all-platforms --plain-http --ca-cert /ca.pem --hosts-dir /etc --hosts-dir /usr containerd://k8s.io/r/app:1 r/app:1",
            ),
            (
                "soci push -u me:se=cret --refresh=token r/app:1",
                "socinbd index push --keep-tag --user=me:se=cret --refresh=token containerd://default/r/app:1 r/app:1",
            ),
            (
                "soci --debug convert r/app:1 -p linux/arm64 --min-layer-size=0 r/app:2",
                "socinbd --log=debug convert -p linux/arm64 --min-layer-size=0 containerd://default/r/app:1 containerd://default/r/app:2",
            ),
            (
                "soci convert --standalone in.tar out.tar",
                "socinbd convert --format=oci-archive in.tar out.tar",
            ),
            (
                "soci convert --standalone --format oci-dir in.tar out",
                "socinbd convert --format oci-dir in.tar out",
            ),
            ("soci index list", "socinbd index list containerd://default"),
            (
                "soci index ls -q --ref r/app:1",
                "socinbd index list -q containerd://default/r/app:1",
            ),
            ("soci --content-store soci index list", "socinbd index list"),
            (
                "soci index rm --ref r/app:1",
                "socinbd index rm --ref containerd://default/r/app:1",
            ),
            (
                "soci ztoc list --image-ref=r/app:1",
                "socinbd ztoc list --at containerd://default/r/app:1",
            ),
            (
                "soci prefetch list",
                "socinbd prefetch list --at containerd://default",
            ),
        ]);
    }

    #[test]
    fn what_soci_can_and_this_program_cannot_is_said() {
        for (given, reason) in [
            ("soci rebuild-db", "there is no database"),
            ("soci run", "`soci run` has no counterpart here"),
            ("soci create -u me:secret r/app:1", "docker login"),
            ("soci push --tlskey /k r/app:1", "hosts.toml"),
            ("soci --content-store oci create r/app:1", "containerd"),
        ] {
            let said = line(given).unwrap_err();
            assert!(said.contains(reason) && !said.contains("secret"), "{said}");
        }
    }
}
