//! Work requests and completions: what is asked of the device, and what came of it.
//!
//! ```text
//!   Local (owns Buffer or registration) ─► WorkRequest ──post──► the device's ──completion──► Completion ─► Local
//!                                                                 (nobody else can touch it)
//! ```
//!
//! Before posting, a buffer is plain memory:
//!
//! ```no_run
//! # use holdfast_verbs::{Connection, Local, MemoryRegistration, memory::Buffer};
//! # use std::sync::Arc;
//! # fn post(connection: &mut Connection, registration: &Arc<MemoryRegistration>, mut buffer: Buffer) {
//! buffer[0] = 1;
//! let local = Local::buffer(registration, buffer, 0..8).unwrap();
//! connection.post_receive(1, local).unwrap();
//! # }
//! ```
//!
//! Once posted it is gone until its completion; the compiler sees to it:
//!
//! ```compile_fail,E0382
//! # use holdfast_verbs::{Connection, Local, MemoryRegistration, memory::Buffer};
//! # use std::sync::Arc;
//! # fn post(connection: &mut Connection, registration: &Arc<MemoryRegistration>, mut buffer: Buffer) {
//! let local = Local::buffer(registration, buffer, 0..8).unwrap();
//! connection.post_receive(1, local).unwrap();
//! buffer[0] = 1; // the device may be writing there
//! # }
//! ```

use std::ops::Range;
use std::sync::Arc;

use crate::error::VerbsError;
use crate::ffi;
use crate::memory::{Buffer, Region, check_range};
use crate::mr::MemoryRegistration;

/// Memory of this host that a work request names and owns: part of a buffer, of a region, or of a file's pages.
#[derive(Debug)]
pub struct Local {
    registration: Arc<MemoryRegistration>,
    buffer: Option<Buffer>,
    addr: u64,
    len: u32,
}

impl Local {
    /// Part of a buffer. `registration` must be of the buffer's pool. On failure the buffer goes back to its pool.
    pub fn buffer(
        registration: &Arc<MemoryRegistration>,
        buffer: Buffer,
        range: Range<usize>,
    ) -> Result<Self, VerbsError> {
        if registration.pool_id() != Some(buffer.pool_id()) {
            return Err(VerbsError::WrongRegistration);
        }
        check_range(&range, buffer.len())?;
        let addr = buffer.addr();
        Self::new(registration, Some(buffer), addr, range)
    }

    /// Part of a region that `registration` was made of.
    pub fn region(registration: &Arc<MemoryRegistration>, range: Range<usize>) -> Result<Self, VerbsError> {
        if registration.region().is_none() {
            return Err(VerbsError::WrongRegistration);
        }
        check_range(&range, registration.len())?;
        Self::new(registration, None, registration.addr(), range)
    }

    /// Part of a file's pages, to send or write from.
    pub fn file(registration: &Arc<MemoryRegistration>, range: Range<usize>) -> Result<Self, VerbsError> {
        if !registration.is_file() {
            return Err(VerbsError::WrongRegistration);
        }
        check_range(&range, registration.len())?;
        Self::new(registration, None, registration.addr(), range)
    }

    fn new(
        registration: &Arc<MemoryRegistration>,
        buffer: Option<Buffer>,
        addr: u64,
        range: Range<usize>,
    ) -> Result<Self, VerbsError> {
        let bytes = range.end - range.start;
        let limit = u32::MAX;
        let len = u32::try_from(bytes).map_err(|_| VerbsError::TooLong { bytes, limit: limit as usize })?;
        Ok(Self { registration: Arc::clone(registration), buffer, addr: addr + range.start as u64, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// True if it names no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffer, if it is part of one.
    pub fn into_buffer(self) -> Option<Buffer> {
        self.buffer
    }

    /// The region, if it is part of one.
    pub fn as_region(&self) -> Option<&Arc<Region>> {
        self.registration.region()
    }

    pub(crate) fn registration(&self) -> &Arc<MemoryRegistration> {
        &self.registration
    }

    /// As the device takes it.
    pub(crate) fn scatter_gather(&self) -> ffi::ibv_sge {
        ffi::ibv_sge { addr: self.addr, length: self.len, lkey: self.registration.lkey() }
    }
}

/// Memory of the peer: where it said it is, and the key it gave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// Address in the peer's process.
    pub addr: u64,
    /// The peer's key for it.
    pub rkey: u32,
}

impl std::fmt::Debug for Remote {
    // Not the key: who knows it can try it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("addr", &format_args!("{:#x}", self.addr)).finish()
    }
}

/// What a work request does with its local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Sends it, into the next receive the peer has posted.
    Send,
    /// As `Send`, with four bytes the peer finds in its completion.
    SendImmediate(u32),
    /// RDMA WRITE: copies it into the peer's memory. The peer isn't told.
    Write(Remote),
    /// RDMA WRITE that uses up one of the peer's posted receives, and so tells it, with four bytes.
    WriteImmediate(Remote, u32),
    /// RDMA READ: fills it from the peer's memory.
    Read(Remote),
}

