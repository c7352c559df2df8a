//! [`StreamChannel`]: the trait over the two halves, and how a connection ends.

use super::fetches::Fetches;
use super::framing::{FETCHES_MAX, LENGTH_MAX, Refusal};
use super::receive::{Context, Known, Receive};
use super::send::{Owned, Transmit};
use super::{Ending, Wire};
use crate::admission::Admission;
use crate::channel::{
    Armed, Capabilities, Channel, ChannelError, Completion, FilePart, Kind, Operation, OperationError,
    Registrar, Rejected, Setup, SubmitError, ViewPlaced,
};
use crate::region_table::{RegionTable, Wanted};
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::types::RegionDescriptor;
use holdfast_shared::wire::service::TransportKind;
use holdfast_verbs::memory::{Buffer, PeerBytes};
use rustix::net::Shutdown;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One data connection over a stream of bytes.
pub(crate) struct StreamChannel<W: Wire> {
    wire: W,
    peer: SocketAddr,
    identity: ChannelIdentity,
    admission: Admission,
    table: Arc<RegionTable>,
    transmit: Transmit,
    receive: Receive,
    fetches: Fetches,
    /// Completions to be handed out.
    ready: VecDeque<Completion>,
    /// The last poll sent, and left out receiving because the wire had been found empty.
    skipped: bool,
    end: Option<ChannelError>,
}

impl<W: Wire> StreamChannel<W> {
    pub(crate) fn new(
        wire: W,
        peer: SocketAddr,
        identity: ChannelIdentity,
        setup: Setup,
    ) -> io::Result<Self> {
        let capabilities = Capabilities {
            message_bytes_max: LENGTH_MAX,
            transfer_bytes_max: LENGTH_MAX,
            depth: setup.depth,
            zero_copy: false,
            cheap_poll: W::IS_CHEAP,
            // The peer is a process, which the kernel wakes; it runs elsewhere, or looking does not pay off.
            gives_way: !W::IS_CHEAP,
        };
        let mut admission = Admission::new(&setup, capabilities)?;
        let (operations, receives) = (admission.operations_reserve(), admission.receives_reserve());
        let mut receive = Receive::new(receives, W::STAGING_BYTES);
        for (token, buffer) in setup.receives {
            admission.enter(Kind::Recv);
            receive.post(token, buffer);
        }
        Ok(Self {
            peer,
            identity,
            admission,
            table: RegionTable::new(),
            transmit: Transmit::with_capacity(operations + FETCHES_MAX + 1, W::IS_CHEAP),
            receive,
            fetches: Fetches::with_capacity(operations),
            ready: VecDeque::with_capacity(operations + receives),
            skipped: false,
            end: None,
            wire,
        })
    }

