//! [`Foreign`]: a descriptor that a peer has passed, before it is known what it is.
//!
//! Closing a descriptor can wait for as long as its maker wants: a socket that lingers, a file of a file system in user space. So what is
//! not the memory that was asked for is closed on a thread of its own, and nobody else waits for it.

use rustix::fs::SealFlags;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Descriptors that are being closed so. More are left open: who passes them has ended its channel with the first.
const CLOSING_MAX: usize = 64;
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// See the module's text.
pub(super) struct Foreign(Option<OwnedFd>);

impl Foreign {
    pub(super) fn new(descriptor: OwnedFd) -> Self {
        Self(Some(descriptor))
    }

    /// It, if it is a memory file of sealed length. Asking that reaches no file system of the peer's.
    pub(super) fn memory(mut self) -> Option<OwnedFd> {
        let sealed = SealFlags::SHRINK | SealFlags::GROW;
        let seals = self.0.as_ref().and_then(|fd| rustix::fs::fcntl_get_seals(fd).ok());
        if seals.is_some_and(|seals| seals.contains(sealed)) { self.0.take() } else { None }
    }

    /// It, whatever it is: of one who is trusted that far.
    pub(super) fn any(mut self) -> Option<OwnedFd> {
        self.0.take()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let Some(descriptor) = self.0.take() else { return };
        if CLOSING.fetch_add(1, Ordering::Relaxed) >= CLOSING_MAX {
            CLOSING.fetch_sub(1, Ordering::Relaxed);
            tracing::error!("too many passed descriptors can't be closed: one is left open");
            return std::mem::forget(descriptor);
        }
        let close = move || {
            drop(descriptor);
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        };
        // Without a thread it is closed here, with the closure.
        if std::thread::Builder::new().name("closes".into()).spawn(close).is_err() {
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_verbs::memory::Region;

    #[test]
    fn only_sealed_memory_is_taken_and_the_rest_is_closed_elsewhere() {
        let region = Region::shareable(4096).unwrap();
        let given = region.file().unwrap().try_clone_to_owned().unwrap();
        assert!(Foreign::new(given).memory().is_some());
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(Foreign::new(writer).memory().is_none());
        // Its end is told when it is closed.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    }
}
