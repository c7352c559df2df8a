//! Ends a waiting `accept` from any thread, for ever.

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// An event descriptor that is never read: once written to, every wait ends at once.
pub(crate) struct Stopper {
    event: Arc<OwnedFd>,
}

impl Stopper {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { event: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?) })
    }

    /// What stops: see [`crate::Listener::stopper`].
    pub(crate) fn handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let event = Arc::clone(&self.event);
        Box::new(move || {
            // Fails only if it was written to so often that it is full: then it is stopped.
            let _ = rustix::io::write(&*event, &1u64.to_ne_bytes());
        })
    }

    /// Waits until `fd` has one of `flags`, or the time is over. True if it has.
    ///
    /// # Errors
    /// `Interrupted` once stopped.
    pub(crate) fn wait(&self, fd: &impl AsFd, flags: PollFlags, time: Option<Duration>) -> io::Result<bool> {
        self.poll(&mut [PollFd::new(&*self.event, PollFlags::IN), PollFd::new(fd, flags)], time)
    }

    /// Waits for that long.
    ///
    /// # Errors
    /// `Interrupted` once stopped.
    pub(crate) fn sleep(&self, time: Duration) -> io::Result<()> {
        self.poll(&mut [PollFd::new(&*self.event, PollFlags::IN)], Some(time)).map(|_| ())
    }

    fn poll(&self, fds: &mut [PollFd<'_>], time: Option<Duration>) -> io::Result<bool> {
        let time = time.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        match poll(fds, time.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds.first().is_some_and(|event| !event.revents().is_empty()) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the listener was stopped"));
        }
        Ok(fds.get(1).is_some_and(|fd| !fd.revents().is_empty()))
    }
}
