//! The images that wait for their index: a directory with one file per image, so that an accepted image is not lost in a crash.
//!
//! A file is named by repository and tag, so an event that is delivered twice is one file. If an image is queued again while a worker
//! processes it, it is processed once more, because the tag may lead elsewhere now. Jobs that can never succeed are kept in the directory
//! `failed`, with the reason, until they succeed after another push. Files in the directory that are not jobs are moved there too.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
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
/// Number of further looks for content that is missing.
const LOOKS: u32 = 4;
/// Bytes of a job's file, at most.
const MAX_JOB_BYTES: u64 = 64 << 10;

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
    state: Mutex<QueueState>,
    changed: Notify,
}

#[derive(Default)]
struct QueueState {
    jobs: BTreeMap<Job, QueuedBuild>,
    /// The number of the next job: the oldest goes first.
    next: u64,
    failed: usize,
}

struct QueuedBuild {
    number: u64,
    status: Status,
    attempts: u32,
    /// The last attempts that found something absent.
    absences: u32,
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
    /// Given up: files in the folder `failed`.
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
    /// Opens the queue of a directory, and makes the directory (mode 0700) if it does not exist. Jobs that were running when a process
    /// died wait again.
    pub fn open(folder: &Path) -> Result<Self> {
        let context = || format!("the queue in {}", folder.display());
        let failed = folder.join("failed");
        make_private(&failed).map_err(|error| error.context(context()))?;
        let mut found: Vec<(SystemTime, Job)> = Vec::new();
        for entry in fs::read_dir(folder).or_kind(Kind::Io, context)? {
            let path = entry.or_kind(Kind::Io, context)?.path();
            let extension = path.extension().and_then(OsStr::to_str);
            if extension == Some("new") && path.is_file() {
                // its sender got no answer
                fs::remove_file(&path).or_kind(Kind::Io, context)?;
            } else if extension == Some("json") {
                match stored_job(&path) {
                    Ok((modified, job)) => {
                        // a file that a person has put there may have any name
                        fs::rename(&path, folder.join(file_name(&job)))
                            .or_kind(Kind::Io, context)?;
                        found.push((modified, job));
                    }
                    Err(error) => put_aside(&path, &failed, &error),
                }
            }
        }
        found.sort();
        let mut state = QueueState {
            failed: fs::read_dir(&failed).or_kind(Kind::Io, context)?.count(),
            ..QueueState::default()
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
                format!("the queue is full: {MAX_WAITING} images are waiting"),
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
            entry.put_off();
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Something that the job needs is not there, and may be later. Says whether it is tried again, as after [`Queue::later`]: a few
    /// times.
    pub fn look_again(&self, job: &Job) -> bool {
        let mut state = self.state();
        let Some(entry) = state.jobs.get_mut(job) else {
            return false;
        };
        let absences = match entry.status {
            Status::Running { again: true } => 0, // it may lead to another image now
            _ => entry.absences,
        };
        if absences >= LOOKS {
            return false;
        }
        entry.put_off();
        entry.absences = absences + 1;
        drop(state);
        self.changed.notify_waiters();
        true
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
        if let Some(QueuedBuild {
            status: status @ Status::Running { again: true },
            attempts,
            absences,
            ..
        }) = state.jobs.get_mut(job)
        {
            (*status, *attempts, *absences) = (Status::Waiting, 0, 0);
            drop(state);
            self.changed.notify_waiters();
            return Ok(());
        }
        let file = self.folder.join(file_name(job));
        let reason = self.folder.join("failed").join(file_name(job));
        let had_failed = reason.exists();
        let ended = || -> std::io::Result<()> {
            match error {
                Some(error) => {
                    fs::write(&reason, serde_json::to_vec_pretty(&Failed { job, error })?)?
                }
                None => remove_if_there(&reason)?,
            }
            remove_if_there(&file)
        };
        ended().or_kind(Kind::Io, || self.context())?;
        state.jobs.remove(job);
        match (had_failed, error) {
            (false, Some(_)) => state.failed += 1,
            (true, None) => state.failed = state.failed.saturating_sub(1),
            _ => {}
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

    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueuedBuild {
    fn put_off(&mut self) {
        if matches!(self.status, Status::Running { again: true }) {
            self.attempts = 0;
        }
        let delay = FIRST_DELAY
            .saturating_mul(1 << self.attempts.min(16))
            .min(LONGEST_DELAY);
        self.attempts = self.attempts.saturating_add(1);
        self.absences = 0;
        self.status = Status::Delayed(Instant::now() + delay);
    }
}

impl QueueState {
    fn add(&mut self, job: Job) {
        let number = self.next;
        self.next += 1;
        match self.jobs.get_mut(&job) {
            Some(QueuedBuild {
                status: Status::Running { again },
                ..
            }) => *again = true,
            // the tag may lead to another image now
            Some(entry) => {
                entry.status = Status::Waiting;
                (entry.attempts, entry.absences) = (0, 0);
            }
            None => {
                let entry = QueuedBuild {
                    number,
                    status: Status::Waiting,
                    attempts: 0,
                    absences: 0,
                };
                self.jobs.insert(job, entry);
            }
        }
    }

    /// The oldest job that is ready; else the time when the next one will be.
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

/// A job from its file, and when that was written.
fn stored_job(path: &Path) -> Result<(SystemTime, Job)> {
    let context = || path.display().to_string();
    let metadata = fs::symlink_metadata(path).or_kind(Kind::Io, context)?;
    // to open a pipe would wait for ever
    if !metadata.is_file() || metadata.len() > MAX_JOB_BYTES {
        return Err(Error::new(
            Kind::Corrupt,
            format!(
                "{}: not a file of at most {MAX_JOB_BYTES} bytes",
                path.display()
            ),
        ));
    }
    let bytes = fs::read(path).or_kind(Kind::Io, context)?;
    let job = serde_json::from_slice(&bytes).or_kind(Kind::Corrupt, context)?;
    Ok((metadata.modified().or_kind(Kind::Io, context)?, job))
}

/// Moves files that are not jobs out of the queue.
fn put_aside(path: &Path, failed: &Path, why: &Error) {
    let place = failed.join(path.file_name().unwrap_or_default());
    let moved = match fs::rename(path, &place) {
        Ok(()) => format!("it is moved to {}", place.display()),
        Err(error) => format!("it cannot be moved: {error}"),
    };
    tracing::error!("a queued image cannot be read, {moved}: {}", why.report());
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
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
    #[tokio::test]
    async fn what_is_absent_is_looked_for_a_few_times_each_time_that_it_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        let absent = |queue: &Queue| {
            let mut looks = 0;
            while queue.look_again(&job("1")) {
                looks += 1;
            }
            looks
        };
        queue.add(&[job("1")]).unwrap();
        // what has passed before does not count
        for _ in 0..10 {
            queue.later(&job("1"));
        }
        assert_eq!(absent(&queue), LOOKS);
        queue.add(&[job("1")]).unwrap();
        assert_eq!(absent(&queue), LOOKS);
        assert_eq!(queue.next().await, job("1"));
        // pushed while it was looked at
        queue.add(&[job("1")]).unwrap();
        assert_eq!(absent(&queue), LOOKS);
        // another failure, in between or before it is asked for again, ends the row
        queue.later(&job("1"));
        assert_eq!(absent(&queue), LOOKS);
        queue.add(&[job("1")]).unwrap();
        assert_eq!(queue.next().await, job("1"));
        queue.state().jobs.values_mut().for_each(|entry| {
            entry.absences = LOOKS;
        });
        queue.add(&[job("1")]).unwrap();
        queue.done(&job("1")).unwrap();
        assert_eq!(absent(&queue), LOOKS);
    }

    #[tokio::test]
    async fn a_reason_is_kept_until_the_image_works() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        for _ in 0..2 {
            queue.add(&[job("1")]).unwrap();
            queue.give_up(&queue.next().await, "no").unwrap();
            assert_eq!(queue.counts(), counts(0, 0, 1));
        }
        queue.add(&[job("1")]).unwrap();
        let running = queue.next().await;
        // somebody has tidied up
        fs::remove_file(folder.path().join(file_name(&running))).unwrap();
        queue.done(&running).unwrap();
        assert_eq!(queue.counts(), counts(0, 0, 0));
        assert_eq!(
            fs::read_dir(folder.path().join("failed")).unwrap().count(),
            0
        );
    }

    #[tokio::test]
    async fn what_is_no_job_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("half.json"), r#"{"repository":"te"#).unwrap();
        fs::write(path("other.json"), r#"{"repository":7,"tag":"1"}"#).unwrap();
        fs::write(path("long.json"), vec![b' '; 1 << 20]).unwrap();
        fs::create_dir(path("folder.json")).unwrap();
        let mode = rustix::fs::Mode::RUSR;
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe.json"), fifo, mode, 0).unwrap();
        std::os::unix::fs::symlink("nowhere", path("link.json")).unwrap();
        fs::write(path("by-hand.json"), serde_json::to_vec(&job("1")).unwrap()).unwrap();
        fs::write(path("README"), "what somebody has left here").unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        assert_eq!(queue.counts(), counts(1, 0, 6));
        assert!(path("failed/half.json").exists() && path("README").exists());
        queue.done(&queue.next().await).unwrap();
        assert_eq!(
            Queue::open(folder.path()).unwrap().counts(),
            counts(0, 0, 6)
        );
    }
}
