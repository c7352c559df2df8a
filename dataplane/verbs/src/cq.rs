//! [`CompletionQueue`]: where the device reports finished work, and the descriptor that wakes who waits for it.
//!
//! ```text
//!   poll() ──► entries? ──yes──► handle, poll again
//!                 │no
//!                 ▼
//!   arm() ──► entries that came in between? ──yes──► poll again
//!                 │no
//!                 ▼
//!   sleep until the descriptor has an edge
//! ```
//!
//! Through the kernel's verbs, asking for an event and reading one are a system call each, which cost more than all else
//! of a small request. So a queue that is armed and has yielded nothing since is not armed again. But an event is always
//! read before the queue is: drivers of devices that are armed from user space (mlx4, mlx5, hns) count the events that are
//! read, and the count goes into the doorbell that arms. One with the count of an event that has fired may be taken for an old
//! one.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::device::Device;
use crate::error::VerbsError;
use crate::ffi;
use crate::gauges::COMPLETION_QUEUES;

/// Entries fetched in one call.
const POLL_BATCH: u8 = 16;
/// Events that are acknowledged together.
const ACKNOWLEDGE_BATCH: u32 = 64;

/// One queue with a completion channel of its own. Serves one queue pair, whose depths it has room for: so it can't
/// overrun.
pub(crate) struct CompletionQueue {
    cq: *mut ffi::ibv_cq,
    channel: *mut ffi::ibv_comp_channel,
    /// Asked for an event, and neither it nor an entry seen since: should one have come, its event is under way.
    armed: bool,
    /// Was armed at all: else there is no event.
    ever_armed: bool,
    /// Events received and not acknowledged: the library wants that before it destroys the queue.
    unacknowledged: u32,
    /// Where entries are fetched to. Initialised once: of a failed request the device fills in only some fields.
    entries: Box<[ffi::ibv_wc; POLL_BATCH as usize]>,
    _device: Arc<Device>,
}

// SAFETY: libibverbs is thread-safe; self is used by one thread at a time (`&mut`).
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    pub(crate) fn new(device: &Arc<Device>, entries: u32) -> Result<Self, VerbsError> {
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: the context is open as long as the process.
        let channel = ffi::check_pointer(unsafe { ffi::ibv_create_comp_channel(device.context()) })
            .map_err(|source| VerbsError::call("ibv_create_comp_channel", source))?;
        // SAFETY: context and channel are alive; the queue is destroyed before the channel.
        let cq = unsafe { ffi::ibv_create_cq(device.context(), entries, std::ptr::null_mut(), channel, 0) };
        let cq = match ffi::check_pointer(cq) {
            Ok(cq) => cq,
            Err(source) => {
                // SAFETY: no queue uses the channel.
                unsafe { ffi::ibv_destroy_comp_channel(channel) };
                return Err(VerbsError::call("ibv_create_cq", source));
            }
        };
        COMPLETION_QUEUES.add(1);
        // SAFETY: plain C structures of integers; all zeroes is a value of them.
        let entries = Box::new(unsafe { std::mem::zeroed() });
        let queue = Self {
            cq,
            channel,
            armed: false,
            ever_armed: false,
            unacknowledged: 0,
            entries,
            _device: Arc::clone(device),
        };
        set_nonblocking(queue.fd()).map_err(|source| VerbsError::call("fcntl", source))?;
        Ok(queue)
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_cq {
        self.cq
    }

    /// Has an edge after [`CompletionQueue::arm`], once an entry has come. Stays readable until the next `arm`, at least.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel, and with it its descriptor, lives as long as self.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Fetches up to [`POLL_BATCH`] entries and hands each to `handle`. Returns how many there were.
    pub(crate) fn poll(&mut self, mut handle: impl FnMut(&ffi::ibv_wc)) -> Result<usize, VerbsError> {
        // SAFETY: the queue is alive, and there is room for POLL_BATCH entries.
        let count = unsafe { ffi::ibv_poll_cq(self.cq, i32::from(POLL_BATCH), self.entries.as_mut_ptr()) };
        let Ok(count) = usize::try_from(count) else {
            return Err(VerbsError::call("ibv_poll_cq", std::io::Error::from_raw_os_error(libc::EIO)));
        };
        if count > 0 {
            self.armed = false;
        }
        self.entries.iter().take(count).for_each(&mut handle);
        Ok(count)
    }

    /// Asks for one event at the next entry. Entries that came before have to be polled for afterwards.
    pub(crate) fn arm(&mut self) -> Result<(), VerbsError> {
        // Even if it is armed: an event that came late may be of an earlier request, and who armed meanwhile did so in vain.
        if self.ever_armed && self.take_event()? {
            self.armed = false;
        }
        if self.armed {
            return Ok(());
        }
        // SAFETY: the queue is alive.
        ffi::check_errno(unsafe { ffi::ibv_req_notify_cq(self.cq, 0) })
            .map_err(|source| VerbsError::call("ibv_req_notify_cq", source))?;
        (self.armed, self.ever_armed) = (true, true);
        Ok(())
    }

    /// Reads an event, if there is one. No more than one is made each time the queue is armed: so they don't gather.
    fn take_event(&mut self) -> Result<bool, VerbsError> {
        loop {
            let mut cq = std::ptr::null_mut();
            let mut context = std::ptr::null_mut();
            // SAFETY: the channel is alive and non-blocking; both results outlive the call.
            if unsafe { ffi::ibv_get_cq_event(self.channel, &raw mut cq, &raw mut context) } == 0 {
                self.unacknowledged += 1;
                if self.unacknowledged == ACKNOWLEDGE_BATCH {
                    self.acknowledge();
                }
                return Ok(true);
            }
            let error = std::io::Error::last_os_error();
            match error.kind() {
                std::io::ErrorKind::WouldBlock => return Ok(false),
                std::io::ErrorKind::Interrupted => {}
                _ => return Err(VerbsError::call("ibv_get_cq_event", error)),
            }
        }
    }

    fn acknowledge(&mut self) {
        // SAFETY: the queue is alive, and that many events were received and not acknowledged.
        unsafe { ffi::ibv_ack_cq_events(self.cq, self.unacknowledged) };
        self.unacknowledged = 0;
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.acknowledge();
        // SAFETY: its queue pair is gone (the owner destroys it first, or leaks both), all events are acknowledged, and
        // the channel has no other queue.
        let outcome = unsafe {
            ffi::check_errno(ffi::ibv_destroy_cq(self.cq))
                .and_then(|()| ffi::check_errno(ffi::ibv_destroy_comp_channel(self.channel)))
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "a completion queue could not be destroyed: leaked");
        }
        COMPLETION_QUEUES.sub(1);
    }
}

/// Makes a descriptor of the library non-blocking, and not inherited by programs this process starts.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
    fcntl_setfl(fd.as_fd(), fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
    fcntl_setfd(fd.as_fd(), fcntl_getfd(fd)? | FdFlags::CLOEXEC)?;
    Ok(())
}
