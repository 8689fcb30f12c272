//! Each request of an attach and of a read, failing in each way: the right bytes or a clear error within a bound, nothing is left over, and
//! the next try without faults succeeds.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use rustix::io::Errno;
use socinbd::{
    engine::{AttachedImage, Engine},
    error::{Error, Kind},
    kernel::mount,
    layer::StoreOptions,
    source::Limits,
};

use super::{Host, interrupted::request, lifecycle::indexed};
use crate::support::{
    registry::{Auth, Fault, On, Redirects, Registry, Times},
    seeded_noise,
    tars::Layer,
};

/// The registry is gone from a request on: its connections are closed, and new ones are refused.
const REFUSED: &str = "refused";
/// The faults that also last, from one request on. With `SOCINBD_TEST_ALL_FAULTS` all of them do.
const LASTING: [&str; 5] = [REFUSED, "reset", "403", "wrong byte", "hang"];
/// Maximum time of an attach and a read, on a machine with much else to do. The limits of [`options`] are shorter.
const BOUND: Duration = Duration::from_secs(60);
/// Cases at a time: most of the time they wait.
const AT_ONCE: usize = 16;

fn options() -> StoreOptions {
    StoreOptions {
        io_timeout: Some(Duration::from_secs(5)),
        limits: Limits {
            connect: Duration::from_secs(3),
            first_byte: Duration::from_secs(3),
            stall: Duration::from_secs(3),
            control_patience: Duration::from_secs(4),
            data_patience: Duration::from_secs(4),
        },
        ..StoreOptions::default()
    }
}

fn faults() -> Vec<(&'static str, Fault)> {
    let expired = Fault::Answer {
        code: 403,
        headers: vec![("content-type".to_owned(), "application/json".to_owned())],
        body: r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}"#
            .into(),
    };
    let many = Fault::Status {
        code: 429,
        retry_after: Some("0".to_owned()),
    };
    vec![
        (REFUSED, Fault::Close),
        ("reset", Fault::Close),
        ("401", Fault::status(401)),
        ("403", Fault::status(403)),
        ("403 expired", expired),
        ("404", Fault::status(404)),
        ("429", many),
        ("500", Fault::status(500)),
        ("cut", Fault::Cut { after: 5 }),
        ("truncated", Fault::Truncate { to: 5 }),
        ("wrong byte", Fault::WrongByte { at: 3 }),
        ("hang", Fault::Hang),
    ]
}

/// A fault at one request, or at this and all later ones.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    fault: Fault,
    times: Times,
}

/// How a try to attach the image and to read its file has ended.
#[derive(Debug)]
enum Tried {
    Read(Vec<u8>),
    NotAttached(Error),
    NotRead(io::Error),
}

struct Image {
    layout: PathBuf,
    file: Vec<u8>,
}

/// A registry with a token service and redirects, and a daemon's engine.
struct Lab {
    host: Host,
    registry: Mutex<Registry>,
    engine: Arc<Engine>,
    mountpoint: PathBuf,
}

fn registry_of(image: &Image) -> Registry {
    let registry = Registry::start();
    registry.add_layout("app", &image.layout).unwrap();
    registry.set_auth(Auth::Bearer {
        user: None,
        refresh_token: None,
        lifetime: Duration::from_secs(3600),
    });
    registry.set_redirects(Some(Redirects {
        lifetime: Duration::from_secs(3600),
        expired_status: 403,
    }));
    registry
}

impl Lab {
    async fn new(image: &Image) -> Self {
        let host = Host::new();
        let engine = Engine::open_with(&host.root(), &host.run_dir(), options()).await;
        Self {
            mountpoint: host.mountpoint("mnt"),
            engine: engine.unwrap(),
            registry: Mutex::new(registry_of(image)),
            host,
        }
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap()
    }

