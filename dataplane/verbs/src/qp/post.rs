//! Posting: from owned work requests to what the device takes, many with one doorbell.
//!
//! ```text
//!   VecDeque<WorkRequest> ──front, as many as fit──► chain on the stack ──one call──► device
//!                    ▲                                                      │
//!                    └── what was not accepted stays                        └─► Ring (memory kept until completion)
//! ```

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::sync::Arc;

use super::{QueuePair, RECEIVE};
use crate::error::VerbsError;
use crate::ffi;
use crate::gauges::OUTSTANDING_WORK_REQUESTS;
use crate::work::{CompletionKind, InFlight, Local, Operation, WorkRequest};

/// Most requests that go to the device with one doorbell.
const CHAIN: usize = 16;

impl QueuePair {
    /// Posts one receive. Gives the memory back if it can't.
    pub(crate) fn post_receive(&mut self, token: u64, local: Local) -> Result<(), (VerbsError, Local)> {
        if let Err(error) = self.check(&local, true) {
            return Err((error, local));
        }
        if self.receives.room() == 0 {
            return Err((VerbsError::Full(self.receives.capacity()), local));
        }
        let mut sge = local.scatter_gather();
        let mut request = ffi::ibv_recv_wr {
            wr_id: RECEIVE | self.receives.next(),
            next: std::ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: i32::from(!local.is_empty()),
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair is alive; the device copies request and list during the call; the memory they name is
        // registered (in this domain: checked) and owned by `local`, which goes into the ring until its completion.
        let outcome =
            ffi::check_errno(unsafe { ffi::ibv_post_recv(self.qp, &raw mut request, &raw mut bad) });
        match outcome {
            Ok(()) => {
                OUTSTANDING_WORK_REQUESTS.add(1);
                self.receives.push(InFlight { token, kind: CompletionKind::Receive, local });
                Ok(())
            }
            Err(source) => Err((VerbsError::call("ibv_post_recv", source), local)),
        }
    }

    /// Posts requests from the front of `queue` while there is room. See [`crate::Connection::post`].
    pub(crate) fn post(&mut self, queue: &mut VecDeque<WorkRequest>) -> Result<usize, VerbsError> {
        let mut posted = 0;
        loop {
            let mut refusal = None;
            let mut count = queue.len().min(self.sends.room()).min(CHAIN);
            for (index, request) in queue.iter().take(count).enumerate() {
                if let Err(error) =
                    self.check(&request.local, matches!(request.operation, Operation::Read(_)))
                {
                    (count, refusal) = (index, Some(error));
                    break;
                }
            }
            if count > 0 {
                let (accepted, outcome) = self.post_chain(queue, count);
                posted += accepted;
                outcome?;
            }
            match refusal {
                Some(error) => return Err(error),
                None if count == 0 => return Ok(posted),
                None => {}
            }
        }
    }

    /// Posts the first `count` (at most [`CHAIN`]) requests with one doorbell. Takes those accepted out of the queue.
    fn post_chain(
        &mut self,
        queue: &mut VecDeque<WorkRequest>,
        count: usize,
    ) -> (usize, Result<(), VerbsError>) {
        let mut list = [const { ffi::ibv_sge { addr: 0, length: 0, lkey: 0 } }; CHAIN];
        let mut chain = [const { MaybeUninit::<ffi::ibv_send_wr>::zeroed() }; CHAIN];
        let chain_start: *mut ffi::ibv_send_wr = chain.as_mut_ptr().cast();
        let list_start = list.as_mut_ptr();
        let first = self.sends.next();
        let mut unsignaled = self.unsignaled;
        for (index, request) in queue.iter().take(count).enumerate() {
            // A completion now and then is needed to get room again, whatever the caller asks for.
            let signaled = request.signaled
                || unsignaled + 1 >= self.sends.capacity().div_ceil(2)
                || index + 1 == self.sends.room();
            unsignaled = if signaled { 0 } else { unsignaled + 1 };
            // SAFETY: index < count <= CHAIN, for both arrays; all zeroes is a value of ibv_send_wr (integers, pointers
            // and unions of them), so a reference to it is sound. The raw pointers stored in it point into the two
            // arrays, which outlive the call below and aren't touched by other means until then.
            unsafe {
                list_start.add(index).write(request.local.scatter_gather());
                let next = if index + 1 < count { chain_start.add(index + 1) } else { std::ptr::null_mut() };
                let raw = &mut *chain_start.add(index);
                raw.wr_id = first + index as u64;
                raw.next = next;
                raw.sg_list = list_start.add(index);
                self.fill(raw, request, signaled);
            }
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair is alive; the device copies chain and lists during the call. The memory they name is
        // registered in this domain and owned by the requests, which stay borrowed in `queue` during the call, and go into the
        // ring after it, until their completion.
        let outcome = ffi::check_errno(unsafe { ffi::ibv_post_send(self.qp, chain_start, &raw mut bad) });
        let accepted = match &outcome {
            Ok(()) => count,
            Err(_) => accepted_before(bad, chain_start, count),
        };
        OUTSTANDING_WORK_REQUESTS.add(accepted as u64);
        for request in queue.drain(..accepted) {
            self.sends.push(request.into_in_flight());
        }
        // After a partial refusal the count is a guess on the safe side: the next one asks for a completion.
        self.unsignaled = if outcome.is_ok() { unsignaled } else { self.sends.capacity() };
        (accepted, outcome.map_err(|source| VerbsError::call("ibv_post_send", source)))
    }

    fn fill(&self, raw: &mut ffi::ibv_send_wr, request: &WorkRequest, signaled: bool) {
        use ffi::{ibv_send_flags as flag, ibv_wr_opcode as opcode};
        raw.num_sge = i32::from(!request.local.is_empty());
        if signaled {
            raw.send_flags |= flag::IBV_SEND_SIGNALED.0;
        }
        let is_read = matches!(request.operation, Operation::Read(_));
        // Inline means that a processor copies the bytes: of a file's pages that would be a fault once the file has shrunk.
        let may_inline = !is_read && !request.local.registration().is_file();
        if may_inline && request.local.len() <= self.max_inline as usize {
            raw.send_flags |= flag::IBV_SEND_INLINE.0;
        }
        let (code, remote, immediate) = match request.operation {
            Operation::Send => (opcode::IBV_WR_SEND, None, None),
            Operation::SendImmediate(value) => (opcode::IBV_WR_SEND_WITH_IMM, None, Some(value)),
            Operation::Write(remote) => (opcode::IBV_WR_RDMA_WRITE, Some(remote), None),
            Operation::WriteImmediate(remote, value) => {
                (opcode::IBV_WR_RDMA_WRITE_WITH_IMM, Some(remote), Some(value))
            }
            Operation::Read(remote) => (opcode::IBV_WR_RDMA_READ, Some(remote), None),
        };
        raw.opcode = code;
        if let Some(remote) = remote {
            raw.wr.rdma = ffi::rdma_t { remote_addr: remote.addr, rkey: remote.rkey };
        }
        if let Some(value) = immediate {
            raw.imm_data_invalidated_rkey_union.imm_data = value.to_be();
        }
    }

    /// `written`: the device is to write into it.
    fn check(&self, local: &Local, written: bool) -> Result<(), VerbsError> {
        let registration = local.registration();
        if !Arc::ptr_eq(registration.domain(), &self.domain) || (written && registration.is_file()) {
            return Err(VerbsError::WrongRegistration);
        }
        if local.len() > self.max_message as usize {
            return Err(VerbsError::TooLong { bytes: local.len(), limit: self.max_message as usize });
        }
        Ok(())
    }
}

/// How many of the `count` requests from `chain` on are the device's after a refusal: those before the one that was `bad`.
/// A provider that names none of them (rxe does when the doorbell fails) may have queued all: then all count as the
/// device's, and their memory stays in the ring until they complete or the queue pair is destroyed.
fn accepted_before(bad: *const ffi::ibv_send_wr, chain: *const ffi::ibv_send_wr, count: usize) -> usize {
    (0..count).find(|index| std::ptr::eq(chain.wrapping_add(*index), bad)).unwrap_or(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_refuses_without_saying_which_may_hold_all() {
        let chain = [const { MaybeUninit::<ffi::ibv_send_wr>::zeroed() }; CHAIN];
        let start: *const ffi::ibv_send_wr = chain.as_ptr().cast();
        assert_eq!(accepted_before(start, start, 3), 0);
        assert_eq!(accepted_before(start.wrapping_add(2), start, 3), 2);
        assert_eq!(accepted_before(std::ptr::null(), start, 3), 3);
        assert_eq!(accepted_before(start.wrapping_add(5), start, 3), 3, "one that was not given");
    }
}
