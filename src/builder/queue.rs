//! The images that wait for their index: a folder with a file each, so that none that was accepted is lost by a crash.
//!
//! A file is named after what it asks for (repository and tag), and so an event that is delivered twice is one file. What was asked
//! for again while it was being worked on is done once more: the tag may lead elsewhere now. What can never work is kept in the
//! folder `failed`, with the reason.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::{
    error::{Error, Kind, Result, ResultExt},
    layer::make_private,
    oci::Digest,
};

/// Images that may wait; more are refused until there is room, and the registry sends them again.
const MAX_WAITING: usize = 100_000;
/// The first wait before something is tried again; doubled each time.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_DELAY: Duration = Duration::from_secs(600);

/// A tag whose image wants an index.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Job {
    /// Repository, checked.
    pub repository: String,
    /// Tag, checked.
    pub tag: String,
}

/// See the module.
pub struct Queue {
    folder: PathBuf,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<Job, Entry>,
    /// The number of the next job: the oldest goes first.
    next: u64,
    failed: usize,
}

struct Entry {
    number: u64,
    status: Status,
    attempts: u32,
}

enum Status {
    Waiting,
    /// Not before then.
    Delayed(Instant),
    /// Being worked on; `again` when it was asked for once more.
    Running {
        again: bool,
    },
}

/// How many jobs are where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Waiting, also for another try.
    pub waiting: usize,
    /// Being worked on.
    pub running: usize,
    /// Given up, since the folder was made.
    pub failed: usize,
}

/// A job that was given up.
#[derive(Serialize)]
struct Failed<'a> {
    #[serde(flatten)]
    job: &'a Job,
    error: &'a str,
}

impl Queue {
    /// The queue of a folder, which is made (0700) where there is none. What was being worked on when a process died waits again.
    pub fn open(folder: &Path) -> Result<Self> {
        let context = || format!("the queue in {}", folder.display());
        let failed = folder.join("failed");
        make_private(&failed).map_err(|error| error.context(context()))?;
        let mut found: Vec<(std::time::SystemTime, Job)> = Vec::new();
        for entry in fs::read_dir(folder).or_kind(Kind::Io, context)? {
            let entry = entry.or_kind(Kind::Io, context)?;
            let name = entry.file_name();
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "new")
            {
                // its sender got no answer
                fs::remove_file(entry.path()).or_kind(Kind::Io, context)?;
            } else if name.to_str().is_some_and(|name| name.ends_with(".json")) {
                let bytes = fs::read(entry.path()).or_kind(Kind::Io, context)?;
                match serde_json::from_slice::<Job>(&bytes) {
                    Ok(job) => {
                        let modified = entry.metadata().and_then(|metadata| metadata.modified());
                        found.push((modified.or_kind(Kind::Io, context)?, job));
                    }
                    Err(error) => {
                        tracing::error!(file = %entry.path().display(), %error, "a queued image cannot be read; left where it is")
                    }
                }
            }
        }
        found.sort();
        let mut state = State {
            failed: fs::read_dir(&failed).or_kind(Kind::Io, context)?.count(),
            ..State::default()
        };
        for (_, job) in found {
            state.add(job);
        }
        Ok(Self {
            folder: folder.to_owned(),
            state: Mutex::new(state),
            changed: Notify::new(),
        })
    }

    /// Adds jobs; when this returns they are on the disk. Blocks on it.
    pub fn add(&self, jobs: &[Job]) -> Result<()> {
        let mut state = self.state();
        let new = jobs
            .iter()
            .filter(|job| !state.jobs.contains_key(job))
            .count();
        if state.jobs.len().saturating_add(new) > MAX_WAITING {
            return Err(Error::new(
                Kind::Unavailable,
                format!("{MAX_WAITING} images wait for their index already"),
            ));
        }
        for job in jobs {
            if !state.jobs.contains_key(job) {
                self.write(job)?;
            }
            state.add(job.clone());
        }
        if new > 0 {
            sync_folder(&self.folder).or_kind(Kind::Io, || self.context())?;
        }
        drop(state);
        self.changed.notify_waiters();
        Ok(())
    }

    /// The next job, when there is one; it is the caller's until [`Queue::done`], [`Queue::later`] or [`Queue::give_up`].
    pub async fn next(&self) -> Job {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable(); // from here on no change is missed
            let wake = match self.state().take() {
                Ok(job) => return job,
                Err(wake) => wake,
            };
            match wake {
                Some(at) => drop(tokio::time::timeout_at(at.into(), changed).await),
                None => changed.await,
            }
        }
    }

    /// The job is done. Blocks on the disk.
    pub fn done(&self, job: &Job) -> Result<()> {
        self.remove(job, None)
    }

    /// The job failed and may work later.
    pub fn later(&self, job: &Job) {
        let mut state = self.state();
        if let Some(entry) = state.jobs.get_mut(job) {
            let delay = FIRST_DELAY
                .saturating_mul(1 << entry.attempts.min(16))
                .min(LONGEST_DELAY);
            entry.attempts = entry.attempts.saturating_add(1);
            entry.status = Status::Delayed(Instant::now() + delay);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// How often the job was put off.
    pub fn attempts(&self, job: &Job) -> u32 {
        self.state().jobs.get(job).map_or(0, |entry| entry.attempts)
    }

    /// The job cannot work. Blocks on the disk.
    pub fn give_up(&self, job: &Job, error: &str) -> Result<()> {
        self.remove(job, Some(error))
    }

    /// How many jobs are where.
    pub fn counts(&self) -> Counts {
        let state = self.state();
        let running = state
            .jobs
            .values()
            .filter(|entry| matches!(entry.status, Status::Running { .. }))
            .count();
        Counts {
            waiting: state.jobs.len() - running,
            running,
            failed: state.failed,
        }
    }

    fn remove(&self, job: &Job, error: Option<&str>) -> Result<()> {
        let mut state = self.state();
        if let Some(Entry {
            status: status @ Status::Running { again: true },
            attempts,
            ..
        }) = state.jobs.get_mut(job)
        {
            (*status, *attempts) = (Status::Waiting, 0);
            drop(state);
            self.changed.notify_waiters();
            return Ok(());
        }
        let file = self.folder.join(file_name(job));
        let ended = || -> std::io::Result<()> {
            if let Some(error) = error {
                let text = serde_json::to_vec_pretty(&Failed { job, error })?;
                fs::write(self.folder.join("failed").join(file_name(job)), text)?;
            }
            fs::remove_file(&file)
        };
        ended().or_kind(Kind::Io, || self.context())?;
        state.jobs.remove(job);
        if error.is_some() {
            state.failed = state.failed.saturating_add(1);
        }
        Ok(())
    }

    fn write(&self, job: &Job) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let file = self.folder.join(file_name(job));
            let new = file.with_extension("new");
            let mut writer = File::create(&new)?;
            writer.write_all(&serde_json::to_vec(job)?)?;
            writer.sync_all()?;
            fs::rename(&new, &file)
        };
        write().or_kind(Kind::Io, || self.context())
    }

    fn context(&self) -> String {
        format!("the queue in {}", self.folder.display())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, job: Job) {
        let number = self.next;
        self.next += 1;
        match self.jobs.get_mut(&job) {
            Some(Entry {
                status: Status::Running { again },
                ..
            }) => *again = true,
            Some(entry) => entry.status = Status::Waiting,
            None => {
                let entry = Entry {
                    number,
                    status: Status::Waiting,
                    attempts: 0,
                };
                self.jobs.insert(job, entry);
            }
        }
    }

    /// The oldest job that is ready; else when the next one will be.
    fn take(&mut self) -> Result<Job, Option<Instant>> {
        let now = Instant::now();
        let ready = self
            .jobs
            .iter_mut()
            .filter(|(_, entry)| match entry.status {
                Status::Waiting => true,
                Status::Delayed(until) => until <= now,
                Status::Running { .. } => false,
            })
            .min_by_key(|(_, entry)| entry.number);
        if let Some((job, entry)) = ready {
            entry.status = Status::Running { again: false };
            return Ok(job.clone());
        }
        let delayed = self.jobs.values().filter_map(|entry| match entry.status {
            Status::Delayed(until) => Some(until),
            _ => None,
        });
        Err(delayed.min())
    }
}

