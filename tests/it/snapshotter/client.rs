//! A client of the snapshots API, as containerd is one.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use socinbd::snapshotter::proto::{
    snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
        PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
        UsageRequest, UsageResponse, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::Mount,
};
use tonic::{Code, Status};

use super::connection::{self, Connection};
use crate::support::unmount;

/// What a request gives, or the code of its error and its message.
pub type Answer<T> = Result<T, (Code, String)>;

/// Labels as a test writes them.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

pub struct Client {
    runtime: tokio::runtime::Runtime,
    client: SnapshotsClient<Connection>,
}

fn owned(labels: Labels) -> HashMap<String, String> {
    let labels = labels.iter();
    labels
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn refused(status: Status) -> (Code, String) {
    (status.code(), status.message().to_owned())
}

impl Client {
    /// `None`: nobody answers.
    pub fn connect(socket: &Path) -> Option<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let client = runtime.block_on(connection::connect(socket))?;
        Some(Self { runtime, client })
    }

    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Answer<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.prepare(request));
        Ok(answer.map_err(refused)?.into_inner().mounts)
    }

    /// Prepares snapshots without parents, many at a time, as the containers of a node that starts.
    pub fn prepare_all(&self, keys: &[String], labels: Labels) {
        let requests = keys.iter().map(|key| {
            let request = PrepareSnapshotRequest {
                key: key.clone(),
                labels: owned(labels),
                ..Default::default()
            };
            let mut client = self.client.clone();
            async move { client.prepare(request).await.map(|_| ()) }
        });
        let all = stream::iter(requests).buffer_unordered(64);
        let prepared = self.runtime.block_on(all.try_collect::<()>());
        prepared.unwrap();
    }

    pub fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        let request = ViewSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.view(request));
        Ok(answer.map_err(refused)?.into_inner().mounts)
    }

    pub fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        let request = MountsRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.mounts(request));
        Ok(answer.map_err(refused)?.into_inner().mounts)
    }

    pub fn commit(&self, name: &str, key: &str, parent: &str, labels: Labels) -> Answer<()> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.commit(request));
        answer.map(|_| ()).map_err(refused)
    }

    pub fn remove(&self, key: &str) -> Answer<()> {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.remove(request));
        answer.map(|_| ()).map_err(refused)
    }

    pub fn stat(&self, key: &str) -> Answer<Info> {
        let request = StatSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.stat(request));
        Ok(answer.map_err(refused)?.into_inner().info.unwrap())
    }

    /// Looks all of these up, one after the other; how many there are.
    pub fn stat_all(&self, keys: &[String]) -> usize {
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let mut found = 0;
            for key in keys {
                let request = StatSnapshotRequest {
                    key: key.clone(),
                    ..Default::default()
                };
                found += usize::from(client.stat(request).await.is_ok());
            }
            found
        })
    }

    pub fn update(&self, name: &str, labels: Labels, paths: &[&str]) -> Answer<Info> {
        let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
        let request = UpdateSnapshotRequest {
            info: Some(Info {
                name: name.to_owned(),
                labels: owned(labels),
                ..Default::default()
            }),
            update_mask: (!paths.is_empty()).then_some(prost_types::FieldMask { paths }),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.update(request));
        Ok(answer.map_err(refused)?.into_inner().info.unwrap())
    }

    pub fn list(&self, filters: &[&str]) -> Answer<Vec<Info>> {
        let request = ListSnapshotsRequest {
            filters: filters.iter().map(|&filter| filter.to_owned()).collect(),
            ..Default::default()
        };
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let mut answer = client.list(request).await.map_err(refused)?.into_inner();
            let mut found = Vec::new();
            while let Some(message) = answer.message().await.map_err(refused)? {
                found.extend(message.info);
            }
            Ok(found)
        })
    }

    /// The names of all snapshots that filters find.
    pub fn names(&self, filters: &[&str]) -> Vec<String> {
        let mut names: Vec<_> = self
            .list(filters)
            .unwrap()
            .into_iter()
            .map(|info| info.name)
            .collect();
        names.sort();
        names
    }

    pub fn usage(&self, key: &str) -> Answer<UsageResponse> {
        let request = UsageRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let mut client = self.client.clone();
        let answer = self.runtime.block_on(client.usage(request));
        Ok(answer.map_err(refused)?.into_inner())
    }

    pub fn cleanup(&self) -> Answer<()> {
        let mut client = self.client.clone();
        let answer = self
            .runtime
            .block_on(client.cleanup(CleanupRequest::default()));
        answer.map(|_| ()).map_err(refused)
    }

    /// Removes all snapshots, children first.
    pub fn remove_all(&self) {
        loop {
            let names = self.names(&[]);
            if names.is_empty() {
                return;
            }
            let removed = names.iter().filter(|name| self.remove(name).is_ok());
            assert!(removed.count() > 0, "none of {names:?} can be removed");
        }
    }
}

/// Mounts of a snapshot, until this is dropped.
pub struct Mounted {
    path: PathBuf,
    /// The mounts below it, as containerd's mount manager makes them.
    managed: Vec<PathBuf>,
}

impl Mounted {
    /// Mounts as containerd does.
    pub fn at(path: PathBuf, mounts: &[Mount]) -> Self {
        let mut mounted = Self {
            path,
            managed: Vec::new(),
        };
        let Some((last, managed)) = mounts
            .split_last()
            .filter(|(last, _)| last.r#type.starts_with("format/"))
        else {
            for made in mounts {
                mount(made, &mounted.path);
            }
            return mounted;
        };
        for made in managed {
            let place = mounted.path.with_extension("managed");
            let place = place.join(mounted.managed.len().to_string());
            mount(made, &place);
            mounted.managed.push(place);
        }
        let paths: Vec<_> = mounted
            .managed
            .iter()
            .map(|it| it.to_str().unwrap())
            .collect();
        let filled = |option: &String| {
            let Some((before, template)) = option.split_once("{{ ") else {
                return option.clone();
            };
            let (template, after) = template.split_once(" }}").unwrap();
            let words: Vec<_> = template.split(' ').collect();
            let number = |at: usize| words[at].parse::<usize>().unwrap();
            let filled = match words[0] {
                "mount" => paths[number(1)].to_owned(),
                "overlay" => paths[number(1)..=number(2)].join(":"),
                other => panic!("{other}"),
            };
            format!("{before}{filled}{after}")
        };
        let overlay = Mount {
            r#type: last.r#type.strip_prefix("format/").unwrap().to_owned(),
            options: last.options.iter().map(filled).collect(),
            ..last.clone()
        };
        mount(&overlay, &mounted.path);
        mounted
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path.join(name)).unwrap()
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path.join(name), text).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for place in [&self.path].into_iter().chain(self.managed.iter().rev()) {
            match std::thread::panicking() {
                // it ends alone: a panic here would end all other tests too
                true => drop(Command::new("umount").arg("-l").arg(place).status()),
                false => unmount(place),
            }
        }
    }
}

fn mount(mount: &Mount, path: &Path) {
    fs::create_dir_all(path).unwrap();
    let options: Vec<&str> = mount
        .options
        .iter()
        .map(|option| if option == "rbind" { "bind" } else { option })
        .collect();
    let kind = match mount.r#type.as_str() {
        "bind" => "none",
        kind => kind,
    };
    let status = Command::new("mount")
        .args(["-t", kind])
        .args(["-o", &options.join(","), &mount.source])
        .arg(path)
        .status();
    assert!(status.unwrap().success(), "{mount:?}");
}
