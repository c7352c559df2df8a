//! The trait, its operations and their completions.

use crate::verbs::{Lane, PinnedFile, Pinner};
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{Buffer, FileMapping, PeerBytes, Pool, Region};
use std::any::Any;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Something to do, with the buffer it needs.
#[derive(Debug)]
pub enum Operation {
    /// Send the first `length` bytes of the buffer as one message.
    Send {
        /// Holds the message.
        buffer: Buffer,
        /// Its bytes.
        length: usize,
    },
    /// Take one message from the peer.
    Recv {
        /// Where to put it; its size bounds the message.
        buffer: Buffer,
    },
    /// Write the first `remote.length()` bytes of the buffer into the peer's region.
    Place {
        /// Holds the bytes.
        buffer: Buffer,
        /// Where they go.
        remote: RegionDescriptor,
    },
    /// Read `remote.length()` bytes of the peer's region into the buffer's beginning.
    Fetch {
        /// Where they go.
        buffer: Buffer,
        /// Where they are.
        remote: RegionDescriptor,
    },
}

/// Which operation a completion is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// See [`Operation::Send`].
    Send,
    /// See [`Operation::Recv`].
    Recv,
    /// See [`Operation::Place`].
    Place,
    /// See [`Operation::Fetch`].
    Fetch,
}

/// The end of an operation: its buffer comes back.
#[derive(Debug)]
pub struct Completion {
    /// As given to `submit`.
    pub token: u64,
    /// Which operation it was.
    pub kind: Kind,
    /// The buffer, the owner's again.
    pub buffer: Buffer,
    /// Bytes sent, received, placed or fetched; or why not.
    pub outcome: Result<usize, OperationError>,
    /// Of a message received over a local channel: the descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
}

impl Completion {
    /// One without a descriptor.
    pub fn new(token: u64, kind: Kind, buffer: Buffer, outcome: Result<usize, OperationError>) -> Self {
        Self { token, kind, buffer, outcome, descriptor: None }
    }
}

/// The end of a [`Channel::place_pinned`].
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// As given to it.
    pub token: u64,
    /// Bytes placed; or why not.
    pub outcome: Result<usize, OperationError>,
}

/// What [`Channel::place_view`] places.
pub struct FilePart<'a> {
    /// Of the Place, should it have a completion.
    pub token: u64,
    /// A mapping of the file.
    pub view: &'a Arc<FileMapping>,
    /// The bytes of the mapping.
    pub range: Range<usize>,
    /// Where they go; as long.
    pub remote: RegionDescriptor,
    /// For what is not taken at once. The part goes as Places as long as this is, several with one call.
    pub buffer: Buffer,
    /// Reads that: the bytes of the part from the number on, all of them. What the file does not have any more is zeros.
    pub fill: &'a mut dyn FnMut(&mut [u8], usize),
}

/// What came of it.
#[derive(Debug)]
pub enum ViewPlaced {
    /// So many bytes have been taken, not necessarily all: there is no completion.
    Done(Buffer, usize),
    /// So many have, or were filled into the buffer: an operation in flight, with the completion of a Place.
    Begun(usize),
    /// Nothing has been taken, for want of room: the wake descriptor tells when there is some.
    Full(Buffer),
    /// Nothing has been taken: no such part may be placed here, or the file has lost its pages.
    Unable(Buffer),
}

/// Why an operation that was accepted did not succeed. Each of them ends the channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OperationError {
    /// The channel was closed or had failed before it was done.
    #[error("the channel ended before the operation was done")]
    Flushed,
    /// The peer's region does not allow it: unknown rkey, out of bounds, or the access is missing.
    #[error("the peer's region does not allow the access")]
    RemoteAccess,
    /// The message did not fit the receiver's buffer.
    #[error("the message is longer than the buffer it was received into")]
    Length,
    /// The peer does not answer.
    #[error("the peer does not answer")]
    Unreachable,
    /// Anything else the device or kernel reported.
    #[error("the transport failed")]
    Transport,
}

/// Why an operation was not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// As many as [`Setup`] allows are in flight: poll first.
    #[error("too many operations in flight")]
    Full,
    /// The channel has ended.
    #[error("the channel has ended")]
    Closed,
    /// A length exceeds the buffer or the capabilities, or the buffer's pool was not in [`Setup`].
    #[error("the operation is not valid")]
    Invalid,
}

/// An operation that was not accepted, given back whole.
#[derive(Debug)]
pub struct Rejected {
    /// Why.
    pub error: SubmitError,
    /// The operation.
    pub operation: Operation,
}

