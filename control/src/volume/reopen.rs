//! Files found again: after a restart, or when only their record is left.
//!
//! ```text
//!   handle ──open_by_handle_at──┐
//!                               ├─► the identity must be the recorded one ─► opened through that very descriptor
//!   path ──beneath the root─────┘
//! ```
//!
//! The handle leads to the file whatever its name is now. Where the kernel or the file system gives none, the path is
//! tried; after a rename it leads elsewhere, which the identity shows.

use super::{Volume, attributes, identity, open, stat, through_proc};
use crate::errno::refused;
use holdfast_shared::state::{FileIdentity, Inspected, Reopen};
use holdfast_shared::types::{Access, Evidence, VolumePath};
use holdfast_shared::wire::control::{FileKind, Refusal};
use rustix::fs::{Mode, OFlags, Statx, StatxTimestamp};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};

/// Why a recorded file is not open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unopened {
    /// It is lost; in words for the operator.
    Lost(String),
    /// The process or the system has no room for another descriptor now.
    NoRoom,
}

/// A file that was found: an `O_PATH` descriptor, which opens nothing, and how it looks.
struct Found {
    place: OwnedFd,
    stat: Statx,
}

impl Volume {
    /// The kernel's own name of an open file; empty if it has none here.
    pub(super) fn handle_of(&self, file: &OwnedFd) -> Vec<u8> {
        if self.mount.is_none() {
            return Vec::new();
        }
        holdfast_kernel::handle_of(file.as_fd()).unwrap_or_default()
    }

    /// Opens a recorded file again, and says how it looks.
    ///
    /// # Errors
    /// See [`Unopened`].
    pub fn reopen(&self, reopen: &Reopen) -> Result<(OwnedFd, Inspected), Unopened> {
        let found = self.search(reopen)?;
        let flags = open::flags(reopen.access);
        let opened = rustix::fs::openat(rustix::fs::CWD, through_proc(&found.place), flags, Mode::empty());
        let file = opened.map_err(|error| unopened(error, "it cannot be opened"))?;
        Ok((file, inspected(&found.stat)))
    }

    /// Looks at a recorded file without opening it.
    ///
    /// # Errors
    /// See [`Unopened`].
    pub fn look(&self, reopen: &Reopen) -> Result<Inspected, Unopened> {
        Ok(inspected(&self.search(reopen)?.stat))
    }

    /// Looks at a file of which only the record is left; `None` if it is not there any more.
    ///
    /// # Errors
    /// A refusal for the client: it can't be known whether it is there.
    pub fn inspect_lost(
        &self,
        path: &VolumePath,
        handle: &[u8],
        wanted: FileIdentity,
    ) -> Result<Option<Inspected>, Refusal> {
        Ok(self.find_again(path, handle, wanted).map_err(refused)?.map(|found| inspected(&found.stat)))
    }

    fn search(&self, reopen: &Reopen) -> Result<Found, Unopened> {
        let found = self
            .find_again(&reopen.at.path, &reopen.file_handle, reopen.identity)
            .map_err(|error| unopened(error, "the file system refuses to say whether it is there"))?
            .ok_or_else(|| {
                Unopened::Lost("it is gone: neither its handle nor its path leads to it".into())
            })?;
        if attributes::kind(found.stat.stx_mode) == FileKind::File {
            Ok(found)
        } else {
            Err(Unopened::Lost("it is no regular file".into()))
        }
    }

    fn find_again(
        &self,
        path: &VolumePath,
        handle: &[u8],
        wanted: FileIdentity,
    ) -> Result<Option<Found>, Errno> {
        let is_it = |place: OwnedFd| -> Result<Option<Found>, Errno> {
            let stat = stat(&place)?;
            Ok((identity(&stat) == wanted).then_some(Found { place, stat }))
        };
        if let Some(mount) = self.mount.as_ref().filter(|_| !handle.is_empty()) {
            let flags = i32::try_from(OFlags::PATH.bits()).map_err(|_| Errno::INVAL)?;
            match holdfast_kernel::open_by_handle(mount.as_fd(), handle, flags) {
                Ok(place) => {
                    if let Some(found) = is_it(place)? {
                        return Ok(Some(found));
                    }
                }
                Err(error) => {
                    let no_room =
                        |error: &Errno| matches!(*error, Errno::MFILE | Errno::NFILE | Errno::NOMEM);
                    if let Some(error) = Errno::from_io_error(&error).filter(no_room) {
                        return Err(error);
                    }
                    // Gone, not allowed, or of another mount: the path may still lead there.
                }
            }
        }
        match self.find(path) {
            Ok(place) => is_it(place),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn unopened(error: Errno, what: &str) -> Unopened {
    match error {
        Errno::MFILE | Errno::NFILE | Errno::NOMEM => Unopened::NoRoom,
        error => Unopened::Lost(format!("{what}: {error}")),
    }
}

/// How an open file looks, and which it is.
///
/// # Errors
/// A refusal for the client.
pub fn inspect(file: &OwnedFd) -> Result<(FileIdentity, Inspected), Refusal> {
    let stat = stat(file).map_err(refused)?;
    Ok((identity(&stat), inspected(&stat)))
}

/// What a descriptor can do; `None` if it is none that an open has.
pub fn opened_for(file: &OwnedFd) -> Option<Access> {
    let flags = rustix::fs::fcntl_getfl(file).ok().filter(|flags| !flags.contains(OFlags::PATH))?;
    match flags.intersection(OFlags::RWMODE) {
        OFlags::RDWR => Some(Access::READ | Access::WRITE),
        OFlags::WRONLY => Some(Access::WRITE),
        _ => Some(Access::READ),
    }
}

fn inspected(stat: &Statx) -> Inspected {
    Inspected { attributes: attributes::of(stat), evidence: evidence(stat) }
}

/// What tells a change of the file.
pub(super) fn evidence(stat: &Statx) -> Evidence {
    let nanos = |t: StatxTimestamp| t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec.into());
    Evidence { changed_ns: nanos(stat.stx_ctime), modified_ns: nanos(stat.stx_mtime), size: stat.stx_size }
}