impl Operation {
    fn kind(self) -> CompletionKind {
        match self {
            Self::Send | Self::SendImmediate(_) => CompletionKind::Send,
            Self::Write(_) | Self::WriteImmediate(..) => CompletionKind::Write,
            Self::Read(_) => CompletionKind::Read,
        }
    }
}

/// A request for the send queue. Owns its memory.
#[derive(Debug)]
pub struct WorkRequest {
    /// The caller's number for it; comes back with the completion.
    pub token: u64,
    /// What to do.
    pub operation: Operation,
    /// With which memory.
    pub local: Local,
    /// True to have the completion as soon as it is done. False saves the device work: the completion then comes
    /// together with that of a later request.
    pub signaled: bool,
}

/// What kind of work a completion ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionKind {
    /// A send, with or without immediate.
    Send,
    /// An RDMA WRITE, with or without immediate.
    Write,
    /// An RDMA READ.
    Read,
    /// A posted receive.
    Receive,
}

/// How a work request ended. Everything but `Success` means that the connection is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Status {
    /// Done.
    #[error("success")]
    Success,
    /// Not done, because the connection had failed or was closed. (Perhaps done, if it was an earlier one that
    /// failed at the peer.)
    #[error("flushed: the connection had ended")]
    Flushed,
    /// The peer's memory doesn't allow it: wrong key, range, rights, or revoked.
    #[error("the peer's memory doesn't allow it")]
    RemoteAccessError,
    /// The peer could not do it.
    #[error("the peer could not do it")]
    RemoteOperationError,
    /// The peer found the request invalid: a message longer than its receive, for instance.
    #[error("invalid for the peer")]
    RemoteInvalidRequest,
    /// The peer doesn't answer.
    #[error("the peer doesn't answer")]
    RetryExceeded,
    /// The peer has no receive posted, for longer than we are willing to wait.
    #[error("the peer has no receive posted")]
    RnrRetryExceeded,
    /// A message was longer than the posted receive.
    #[error("longer than the posted receive")]
    LocalLengthError,
    /// The local memory isn't covered by its key.
    #[error("local memory not covered by its key")]
    LocalProtectionError,
    /// Anything else, with the number from verbs.
    #[error("work completion status {0}")]
    Other(u32),
}

impl Status {
    pub(crate) fn from_raw(status: u32) -> Self {
        use ffi::ibv_wc_status as s;
        match status {
            s::IBV_WC_SUCCESS => Self::Success,
            s::IBV_WC_WR_FLUSH_ERR => Self::Flushed,
            s::IBV_WC_REM_ACCESS_ERR => Self::RemoteAccessError,
            s::IBV_WC_REM_OP_ERR => Self::RemoteOperationError,
            s::IBV_WC_REM_INV_REQ_ERR => Self::RemoteInvalidRequest,
            s::IBV_WC_RETRY_EXC_ERR => Self::RetryExceeded,
            s::IBV_WC_RNR_RETRY_EXC_ERR => Self::RnrRetryExceeded,
            s::IBV_WC_LOC_LEN_ERR => Self::LocalLengthError,
            s::IBV_WC_LOC_PROT_ERR => Self::LocalProtectionError,
            other => Self::Other(other),
        }
    }
}

/// The end of one work request. Every accepted request gets exactly one.
#[derive(Debug)]
pub struct Completion {
    /// The caller's number.
    pub token: u64,
    /// What kind of work it was.
    pub kind: CompletionKind,
    /// How it ended.
    pub status: Status,
    /// Bytes moved, if it succeeded. For a receive: of the message (of a write with immediate: what was written elsewhere).
    pub bytes: usize,
    /// The peer's four bytes, if it sent any.
    pub immediate: Option<u32>,
    /// The memory, the caller's again.
    pub local: Local,
}

/// A request in flight.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) token: u64,
    pub(crate) kind: CompletionKind,
    pub(crate) local: Local,
}

impl WorkRequest {
    pub(crate) fn into_in_flight(self) -> InFlight {
        InFlight { token: self.token, kind: self.operation.kind(), local: self.local }
    }
}

impl InFlight {
    pub(crate) fn complete(self, status: Status, bytes: usize, immediate: Option<u32>) -> Completion {
        Completion { token: self.token, kind: self.kind, status, bytes, immediate, local: self.local }
    }
}
