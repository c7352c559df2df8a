//! Volumes: directories that are served, and the only place where a path becomes a file.
//!
//! Every path is resolved by the kernel beneath the volume's root (`openat2` with `RESOLVE_BENEATH`), in one step.
//! So `..`, absolute paths, symbolic links that lead out and directories that are swapped for links meanwhile all
//! end in `PathEscape`. An operation on a name opens the directory above it that way, and then works on the
//! last component alone, which is never followed.
//!
//! ```text
//!  open         regular files: found with O_PATH first, so that a device or fifo is never opened
//!  attributes   stat, size, mode, times
//!  names        mkdir, symlink, remove, rename
//!  list         pages of a directory
//!  files        what the file system can do, for the operator
//!  reopen       recorded files found again, by handle or by path
//! ```
//!
//! Everything here may block, and runs on the blocking threads.

pub mod attributes;
mod files;
mod list;
mod names;
mod open;
mod reopen;
#[cfg(test)]
mod tests;

use crate::errno::refused;
use holdfast_shared::state::FileIdentity;
use holdfast_shared::types::{Status, VolumePath};
use holdfast_shared::wire::control::{Refusal, VolumeStatus};
use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

pub(crate) use files::ends_with_its_process;
pub use files::{Direct, Files};
pub use open::OpenAnswer;
pub use reopen::{Unopened, inspect, opened_for};

/// How often a resolution is tried again when the kernel saw a rename in the middle of it.
const RACES_MAX: usize = 32;

/// A served directory.
#[derive(Debug)]
pub struct Volume {
    root: OwnedFd,
    /// The root once more, not only as a place: the kernel finds handles beside it. None if the root may not be read.
    mount: Option<OwnedFd>,
    /// Held from the look at a name to its removal or renaming: the kernel cannot do both in one step.
    name_changes: Mutex<()>,
}

impl Volume {
    /// Opens the root.
    ///
    /// # Errors
    /// If it is not a directory, or the kernel lacks `openat2` or `/proc`.
    pub fn open(directory: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(rustix::fs::CWD, directory, flags, Mode::empty())?;
        let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mount = rustix::fs::openat(rustix::fs::CWD, through_proc(&root), readable, Mode::empty()).ok();
        let volume = Self { root, mount, name_changes: Mutex::new(()) };
        let again = volume.resolve(".", flags, Mode::empty())?;
        rustix::fs::openat(rustix::fs::CWD, through_proc(&again), flags, Mode::empty())?;
        Ok(volume)
    }

    /// Opens something beneath the root.
    fn resolve(&self, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { "." } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let mut error = Errno::AGAIN;
        for _ in 0..RACES_MAX {
            match openat2(&self.root, path, flags | OFlags::CLOEXEC, mode, resolve) {
                // A rename crossed the resolution and the kernel cannot tell whether it stayed inside.
                Err(Errno::AGAIN | Errno::INTR) => error = Errno::AGAIN,
                done => return done,
            }
        }
        Err(error.into_busy())
    }

    /// What stands at a path; a symbolic link at its end is not followed.
    fn find(&self, path: &VolumePath) -> Result<OwnedFd, Errno> {
        self.resolve(path.as_str(), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
    }

    /// The directory above a path, and the last name.
    fn parent<'p>(&self, path: &'p VolumePath) -> Result<(OwnedFd, &'p str), Refusal> {
        let Some((above, name)) = path.split() else {
            return Err(crate::errno::refusal(Status::Invalid, "the volume's root stays as it is"));
        };
        let above = self.resolve(above, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).map_err(refused)?;
        Ok((above, name))
    }

    /// The root as a descriptor that takes extended attributes; none if the root may not be read.
    pub fn readable_root(&self) -> Option<&OwnedFd> {
        self.mount.as_ref()
    }

    /// The root's device, as identities of files have it; none if the kernel does not say.
    pub fn device(&self) -> Option<u64> {
        stat(&self.root).ok().map(|stat| identity(&stat).device)
    }

    /// Size and room of its file system.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn status(&self) -> Result<VolumeStatus, Refusal> {
        let s = rustix::fs::fstatvfs(&self.root).map_err(refused)?;
        Ok(VolumeStatus {
            bytes_total: s.f_blocks.saturating_mul(s.f_frsize),
            bytes_available: s.f_bavail.saturating_mul(s.f_frsize),
            files_total: s.f_files,
            files_available: s.f_favail,
            block_size: u32::try_from(s.f_bsize).unwrap_or(u32::MAX),
        })
    }
}

trait IntoBusy {
    fn into_busy(self) -> Self;
}

impl IntoBusy for Errno {
    /// A name that is renamed all the time is busy.
    fn into_busy(self) -> Self {
        if self == Self::AGAIN { Self::BUSY } else { self }
    }
}

/// The name under which the kernel knows a descriptor of ours; opening it opens that very file.
fn through_proc(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(
        fd,
        "",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        StatxFlags::BASIC_STATS | StatxFlags::BTIME,
    )
}

fn stat_at(directory: impl AsFd, name: &str) -> Result<Statx, Errno> {
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

fn identity(s: &Statx) -> FileIdentity {
    let born = StatxFlags::from_bits_retain(s.stx_mask).contains(StatxFlags::BTIME);
    let seconds = u64::from_ne_bytes(s.stx_btime.tv_sec.to_ne_bytes()).wrapping_mul(1_000_000_000);
    FileIdentity {
        device: u64::from(s.stx_dev_major) << 32 | u64::from(s.stx_dev_minor),
        inode: s.stx_ino,
        generation: if born { seconds.wrapping_add(u64::from(s.stx_btime.tv_nsec)) } else { 0 },
    }
}
