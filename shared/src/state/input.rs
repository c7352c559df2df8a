//! What comes into the authority.

use super::operation::OperationId;
use crate::auth::SessionKey;
use crate::types::{ProcessId, SessionId};
use crate::wire::control::{Attributes, Refusal, Reply, Request};
use crate::wire::link::{Fence, LinkBinding, Redeem};

/// One event. The shell gives them one at a time, in the order in which they happened.
#[derive(Debug)]
pub enum Input {
    /// A peer is authenticated and has said hello.
    SessionBegan(Box<SessionBegan>),
    /// The session's connection is gone. Nothing more comes from it.
    SessionLost(SessionId),
    /// A session asks. Requests of a session that is not (or no longer) there are dropped.
    Request {
        /// Which session.
        session: SessionId,
        /// The request's number, echoed in its one answer.
        id: u64,
        /// What is asked.
        request: Request,
        /// Randomness and wall clock for this request.
        fresh: Box<Fresh>,
    },
    /// Answer to [`Effect::OpenFile`](super::Effect::OpenFile).
    FileOpened {
        /// Which operation.
        operation: OperationId,
        /// The file, or why not.
        result: Result<FileOpened, Refusal>,
    },
    /// Answer to [`Effect::Resolve`](super::Effect::Resolve).
    Resolved {
        /// Which operation.
        operation: OperationId,
        /// What stands at each name, in the order asked; `None` where nothing does.
        result: Result<Vec<Option<FileIdentity>>, Refusal>,
    },
    /// Answer to [`Effect::Perform`](super::Effect::Perform).
    Performed {
        /// Which operation.
        operation: OperationId,
        /// The answer for the client, or why not.
        result: Result<Reply, Refusal>,
    },
    /// At the start only: a dataplane of an earlier control may live and hold bindings that this authority does not
    /// know. Until [`Input::LinkUp`] or [`Input::LinkLost`] nothing is granted that they could conflict with.
    DataplaneMayLive,
    /// A dataplane registered. By the link's contract every binding of earlier registrations is drained.
    LinkUp {
        /// As registered; handed on unread.
        service_blob: Vec<u8>,
    },
    /// The link has closed. Dataplane may live, and its bindings with it: all of them stay.
    LinkDown,
    /// The dataplane is proven dead, and with it every descriptor and queue pair it held. Opens stay.
    LinkLost,
    /// Dataplane carries a client's bind request.
    Redeem {
        /// The request.
        redeem: Box<Redeem>,
        /// Randomness for the new handle.
        fresh: Box<Fresh>,
    },
    /// Dataplane says that a binding's I/O has ended for good.
    Fenced(Fence),
    /// Dataplane says that a binding ended by itself.
    Released(LinkBinding),
}

/// See [`Input::SessionBegan`].
#[derive(Debug)]
pub struct SessionBegan {
    /// Fresh, 128 random bits.
    pub session: SessionId,
    /// Number of the hello request.
    pub request: u64,
    /// From the client's certificate.
    pub principal: String,
    /// K1, from the TLS exporter.
    pub key: SessionKey,
    /// The client's process, from its hello.
    pub process: ProcessId,
}

/// Fresh randomness and the wall clock: the authority has neither. Part of it becomes secret, so Debug is silent.
#[derive(Clone)]
pub struct Fresh {
    /// For an open id.
    pub open: [u8; 16],
    /// For a handle id.
    pub handle: [u8; 16],
    /// For an open's challenge.
    pub challenge: [u8; 32],
    /// For sealing a resume key.
    pub nonce: [u8; 12],
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

impl std::fmt::Debug for Fresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fresh").field("wall_ms", &self.wall_ms).finish_non_exhaustive()
    }
}

/// Which file it is, whatever its name. While any open of it lasts, no other file can have the same identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileIdentity {
    /// Device number of its file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Tells an inode number's later uses apart: the time of the inode's birth, nanoseconds (0 if the file
    /// system does not keep it).
    pub generation: u64,
}

/// A file that the shell has opened. It holds the descriptor until [`Effect::CloseFile`](super::Effect::CloseFile).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileOpened {
    /// Which file.
    pub identity: FileIdentity,
    /// Its attributes.
    pub attributes: Attributes,
    /// True if it was made just now.
    pub created: bool,
}
