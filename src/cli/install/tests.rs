use std::{collections::BTreeMap, fs};

use proptest::prelude::*;
use toml_edit::DocumentMut;

use super::{
    containerd::{Containerd, Snapshotter, Version, wanted},
    settings::{Done, Setting, at},
    *,
};

const MAIN: &str = "/etc/containerd/config.toml";

/// A root directory with files.
fn node(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(&path[1..]);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let root = Root::open(folder.path()).unwrap();
    (folder, root)
}

fn settings(files: &[(&str, &str)], version: &str, replaces: bool) -> Result<(PathBuf, String)> {
    settings_with(files, version, replaces, false)
}

fn settings_with(
    files: &[(&str, &str)],
    version: &str,
    replaces: bool,
    maps_owners: bool,
) -> Result<(PathBuf, String)> {
    let (_folder, root) = node(files);
    let snapshotter = Snapshotter {
        socket: "/run/socinbd/snapshotter.sock".to_owned(),
        root: "/var/lib/socinbd".to_owned(),
        replaces,
        maps_owners,
    };
    let read = |path: &Path| root.read(path);
    let containerd = Containerd::find(&root, None)?;
    let version: Version = version.parse().unwrap();
    let wanted = wanted(&root, &read, &containerd, version.check()?, &snapshotter)?;
    let text = root.read(&wanted.path)?.unwrap_or(wanted.start.clone());
    let mut document: DocumentMut = text.parse().unwrap();
    for setting in &wanted.settings {
        setting.apply(&mut document)?;
    }
    Ok((wanted.path, document.to_string()))
}

#[test]
fn the_capability_for_user_namespaces_is_set_where_the_host_has_it() {
    for (version, maps_owners, capabilities) in [
        ("2.4", true, "capabilities = [\"rebase\", \"remap-ids\"]\n"),
        ("2.4", false, "capabilities = [\"rebase\"]\n"),
        ("2.3", true, "capabilities = [\"remap-ids\"]\n"),
        ("2.3", false, ""),
        ("2.2", true, ""),
    ] {
        let (_, text) = settings_with(&[], version, false, maps_owners).unwrap();
        let lines = text.split_inclusive('\n');
        let found: String = lines
            .filter(|line| line.starts_with("capabilities"))
            .collect();
        assert_eq!(found, capabilities, "{version}");
    }
}

