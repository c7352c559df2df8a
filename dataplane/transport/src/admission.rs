//! What every transport checks before it takes an operation, so that all of them refuse the same things.
//!
//! ```text
//!   submit ──check──► enter ──► in flight ──► completion handed out ──► leave
//! ```

use crate::channel::{Capabilities, Kind, Operation, Setup, SubmitError};
use std::io;

/// Queues are made as long as the setup says, but not longer than this at once: they grow when they are needed.
const RESERVE_MAX: usize = 4096;

/// How many operations are in flight, and which are valid.
#[derive(Debug)]
pub(crate) struct Admission {
    capabilities: Capabilities,
    receives_max: usize,
    /// Ids of the pools whose buffers are accepted.
    pools: Vec<u64>,
    operations: usize,
    receives: usize,
}

impl Admission {
    /// Reads the limits out of a setup. Its receives are counted by [`Admission::enter`], as all others.
    pub(crate) fn new(setup: &Setup, capabilities: Capabilities) -> io::Result<Self> {
        let pools: Vec<u64> = setup.pools.iter().map(|pool| pool.id()).collect();
        let invalid = |text| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if setup.receives.len() > setup.receives_max {
            return invalid("more receives given than may be posted together");
        }
        if setup.receives.iter().any(|(_, buffer)| !pools.contains(&buffer.pool_id())) {
            return invalid("a receive buffer is of a pool that was not named");
        }
        Ok(Self { capabilities, receives_max: setup.receives_max, pools, operations: 0, receives: 0 })
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Lowers the longest message and transfer to what a connection turned out to carry.
    pub(crate) fn narrow(&mut self, length_max: usize) {
        let capabilities = &mut self.capabilities;
        capabilities.message_bytes_max = capabilities.message_bytes_max.min(length_max);
        capabilities.transfer_bytes_max = capabilities.transfer_bytes_max.min(length_max);
    }

    pub(crate) fn receives_max(&self) -> usize {
        self.receives_max
    }

    /// Says whether the operation may be accepted now.
    pub(crate) fn check(&self, operation: &Operation) -> Result<(), SubmitError> {
        let (buffer, length, length_max) = match operation {
            Operation::Send { buffer, length } => (buffer, *length, self.capabilities.message_bytes_max),
            Operation::Recv { buffer } => (buffer, 0, 0),
            Operation::Place { buffer, remote } | Operation::Fetch { buffer, remote } => {
                (buffer, remote.length() as usize, self.capabilities.transfer_bytes_max)
            }
        };
        if length > buffer.len() || length > length_max || !self.pools.contains(&buffer.pool_id()) {
            return Err(SubmitError::Invalid);
        }
        let full = match operation {
            Operation::Recv { .. } => self.receives >= self.receives_max,
            _ => self.operations >= self.capabilities.depth,
        };
        if full { Err(SubmitError::Full) } else { Ok(()) }
    }

    /// Says whether a transfer of so many bytes may be accepted now whose bytes are in no buffer.
    pub(crate) fn check_transfer(&self, length: usize) -> Result<(), SubmitError> {
        if length > self.capabilities.transfer_bytes_max {
            return Err(SubmitError::Invalid);
        }
        if self.operations >= self.capabilities.depth { Err(SubmitError::Full) } else { Ok(()) }
    }

    /// An operation was accepted.
    pub(crate) fn enter(&mut self, kind: Kind) {
        *self.count(kind) += 1;
    }

    /// Its completion was handed out.
    pub(crate) fn leave(&mut self, kind: Kind) {
        let count = self.count(kind);
        debug_assert!(*count > 0, "a completion without an operation");
        *count = count.saturating_sub(1);
    }

    fn count(&mut self, kind: Kind) -> &mut usize {
        if kind == Kind::Recv { &mut self.receives } else { &mut self.operations }
    }

    /// Entries to make room for: operations other than receives.
    pub(crate) fn operations_reserve(&self) -> usize {
        self.capabilities.depth.min(RESERVE_MAX)
    }

    /// Entries to make room for: receives.
    pub(crate) fn receives_reserve(&self) -> usize {
        self.receives_max.min(RESERVE_MAX)
    }
}

impl Operation {
    /// Which kind of completion it will have.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Send { .. } => Kind::Send,
            Self::Recv { .. } => Kind::Recv,
            Self::Place { .. } => Kind::Place,
            Self::Fetch { .. } => Kind::Fetch,
        }
    }
}
