//! [`VerbsChannel`]: the trait over a connected queue pair.

use super::home::{Exporting, Home, NotExporting};
use super::pinned::{PinnedFile, Pinner};
use super::wake::{Note, Wake};
use super::{config, io_error, require_device};
use crate::admission::Admission;
use crate::channel::{
    Armed, Capabilities, Channel, ChannelError, Completion, Kind, Operation, OperationError, Placed,
    Registrar, Rejected, Setup, SubmitError,
};
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::types::RegionDescriptor;
use holdfast_shared::wire::service::TransportKind;
use holdfast_verbs::memory::Buffer;
use holdfast_verbs::{
    CompletionKind, Connection, DeviceLimits, Incoming, Local, Outgoing, Remote, Status, VerbsError,
    WorkRequest,
};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// Transfers from this length on ask for a completion of their own, so that their buffers are free soon.
const LONG_TRANSFER_BYTES: usize = 32 << 10;
/// No transport here moves more at once.
const LENGTH_MAX: usize = 1 << 30;

/// How soft-RoCE reports to a receiver that a message is too long. The receives posted here are otherwise valid, so that
/// this means nothing else for them.
const LOC_QP_OP_ERR: Status = Status::Other(2);

/// One data connection over RDMA.
pub struct VerbsChannel {
    connection: Connection,
    wake: Wake,
    identity: ChannelIdentity,
    admission: Admission,
    home: Home,
    exports: bool,
    /// Accepted, and not posted yet.
    outgoing: VecDeque<WorkRequest>,
    /// Completions to be handed out.
    ready: VecDeque<Completion>,
    /// Of Places from files, which have no buffer to hand out; and how many of them a poll has counted.
    placed: Vec<Placed>,
    placed_counted: usize,
    batch: Vec<holdfast_verbs::Completion>,
    end: Option<ChannelError>,
}

/// Connects to `address` through the RDMA device that leads there, waiting at most `timeout`. The pools are registered
/// in a protection domain of this channel's own.
///
/// # Errors
/// `NotFound` if there is no RDMA device here, or none that leads there; `InvalidInput` for a setup that contradicts
/// itself; else the device's or the connection manager's.
pub fn connect(address: SocketAddr, timeout: Duration, setup: Setup) -> io::Result<VerbsChannel> {
    require_device()?;
    let outgoing = Outgoing::resolve(address, timeout).map_err(io_error)?;
    let mut home = Home::new(outgoing.device()).map_err(io_error)?;
    home.add(&setup.pools).map_err(io_error)?;
    let (admission, receives) = admit(setup, outgoing.device().limits())?;
    let note = Note::new(None)?;
    let config = config(admission.capabilities().depth, admission.receives_max(), &note);
    let mut prepared = outgoing.prepare(&home.domain, &config).map_err(io_error)?;
    post_first(&home, receives, |token, local| prepared.post_receive(token, local)).map_err(io_error)?;
    let connection = prepared.connect(&[]).map_err(io_error)?;
    VerbsChannel::new(connection, home, admission, note, true)
}

/// Makes the listener's end of a channel from a connect request.
pub(super) fn accept(
    make: impl FnOnce(&holdfast_verbs::ConnectionConfig) -> Result<Incoming, VerbsError>,
    home: Home,
    setup: Setup,
    note: Arc<Note>,
) -> io::Result<VerbsChannel> {
    let (admission, receives) = admit(setup, home.domain.device().limits())?;
    let config = config(admission.capabilities().depth, admission.receives_max(), &note);
    let mut incoming = make(&config).map_err(io_error)?;
    post_first(&home, receives, |token, local| incoming.post_receive(token, local)).map_err(io_error)?;
    let connection = incoming.accept(&[]).map_err(io_error)?;
    VerbsChannel::new(connection, home, admission, note, false)
}

/// What the setup and the device allow, and the receives to be posted.
fn admit(mut setup: Setup, limits: DeviceLimits) -> io::Result<(Admission, Vec<(u64, Buffer)>)> {
    setup.depth = setup.depth.min(limits.work_requests as usize);
    setup.receives_max = setup.receives_max.min(limits.work_requests as usize);
    let capabilities = Capabilities {
        message_bytes_max: LENGTH_MAX,
        transfer_bytes_max: LENGTH_MAX,
        depth: setup.depth,
        zero_copy: true,
        cheap_poll: true,
        gives_way: true,
    };
    let mut admission = Admission::new(&setup, capabilities)?;
    for _ in &setup.receives {
        admission.enter(Kind::Recv);
    }
    Ok((admission, setup.receives))
}

fn post_first(
    home: &Home,
    receives: Vec<(u64, Buffer)>,
    mut post: impl FnMut(u64, holdfast_verbs::Local) -> Result<(), VerbsError>,
) -> Result<(), VerbsError> {
    for (token, buffer) in receives {
        let length = buffer.len();
        post(token, home.local(buffer, 0..length)?)?;
    }
    Ok(())
}

