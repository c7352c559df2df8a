//! [`QueuePair`]: its making, learning how work ended, and its end. Posting is in `post`.
//!
//! Facts the rest relies on:
//!
//! * Never more in flight than asked for at creation, on either queue, and the completion queue has room for both: nothing
//!   overruns. More is answered with "full".
//! * A work request's memory is kept in a [`Ring`] from the moment it is posted until its completion is handed out.
//! * On drop the queue pair is destroyed first. After that the device can't touch the memory, and only then is it
//!   released. Should destroying fail, everything in flight is leaked on purpose.

mod post;

use std::mem::ManuallyDrop;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::cm::Id;
use crate::cq::CompletionQueue;
use crate::device::Gid;
use crate::error::VerbsError;
use crate::ffi;
use crate::gauges::{OUTSTANDING_WORK_REQUESTS, QUEUE_PAIRS};
use crate::pd::ProtectionDomain;
use crate::ring::Ring;
use crate::work::{Completion, InFlight, Status};

/// Set in the `wr_id` of receives; the rest is the sequence number.
const RECEIVE: u64 = 1 << 63;
/// 0.64 ms: how long the peer waits before it sends again what found no receive posted. (The default of rdmacm, 0, is 655 ms.)
const MIN_RNR_TIMER: u8 = 12;

/// Sizes of the queues.
#[derive(Clone, Copy, Debug)]
pub struct QueueDepths {
    /// Sends, writes and reads in flight.
    pub send: u32,
    /// Receives posted.
    pub receive: u32,
    /// Longest message to be sent inline (copied at posting, so that the device needn't fetch it).
    pub inline: u32,
}

/// Names of both ends of a connection, for binding keys to it. The peer has the mirrored one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionIdentity {
    /// Number of our queue pair.
    pub local_qpn: u32,
    /// Number of the peer's queue pair.
    pub remote_qpn: u32,
    /// Our GID.
    pub local_gid: Gid,
    /// The peer's GID.
    pub remote_gid: Gid,
}

/// A reliable-connected queue pair with its completion queue and what is in flight on it.
pub(crate) struct QueuePair {
    /// Owned by `id` as far as the library is concerned; destroyed by us.
    qp: *mut ffi::ibv_qp,
    id: Id,
    max_inline: u32,
    max_message: u32,
    sends: Ring<InFlight>,
    receives: Ring<InFlight>,
    /// Sends posted since the last one that asked for a completion.
    unsignaled: usize,
    /// Completions found by `arm`, to be handed out by the next `poll`.
    found: Vec<Completion>,
    /// Dropped by hand, after the queue pair; or leaked with it.
    cq: ManuallyDrop<CompletionQueue>,
    domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs is thread-safe, and self is used by one thread at a time (`&mut`).
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes the queue pair of a connection manager id that has been resolved or has come with a connect request.
    pub(crate) fn new(
        id: Id,
        domain: &Arc<ProtectionDomain>,
        depths: QueueDepths,
    ) -> Result<Self, VerbsError> {
        let device = domain.device();
        if id.context() != device.context() {
            return Err(VerbsError::WrongRegistration);
        }
        let limit = device.limits().work_requests;
        let (send, receive) = (depths.send.clamp(1, limit), depths.receive.clamp(1, limit));
        let max_message = device.max_message(id.port())?;
        let cq = CompletionQueue::new(device, send.saturating_add(receive))?;
        // SAFETY: a plain C structure of integers and pointers; all zeroes is a value of it.
        let mut attr: ffi::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attr.send_cq = cq.as_ptr();
        attr.recv_cq = cq.as_ptr();
        attr.qp_type = ffi::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = send;
        attr.cap.max_recv_wr = receive;
        attr.cap.max_send_sge = 1;
        attr.cap.max_recv_sge = 1;
        attr.cap.max_inline_data = depths.inline;
        // SAFETY: id, domain and completion queue are alive and of one device; the queue pair is destroyed before them.
        if unsafe { ffi::rdma_create_qp(id.as_ptr(), domain.as_ptr(), &raw mut attr) } != 0 {
            return Err(VerbsError::call("rdma_create_qp", std::io::Error::last_os_error()));
        }
        QUEUE_PAIRS.add(1);
        // SAFETY: the call has just set it.
        let qp = unsafe { (*id.as_ptr()).qp };
        Ok(Self {
            qp,
            id,
            max_inline: attr.cap.max_inline_data.min(depths.inline),
            max_message,
            sends: Ring::new(send as usize),
            receives: Ring::new(receive as usize),
            unsignaled: 0,
            found: Vec::with_capacity((send + receive) as usize),
            cq: ManuallyDrop::new(cq),
            domain: Arc::clone(domain),
        })
    }

    pub(crate) fn id(&self) -> &Id {
        &self.id
    }

