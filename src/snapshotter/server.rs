//! The sockets of the snapshotter: gRPC over HTTP/2.

use std::{
    collections::HashSet,
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper::{Request, body::Incoming};
use tokio::task::JoinSet;
use tonic::codegen::Service as _;

use super::{
    claims,
    image_service::ImageServiceProxy,
    images::{Images, START_TIME},
    options::{SnapshotterOptions, Unproven},
    proto::snapshots::snapshots_server::SnapshotsServer,
    records::Snapshot,
    service::Service,
    set::SnapshotSet,
    socket::GrpcSocket,
};
use crate::{
    blocking::blocking,
    engine::Engine,
    error::{Error, Kind, Result},
    keeper,
};

/// Bytes of a request, at most.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// The name of the image service's socket in the descriptor store.
const IMAGE_SERVICE: &str = "image-service";
/// The end of the name of a socket's file.
const SUFFIX: &str = ".sock";

/// The snapshotter's sockets, bound, each with its own set of snapshots. Their files are removed by [`Server::remove_files`].
pub struct Server {
    sets: Vec<BoundSet>,
    image_service: Option<BoundImageService>,
}

/// A set of snapshots and its socket.
struct BoundSet {
    set: Arc<SnapshotSet>,
    address: PathBuf,
    socket: GrpcSocket,
    /// The image service that is at the same socket.
    image_service: Option<Arc<ImageServiceProxy>>,
}

/// The image service and its socket.
struct BoundImageService {
    proxy: Arc<ImageServiceProxy>,
    socket: GrpcSocket,
}

impl Server {
    /// Reads the records of each address, and binds its socket or takes that of the daemon before. The engine holds the lock of the state
    /// directory, so a file that is at the place of a socket and leads nowhere else is stale.
    pub async fn bind(
        engine: &Arc<Engine>,
        addresses: &[PathBuf],
        options: SnapshotterOptions,
        mut service: Option<&mut keeper::Service>,
    ) -> Result<Arc<Self>> {
        let options = Arc::new(options);
        let images = Images::new(Arc::clone(engine), Arc::clone(&options));
        let (mut sets, mut names) = (Vec::new(), HashSet::new());
        for address in addresses {
            let name = set_name(address)?;
            if !names.insert(name.clone()) {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!(
                        "two sockets have the name {name}{SUFFIX}, which names their snapshots"
                    ),
                ));
            }
            let set = {
                let (engine, options, images, name) = (
                    Arc::clone(engine),
                    Arc::clone(&options),
                    Arc::clone(&images),
                    name.clone(),
                );
                blocking(move || SnapshotSet::open(&engine, &name, &options, &images)).await?
            };
            let name = format!("snapshotter-{name}");
            let socket = GrpcSocket::bind(name, address, service.as_deref_mut())?;
            sets.push(BoundSet {
                set,
                address: address.clone(),
                socket,
                image_service: None,
            });
        }
        let all: Vec<_> = sets
            .iter()
            .map(|bound| Arc::downgrade(&bound.set))
            .collect();
        engine
            .disks()
            .store()
            .set_on_false_layer(move |layer, table| claims::tell_false_layer(&all, layer, table));
        let store = service.as_ref().map(|service| service.store().clone());
        let mut image_service = None;
        if let Some(wanted) = &options.image_service {
            let proxy = ImageServiceProxy::new(&wanted.containerd, store.unwrap_or_default());
            let shared = sets.iter_mut().find(|set| set.address == wanted.address);
            match shared {
                Some(set) => set.image_service = Some(proxy),
                None => {
                    let name = IMAGE_SERVICE.to_owned();
                    let socket = GrpcSocket::bind(name, &wanted.address, service)?;
                    image_service = Some(BoundImageService { proxy, socket });
                }
            }
        }
        Ok(Arc::new(Self {
            sets,
            image_service,
        }))
    }

    /// Answers until it is dropped.
    pub async fn run(self: Arc<Self>) -> Infallible {
        let mut answering = JoinSet::new();
        for index in 0..self.sets.len() {
            let server = Arc::clone(&self);
            answering.spawn(async move { server.sets[index].answer().await });
        }
        if self.image_service.is_some() {
            let server = Arc::clone(&self);
            answering.spawn(async move {
                match &server.image_service {
                    Some(image_service) => image_service.answer().await,
                    None => std::future::pending().await,
                }
            });
        }
        loop {
            if let Some(Err(error)) = answering.join_next().await {
                tracing::error!(%error, "a socket of the snapshotter is not served any more");
            }
            if answering.is_empty() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// What the daemon before has left is removed, and layers that are not proven are compared with their diff IDs. In the background.
    pub fn resume(self: &Arc<Self>) {
        let server = Arc::clone(self);
        tokio::spawn(async move {
            for bound in &server.sets {
                // it waits until the devices of the daemon before were taken over
                if let Err(error) = bound.set.cleanup().await {
                    tracing::warn!("leftovers of snapshots: {}", error.report());
                }
            }
            for bound in &server.sets {
                for snapshot in bound.set.records.list() {
                    if let Err(error) = bound.check(&snapshot).await {
                        tracing::warn!(name = snapshot.name, "{}", error.report());
                    }
                }
            }
        });
    }

    /// Binds sockets again whose files were removed.
    pub fn mend_sockets(&self) {
        self.sockets().for_each(GrpcSocket::mend);
    }

    /// Removes the files of the sockets: the daemon ends, and no other one follows.
    pub fn remove_files(&self) {
        self.sockets().for_each(GrpcSocket::remove_file);
    }

    fn sockets(&self) -> impl Iterator<Item = &GrpcSocket> {
        let sets = self.sets.iter().map(|bound| &bound.socket);
        sets.chain(self.image_service.iter().map(|bound| &bound.socket))
    }
}

impl BoundImageService {
    async fn answer(&self) -> Infallible {
        let proxy = Arc::clone(&self.proxy);
        let answer = move |request| Arc::clone(&proxy).answer(request);
        self.socket.serve(answer).await
    }
}

impl BoundSet {
    async fn answer(&self) -> Infallible {
        let service = SnapshotsServer::new(Service::new(Arc::clone(&self.set)))
            .max_decoding_message_size(MAX_REQUEST_BYTES);
        let image_service = self.image_service.clone();
        let answer = move |request: Request<Incoming>| {
            let (mut service, image_service) = (service.clone(), image_service.clone());
            async move {
                match image_service.filter(|_| ImageServiceProxy::is_asked(&request)) {
                    Some(proxy) => {
                        let answered = proxy.answer(request).await;
                        answered.map(|answer| answer.map(tonic::body::Body::new))
                    }
                    None => service.call(request).await,
                }
            }
        };
        self.socket.serve(answer).await
    }

    /// Resumes the check of a lazy layer that was not completed before a restart.
    async fn check(&self, snapshot: &Snapshot) -> Result<()> {
        match &snapshot.layer {
            Some(layer) if self.set.options.unproven == Unproven::VerifySoon => {
                self.set.check_soon(layer.clone(), START_TIME).await
            }
            _ => Ok(()),
        }
    }
}

/// The name of the snapshots of a socket: that of its file, without `.sock`.
fn set_name(address: &Path) -> Result<String> {
    let name = address.file_name().and_then(|name| name.to_str());
    let name = name.map(|name| name.strip_suffix(SUFFIX).unwrap_or(name));
    let is_plain = |name: &&str| {
        let is_one = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        (1..=64).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(is_one)
    };
    let name = name.filter(is_plain).map(str::to_owned);
    name.ok_or_else(|| {
        Error::new(
            Kind::InvalidArgument,
            format!(
                "--address {}: the name of the file names the snapshots, and must be 1 to 64 letters, digits, dots, dashes and underscores",
                address.display()
            ),
        )
    })
}
