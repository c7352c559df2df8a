//! What other threads leave for a worker, and how it is woken.
//!
//! ```text
//!  acceptors, link ─► letters (unbounded, rare) ┐
//!                                               ├─► worker      eventfd, written only if the worker sleeps
//!  storage threads ─► done (bounded, hot)       ┘
//! ```

use super::bind::Redemption;
use super::mapper::{ExposeDone, WithdrawDone, Withdrawal};
use super::pinner::PinDone;
use super::registry::HeldBinding;
use super::restrict::Restriction;
use super::storage::Done;
use crossbeam::queue::{ArrayQueue, SegQueue};
use holdfast_shared::wire::link::Fence;
use holdfast_transport::Channel;
use rustix::event::EventfdFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

/// A rare message to a worker.
pub(crate) enum Letter {
    /// A new channel to serve.
    Channel { channel: Box<dyn Channel>, id: u64 },
    /// The channel with this id at the door gives its place to another, unless it was bound meanwhile.
    Evict { id: u64 },
    /// Control's answer to a bind.
    Redeemed(Redemption),
    /// Control wants a binding fenced.
    Fence(Fence),
    /// Control has new rules for an open which has, or had, bindings here.
    Restrict(Arc<Restriction>),
    /// The mapper is done with a request.
    Exposed(Box<ExposeDone>),
    /// A mapping was withdrawn.
    Withdrawn(WithdrawDone),
    /// What is mapped of a file is to be withdrawn.
    Withdraw(Arc<Withdrawal>),
    /// The pinner has pinned an extent of a file, or could not.
    Pinned(Box<PinDone>),
    /// The pinner has unpinned so many bytes.
    Unpinned(u64),
    /// So many bytes of files are mapped no more.
    Unmapped(u64),
    /// A control is to be told which bindings there are.
    Snapshot(Sender<Vec<HeldBinding>>),
    /// End all channels, then the worker.
    Stop,
}

/// See the module's text.
pub(crate) struct Inbox {
    letters: SegQueue<Letter>,
    done: ArrayQueue<Done>,
    sleeping: AtomicBool,
    wake: OwnedFd,
}

const DONE_LENGTH: usize = 4096;

impl Inbox {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            letters: SegQueue::new(),
            done: ArrayQueue::new(DONE_LENGTH),
            sleeping: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Leaves a letter.
    pub(crate) fn send(&self, letter: Letter) {
        self.letters.push(letter);
        self.wake();
    }

    /// Leaves a storage job's result. Waits while the worker has thousands of them unread.
    pub(crate) fn storage_done(&self, mut done: Done) {
        while let Err(back) = self.done.push(done) {
            done = back;
            self.wake();
            std::thread::yield_now();
        }
        self.wake();
    }

    fn wake(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // Fails only if the counter is full: then the worker is awake already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn letter(&self) -> Option<Letter> {
        self.letters.pop()
    }

    pub(crate) fn done(&self) -> Option<Done> {
        self.done.pop()
    }

    /// The worker is about to sleep. False if something came meanwhile: then it must not.
    pub(crate) fn may_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.letters.is_empty() && self.done.is_empty() {
            return true;
        }
        self.sleeping.store(false, Ordering::SeqCst);
        false
    }

    /// The worker is awake.
    pub(crate) fn woke(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Takes a wake-up off the descriptor.
    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
