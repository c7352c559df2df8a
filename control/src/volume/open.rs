//! Opening regular files, and nothing else.
//!
//! What stands at the path is first looked at through `O_PATH`, which opens nothing; only a regular file is then
//! opened, through that same descriptor, so that it cannot be another one by then.

use super::{Volume, attributes, identity, reopen, stat, through_proc};
use crate::errno::{refusal, refused};
use holdfast_shared::state::FileOpened;
use holdfast_shared::types::{Access, Disposition, Status, VolumePath};
use holdfast_shared::wire::control::{FileKind, Refusal};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// How often a file may vanish or appear between the two looks.
const TRIES_MAX: usize = 16;

/// An open file and what is known of it.
pub type OpenAnswer = (FileOpened, OwnedFd);

impl Volume {
    /// Opens or creates a regular file, without truncating it. With `follow`, a symbolic link at the end leads on,
    /// inside the volume.
    ///
    /// # Errors
    /// A refusal for the client.
    pub fn open_file(
        &self,
        path: &VolumePath,
        access: Access,
        disposition: Disposition,
        mode: u32,
        follow: bool,
    ) -> Result<OpenAnswer, Refusal> {
        for _ in 0..TRIES_MAX {
            if disposition != Disposition::CreateNew {
                match self.open_existing(path, access, follow) {
                    Err(refused) if refused.status == Status::NotFound && disposition.creates() => {}
                    done => return done,
                }
            }
            match self.create(path, access, mode) {
                Ok(fd) => return self.describe(fd, true),
                Err(Errno::EXIST) if disposition != Disposition::CreateNew => {}
                Err(error) => return Err(refused(error)),
            }
        }
        // It neither can be opened nor made: a symbolic link that leads nowhere, or a busy name.
        Err(refusal(Status::NotFound, "the name leads nowhere"))
    }

    fn open_existing(&self, path: &VolumePath, access: Access, follow: bool) -> Result<OpenAnswer, Refusal> {
        let nofollow = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
        let found = self.resolve(path.as_str(), OFlags::PATH | nofollow, Mode::empty()).map_err(refused)?;
        match attributes::kind(stat(&found).map_err(refused)?.stx_mode) {
            FileKind::File => {}
            FileKind::Directory => return Err(refusal(Status::IsDirectory, "")),
            FileKind::Symlink => {
                return Err(refusal(Status::SymlinkLoop, "a symbolic link is not followed here"));
            }
            FileKind::Other => return Err(refusal(Status::Unsupported, "not a regular file")),
        }
        let fd = rustix::fs::openat(rustix::fs::CWD, through_proc(&found), flags(access), Mode::empty());
        self.describe(fd.map_err(refused)?, false)
    }

    fn create(&self, path: &VolumePath, access: Access, mode: u32) -> Result<OwnedFd, Errno> {
        let flags = flags(access) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        self.resolve(path.as_str(), flags, Mode::from_raw_mode(mode & 0o777))
    }

    fn describe(&self, fd: OwnedFd, created: bool) -> Result<OpenAnswer, Refusal> {
        let stat = stat(&fd).map_err(refused)?;
        let opened = FileOpened {
            identity: identity(&stat),
            attributes: attributes::of(&stat),
            created,
            file_handle: self.handle_of(&fd),
            evidence: reopen::evidence(&stat),
        };
        Ok((opened, fd))
    }
}

/// The descriptor's mode is what the open wants, no more: dataplane can't be talked into writing through it.
pub(super) fn flags(access: Access) -> OFlags {
    let mode = match (access.contains(Access::READ), access.contains(Access::WRITE)) {
        (true, true) => OFlags::RDWR,
        (false, true) => OFlags::WRONLY,
        (_, false) => OFlags::RDONLY,
    };
    mode | OFlags::CLOEXEC | OFlags::NOCTTY
}