    /// Sends, receives, and sends what receiving gave rise to.
    fn advance(&mut self) -> Result<(), Ending> {
        let sent = match self.send() {
            Ok(sent) => sent,
            // The peer has gone. What it said before is still to be read: it may have told why.
            Err(Ending::Io(error)) => return Err(self.last_words().unwrap_or(Ending::Io(error))),
            Err(ending) => return Err(ending),
        };
        // Right after a receive that left the wire empty there is hardly anything new: save the call, but never twice
        // in a row, so that who polls without arming is served too.
        let probably_empty = self.receive.known() != Known::Unknown && !W::IS_CHEAP;
        self.skipped = sent && probably_empty && !self.skipped && !self.receive.can_resume();
        if self.skipped {
            return Ok(());
        }
        self.receive()?;
        self.send()?;
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Ending> {
        let mut context = Context {
            table: &self.table,
            fetches: &mut self.fetches,
            transmit: &mut self.transmit,
            ready: &mut self.ready,
        };
        self.receive.pull(&mut self.wire, &mut context)
    }

    /// Takes what arrived before the connection broke. Returns how the peer ended it, if that says more than that it did.
    fn last_words(&mut self) -> Option<Ending> {
        match self.receive() {
            Ok(()) | Err(Ending::Disconnected | Ending::Io(_)) => None,
            Err(said) => Some(said),
        }
    }

    fn send(&mut self) -> Result<bool, Ending> {
        let mut moved = false;
        loop {
            while let Some((remote, tag)) = self.fetches.ask() {
                self.transmit.add_fetch(remote, tag);
            }
            if self.transmit.is_empty() {
                return Ok(moved);
            }
            moved |= self.transmit.push(&mut self.wire, &mut self.fetches, &mut self.ready)?;
            // Those that were done at once make room for others.
            if !self.transmit.is_empty() || !self.fetches.can_ask() {
                return Ok(moved);
            }
        }
    }

    fn finish(&mut self, ending: Ending) {
        let mut refused_place = None;
        let mut how = Shutdown::Both;
        let error = match ending {
            Ending::Disconnected => ChannelError::Disconnected,
            Ending::Io(error) => match error.kind() {
                io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::TimedOut
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable => ChannelError::Disconnected,
                _ => ChannelError::Transport(error.to_string()),
            },
            Ending::Misbehaved(why) => {
                tracing::warn!(peer = %self.peer, why, "data connection dropped: the peer misbehaved");
                ChannelError::Misbehaved(why)
            }
            Ending::Refuse { why, refusal, tag } => {
                tracing::warn!(peer = %self.peer, why, "data connection dropped: the peer misbehaved");
                self.transmit.refuse(&mut self.wire, refusal, tag, &mut self.ready);
                // What the peer has sent meanwhile stays unread; were the connection closed now, that would take
                // the refusal away from it.
                how = Shutdown::Write;
                ChannelError::Misbehaved(why)
            }
            Ending::Refused { refusal: Refusal::Access, tag } => {
                refused_place = Some(tag);
                if let Some(pending) = self.fetches.answered(tag) {
                    self.ready.push_back(pending.complete(Err(OperationError::RemoteAccess)));
                }
                ChannelError::Transport(OperationError::RemoteAccess.to_string())
            }
            Ending::Refused { refusal: Refusal::Length, .. } => {
                ChannelError::Transport("a message was longer than the peer's buffer for it".into())
            }
        };
        self.transmit.flush(refused_place, &mut self.ready);
        self.flush(error, how);
    }

    fn flush(&mut self, error: ChannelError, how: Shutdown) {
        self.transmit.flush(None, &mut self.ready);
        self.receive.flush(&mut self.ready);
        self.ready.extend(self.fetches.flush().map(|pending| pending.complete(Err(OperationError::Flushed))));
        self.wire.cut(how);
        self.end = Some(error);
    }
}

impl<W: Wire> Channel for StreamChannel<W> {
    fn identity(&self) -> &ChannelIdentity {
        &self.identity
    }

    fn peer(&self) -> SocketAddr {
        self.peer
    }

    fn bound(&mut self, is_bound: bool) {
        self.wire.bound(is_bound);
    }

    fn capabilities(&self) -> Capabilities {
        self.admission.capabilities()
    }

    fn submit(&mut self, token: u64, operation: Operation) -> Result<(), Rejected> {
        let admitted = match self.end {
            Some(_) => Err(SubmitError::Closed),
            None => self.admission.check(&operation),
        };
        if let Err(error) = admitted {
            return Err(Rejected { error, operation });
        }
        let kind = operation.kind();
        self.admission.enter(kind);
        match operation {
            Operation::Send { buffer, length } => {
                self.transmit.add_message(Owned { token, kind, buffer, length }, false);
            }
            Operation::Recv { buffer } => self.receive.post(token, buffer),
            Operation::Place { buffer, remote } | Operation::Fetch { buffer, remote }
                if remote.length() == 0 =>
            {
                self.ready.push_back(Completion::new(token, kind, buffer, Ok(0)));
            }
            Operation::Place { buffer, remote } => {
                let length = remote.length() as usize;
                self.transmit.add_place(Owned { token, kind, buffer, length }, remote);
            }
            Operation::Fetch { buffer, remote } => self.fetches.submit(token, buffer, remote),
        }
        Ok(())
    }

