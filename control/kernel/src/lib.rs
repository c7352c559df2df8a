//! The kernel calls of control that no maintained crate wraps safely: files by the kernel's own handle, and descriptors
//! that were inherited.
//!
//! ```text
//!  open file ── handle_of ──► bytes, kept over a crash ── open_by_handle ──► the same file, whatever its name is now
//! ```
//!
//! A handle is opaque: its type (i32, little-endian) and the file system's bytes. The file system makes sure that it
//! never leads to a later file with the same inode number; whoever uses one still checks what it got.
//!
//! `open_by_handle` needs the capability `CAP_DAC_READ_SEARCH`; without it the answer is `PermissionDenied`, and the file must be
//! found by its path.

#![expect(unsafe_code, reason = "two system calls and one adoption; nothing else may come in here")]

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The kernel's `MAX_HANDLE_SZ`.
const HANDLE_BYTES_MAX: usize = 128;
/// Bytes of the type before the handle's own.
const TYPE_BYTES: usize = 4;

/// The kernel's `struct file_handle` with all the room it can want.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; HANDLE_BYTES_MAX],
}

/// An open file's handle; empty if its file system has none.
///
/// # Errors
/// Whatever else the kernel says.
pub fn handle_of(file: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let room = u32::try_from(HANDLE_BYTES_MAX).unwrap_or(0);
    let mut handle = Handle { bytes: room, kind: 0, handle: [0; HANDLE_BYTES_MAX] };
    let mut mount = 0;
    // SAFETY: the path is a constant C string, `handle` has the layout of `struct file_handle` followed by the number of
    // bytes that it says, and both pointers are to live, writable variables for the whole call.
    let done = unsafe {
        libc::name_to_handle_at(
            file.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if done != 0 {
        let error = Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EOVERFLOW | libc::ENOSYS | libc::EPERM) => Ok(Vec::new()),
            _ => Err(error),
        };
    }
    let bytes = usize::try_from(handle.bytes).unwrap_or(usize::MAX);
    let Some(own) = handle.handle.get(..bytes) else {
        return Err(Error::other("the kernel gave a handle longer than there is room"));
    };
    let mut told = Vec::with_capacity(TYPE_BYTES + bytes);
    told.extend_from_slice(&handle.kind.to_le_bytes());
    told.extend_from_slice(own);
    Ok(told)
}

/// Opens the file of a handle, with `O_CLOEXEC` and the flags given. `mount` is any open file on its file system (not one
/// opened with `O_PATH`).
///
/// # Errors
/// `InvalidInput` for bytes that are no handle; `ESTALE` if the file is gone; `PermissionDenied` without the capability.
pub fn open_by_handle(mount: BorrowedFd<'_>, handle: &[u8], flags: i32) -> Result<OwnedFd> {
    let not_one = || Error::new(ErrorKind::InvalidInput, "not a file handle");
    let (kind, own) = handle.split_first_chunk::<TYPE_BYTES>().ok_or_else(not_one)?;
    let mut wanted = Handle {
        bytes: u32::try_from(own.len()).map_err(|_| not_one())?,
        kind: i32::from_le_bytes(*kind),
        handle: [0; HANDLE_BYTES_MAX],
    };
    wanted.handle.get_mut(..own.len()).ok_or_else(not_one)?.copy_from_slice(own);
    // SAFETY: `wanted` has the layout of `struct file_handle` followed by at least the number of bytes that it says (checked
    // above), and lives for the whole call.
    let opened = unsafe {
        libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut wanted).cast(), flags | libc::O_CLOEXEC)
    };
    if opened < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

/// Takes the descriptors that a supervisor passed to this very process (the protocol of `sd_listen_fds`: numbers from 3
/// on, their count in `LISTEN_FDS`, the process in `LISTEN_PID`), with their names from `LISTEN_FDNAMES`. Numbers that
/// are not open are left out. To be called first of all in `main`; it gives them away once, and then none.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) || TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let numbers = 3..number("LISTEN_FDS").unwrap_or(0).saturating_add(3);
    let take = |(number, name): (u32, String)| {
        let number = RawFd::try_from(number).ok()?;
        // SAFETY: asking for a descriptor's flags changes nothing, whether it is open or not.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return None;
        }
        // SAFETY: it is open; whoever started this process says in its environment that it is for us; and the flag above lets
        // only one caller come here, so nobody else of this process owns it.
        let taken = unsafe { OwnedFd::from_raw_fd(number) };
        // SAFETY: it is ours. A process that we start must not inherit it.
        unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        Some((name, taken))
    };
    numbers.zip(names).filter_map(take).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn a_handle_leads_to_the_file_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, b"text").unwrap();
        let handle = handle_of(std::fs::File::open(&old).unwrap().as_fd()).unwrap();
        if handle.is_empty() {
            println!("the file system of {} has no handles", dir.path().display());
            return;
        }
        std::fs::rename(&old, &new).unwrap();
        let mount = std::fs::File::open(dir.path()).unwrap();
        let opened = match open_by_handle(mount.as_fd(), &handle, libc::O_RDONLY) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return,
            opened => opened.unwrap(),
        };
        let mut text = String::new();
        std::fs::File::from(opened).read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        std::fs::remove_file(&new).unwrap();
        let gone = open_by_handle(mount.as_fd(), &handle, libc::O_RDONLY).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ESTALE));
    }

    #[test]
    fn bytes_that_are_no_handle_are_refused() {
        let dir = std::fs::File::open("/").unwrap();
        for length in [0, 1, 3, 4 + HANDLE_BYTES_MAX + 1, 70_000] {
            let error = open_by_handle(dir.as_fd(), &vec![0; length], libc::O_RDONLY).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{length}");
        }
        for length in [4, 12, 4 + HANDLE_BYTES_MAX] {
            assert!(open_by_handle(dir.as_fd(), &vec![0xff; length], libc::O_RDONLY).is_err(), "{length}");
        }
    }
}
