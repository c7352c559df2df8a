//! The driver's hands in the file system: descriptors it keeps, and work on the blocking threads.

use super::{Driver, internal};
use crate::gauges::Held;
use crate::volume::{OpenAnswer, Volume, attributes};
use holdfast_shared::state::{FileId, FileOpened, Input, Located, OperationId, Subject, Work};
use holdfast_shared::types::VolumePath;
use holdfast_shared::wire::control::{Refusal, Reply};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A descriptor of a volume's file, counted.
pub(super) struct HeldFile {
    pub(super) fd: Arc<OwnedFd>,
    _held: Held,
}

/// What comes back from a blocking thread.
pub(super) enum Done {
    Input(Input),
    /// The dataplane that was silent since the link of that number closed.
    DataplaneDied(u64),
    Opened(OperationId, FileId, Result<(FileOpened, HeldFile), Refusal>),
}

impl Driver {
    pub(super) fn open_file(
        &self,
        operation: OperationId,
        file: FileId,
        at: Located,
        open: impl FnOnce(&Volume, &VolumePath) -> Result<OpenAnswer, Refusal> + Send + 'static,
    ) {
        let (volume, gauges) = (self.volume(&at), self.gauges.clone());
        self.blocking(move || {
            let open = |volume: Arc<Volume>| {
                let (opened, fd) = open(&volume, &at.path)?;
                let held = Held::new(&gauges, |g| &g.open_files);
                Ok((opened, HeldFile { fd: Arc::new(fd), _held: held }))
            };
            Done::Opened(operation, file, volume.and_then(open))
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

    fn fd(&self, file: FileId) -> Result<Arc<OwnedFd>, Refusal> {
        self.files.get(&file).map(|held| held.fd.clone()).ok_or_else(internal)
    }
}
