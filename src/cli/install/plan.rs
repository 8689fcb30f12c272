//! The plan of an installation: all files with their contents, before anything is written.

use std::path::{Path, PathBuf};

use toml_edit::DocumentMut;

use super::{
    containerd::{self, Containerd, Snapshotter, Version, Wanted},
    record::{Changed, RECORD, Record},
    root::{Root, UNITS},
    steps::{Report, Step},
};
use crate::{
    cli::{GlobalArgs, absolute},
    error::{Error, Kind, Result, ResultExt as _},
    kernel::mount::idmap,
};

/// The unit of the package.
const UNIT: &str = include_str!("../../../scripts/systemd/socinbd.service");
/// The command line of the packaged unit.
const PACKAGED: &str = "/usr/bin/socinbd";
const COPIED: &str = "/usr/local/bin/socinbd";

/// All files of an installation.
pub(super) struct Plan {
    /// In the order in which they are written: containerd's configuration is the last.
    files: Vec<Changed>,
    /// The program that is running, and where it is copied to.
    program: Option<(PathBuf, PathBuf)>,
    /// The program of the daemon.
    pub(super) own: PathBuf,
    pub(super) warnings: Vec<String>,
    /// The socket of the snapshotter.
    pub(super) socket: String,
    /// The socket of containerd.
    pub(super) address: String,
}

impl Plan {
    pub(super) fn new(
        global: &GlobalArgs,
        root: &Root,
        old: Option<&Record>,
        containerd: &Containerd,
        version: Version,
        replaces: bool,
    ) -> Result<Self> {
        let read = |path: &Path| {
            let now = root.read(path)?;
            old.map_or(Ok(now.clone()), |old| old.without(path, now))
        };
        let (state, run_dir) = (absolute(&global.root)?, absolute(&global.run_dir)?);
        let snapshotter = Snapshotter {
            socket: run_dir.join("snapshotter.sock").display().to_string(),
            root: state.display().to_string(),
            replaces,
            maps_owners: root.is_host() && idmap::is_possible(&state),
        };
        let mut wanted = containerd::wanted(root, &read, containerd, version, &snapshotter)?;
        let own = std::env::current_exe().or_kind(Kind::Io, || "finding this program".into())?;
        let (program, copied) = match root.is_host() {
            true => (own, None),
            false if root.exists(Path::new(PACKAGED)) => (PACKAGED.into(), None),
            false => (COPIED.into(), Some((own, COPIED.into()))),
        };
        let mut line = in_unit(&program)?;
        for (option, path, usual) in [
            ("--root", &state, "/var/lib/socinbd"),
            ("--run-dir", &run_dir, "/run/socinbd"),
        ] {
            if path != Path::new(usual) {
                line = format!("{line} {option} {}", in_unit(path)?);
            }
        }
        let hosts = containerd
            .distribution
            .as_ref()
            .and_then(|it| it.hosts(root));
        let options = match hosts {
            Some(folder) => format!(" --hosts-dir {}", in_unit(&folder)?),
            None => String::new(),
        };
        let command = Command {
            line: &line,
            options: &options,
            state: &in_unit(&state)?,
        };
        let services = containerd.services(root);
        let mut files = units(&command, &services, &read, root)?;
        files.extend(configured(&wanted, &read)?);
        if services.is_empty() {
            let what = "no unit of k3s or RKE2 was found: start them after socinbd.service";
            wanted.warnings.push(what.to_owned());
        }
        Ok(Self {
            files,
            program: copied,
            own: program,
            warnings: wanted.warnings,
            socket: snapshotter.socket,
            address: wanted.address,
        })
    }

    /// The services that start containerd.
    pub(super) fn services(&self) -> Vec<String> {
        services_of(&self.files)
    }

    /// Where the program is to be copied to, if it is not there yet.
    pub(super) fn copied_program(&self, root: &Root) -> Option<PathBuf> {
        let (own, copy) = self.program.as_ref()?;
        (!root.has_copy(copy, own)).then(|| copy.clone())
    }

    /// The steps from what is there to what is planned.
    pub(super) fn steps(&self, root: &Root, old: Option<&Record>) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        // what an earlier installation has written, and this one does not
        for changed in old.iter().flat_map(|old| &old.files) {
            if self.files.iter().all(|file| file.path != changed.path) {
                let now = root.read(&changed.path)?;
                let wanted = old.map_or(Ok(None), |old| old.without(&changed.path, now.clone()))?;
                let path = changed.path.clone();
                steps.push(Step { path, now, wanted });
            }
        }
        for file in &self.files {
            steps.push(Step {
                path: file.path.clone(),
                now: root.read(&file.path)?,
                wanted: Some(file.after.clone()),
            });
        }
        steps.retain(Step::is_change);
        Ok(steps)
    }

    /// Writes the record first, so that an installation that is cut short can be taken back, and then the files.
    pub(super) fn write(&self, root: &Root, old: Option<&Record>, report: &Report) -> Result<()> {
        let mut record = Record::new();
        record.files.clone_from(&self.files);
        record.containerd.clone_from(&self.address);
        record.program = self.program.as_ref().map(|(_, copy)| copy.clone());
        record.directories = old.map_or(Vec::new(), |old| old.directories.clone());
        let paths = report.files.iter().map(|step| step.path.as_path());
        for path in paths
            .chain(record.program.as_deref())
            .chain([Path::new(RECORD)])
        {
            record.directories.extend(root.make_parents(path)?);
        }
        if old != Some(&record) {
            record.write(root, Path::new(RECORD))?;
        }
        if let Some((own, copy)) = &self.program
            && report.program.is_some()
        {
            root.copy(own, copy)?;
        }
        report.files.iter().try_for_each(|step| step.run(root))
    }

    /// Restores the files and the record as they were before [`Self::write`].
    pub(super) fn take_back(
        &self,
        root: &Root,
        old: Option<&Record>,
        steps: &[Step],
    ) -> Result<()> {
        let record = Record::read(root, Path::new(RECORD)).ok().flatten();
        let made = record.map(|record| record.directories);
        for step in steps.iter().rev() {
            step.back().run(root)?;
        }
        match old {
            Some(old) => old.write(root, Path::new(RECORD))?,
            None => root.remove(Path::new(RECORD))?,
        }
        let made = made.into_iter().flatten().rev();
        for directory in made.filter(|it| old.is_none_or(|old| !old.directories.contains(it))) {
            // it may be in use by now
            let _ = root.remove(&directory);
        }
        Ok(())
    }
}