    pub(crate) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// Has an edge after [`QueuePair::arm`], once something has completed.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.cq.fd()
    }

    pub(crate) fn send_room(&self) -> usize {
        self.sends.room()
    }

    pub(crate) fn receive_room(&self) -> usize {
        self.receives.room()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.sends.len() + self.receives.len()
    }

    pub(crate) fn max_message(&self) -> usize {
        self.max_message as usize
    }

    pub(crate) fn max_inline(&self) -> usize {
        self.max_inline as usize
    }

    /// Moves finished work to `completions`. Returns how many were added; 0 means there is nothing more now.
    pub(crate) fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, VerbsError> {
        let before = completions.len();
        completions.append(&mut self.found);
        if completions.len() == before {
            self.fetch(completions)?;
        }
        let count = completions.len() - before;
        OUTSTANDING_WORK_REQUESTS.sub(count as u64);
        Ok(count)
    }

    /// Arms the completion channel. True if the caller may sleep; false if completions have come in the meantime.
    pub(crate) fn arm(&mut self) -> Result<bool, VerbsError> {
        self.cq.arm()?;
        let mut found = std::mem::take(&mut self.found);
        let outcome = self.fetch(&mut found);
        self.found = found;
        outcome?;
        Ok(self.found.is_empty())
    }

    /// One batch from the completion queue.
    fn fetch(&mut self, completions: &mut Vec<Completion>) -> Result<(), VerbsError> {
        let (sends, receives) = (&mut self.sends, &mut self.receives);
        self.cq.poll(|entry| {
            let status = Status::from_raw(entry.status);
            let is_receive = entry.wr_id & RECEIVE != 0;
            let ring = if is_receive { &mut *receives } else { &mut *sends };
            let known = ring.finish(entry.wr_id & !RECEIVE, |request, named| {
                // Requests before the named one didn't ask for a completion, and are done: work completes in order.
                let status = if named { status } else { Status::Success };
                let bytes = match (status, is_receive) {
                    (Status::Success, true) => entry.byte_len as usize,
                    (Status::Success, false) => request.local.len(),
                    _ => 0,
                };
                let has_immediate =
                    is_receive && status == Status::Success && entry.wc_flags & ffi::WC_WITH_IMM != 0;
                // SAFETY: both views of the union are four plain bytes; the flag says they are an immediate.
                let immediate = has_immediate
                    .then(|| u32::from_be(unsafe { entry.imm_data_invalidated_rkey_union.imm_data }));
                completions.push(request.complete(status, bytes, immediate));
            });
            if !known {
                tracing::error!(
                    wr_id = entry.wr_id,
                    ?status,
                    "completion of a work request that is not in flight: ignored"
                );
            }
        })?;
        Ok(())
    }

    /// Makes the peer retry soon when it finds no receive. Only once connected.
    pub(crate) fn shorten_rnr_timer(&mut self) -> Result<(), VerbsError> {
        // SAFETY: a plain C structure of integers; all zeroes is a value of it.
        let mut attr: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.min_rnr_timer = MIN_RNR_TIMER;
        let mask = ffi::ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0;
        self.modify(&mut attr, mask)
    }

    /// Ends the connection at once: everything in flight is flushed, nothing lands from now on.
    pub(crate) fn fail(&mut self) -> Result<(), VerbsError> {
        // SAFETY: a plain C structure of integers; all zeroes is a value of it.
        let mut attr: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = ffi::ibv_qp_state::IBV_QPS_ERR;
        self.modify(&mut attr, ffi::ibv_qp_attr_mask::IBV_QP_STATE.0)
    }

    fn modify(&mut self, attr: &mut ffi::ibv_qp_attr, mask: u32) -> Result<(), VerbsError> {
        let mask = i32::try_from(mask).unwrap_or_default();
        // SAFETY: the queue pair is alive, and `attr` outlives the call.
        ffi::check_errno(unsafe { ffi::ibv_modify_qp(self.qp, attr, mask) })
            .map_err(|source| VerbsError::call("ibv_modify_qp", source))
    }

    /// Both ends' names. Only once connected.
    pub(crate) fn identity(&self) -> Result<ConnectionIdentity, VerbsError> {
        // SAFETY: plain C structures of integers and pointers; all zeroes is a value of both.
        let (mut attr, mut init): (ffi::ibv_qp_attr, ffi::ibv_qp_init_attr) = unsafe { std::mem::zeroed() };
        let mask = ffi::ibv_qp_attr_mask::IBV_QP_AV.0 | ffi::ibv_qp_attr_mask::IBV_QP_DEST_QPN.0;
        let mask = i32::try_from(mask).unwrap_or_default();
        // SAFETY: the queue pair is alive, and both structures outlive the call.
        ffi::check_errno(unsafe { ffi::ibv_query_qp(self.qp, &raw mut attr, mask, &raw mut init) })
            .map_err(|source| VerbsError::call("ibv_query_qp", source))?;
        let port = self.id.port();
        let local_gid =
            self.domain.device().gid(port, i32::from(attr.ah_attr.grh.sgid_index)).unwrap_or(Gid([0; 16]));
        Ok(ConnectionIdentity {
            // SAFETY: the queue pair is alive.
            local_qpn: unsafe { (*self.qp).qp_num },
            remote_qpn: attr.dest_qp_num,
            local_gid,
            // SAFETY: every view of the union is 16 plain bytes.
            remote_gid: Gid(unsafe { attr.ah_attr.grh.dgid.raw }),
        })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        if let Err(error) = self.fail() {
            tracing::debug!(%error, "queue pair not moved to the error state; destroying it all the same");
        }
        OUTSTANDING_WORK_REQUESTS.sub((self.in_flight() + self.found.len()) as u64);
        if let Err(error) = self.id.destroy_queue_pair() {
            // The device may still write: what is in flight must never be used for anything else.
            std::mem::forget(std::mem::replace(&mut self.sends, Ring::new(0)));
            std::mem::forget(std::mem::replace(&mut self.receives, Ring::new(0)));
            std::mem::forget(Arc::clone(&self.domain));
            tracing::error!(%error, "ibv_destroy_qp failed: the queue pair and its memory are leaked on purpose");
            return;
        }
        // SAFETY: dropped once, here; the queue pair that used it is gone.
        unsafe { ManuallyDrop::drop(&mut self.cq) };
        QUEUE_PAIRS.sub(1);
    }
}
