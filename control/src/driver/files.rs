//! The driver's hands in the file system: descriptors it keeps, and work on the blocking threads.
//!
//! ```text
//!   OpenFile ─► Open (descriptor)            recovered beyond the descriptors there may be ─► Named (handle, path)
//!                 ▲                                                                              │
//!                 └────── Inspect: its client is back ── opened, identity checked ◄──────────────┘
//! ```

use super::{Driver, internal};
use crate::errno::refusal;
use crate::gauges::{Gauges, Held};
use crate::notify::Stored;
use crate::volume::{OpenAnswer, Unopened, Volume, attributes, inspect};
use holdfast_shared::state::{
    FileId, FileIdentity, FileOpened, Input, Inspected, Located, OperationId, Reopen, Subject, Work,
};
use holdfast_shared::types::{Status, VolumePath};
use holdfast_shared::wire::control::{Refusal, Reply};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A file of an open.
pub enum HeldFile {
    /// By its descriptor.
    Open(OpenFile),
    /// By what is known of it: it was there, and itself, when it was last looked at.
    Named(Box<Reopen>),
}

/// A descriptor of a volume's file, counted.
pub struct OpenFile {
    pub(super) fd: Arc<OwnedFd>,
    _held: Held,
    _stored: Option<Stored>,
}

impl OpenFile {
    /// Counts it, and has the supervisor keep a duplicate, if it is `stored` there.
    pub fn new(fd: OwnedFd, stored: Option<Stored>, gauges: &Arc<Gauges>) -> Self {
        Self { fd: Arc::new(fd), _held: Held::new(gauges, |g| &g.open_files), _stored: stored }
    }
}

/// What comes back from a blocking thread.
pub(super) enum Done {
    Input(Input),
    /// The dataplane that was silent since the link of that number closed.
    DataplaneDied(u64),
    Opened(OperationId, FileId, Result<(FileOpened, OpenFile), Refusal>),
    /// A file that was held by name is open again; or it is not there any more.
    Reopened(OperationId, FileId, Result<Option<(OpenFile, Inspected)>, Refusal>),
}

impl Driver {
    pub(super) fn open_file(
        &self,
        operation: OperationId,
        file: FileId,
        at: Located,
        open: impl FnOnce(&Volume, &VolumePath) -> Result<OpenAnswer, Refusal> + Send + 'static,
    ) {
        let (volume, gauges, store) = (self.volume(&at), self.gauges.clone(), self.store.clone());
        self.blocking(move || {
            let open = |volume: Arc<Volume>| {
                let (opened, fd) = open(&volume, &at.path)?;
                let stored = store.as_ref().and_then(|store| store.keep(&fd));
                Ok((opened, OpenFile::new(fd, stored, &gauges)))
            };
            Done::Opened(operation, file, volume.and_then(open))
        });
    }

    /// Looks at an open's file; one that is held by name is opened, since its client is back.
    pub(super) fn inspect(&self, operation: OperationId, file: FileId) {
        let told = move |result| Done::Input(Input::Inspected { operation, result });
        match self.files.get(&file) {
            Some(HeldFile::Open(open)) => {
                let fd = open.fd.clone();
                self.blocking(move || told(inspect(&fd).map(|(_, inspected)| Some(inspected))));
            }
            Some(HeldFile::Named(reopen)) => {
                let (volume, reopen) = (self.volume(&reopen.at), reopen.clone());
                let (gauges, store) = (self.gauges.clone(), self.store.clone());
                self.blocking(move || {
                    let opened = volume.and_then(|volume| match volume.reopen(&reopen) {
                        Ok((fd, inspected)) => {
                            let stored = store.as_ref().and_then(|store| store.keep(&fd));
                            Ok(Some((OpenFile::new(fd, stored, &gauges), inspected)))
                        }
                        Err(Unopened::Lost(_)) => Ok(None),
                        Err(Unopened::NoRoom) => Err(no_room()),
                    });
                    Done::Reopened(operation, file, opened)
                });
            }
            None => self.blocking(move || told(Err(internal()))),
        }
    }