    /// The registry ends after so many requests, and another one has its image.
    async fn stop_registry_after(&self, requests: u64, image: &Image) {
        while self.registry().counters().total().requests <= requests {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let ended = std::mem::replace(&mut *self.registry(), registry_of(image));
        tokio::task::spawn_blocking(|| drop(ended)).await.unwrap();
    }

    async fn attach_and_read(&self) -> Tried {
        let image = self.registry().reference("app");
        let request = request(&image, Some(&self.mountpoint));
        let attached = self.engine.attach(request, &|_| {}).await;
        let AttachedImage { attachment, mount } = match attached {
            Ok(attached) => attached,
            Err(error) => return Tried::NotAttached(error),
        };
        let id = attachment.id;
        mount::attach(mount.as_fd(), &self.mountpoint).unwrap();
        drop(mount);
        self.engine.mounted(&id).unwrap();
        let file = self.mountpoint.join("file");
        let read = tokio::task::spawn_blocking(move || fs::read(file)).await;
        let mountpoint = self.mountpoint.clone();
        let unmount = move || crate::support::unmount(&mountpoint);
        tokio::task::spawn_blocking(unmount).await.unwrap();
        self.engine.release(&id).await.unwrap();
        match read.unwrap() {
            Ok(bytes) => Tried::Read(bytes),
            Err(error) => Tried::NotRead(error),
        }
    }

    /// Mounts, devices and records that are there at the end.
    async fn end(self) -> Vec<String> {
        self.engine.end().await;
        drop(self.engine);
        self.host.left_over()
    }
}

/// What is wrong with a case, if anything.
async fn suffer(image: &Image, case: &Case) -> Result<&'static str, String> {
    let lab = Lab::new(image).await;
    lab.registry().fail(On::Any, case.fault.clone(), case.times);
    let registry = lab.registry().host();
    let stop = async {
        if let (REFUSED, Times::AllAfter(requests)) = (case.name, case.times) {
            lab.stop_registry_after(requests, image).await;
        }
        std::future::pending::<()>().await;
    };
    let begun = Instant::now();
    let first = tokio::select! {
        first = lab.attach_and_read() => first,
        () = stop => unreachable!(),
    };
    let time = begun.elapsed();
    if time > BOUND {
        return Err(format!("it took {time:?}"));
    }
    let outcome = match first {
        Tried::Read(bytes) if bytes == image.file => "read",
        Tried::Read(_) => return Err("wrong bytes".to_owned()),
        Tried::NotRead(error) if Errno::from_io_error(&error) == Some(Errno::IO) => "EIO",
        Tried::NotRead(error) => return Err(format!("read: {error}")),
        Tried::NotAttached(error) => {
            let report = error.report();
            let is_ours = matches!(
                error.kind(),
                Kind::Io | Kind::Kernel | Kind::InvalidArgument
            );
            let is_named = report.contains(&registry);
            if is_ours || !is_named {
                return Err(format!(
                    "the error is not clear: {:?} {report}",
                    error.kind()
                ));
            }
            "error"
        }
    };
    lab.registry().heal();
    match lab.attach_and_read().await {
        Tried::Read(bytes) if bytes == image.file => {}
        other => {
            let why = match other {
                Tried::Read(_) => "wrong bytes".to_owned(),
                Tried::NotAttached(error) => error.report(),
                Tried::NotRead(error) => error.to_string(),
            };
            return Err(format!("after it ({outcome}): {why}"));
        }
    }
    let left = lab.end().await;
    match left.is_empty() {
        true => Ok(outcome),
        false => Err(format!("left over: {left:?}")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_of_an_attach_and_a_read_fails_in_each_way() {
    let host = Host::new();
    let file = seeded_noise(20_000, 3);
    let layout = indexed(&host, vec![Layer::new().file("file", &file)]);
    let image = Image {
        layout: Path::to_owned(layout.path()),
        file,
    };
    let calm = Lab::new(&image).await;
    assert!(matches!(calm.attach_and_read().await, Tried::Read(bytes) if bytes == image.file));
    let requests = calm.registry().counters().total().requests;
    assert_eq!(calm.end().await, [""; 0]);
    assert!(requests >= 6, "{requests} requests");
    let is_long = std::env::var_os("SOCINBD_TEST_ALL_FAULTS").is_some();
    let cases: Vec<Case> = faults()
        .into_iter()
        .flat_map(|(name, fault)| {
            let lasts = is_long || LASTING.contains(&name);
            let each = (0..requests).flat_map(move |at| {
                let once = (name != REFUSED).then_some(Times::After(at));
                [once, lasts.then_some(Times::AllAfter(at))]
            });
            each.flatten().map(move |times| Case {
                name,
                fault: fault.clone(),
                times,
            })
        })
        .collect();
    let begun = Instant::now();
    let image = &image;
    let suffered = stream::iter(&cases)
        .map(|case| async move { (case, suffer(image, case).await) })
        .buffer_unordered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let count = |wanted: &str| {
        let ended = suffered
            .iter()
            .filter_map(|(_, outcome)| outcome.as_ref().ok());
        ended.filter(|outcome| **outcome == wanted).count()
    };
    println!(
        "{requests} requests, {} cases in {:.1} s: {} read, {} errors of an attach, {} of a read",
        cases.len(),
        begun.elapsed().as_secs_f64(),
        count("read"),
        count("error"),
        count("EIO")
    );
    let failed: Vec<String> = suffered
        .iter()
        .filter_map(|(case, outcome)| {
            let why = outcome.as_ref().err()?;
            Some(format!("{}, {:?}: {why}", case.name, case.times))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    // each kind of ending was seen, or the faults did not hit
    assert!(count("read") > 0 && count("error") > 0 && count("EIO") > 0);
}
