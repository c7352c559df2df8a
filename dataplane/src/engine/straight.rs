//! Pieces moved straight between the file and the client's memory, where the transport gets at that: no buffer, and one copy.
//!
//! ```text
//!   read ─► may the bytes go as they are? ─► page cache ══ preadv ══► the client's region ─► reply
//!   write ─►    │ no                             ▲ would wait, or can't say
//!               └────────────────────────────────┴─► the usual way, from there on (`transfer`)
//! ```
//!
//! It is done when the call returns: nothing is left that a fence or new rules would have to wait for. An error is none yet, as it may be
//! of either side: the usual way finds out.

use super::backend::{FileIo, Progress};
use super::channel::{Conn, Cx};
use super::request::{Request, Step};
use holdfast_shared::types::Status;
use holdfast_transport::Kind;
use holdfast_verbs::memory::Nowait;
use std::io;
use std::sync::Arc;

impl Conn {
    /// The next piece of a read, to which there is room to reply. `None`: the usual way. `Some(None)`: it was answered.
    #[allow(clippy::option_option)] // as `step_read` has it
    pub(super) fn read_straight(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Option<Option<Step>> {
        let file = self.may_go_straight(request)?;
        let length = self.piece(cx, request, request.next);
        let remote = request.region.part(request.next, length)?;
        let at = request.offset + u64::from(request.next);
        let mut progress = Progress::Partial(0);
        self.transport.reach(remote, Kind::Place, &mut |to| {
            progress = as_far(to.len(), |done| file.read_into_now(to, done, at + done as u64));
        });
        let (Progress::Complete(done) | Progress::Partial(done) | Progress::Failed(done, _)) = progress;
        request.next += u32::try_from(done).unwrap_or(0);
        *bytes += done;
        if !matches!(progress, Progress::Complete(_)) {
            request.roundabout = true;
            return (done > 0).then_some(Some(Step::Again));
        }
        cx.gauges.pieces_straight_total.add(1);
        if done < length as usize || request.next == request.length {
            self.reply(cx, slot, request, Status::Ok, request.next, None);
            return Some(None);
        }
        Some(Some(Step::Again))
    }

    /// The next piece of a write. False: the usual way.
    pub(super) fn write_straight(&mut self, cx: &mut Cx, request: &mut Request, bytes: &mut usize) -> bool {
        let (Some(file), Some(by)) = (self.may_go_straight(request), request.binding) else { return false };
        let length = self.piece(cx, request, request.next);
        let Some(remote) = request.region.part(request.next, length) else { return false };
        let at = request.offset + u64::from(request.next);
        let mut progress = Progress::Partial(0);
        let (written, last_write) = (&mut self.written, &cx.last_write);
        self.transport.reach(remote, Kind::Fetch, &mut |from| {
            written.begin(last_write, by);
            progress = as_far(from.len(), |done| file.write_from_now(from, done, at + done as u64));
        });
        let (done, whole) = match progress {
            // A file takes what it is given, or says why not: what was short is tried again.
            Progress::Complete(done) => (done, done == length as usize),
            Progress::Partial(done) | Progress::Failed(done, _) => (done, false),
        };
        request.next += u32::try_from(done).unwrap_or(0);
        *bytes += done;
        request.roundabout = !whole;
        if whole {
            cx.gauges.pieces_straight_total.add(1);
        }
        whole
    }

    /// The file, if the transport may get at the client's memory and the bytes go as they are: without a digest, and not sealed.
    fn may_go_straight(&self, request: &Request) -> Option<Arc<dyn FileIo>> {
        if !self.straight || request.roundabout {
            return None;
        }
        let binding = self.bindings.get(request.binding?)?;
        binding.file.as_ref().filter(|_| !binding.policy.covers_payload()).map(Arc::clone)
    }
}

/// Moves bytes until `length` are done, none come, or it would wait.
fn as_far(length: usize, mut step: impl FnMut(usize) -> io::Result<Nowait>) -> Progress {
    let mut done = 0;
    while done < length {
        match step(done) {
            Ok(Nowait::Done(0)) => break,
            Ok(Nowait::Done(count)) => done += count,
            Ok(Nowait::WouldBlock | Nowait::Unsupported) => return Progress::Partial(done),
            Err(_) => return Progress::Failed(done, Status::Io),
        }
    }
    Progress::Complete(done)
}
