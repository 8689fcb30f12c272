//! The keys of the configuration file. A key has the name of an option, and the option has the rest: the type of its value, its default,
//! its help, and its variable of the environment.

use clap::{Arg, Command};

/// A table of the file.
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
}

/// The table of the directories.
pub(super) const DIRECTORIES: &str = "directories";

/// The tables, in the order of the documented file.
pub(super) const TABLES: [Table; 8] = [
    Table {
        name: DIRECTORIES,
        help: "Directories of the daemon and of all commands",
    },
    Table {
        name: "logging",
        help: "The log of the daemon; other commands have the options only",
    },
    Table {
        name: "daemon",
        help: "The daemon",
    },
    Table {
        name: "disk",
        help: "Limits of the local disk",
    },
    Table {
        name: "metrics",
        help: "Metrics for Prometheus",
    },
    Table {
        name: "images",
        help: "How images are attached",
    },
    Table {
        name: "snapshotter",
        help: "The snapshotter of containerd",
    },
    Table {
        name: "registry",
        help: "Access to registries",
    },
];

/// What TOML value a key has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Number,
    /// Absolute, because commands and the daemon have different working directories.
    Path,
    Paths,
    /// Tables, each of which is a rule of the snapshotter.
    Rules,
    Texts,
}

/// The key of a rule with what it chooses; the others are its conditions.
pub(super) const CHOICE: &str = "pull";

impl Type {
    /// What is wanted, for messages and documents.
    pub(super) fn wanted(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Number => "a whole number",
            Self::Path => "an absolute path as a string",
            Self::Paths => "a list of absolute paths",
            Self::Rules => "a list of tables",
            Self::Texts => "a list of strings",
        }
    }
}

/// Whose option gets the value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The daemon's.
    Daemon,
    /// That of each command that has it.
    Commands,
}

/// When a changed value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// After a reload of the daemon.
    Reload,
    /// After a restart of the daemon.
    Restart,
    /// In the next command; after a restart in a snapshotter, which has these options too.
    Command,
}

impl Change {
    pub(super) fn when(self) -> &'static str {
        match self {
            Self::Reload => "after a reload",
            Self::Restart => "after a restart",
            Self::Command => "in the next command",
        }
    }
}

/// A key.
#[derive(Debug)]
pub(in crate::cli) struct Key {
    pub(super) table: &'static str,
    /// The name, which is that of the option.
    pub(in crate::cli) name: &'static str,
    pub(super) value: Type,
    pub(super) scope: Scope,
    pub(super) change: Change,
    /// A value as TOML, for the documented file, where the option has no default.
    pub(super) example: &'static str,
    /// Another key of the table that must be there too.
    pub(super) needs: Option<&'static str>,
}

const fn key(table: &'static str, name: &'static str, value: Type, change: Change) -> Key {
    let scope = match change {
        Change::Command => Scope::Commands,
        Change::Reload | Change::Restart => Scope::Daemon,
    };
    Key {
        table,
        name,
        value,
        scope,
        change,
        example: "",
        needs: None,
    }
}