/// Why a channel ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChannelError {
    /// This side closed it.
    #[error("closed by this side")]
    Closed,
    /// The peer closed it, or its process or host is gone.
    #[error("closed by the peer")]
    Disconnected,
    /// The peer broke the transport's own framing or named memory it may not.
    #[error("the peer misbehaved: {0}")]
    Misbehaved(&'static str),
    /// The device or kernel failed.
    #[error("the transport failed: {0}")]
    Transport(String),
}

/// What a transport can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// Longest message, bytes.
    pub message_bytes_max: usize,
    /// Longest Place or Fetch, bytes.
    pub transfer_bytes_max: usize,
    /// Sends, Places and Fetches that may be in flight together.
    pub depth: usize,
    /// True if Place and Fetch move bytes without either CPU touching them.
    pub zero_copy: bool,
    /// True if a `poll` that finds nothing makes no system call: looking for a while is then cheaper than sleeping.
    pub cheap_poll: bool,
    /// True if who looks should give way to others now and then: what is waited for may need this very processor, as of a device in
    /// software. Where it does not, giving way costs milliseconds when others compute.
    pub gives_way: bool,
}

/// The answer of [`Channel::arm`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Armed {
    /// Nothing is pending: the wake descriptor will tell.
    Idle,
    /// Something came meanwhile: poll again before sleeping.
    Pending,
}

/// One data connection.
pub trait Channel: Send {
    /// Which transport it is, and the two ends as the bind transcript needs them.
    fn identity(&self) -> &ChannelIdentity;

    /// The peer's address, for people.
    fn peer(&self) -> SocketAddr;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Says whether the peer has proven that it may be here; until this is called it counts as if it had. Who has not gets none of
    /// what all share: its memory is not mapped.
    fn bound(&mut self, is_bound: bool) {
        let _ = is_bound;
    }

    /// Accepts an operation. It may stay queued until the next `poll`, so that several go out together.
    ///
    /// # Errors
    /// [`Rejected`] gives the operation back.
    fn submit(&mut self, token: u64, operation: Operation) -> Result<(), Rejected>;

    /// As [`Operation::Send`], and the peer gets a duplicate of `descriptor` with the message, if it has room for one.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] on all channels but local ones; then the descriptor is closed.
    fn send_descriptor(
        &mut self,
        token: u64,
        buffer: Buffer,
        length: usize,
        descriptor: OwnedFd,
    ) -> Result<(), Rejected> {
        let _ = (token, descriptor);
        Err(Rejected { error: SubmitError::Invalid, operation: Operation::Send { buffer, length } })
    }

    /// Pushes out what was submitted, collects what is done, and appends it to `done`. Returns how many, with those that
    /// [`Channel::take_placed`] gives.
    fn poll(&mut self, done: &mut Vec<Completion>) -> usize;

    /// Pushes out what was submitted, and does not look for what has come. True if all that remains will be told by the wake
    /// descriptor, should the channel be armed; false: `poll`. An armed channel stays armed.
    fn push(&mut self) -> bool {
        false
    }

    /// Asks for a wake-up. See the module's text.
    fn arm(&mut self) -> Armed;

    /// The wake descriptor.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// Ends the channel: the device is cut off from every buffer before this returns, and what is in flight
    /// completes as [`OperationError::Flushed`] on the following polls. Idempotent.
    fn close(&mut self);

    /// `None` while it lives; then why it ended. Completions may still be due.
    fn ended(&self) -> Option<ChannelError>;

    /// Pins files for [`Channel::place_pinned`]. `None`, as it is for all transports but verbs: their bytes pass a processor
    /// anyway.
    fn pinner(&self) -> Option<Pinner> {
        None
    }

    /// As a Place, straight from pinned pages of a file: from `range` of them to the beginning of `remote`, which is as
    /// long. Takes effect in the order of all that is submitted; counts as an operation in flight until it is
    /// [placed](Channel::take_placed). The pages are held until then.
    ///
    /// # Errors
    /// As [`Channel::submit`]; [`SubmitError::Invalid`] also if they were not pinned by this channel's [`Channel::pinner`].
    fn place_pinned(
        &mut self,
        token: u64,
        file: &PinnedFile,
        range: Range<usize>,
        remote: RegionDescriptor,
    ) -> Result<(), SubmitError> {
        let _ = (token, file, range, remote);
        Err(SubmitError::Invalid)
    }

    /// True if [`Channel::place_view`] works here: the kernel copies what is sent, and saves the copy into a buffer before that.
    fn places_views(&self) -> bool {
        false
    }