/// The command line of the daemon.
struct Command<'a> {
    /// The program and its global options.
    line: &'a str,
    /// Those of the snapshotter.
    options: &'a str,
    /// The state directory.
    state: &'a str,
}

/// The file in the directory of a service that starts containerd.
const AFTER: &str = "socinbd.conf";

/// The services that start containerd, by the files that order them.
pub(super) fn services_of(files: &[Changed]) -> Vec<String> {
    let service = |file: &Changed| {
        let folder = file.path.parent()?.file_name()?.to_str()?;
        let service = folder.strip_suffix(".d")?.to_owned();
        file.path.ends_with(AFTER).then_some(service)
    };
    files.iter().filter_map(service).collect()
}

/// The units of systemd.
fn units(
    command: &Command<'_>,
    services: &[String],
    read: &dyn Fn(&Path) -> Result<Option<String>>,
    root: &Root,
) -> Result<Vec<Changed>> {
    let file = |path: &str, after: String| -> Result<Changed> {
        Ok(Changed {
            path: path.into(),
            before: read(Path::new(path))?,
            after,
            settings: Vec::new(),
        })
    };
    let mut is_packaged = false;
    for folder in UNITS {
        let path = Path::new(folder).join("socinbd.service");
        // without that of an earlier installation
        is_packaged |= root.exists(&path) && read(&path)?.is_some();
    }
    let Command { line, options, .. } = command;
    let of_daemon = match is_packaged {
        true => file(
            "/etc/systemd/system/socinbd.service.d/containerd.conf",
            format!(
                "# Written by `socinbd install`: the daemon is the snapshotter of containerd.\n[Service]\n\
                ExecStart=\nExecStart={line} snapshotter{options}\nExecReload=\nExecReload={line} config reload\n"
            ),
        )?,
        false => file("/etc/systemd/system/socinbd.service", own_unit(command))?,
    };
    let mut files = vec![of_daemon];
    for service in services {
        files.push(file(
            &format!("/etc/systemd/system/{service}.d/{AFTER}"),
            "# Written by `socinbd install`: containerd asks its snapshotters once, when it starts.\n[Unit]\n\
            Wants=socinbd.service\nAfter=socinbd.service\n"
                .to_owned(),
        )?);
    }
    Ok(files)
}

/// The packaged unit, for a program that is not from a package.
fn own_unit(command: &Command<'_>) -> String {
    let Command {
        line,
        options,
        state,
    } = command;
    let unit = UNIT
        .replace(
            &format!("ExecStart={PACKAGED} daemon"),
            &format!("ExecStart={line} snapshotter{options}"),
        )
        .replace(
            &format!("ExecReload={PACKAGED} "),
            &format!("ExecReload={line} "),
        )
        .replace(
            "RequiresMountsFor=/var/lib/socinbd",
            &format!("RequiresMountsFor={state}"),
        )
        .replace("Also=socinbd.socket\n", "");
    format!("# Written by `socinbd install`.\n{unit}")
}

/// containerd's configuration with the settings; nothing if it has them already.
fn configured(
    wanted: &Wanted,
    read: &dyn Fn(&Path) -> Result<Option<String>>,
) -> Result<Option<Changed>> {
    let before = read(&wanted.path)?;
    let named = || format!("{}: correct it first", wanted.path.display());
    let text = before.as_deref().unwrap_or(&wanted.start);
    let mut document = text
        .parse::<DocumentMut>()
        .or_kind(Kind::InvalidArgument, named)?;
    let mut settings = Vec::new();
    for setting in &wanted.settings {
        settings.extend(setting.apply(&mut document)?);
    }
    if settings.is_empty() {
        return Ok(None);
    }
    let after = document.to_string();
    // what is read back has all settings
    let mut written = after
        .parse::<DocumentMut>()
        .or_kind(Kind::Unsupported, named)?;
    for setting in &wanted.settings {
        if setting.apply(&mut written)?.is_some() {
            let what = format!("{}: set {} by hand", named(), setting.path.join("."));
            return Err(Error::new(Kind::Unsupported, what));
        }
    }
    if before.is_none() {
        settings.clear();
    }
    Ok(Some(Changed {
        path: wanted.path.clone(),
        before,
        after,
        settings,
    }))
}

/// A path as a word of a command line in a unit.
fn in_unit(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| {
        text.chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "/_.-+".contains(letter))
    });
    text.map(str::to_owned).ok_or_else(|| {
        let what = format!(
            "{}: the path has letters that have a meaning in units of systemd: use another one",
            path.display()
        );
        Error::new(Kind::Unsupported, what)
    })
}