/// All keys, in the order of the documented file.
pub(super) const KEYS: [Key; 26] = [
    Key {
        scope: Scope::Commands,
        ..key(DIRECTORIES, "root", Type::Path, Change::Restart)
    },
    Key {
        scope: Scope::Commands,
        ..key(DIRECTORIES, "run-dir", Type::Path, Change::Restart)
    },
    key("logging", "log", Type::Text, Change::Reload),
    key("logging", "log-format", Type::Text, Change::Reload),
    Key {
        example: "\"/var/log/socinbd.log\"",
        ..key("logging", "log-file", Type::Path, Change::Restart)
    },
    Key {
        example: "300",
        ..key("daemon", "idle-exit", Type::Number, Change::Reload)
    },
    Key {
        example: "\"50GiB\"",
        ..key("disk", "disk-limit", Type::Text, Change::Reload)
    },
    Key {
        example: "\"10%\"",
        ..key("disk", "disk-reserve", Type::Text, Change::Reload)
    },
    Key {
        example: "\"127.0.0.1:9101\"",
        ..key("metrics", "metrics-address", Type::Text, Change::Restart)
    },
    key("metrics", "metrics-names", Type::Text, Change::Restart),
    key("images", "index-policy", Type::Text, Change::Command),
    key("images", "device", Type::Text, Change::Command),
    key("images", "fill", Type::Text, Change::Command),
    Key {
        example: "[\"/run/socinbd/snapshotter.sock\"]",
        ..key("snapshotter", "address", Type::Paths, Change::Restart)
    },
    Key {
        example: "\"/run/socinbd/image-service.sock\"",
        ..key("snapshotter", "image-service", Type::Path, Change::Restart)
    },
    Key {
        example: "\"/run/containerd/containerd.sock\"",
        ..key("snapshotter", "containerd", Type::Path, Change::Restart)
    },
    key("snapshotter", "unproven", Type::Text, Change::Restart),
    key("snapshotter", "layer-mounts", Type::Text, Change::Restart),
    Key {
        example: "[{ pull = \"disks\", image = \"registry.example/*\", max-image-size = \"100MiB\" }]",
        ..key("snapshotter", "rule", Type::Rules, Change::Restart)
    },
    Key {
        example: "[\"x-request-id\"]",
        ..key("snapshotter", "label-header", Type::Texts, Change::Restart)
    },
    Key {
        example: "\"/etc/socinbd/auth.json\"",
        ..key("registry", "auth-file", Type::Path, Change::Command)
    },
    Key {
        example: "[\"/etc/socinbd/registry-ca.pem\"]",
        ..key("registry", "ca-cert", Type::Paths, Change::Command)
    },
    Key {
        example: "[\"/etc/containerd/certs.d\"]",
        ..key("registry", "hosts-dir", Type::Paths, Change::Command)
    },
    Key {
        example: "\"/etc/kubernetes/credential-providers.yaml\"",
        needs: Some("image-credential-provider-bin-dir"),
        ..key(
            "registry",
            "image-credential-provider-config",
            Type::Path,
            Change::Command,
        )
    },
    Key {
        example: "\"/usr/libexec/kubernetes/credential-providers\"",
        needs: Some("image-credential-provider-config"),
        ..key(
            "registry",
            "image-credential-provider-bin-dir",
            Type::Path,
            Change::Command,
        )
    },
    Key {
        example: "\"/run/containerd/containerd.sock\"",
        ..key(
            "registry",
            "containerd-address",
            Type::Path,
            Change::Command,
        )
    },
];

/// The options of `daemon` and `snapshotter` that are no keys, with the reason.
#[cfg(test)]
pub(super) const NO_KEYS: [(&str, &str); 9] = [
    ("plain-http", "is of one registry"),
    ("tls", "is of one registry"),
    ("index", "is of one image"),
    ("require-index", "is of one image"),
    ("config", "names the file"),
    ("json", "is the form of one output"),
    ("replace", "is another command"),
    ("help", "is another command"),
    ("version", "is another command"),
];

impl Key {
    /// `TABLE.NAME`.
    pub(in crate::cli) fn path(&self) -> String {
        format!("{}.{}", self.table, self.name)
    }

    /// Clap's name of the option.
    pub(super) fn id(&self) -> String {
        self.name.replace('-', "_")
    }

    /// The option, in the first command that has it.
    pub(super) fn option<'a>(&self, command: &'a Command) -> Option<&'a Arg> {
        let own = command
            .get_arguments()
            .find(|option| option.get_long() == Some(self.name));
        own.or_else(|| {
            command
                .get_subcommands()
                .find_map(|command| self.option(command))
        })
    }

    /// The default of the option as TOML; `None` if it has no default.
    pub(super) fn default(&self, option: &Arg) -> Option<String> {
        // the daemon logs what an operator looks for later
        if self.name == "log" {
            return Some(format!("{DAEMON_LOG:?}"));
        }
        let values: Vec<String> = option
            .get_default_values()
            .iter()
            .filter_map(|value| Some(value.to_str()?.to_owned()))
            .collect();
        (!values.is_empty()).then(|| self.toml(&values))
    }

    /// Values of the option as TOML.
    pub(super) fn toml(&self, values: &[String]) -> String {
        let text = |value: &String| toml::Value::String(value.clone()).to_string();
        match (self.value, values) {
            (Type::Number, [value]) => value.clone(),
            (Type::Paths | Type::Texts, values) => {
                let values: Vec<String> = values.iter().map(text).collect();
                format!("[{}]", values.join(", "))
            }
            (Type::Rules, values) => {
                let rules: Vec<String> = values.iter().map(|rule| rule_as_toml(rule)).collect();
                format!("[{}]", rules.join(", "))
            }
            (_, [value]) => text(value),
            (_, _) => String::new(),
        }
    }
}

/// The keys and values of a rule.
pub(super) fn rule_entries(rule: &str) -> Vec<(&str, &str)> {
    let entries = rule.split(',');
    entries
        .map(|entry| entry.split_once('=').unwrap_or((CHOICE, entry)))
        .collect()
}

fn rule_as_toml(rule: &str) -> String {
    let entries = rule_entries(rule).into_iter();
    let entries = entries.map(|(name, value)| {
        let value = toml::Value::String(value.to_owned());
        format!("{name} = {value}")
    });
    format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
}

/// The log filter of a daemon where none is given.
pub(super) const DAEMON_LOG: &str = "info";
