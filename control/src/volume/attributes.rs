//! Attributes, read and changed.

use super::{Volume, stat, through_proc};
use crate::errno::refused;
use holdfast_shared::state::Changes;
use holdfast_shared::types::{FileTime, VolumePath};
use holdfast_shared::wire::control::{Attributes, FileKind, Refusal};
use rustix::fs::{AtFlags, FileType, Mode, Statx, StatxTimestamp, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

pub(super) fn kind(mode: u16) -> FileKind {
    match FileType::from_raw_mode(mode.into()) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    }
}

pub(super) fn of(s: &Statx) -> Attributes {
    let time = |t: StatxTimestamp| FileTime { seconds: t.tv_sec, nanos: t.tv_nsec };
    Attributes {
        kind: kind(s.stx_mode),
        size: s.stx_size,
        allocated: s.stx_blocks.saturating_mul(512),
        mode: u32::from(s.stx_mode) & 0o7777,
        inode: s.stx_ino,
        links: s.stx_nlink.into(),
        accessed: time(s.stx_atime),
        modified: time(s.stx_mtime),
        changed: time(s.stx_ctime),
        uid: s.stx_uid,
        gid: s.stx_gid,
    }
}

impl Volume {
    /// Attributes of what stands at a path.
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn attributes(&self, path: &VolumePath) -> Result<Attributes, Refusal> {
        let found = self.find(path).map_err(refused)?;
        Ok(of(&stat(&found).map_err(refused)?))
    }

    /// Changes mode and times of what stands at a path. (A size is changed through an open file.)
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn set_attributes(&self, path: &VolumePath, changes: &Changes) -> Result<Attributes, Refusal> {
        let found = self.find(path).map_err(refused)?;
        change_found(&found, changes).map_err(refused)?;
        Ok(of(&stat(&found).map_err(refused)?))
    }
}

/// An `O_PATH` descriptor takes no changes itself; its name in /proc leads to the same file, even to a
/// symbolic link.
fn change_found(found: &OwnedFd, changes: &Changes) -> Result<(), Errno> {
    let path = through_proc(found);
    if let Some(mode) = changes.mode {
        if kind(stat(found)?.stx_mode) == FileKind::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        rustix::fs::chmodat(rustix::fs::CWD, &path, Mode::from_raw_mode(mode & 0o777), AtFlags::empty())?;
    }
    match times(changes) {
        Some(times) => rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty()),
        None => Ok(()),
    }
}

/// Attributes of an open file.
///
/// # Errors
/// A refusal for the client.
pub fn of_file(file: &OwnedFd) -> Result<Attributes, Refusal> {
    Ok(of(&stat(file).map_err(refused)?))
}

/// Changes an open file's attributes.
///
/// # Errors
/// A refusal for the client; what was changed before the failure stays changed.
pub fn change_file(file: &OwnedFd, changes: &Changes) -> Result<Attributes, Refusal> {
    let change = || {
        if let Some(size) = changes.size {
            rustix::fs::ftruncate(file, size)?;
        }
        if let Some(mode) = changes.mode {
            rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o777))?;
        }
        times(changes).map_or(Ok(()), |times| rustix::fs::futimens(file, &times))
    };
    change().map_err(refused)?;
    of_file(file)
}

fn times(changes: &Changes) -> Option<Timestamps> {
    if changes.accessed.is_none() && changes.modified.is_none() {
        return None;
    }
    let time = |t: Option<FileTime>| match t {
        Some(t) => Timespec { tv_sec: t.seconds, tv_nsec: t.nanos.into() },
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    Some(Timestamps { last_access: time(changes.accessed), last_modification: time(changes.modified) })
}