impl VerbsChannel {
    fn new(
        connection: Connection,
        home: Home,
        mut admission: Admission,
        note: Arc<Note>,
        is_client: bool,
    ) -> io::Result<Self> {
        admission.narrow(connection.max_message());
        let names = connection.identity();
        let local = ChannelIdentity::verbs_end(names.local_qpn, names.local_gid.0);
        let remote = ChannelIdentity::verbs_end(names.remote_qpn, names.remote_gid.0);
        let (client, server) = if is_client { (local, remote) } else { (remote, local) };
        let (operations, receives) = (admission.operations_reserve(), admission.receives_reserve());
        Ok(Self {
            wake: Wake::new(connection.wake_fd(), note)?,
            connection,
            identity: ChannelIdentity { transport: TransportKind::Verbs, client, server },
            admission,
            home,
            exports: is_client,
            outgoing: VecDeque::with_capacity(operations),
            ready: VecDeque::with_capacity(operations),
            placed: Vec::new(),
            placed_counted: 0,
            batch: Vec::with_capacity(operations + receives),
            end: None,
        })
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn note(&self) -> &Note {
        self.wake.note()
    }

    /// Ends the channel. The device is cut off; what was posted comes back through the completion queue.
    fn finish(&mut self, error: ChannelError) {
        if self.end.is_some() {
            return;
        }
        if let ChannelError::Misbehaved(why) = &error {
            tracing::warn!(peer = %self.connection.peer_address(), why, "data connection dropped: the peer misbehaved");
        }
        self.end = Some(error);
        if let Err(error) = self.connection.disconnect() {
            // The queue pair fails all the same, or had failed; only the peer learns of it later.
            tracing::debug!(%error, "disconnecting");
        }
        for request in std::mem::take(&mut self.outgoing) {
            let kind = match request.operation {
                holdfast_verbs::Operation::Read(_) => Kind::Fetch,
                holdfast_verbs::Operation::Write(_) | holdfast_verbs::Operation::WriteImmediate(..) => {
                    Kind::Place
                }
                _ => Kind::Send,
            };
            self.hand_out(request.token, kind, request.local, Err(OperationError::Flushed));
        }
    }

    /// Why the channel ends if the device or library fails.
    fn failed(&mut self, error: &VerbsError) {
        let why = if self.connection.is_disconnected() {
            ChannelError::Disconnected
        } else {
            ChannelError::Transport(error.to_string())
        };
        self.finish(why);
    }

    /// Hands what was submitted to the device, with as few doorbells as there can be.
    fn post(&mut self) {
        let last = self.outgoing.len().saturating_sub(1);
        for (index, request) in self.outgoing.iter_mut().enumerate() {
            request.signaled = index == last
                || matches!(request.operation, holdfast_verbs::Operation::Read(_))
                || request.local.len() >= LONG_TRANSFER_BYTES;
        }
        if let Err(error) = self.connection.post(&mut self.outgoing) {
            // First what has arrived: the peer may have said why.
            self.collect();
            self.failed(&error);
        }
    }

    /// Takes what the device has finished.
    fn collect(&mut self) {
        loop {
            match self.connection.poll(&mut self.batch) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    self.failed(&error);
                    break;
                }
            }
        }
        let mut batch = std::mem::take(&mut self.batch);
        for done in batch.drain(..) {
            self.completed(done);
        }
        self.batch = batch;
    }

    fn completed(&mut self, done: holdfast_verbs::Completion) {
        let kind = match done.kind {
            CompletionKind::Send => Kind::Send,
            CompletionKind::Receive => Kind::Recv,
            CompletionKind::Write => Kind::Place,
            CompletionKind::Read => Kind::Fetch,
        };
        let outcome = outcome(done.status, kind, done.bytes);
        if self.end.is_none() && outcome.is_err() {
            self.finish(why_ended(done.status, kind));
        }
        self.hand_out(done.token, kind, done.local, outcome);
    }

    /// Nothing but buffers and pages of files is posted here.
    fn hand_out(&mut self, token: u64, kind: Kind, local: Local, outcome: Result<usize, OperationError>) {
        match local.into_buffer() {
            Some(buffer) => self.ready.push_back(Completion::new(token, kind, buffer, outcome)),
            None => self.placed.push(Placed { token, outcome }),
        }
    }

    fn enqueue(&mut self, token: u64, buffer: Buffer, length: usize, operation: holdfast_verbs::Operation) {
        // Length and pool were checked when the operation was admitted, so that this does not fail.
        match self.home.local(buffer, 0..length) {
            Ok(local) => self.outgoing.push_back(WorkRequest { token, operation, local, signaled: true }),
            Err(error) => self.failed(&error),
        }
    }
}

fn outcome(status: Status, kind: Kind, bytes: usize) -> Result<usize, OperationError> {
    match status {
        Status::Success => Ok(bytes),
        Status::Flushed => Err(OperationError::Flushed),
        Status::RemoteAccessError => Err(OperationError::RemoteAccess),
        Status::LocalLengthError => Err(OperationError::Length),
        LOC_QP_OP_ERR if kind == Kind::Recv => Err(OperationError::Length),
        Status::RemoteInvalidRequest if kind == Kind::Send => Err(OperationError::Length),
        Status::RemoteInvalidRequest => Err(OperationError::RemoteAccess),
        Status::RetryExceeded => Err(OperationError::Unreachable),
        _ => Err(OperationError::Transport),
    }
}