    /// Looks at a file of which no descriptor is kept.
    pub(super) fn inspect_lost(
        &self,
        operation: OperationId,
        at: Located,
        file_handle: Vec<u8>,
        identity: FileIdentity,
    ) {
        // A volume that is no longer configured is no reason to tell more than that the file is not there.
        let volume = self.volumes.get(&at.volume).cloned();
        self.blocking(move || {
            let look = |volume: Arc<Volume>| volume.inspect_lost(&at.path, &file_handle, identity);
            Done::Input(Input::Inspected { operation, result: volume.map_or(Ok(None), look) })
        });
    }

    pub(super) fn resolve(&self, operation: OperationId, names: Vec<Located>) {
        let volume = names.first().map_or_else(|| Err(internal()), |at| self.volume(at));
        self.blocking(move || {
            let result = volume.and_then(|volume| names.iter().map(|at| volume.identify(&at.path)).collect());
            Done::Input(Input::Resolved { operation, result })
        });
    }

    pub(super) fn work(&self, operation: OperationId, work: Work) {
        let volume_of = |at: &Located| self.volume(at);
        let job: Box<dyn FnOnce() -> Result<Reply, Refusal> + Send> = match work {
            Work::Attributes(Subject::File(file)) => {
                let fd = self.fd(file);
                Box::new(move || attributes::of_file(&*fd?).map(Reply::Attributes))
            }
            Work::SetAttributes(Subject::File(file), changes) => {
                let fd = self.fd(file);
                Box::new(move || attributes::change_file(&*fd?, &changes).map(Reply::Attributes))
            }
            Work::Attributes(Subject::Name(at)) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.attributes(&at.path).map(Reply::Attributes))
            }
            Work::SetAttributes(Subject::Name(at), changes) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.set_attributes(&at.path, &changes).map(Reply::Attributes))
            }
            Work::List(at, after) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.list(&at.path, &after).map(Reply::Entries))
            }
            Work::MakeDirectory(at, mode) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.make_directory(&at.path, mode).map(|()| Reply::Done))
            }
            Work::MakeSymlink(at, text) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.make_symlink(&at.path, &text).map(|()| Reply::Done))
            }
            Work::ReadSymlink(at) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.read_symlink(&at.path).map(Reply::Symlink))
            }
            Work::VolumeStatus(id) => {
                let volume = self.volumes.get(&id).cloned().ok_or_else(internal);
                Box::new(move || volume?.status().map(Reply::VolumeStatus))
            }
            Work::Remove(at, file) => {
                let volume = volume_of(&at);
                Box::new(move || volume?.remove(&at.path, file).map(|()| Reply::Done))
            }
            Work::Rename { from, to } => {
                let volume = volume_of(&from.0);
                Box::new(move || {
                    let done = volume?.rename((&from.0.path, from.1), (&to.0.path, to.1));
                    done.map(|()| Reply::Done)
                })
            }
        };
        self.blocking(move || Done::Input(Input::Performed { operation, result: job() }));
    }

    fn blocking(&self, work: impl FnOnce() -> Done + Send + 'static) {
        let done = self.done.clone();
        tokio::task::spawn_blocking(move || {
            // The driver is gone only when the process ends.
            let _ = done.send(work());
        });
    }

    fn volume(&self, at: &Located) -> Result<Arc<Volume>, Refusal> {
        self.volumes.get(&at.volume).cloned().ok_or_else(internal)
    }

    /// An open's descriptor. One that is held by name is opened on the spot: nobody comes here before its client was
    /// back, so that is rare, and the file was looked at a moment ago.
    pub(super) fn fd(&self, file: FileId) -> Result<Arc<OwnedFd>, Refusal> {
        match self.files.get(&file).ok_or_else(internal)? {
            HeldFile::Open(open) => Ok(open.fd.clone()),
            HeldFile::Named(reopen) => match self.volume(&reopen.at)?.reopen(reopen) {
                Ok((fd, _)) => Ok(Arc::new(fd)),
                Err(Unopened::Lost(words)) => Err(refusal(Status::Io, &words)),
                Err(Unopened::NoRoom) => Err(no_room()),
            },
        }
    }
}

fn no_room() -> Refusal {
    refusal(Status::TooMany, "the server has no room for another open file")
}