    fn send_descriptor(
        &mut self,
        token: u64,
        buffer: Buffer,
        length: usize,
        descriptor: OwnedFd,
    ) -> Result<(), Rejected> {
        let operation = Operation::Send { buffer, length };
        let admitted = match self.end {
            Some(_) => Err(SubmitError::Closed),
            None if self.identity.transport != TransportKind::Local => Err(SubmitError::Invalid),
            None => self.admission.check(&operation),
        };
        match (admitted, operation) {
            (Ok(()), Operation::Send { buffer, length }) => {
                let kind = Kind::Send;
                self.admission.enter(kind);
                // Without it, if too many are on their way: the peer is told as much by finding none.
                let sent = self.wire.send_descriptor(descriptor);
                self.transmit.add_message(Owned { token, kind, buffer, length }, sent);
                Ok(())
            }
            (admitted, operation) => {
                Err(Rejected { error: admitted.err().unwrap_or(SubmitError::Invalid), operation })
            }
        }
    }

    fn places_views(&self) -> bool {
        W::TAKES_FILES
    }

    fn place_view(&mut self, part: FilePart<'_>) -> ViewPlaced {
        let (length, inside) = (part.range.len(), part.range.end <= part.view.len());
        let fits = length > 0 && inside && length == part.remote.length() as usize && !part.buffer.is_empty();
        let is_open = W::TAKES_FILES && self.end.is_none();
        if !is_open || !fits || self.admission.check_transfer(length).is_err() {
            return ViewPlaced::Unable(part.buffer);
        }
        let placed = self.transmit.push_file(&mut self.wire, &mut self.fetches, &mut self.ready, part);
        if matches!(placed, ViewPlaced::Begun(_)) {
            self.admission.enter(Kind::Place);
        }
        placed
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        if self.end.is_none() {
            if let Err(ending) = self.advance() {
                self.finish(ending);
            }
        }
        let count = self.ready.len();
        for completion in self.ready.drain(..) {
            self.admission.leave(completion.kind);
            done.push(completion);
        }
        count
    }

    fn push(&mut self) -> bool {
        if self.end.is_some() {
            return false;
        }
        match self.send() {
            // What the wire does not take now makes an edge when it does.
            Ok(_) => !self.transmit.is_pending(),
            Err(ending) => {
                let said = self.last_words();
                self.finish(said.unwrap_or(ending));
                false
            }
        }
    }

    fn arm(&mut self) -> Armed {
        if !self.ready.is_empty() {
            return Armed::Pending;
        }
        if self.end.is_some() {
            return Armed::Idle;
        }
        if self.transmit.is_pending() || self.fetches.can_ask() || self.receive.can_resume() {
            return Armed::Pending;
        }
        let (known, is_stalled) = (self.receive.known(), self.receive.is_stalled());
        if known == Known::Unknown && !is_stalled {
            return Armed::Pending;
        }
        match self.wire.arm(known == Known::Empty && !self.skipped, is_stalled) {
            Ok(Armed::Idle) => Armed::Idle,
            Ok(Armed::Pending) => {
                self.receive.mark_readable();
                Armed::Pending
            }
            Err(ending) => {
                self.finish(ending);
                Armed::Pending
            }
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wire.wake_fd()
    }

    fn close(&mut self) {
        if self.end.is_none() {
            self.flush(ChannelError::Closed, Shutdown::Both);
        }
    }

    fn ended(&self) -> Option<ChannelError> {
        self.end.clone()
    }

    fn reach(&mut self, remote: RegionDescriptor, wanted: Kind, act: &mut dyn FnMut(PeerBytes<'_>)) -> bool {
        let wanted = match wanted {
            Kind::Place => Wanted::Place,
            Kind::Fetch => Wanted::Fetch,
            Kind::Send | Kind::Recv => return false,
        };
        if self.end.is_some() {
            return false;
        }
        match self.wire.reach(remote, wanted, act) {
            Ok(reached) => reached,
            Err(ending) => {
                self.finish(ending);
                false
            }
        }
    }

    fn registrar(&self) -> Arc<dyn Registrar> {
        self.wire.registrar(&self.table)
    }
}