/// A name without anything of the job's in it: repositories hold slashes, and may be longer than a file's name.
fn file_name(job: &Job) -> String {
    let key = format!("{}\0{}", job.repository, job.tag);
    format!("{}.json", Digest::of(key.as_bytes()).hex())
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(tag: &str) -> Job {
        Job {
            repository: "team/app".to_owned(),
            tag: tag.to_owned(),
        }
    }

    fn counts(waiting: usize, running: usize, failed: usize) -> Counts {
        Counts {
            waiting,
            running,
            failed,
        }
    }

    #[tokio::test]
    async fn what_was_accepted_is_there_after_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        queue.add(&[job("1"), job("2"), job("1")]).unwrap();
        assert_eq!(queue.counts(), counts(2, 0, 0));
        assert_eq!(queue.next().await, job("1"));
        assert_eq!(queue.counts(), counts(1, 1, 0));
        drop(queue); // it ends in the middle of its work

        fs::write(folder.path().join("half.new"), "{").unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        assert_eq!(queue.counts(), counts(2, 0, 0));
        assert!(!folder.path().join("half.new").exists());
        for _ in 0..2 {
            let job = queue.next().await;
            queue.done(&job).unwrap();
        }
        assert_eq!(
            Queue::open(folder.path()).unwrap().counts(),
            counts(0, 0, 0)
        );
    }

    #[tokio::test]
    async fn what_is_asked_for_during_its_work_is_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        queue.add(&[job("1")]).unwrap();
        let running = queue.next().await;
        queue.add(&[job("1")]).unwrap();
        queue.done(&running).unwrap();
        assert_eq!(queue.next().await, job("1"));
        queue.done(&job("1")).unwrap();
        assert_eq!(queue.counts(), counts(0, 0, 0));
    }

    #[tokio::test]
    async fn what_failed_is_tried_later_or_given_up_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        queue.add(&[job("1"), job("2")]).unwrap();
        let first = queue.next().await;
        queue.later(&first);
        assert_eq!(queue.next().await, job("2"), "the first waits");
        queue.give_up(&job("2"), "it is a chart").unwrap();
        assert_eq!(queue.counts(), counts(1, 0, 1));
        let failed =
            fs::read_to_string(folder.path().join("failed").join(file_name(&job("2")))).unwrap();
        assert!(
            failed.contains("it is a chart") && failed.contains("team/app"),
            "{failed}"
        );
        // asked for anew it waits no longer
        queue.add(&[job("1")]).unwrap();
        assert_eq!(queue.next().await, job("1"));
        assert_eq!(
            Queue::open(folder.path()).unwrap().counts(),
            counts(1, 0, 1)
        );
    }
}
