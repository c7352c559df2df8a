//! The second description of a file, for direct I/O.
//!
//! ```text
//!   open's descriptor ── /proc/self/fd, O_DIRECT ──► another description: same file, same access ──► dataplane, with the grant
//! ```
//!
//! Direct I/O is a property of an open file description, and the open's own must go on taking what is not aligned. So dataplane is
//! given two, and control keeps but one: this one lives as long as the binding, and needs no place in the journal or in what survives
//! a restart.

use crate::volume::ends_with_its_process;
use holdfast_shared::wire::link::{RedeemResult, ToDataplane};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// What of an open's description the other one has too.
const KEPT: OFlags = OFlags::RWMODE
    .union(OFlags::APPEND)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

/// True if the grant that this message brings is of a volume with direct I/O.
pub(crate) fn is_wanted(message: &ToDataplane) -> bool {
    match message {
        ToDataplane::Redeemed(redeemed) => {
            matches!(&redeemed.result, RedeemResult::Granted(grant) if grant.direct)
        }
        _ => false,
    }
}

/// Another description of the same file, for direct I/O. Blocks, as opening does.
///
/// # Errors
/// `INVAL` where the file system has none, or none that can be relied on; `ACCESS` if the file's permissions have changed since it
/// was opened; others of `open`.
pub(crate) fn reopen(file: impl AsFd) -> Result<OwnedFd, Errno> {
    // Of the file itself: a volume may have other file systems mounted in it.
    if !ends_with_its_process(rustix::fs::fstatfs(&file)?.f_type) {
        return Err(Errno::INVAL);
    }
    let flags = rustix::fs::fcntl_getfl(&file)?;
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let wanted = flags.intersection(KEPT) | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::io::retry_on_intr(|| rustix::fs::open(path.as_str(), wanted, Mode::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_description_is_of_the_same_file_with_the_same_access() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"bytes").unwrap();
        for (read, write) in [(true, false), (true, true), (false, true)] {
            let file = std::fs::File::options().read(read).write(write).open(&path).unwrap();
            let other = match reopen(&file) {
                Ok(other) => other,
                Err(error) => {
                    assert_eq!(error, Errno::INVAL, "no direct I/O here, or a bug");
                    return eprintln!("skipped: the file system has no direct I/O");
                }
            };
            let (one, two) = (rustix::fs::fstat(&file).unwrap(), rustix::fs::fstat(&other).unwrap());
            assert_eq!((one.st_dev, one.st_ino), (two.st_dev, two.st_ino));
            let flags = |fd: &dyn AsFd| rustix::fs::fcntl_getfl(fd.as_fd()).unwrap();
            let (one, two) = (flags(&file), flags(&other));
            assert_eq!(one & OFlags::RWMODE, two & OFlags::RWMODE);
            assert!(
                two.contains(OFlags::DIRECT) && !one.contains(OFlags::DIRECT),
                "the open's own stays as it is"
            );
        }
        // Also of a file that has no name any more.
        let file = std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        reopen(&file).unwrap();
    }
}