fn why_ended(status: Status, kind: Kind) -> ChannelError {
    match status {
        Status::Flushed | Status::RetryExceeded => ChannelError::Disconnected,
        Status::LocalLengthError | LOC_QP_OP_ERR if kind == Kind::Recv => {
            ChannelError::Misbehaved("its message is longer than the buffer for it")
        }
        other => ChannelError::Transport(other.to_string()),
    }
}

fn remote(descriptor: RegionDescriptor) -> Remote {
    Remote { addr: descriptor.address(), rkey: descriptor.rkey() }
}

impl Channel for VerbsChannel {
    fn identity(&self) -> &ChannelIdentity {
        &self.identity
    }

    fn peer(&self) -> SocketAddr {
        self.connection.peer_address()
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
                self.enqueue(token, buffer, length, holdfast_verbs::Operation::Send);
            }
            Operation::Recv { buffer } => {
                let length = buffer.len();
                match self.home.local(buffer, 0..length) {
                    Ok(local) => {
                        if let Err((error, local)) = self.connection.post_receive(token, local) {
                            self.failed(&error);
                            let outcome = Err(OperationError::Flushed);
                            self.ready.extend(
                                local
                                    .into_buffer()
                                    .map(|buffer| Completion::new(token, kind, buffer, outcome)),
                            );
                        }
                    }
                    Err(error) => self.failed(&error),
                }
            }
            Operation::Place { buffer, remote } | Operation::Fetch { buffer, remote }
                if remote.length() == 0 =>
            {
                self.ready.push_back(Completion::new(token, kind, buffer, Ok(0)));
            }
            Operation::Place { buffer, remote: descriptor } => {
                let write = holdfast_verbs::Operation::Write(remote(descriptor));
                self.enqueue(token, buffer, descriptor.length() as usize, write);
            }
            Operation::Fetch { buffer, remote: descriptor } => {
                let read = holdfast_verbs::Operation::Read(remote(descriptor));
                self.enqueue(token, buffer, descriptor.length() as usize, read);
            }
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        if !self.outgoing.is_empty() {
            self.post();
        }
        self.collect();
        if self.end.is_none() && self.connection.is_disconnected() {
            // What had arrived before has been collected, or comes with the next polls.
            self.finish(ChannelError::Disconnected);
        }
        let count = self.ready.len() + self.placed.len() - self.placed_counted;
        self.placed_counted = self.placed.len();
        for completion in self.ready.drain(..) {
            self.admission.leave(completion.kind);
            done.push(completion);
        }
        count
    }

    fn push(&mut self) -> bool {
        if !self.outgoing.is_empty() {
            self.post();
        }
        self.end.is_none() && self.ready.is_empty() && self.placed.is_empty() && self.outgoing.is_empty()
    }

    fn arm(&mut self) -> Armed {
        if !self.ready.is_empty() || !self.placed.is_empty() || !self.outgoing.is_empty() {
            return Armed::Pending;
        }
        self.wake.clear_note();
        if self.end.is_none() && self.connection.is_disconnected() {
            return Armed::Pending;
        }
        match self.connection.arm() {
            Ok(true) => Armed::Idle,
            Ok(false) => Armed::Pending,
            Err(_) if self.end.is_some() => Armed::Idle,
            Err(error) => {
                self.failed(&error);
                Armed::Pending
            }
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.fd()
    }

    fn close(&mut self) {
        self.finish(ChannelError::Closed);
    }

    fn ended(&self) -> Option<ChannelError> {
        self.end.clone()
    }

    fn pinner(&self) -> Option<Pinner> {
        // A client has no files.
        (!self.exports).then(|| Pinner(Arc::clone(&self.home.domain)))
    }

    fn place_pinned(
        &mut self,
        token: u64,
        file: &PinnedFile,
        range: Range<usize>,
        to: RegionDescriptor,
    ) -> Result<(), SubmitError> {
        if self.end.is_some() {
            return Err(SubmitError::Closed);
        }
        let fits = range.len() == to.length() as usize && !range.is_empty() && file.is_of(&self.home.domain);
        self.admission.check_transfer(range.len())?;
        let local = if fits { file.local(range).ok() } else { None };
        let local = local.ok_or(SubmitError::Invalid)?;
        self.admission.enter(Kind::Place);
        let operation = holdfast_verbs::Operation::Write(remote(to));
        self.outgoing.push_back(WorkRequest { token, operation, local, signaled: true });
        Ok(())
    }

    fn take_placed(&mut self, done: &mut Vec<Placed>) {
        self.placed_counted = 0;
        for placed in self.placed.drain(..) {
            self.admission.leave(Kind::Place);
            done.push(placed);
        }
    }

    fn registrar(&self) -> Arc<dyn Registrar> {
        if self.exports { Arc::new(Exporting(Arc::clone(&self.home.domain))) } else { Arc::new(NotExporting) }
    }
}