#[test]
fn each_version_has_its_settings_and_all_else_stays() {
    let plugin = "\n[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = \"/run/socinbd/snapshotter.sock\"\n";
    let exports = "\n[proxy_plugins.soci.exports]\nroot = \"/var/lib/socinbd\"\nenable_remote_snapshot_annotations = \"true\"\n";
    let rebase = "capabilities = [\"rebase\"]\n";
    let arch = crate::oci::Platform::new("linux", std::env::consts::ARCH, None);
    let unpack = |name: &str| {
        format!(
            "\n[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"{arch}\"\nsnapshotter = \"{name}\"\n"
        )
    };
    let both = unpack("overlayfs") + &unpack("soci");
    let values = "snapshotter = \"soci\"\ndisable_snapshot_annotations = false\n";
    let cri2 = format!("\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n{values}");
    let cri3 = format!("\n[plugins.\"io.containerd.cri.v1.images\"]\n{values}");
    let old = "# mine\nversion = 2 # two\nroot = '/x'\n";
    let imports = "version = 3\nimports = [\"conf.d/*.toml\"]\n";
    for (files, version, path, text) in [
        (
            vec![],
            "1.6",
            MAIN,
            format!("version = 2\n{plugin}{exports}{cri2}"),
        ),
        (
            vec![(MAIN, old)],
            "1.7.35",
            MAIN,
            format!("{old}{plugin}{exports}{cri2}"),
        ),
        (
            vec![],
            "2.3",
            MAIN,
            format!("version = 3\n{plugin}{exports}{cri3}{both}"),
        ),
        (
            vec![(MAIN, old)],
            "v2.4.2",
            MAIN,
            // the older section is converted by containerd, except for these settings
            format!("{old}{plugin}{rebase}{exports}{cri2}{cri3}{both}"),
        ),
        (
            vec![(MAIN, "version = 4\nimports = []\n")],
            "2.4.2",
            MAIN,
            format!("version = 4\nimports = []\n{plugin}{rebase}{exports}{cri3}{both}"),
        ),
        (
            // each file has a format of its own
            vec![(MAIN, "version = 2\nimports = [\"conf.d/*.toml\"]\n")],
            "2.3",
            "/etc/containerd/conf.d/socinbd.toml",
            format!("version = 3\n{plugin}{exports}{cri3}{both}"),
        ),
        (
            vec![
                (MAIN, imports),
                ("/etc/containerd/conf.d/a.toml", "version = 3\n"),
            ],
            "2.4",
            "/etc/containerd/conf.d/socinbd.toml",
            format!("version = 3\n{plugin}{rebase}{exports}{cri3}{both}"),
        ),
        (
            // format 1 has short names
            vec![(MAIN, "disabled_plugins = []\n")],
            "1.6",
            MAIN,
            format!("disabled_plugins = []\n{plugin}{exports}\n[plugins.cri.containerd]\n{values}"),
        ),
        (
            vec![
                (
                    "/lib/systemd/system/containerd.service",
                    "[Service]\nExecStart=/usr/bin/containerd --config /c\n",
                ),
                ("/c", old),
            ],
            "1.7",
            "/c",
            format!("{old}{plugin}{exports}{cri2}"),
        ),
    ] {
        let found = settings(&files, version, false).unwrap();
        assert_eq!(found, (path.into(), text), "{files:?} {version}");
    }
    // sections that are there, in the forms that TOML has
    let inline = "version = 2\nproxy_plugins = { other = { type = \"snapshot\" } } # p\nplugins.\"io.containerd.grpc.v1.cri\".containerd.snapshotter = 'overlayfs' # s\n";
    let (_, text) = settings(&[(MAIN, inline)], "1.7", false).unwrap();
    let table: toml::Table = text.parse().unwrap();
    assert_eq!(
        table["proxy_plugins"]["other"]["type"].as_str(),
        Some("snapshot")
    );
    assert_eq!(
        table["proxy_plugins"]["soci"]["exports"]["root"].as_str(),
        Some("/var/lib/socinbd")
    );
    let cri = &table["plugins"]["io.containerd.grpc.v1.cri"]["containerd"];
    assert_eq!(cri["snapshotter"].as_str(), Some("soci"));
    assert!(text.contains("# p") && text.contains("# s"), "{text}");
    // a list that is there gets one more
    for list in [
        "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"linux\"\nsnapshotter = \"erofs\"\n",
        "[plugins.\"io.containerd.transfer.v1.local\"]\nunpack_config = [{platform = \"linux\", snapshotter = \"erofs\"}]\n",
    ] {
        let main = format!("{imports}{list}");
        let (path, text) = settings(&[(MAIN, &main)], "2.3", false).unwrap();
        assert_eq!(path, Path::new(MAIN));
        let table: toml::Table = text.parse().unwrap();
        let list = table["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"].as_array();
        let names: Vec<_> = list
            .unwrap()
            .iter()
            .map(|one| one["snapshotter"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["erofs", "soci"]);
    }
}

#[test]
fn what_would_be_lost_or_does_not_work_is_refused_with_a_reason() {
    let other = "version = 2\n[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = \"/run/soci\"\n";
    let stargz =
        "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"stargz\"\n";
    let stargz_2 = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"stargz\"\n";
    let importing = "version = 2\nimports = [\"/etc/containerd/x.toml\"]\n";
    let x = "/etc/containerd/x.toml";
    let cri = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"x\"\n";
    for (files, version, reason) in [
        (
            vec![],
            "1.5",
            "containerd 1.5 is not supported: install 1.6 or later",
        ),
        (vec![], "3.0", "containerd 3.0 is not supported"),
        (
            vec![(MAIN, "version =")],
            "2.4",
            "config.toml: correct it first",
        ),
        (
            vec![(MAIN, "version = 9")],
            "2.4",
            "has a format that is not 1, 2, 3 or 4: configure it by hand",
        ),
        (
            vec![(MAIN, "")],
            "2.4",
            "has the format 1: bring it to a later one first (`containerd config migrate`)",
        ),
        (
            vec![(MAIN, "version = 3")],
            "1.7",
            "has the format 3, which containerd 1.7 does not read",
        ),
        (
            vec![(MAIN, stargz_2)],
            "2.4",
            "has the snapshotter \"stargz\" for CRI: remove it first",
        ),
        (
            vec![(MAIN, other)],
            "1.7",
            "has a plugin soci at /run/soci (soci-snapshotter?): remove it first, or give --replace",
        ),
        (
            vec![(MAIN, stargz)],
            "2.4",
            "has the snapshotter \"stargz\" for CRI: remove it first",
        ),
        (
            vec![(MAIN, importing), (x, cri)],
            "1.7",
            "x.toml is imported, and its plugins.io.containerd.grpc.v1.cri replaces that of the main file",
        ),
        (
            vec![(MAIN, "version = 2\nproxy_plugins = 1\n")],
            "1.7",
            "proxy_plugins.soci.type is set in a form that cannot be changed",
        ),
    ] {
        let error = settings(&files, version, false).unwrap_err().report();
        assert!(error.contains(reason), "{error}\n{reason}");
    }
    for (text, version) in [(other, "1.7"), (stargz, "2.4")] {
        let (_, text) = settings(&[(MAIN, text)], version, true).unwrap();
        assert!(
            !text.contains("/run/soci\"") && !text.contains("stargz"),
            "{text}"
        );
    }
    // sections of plugins are merged
    settings(&[(MAIN, importing), (x, cri)], "2.4", false).unwrap();
}

const K3S: &str = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml";
const RKE2: &str = "/var/lib/rancher/rke2/agent/etc/containerd/config.toml";

#[test]
fn k3s_and_rke2_import_the_settings_from_their_drop_ins() {
    let base = |name: &str, version: u32, drop_ins: &str| {
        format!(
            "version = {version}\nimports = [\"/var/lib/rancher/{name}/agent/etc/containerd/{drop_ins}/*.toml\"]\n\
            [plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"overlayfs\"\ndisable_snapshot_annotations = true\n"
        )
    };
    let k3s = base("k3s", 3, "config-v3.toml.d");
    let rke2 = base("rke2", 2, "config.toml.d");
    let base_template = "{{ template \"base\" . }}\n";
    let template = K3S.replace("config.toml", "config-v3.toml.tmpl");
    let folder = Path::new(K3S).parent().unwrap();
    let of_k3s = folder.join("config-v3.toml.d/socinbd.toml");
    let of_rke2 = RKE2.replace("config.toml", "config.toml.d/socinbd.toml");
    for (files, path) in [
        (vec![(K3S, k3s.as_str())], &of_k3s),
        (vec![(K3S, &k3s), (&template, base_template)], &of_k3s),
        (vec![(RKE2, &rke2)], &of_rke2.clone().into()),
        // what a person has written in plain TOML is all of the configuration
        (
            vec![(K3S, &k3s), (&template, "version = 3\n")],
            &template.clone().into(),
        ),
    ] {
        let (found, text) = settings(&files, "2.3.4", false).unwrap();
        assert_eq!(&found, path);
        let text: toml::Table = text.parse().unwrap();
        let cri = &text["plugins"]["io.containerd.cri.v1.images"];
        assert_eq!(cri["snapshotter"].as_str(), Some("soci"));
        assert_eq!(cri["disable_snapshot_annotations"].as_bool(), Some(false));
    }
    // a list of theirs is not replaced
    let list = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux\"\nsnapshotter = \"nix\"\n";
    let with_list = k3s.clone() + list;
    let (path, text) = settings(&[(K3S, &with_list)], "2.3.4", false).unwrap();
    assert_eq!(path, of_k3s);
    assert!(!text.contains("unpack_config"), "{text}");

    let before = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"overlayfs\"\n";
    for (files, version, reason) in [
        (
            vec![(K3S, before)],
            "1.7",
            "config.toml is written by k3s or RKE2 at each start, but containerd before 2.0 does not merge imported files (docs/install.md",
        ),
        (
            vec![(K3S, before)],
            "2.0",
            "config.toml is written by k3s or RKE2 at each start, but it has no imports of `*.toml` (docs/install.md",
        ),
        (
            vec![(K3S, &k3s), (MAIN, before)],
            "2.3",
            "this node has more than one containerd (/etc/containerd/config.toml, /var/lib/rancher/k3s/agent/etc/containerd/config.toml): name the file of one with --containerd-config",
        ),
        (
            vec![(K3S, &k3s), (RKE2, &rke2)],
            "2.3",
            "this node has more than one containerd",
        ),
    ] {
        let error = settings(&files, version, false).unwrap_err().report();
        assert!(error.contains(reason), "{error}\n{reason}");
    }
}

/// A record of settings that were made in a text.
fn made(text: &str, settings: &[Setting]) -> Option<(String, Vec<Done>)> {
    let mut document: DocumentMut = text.parse().ok()?;
    let mut done = Vec::new();
    for setting in settings {
        done.extend(setting.apply(&mut document).ok()?);
    }
    Some((document.to_string(), done))
}

fn samples() -> Vec<Setting> {
    vec![
        Setting::new(&["a", "b", "x"], "one"),
        Setting::new(&["a", "y"], false),
        Setting::new(&["c", "z"], "two"),
        Setting::element(&["c", "list"], &[("k", "v")]),
    ]
}

#[test]
fn settings_are_undone_in_a_file_that_was_edited_since() {
    let before = "# first\nversion = 2\n\n[a]\n# why\ny = true # because\n";
    let (after, done) = made(before, &samples()).unwrap();
    let edited = format!("# new\n{after}\n[mine]\nkey = 1\n");
    let mut document: DocumentMut = edited.parse().unwrap();
    for done in done.iter().rev() {
        done.undo(&mut document).unwrap();
    }
    let left = document.to_string();
    let kept = "# new\n# first\nversion = 2\n\n[a]\n# why\ny = true # because\n";
    assert!(left.starts_with(kept), "{left}");
    let left: toml::Table = left.parse().unwrap();
    let names: Vec<&String> = left.keys().collect();
    assert_eq!(names, ["a", "mine", "version"]);
    // what a person has set to something else stays
    let mut document: DocumentMut = after.replace("\"one\"", "\"other\"").parse().unwrap();
    for done in done.iter().rev() {
        done.undo(&mut document).unwrap();
    }
    let other = at(&document, &["a", "b", "x"]).and_then(toml_edit::Item::as_str);
    assert_eq!(other, Some("other"));
}

#[test]
fn an_empty_list_stays() {
    let before = "[c]\nlist = []\n";
    let (after, done) = made(before, &samples()).unwrap();
    let mut document: DocumentMut = after.parse().unwrap();
    for done in done.iter().rev() {
        done.undo(&mut document).unwrap();
    }
    assert_eq!(document.to_string(), before);
}

#[test]
fn snapshots_are_counted() {
    let (_folder, root) = node(&[
        ("/s/snapshots/one/1/record.json", ""),
        ("/s/snapshots/one/2/record.json", ""),
        ("/s/snapshots/two/lock", ""),
    ]);
    assert_eq!(count_snapshots(&root, Path::new("/s")), 2);
    assert_eq!(count_snapshots(&root, Path::new("/none")), 0);
}

fn value() -> impl Strategy<Value = toml::Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(toml::Value::from),
        any::<i64>().prop_map(toml::Value::from),
        "[a-z]{0,4}".prop_map(toml::Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let tables = prop::collection::btree_map("[a-cxyz]|list", inner.clone(), 0..4);
        let table =
            |map: BTreeMap<String, toml::Value>| toml::Value::Table(map.into_iter().collect());
        prop_oneof![
            prop::collection::vec(inner, 0..3).prop_map(toml::Value::Array),
            tables.prop_map(table),
        ]
    })
}

proptest! {
    /// Any file is changed in the settings alone, or refused, and is as before after the settings were undone.
    #[test]
    fn any_file_is_as_before_after_an_undo(
        table in prop::collection::btree_map("[a-d]", value(), 0..4),
    ) {
        let before: toml::Table = table.into_iter().collect();
        let text = toml::to_string(&before).unwrap();
        if let Some((after, done)) = made(&text, &samples()) {
            let read: toml::Table = after.parse().unwrap();
            prop_assert_eq!(read["a"]["b"]["x"].as_str(), Some("one"));
            prop_assert_eq!(read["a"]["y"].as_bool(), Some(false));
            let (again, more) = made(&after, &samples()).unwrap();
            prop_assert!(more.is_empty() && again == after);
            let mut document: DocumentMut = after.parse().unwrap();
            for done in done.iter().rev() {
                done.undo(&mut document).unwrap();
            }
            let left: toml::Table = document.to_string().parse().unwrap();
            prop_assert_eq!(left, before, "{}", document);
        }
    }

    #[test]
    fn any_text_is_a_record_or_an_error(text in ".{0,80}") {
        let (_folder, root) = node(&[("/etc/socinbd/install.json", &text)]);
        let _ = Record::read(&root, Path::new(RECORD));
    }
}