    /// As a Place, straight from a mapped file, now: in the order of all that is submitted, and nothing of the file is looked at later.
    /// The pages should be [in memory](FileMapping::is_resident), or the caller waits for the disk. That the channel has ended the next
    /// `poll` finds.
    fn place_view(&mut self, part: FilePart<'_>) -> ViewPlaced {
        ViewPlaced::Unable(part.buffer)
    }

    /// Appends those [`Channel::place_pinned`] that a `poll` has found done. Each accepted one is told once, also when the
    /// channel dies.
    fn take_placed(&mut self, done: &mut Vec<Placed>) {
        let _ = done;
    }

    /// Gives `act` the peer's memory itself, if this transport gets at it, and `remote` may be the target of a Place, or the source of
    /// a Fetch, as `wanted` says: what it moves has been moved when it returns, before what was submitted takes effect. False if not; then
    /// an operation tells why.
    fn reach(&mut self, remote: RegionDescriptor, wanted: Kind, act: &mut dyn FnMut(PeerBytes<'_>)) -> bool {
        let _ = (remote, wanted, act);
        false
    }

    /// Registers memory for the peer of this channel; usable from any thread, and while the channel is polled.
    fn registrar(&self) -> Arc<dyn Registrar>;
}

/// What the peer may do with a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RemoteAccess {
    /// The peer may Fetch from it.
    Fetch,
    /// The peer may Place into it.
    Place,
    /// Both.
    FetchAndPlace,
}

/// Registers regions for one channel's peer, and for no other.
pub trait Registrar: Send + Sync {
    /// Registers the whole region. Dropping the registration withdraws it: the peer's next access fails.
    ///
    /// # Errors
    /// The device's or kernel's own; on ENOMEM the text says how to raise the memlock limit.
    fn register(&self, region: Arc<Region>, access: RemoteAccess) -> io::Result<Registration>;

    /// Connects a lane to the listener at `address`, waiting at most `timeout`, with `depth` reads in flight at most: what
    /// is registered here can be read into over it. Blocks.
    ///
    /// # Errors
    /// `Unsupported` for all transports but verbs; the connection manager's.
    fn lane(&self, address: SocketAddr, timeout: Duration, depth: usize) -> io::Result<Lane> {
        let _ = (address, timeout, depth);
        Err(io::Error::new(io::ErrorKind::Unsupported, "only verbs has one-sided reads"))
    }
}

/// A live registration. Keep it until the last request that names it has been answered.
pub struct Registration {
    descriptor: RegionDescriptor,
    region: Arc<Region>,
    held: Box<dyn Any + Send + Sync>,
}

impl Registration {
    /// Made by transports: `held` withdraws the registration when dropped.
    pub fn new(descriptor: RegionDescriptor, region: Arc<Region>, held: Box<dyn Any + Send + Sync>) -> Self {
        Self { descriptor, region, held }
    }

    /// What withdraws it, if it is of that type.
    pub(crate) fn held<T: Any>(&self) -> Option<&T> {
        self.held.downcast_ref()
    }

    /// The whole region, as the peer is told of it.
    pub fn descriptor(&self) -> RegionDescriptor {
        self.descriptor
    }

    /// The memory.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration").field("length", &self.descriptor.length()).finish_non_exhaustive()
    }
}

/// What a channel is made with.
pub struct Setup {
    /// Sends, Places and Fetches that may be in flight together.
    pub depth: usize,
    /// Receives that may be posted together.
    pub receives_max: usize,
    /// The pools whose buffers will be used on it; registered with the device once, here or by the listener.
    pub pools: Vec<Pool>,
    /// Receives posted before the peer can send, with their tokens.
    pub receives: Vec<(u64, Buffer)>,
}

/// Accepts channels. Lives on a thread of its own.
pub trait Listener: Send {
    /// Where it listens.
    fn address(&self) -> SocketAddr;

    /// Waits for a peer. `prepare` is asked before anything is allocated for it; `None` turns the peer away.
    /// Handshakes that never finish are dropped at a deadline and never hold up others.
    ///
    /// # Errors
    /// An error of kind `Interrupted` after `stopper` was used; others are the listener's own and final.
    fn accept(
        &mut self,
        prepare: &mut dyn FnMut(SocketAddr) -> Option<Setup>,
    ) -> io::Result<Box<dyn Channel>>;

    /// Ends a waiting `accept`, now and for ever, from any thread.
    fn stopper(&self) -> Box<dyn Fn() + Send + Sync>;
}
