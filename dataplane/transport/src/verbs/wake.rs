//! [`Wake`]: one descriptor for both things a channel's owner has to know of.

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, epoll, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rung by the connection manager's thread when the state of a connection changes.
pub(super) struct Note {
    event: OwnedFd,
    /// The event has been written to since it was last read: saves the read when it was not.
    rung: AtomicBool,
    /// The listener's event, until the channel is handed out.
    also: Mutex<Option<Arc<OwnedFd>>>,
}

impl Note {
    pub(super) fn new(also: Option<Arc<OwnedFd>>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { event: event()?, rung: AtomicBool::new(false), also: Mutex::new(also) }))
    }

    pub(super) fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        ring(&self.event);
        if let Some(also) = &*self.also.lock() {
            ring(also);
        }
    }

    /// The listener has no more to do with it.
    pub(super) fn release(&self) {
        *self.also.lock() = None;
    }
}

/// A new event, not blocking.
pub(super) fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes an event readable.
pub(super) fn ring(event: &OwnedFd) {
    // Fails only if the counter is full, and then the event is readable.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes an event unreadable.
pub(super) fn clear(event: &OwnedFd) {
    let mut count = [0; 8];
    // There may be nothing in it.
    let _ = rustix::io::read(event, &mut count);
}

/// Readable, with an edge for each news, when the completion channel is or the note was rung.
pub(super) struct Wake {
    epoll: OwnedFd,
    note: Arc<Note>,
}

impl Wake {
    pub(super) fn new(completions: BorrowedFd<'_>, note: Arc<Note>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, completions, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        epoll::add(&epoll, &note.event, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
        Ok(Self { epoll, note })
    }

    /// Takes back what was rung so far: look at the connection's state afterwards.
    pub(super) fn clear_note(&self) {
        if self.note.rung.swap(false, Ordering::AcqRel) {
            clear(&self.note.event);
        }
    }

    pub(super) fn note(&self) -> &Note {
        &self.note
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
