//! Who holds a lock.

use crate::types::{LockRange, OpenId, ProcessId};
use std::sync::Arc;

/// The holder of a lock. The volume's mode says which of the two a request's owner is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum LockOwner {
    /// On a mandatory volume: an open, and within it the number that an unlock must repeat. Every lock counts
    /// against every other, those of the same open included.
    Open {
        /// The open.
        open: OpenId,
        /// The client's number.
        number: u64,
    },
    /// On an advisory volume: a POSIX owner, whose own locks replace one another.
    Process {
        /// The open through which it locks: what that open took goes with it.
        open: OpenId,
        /// The POSIX owner.
        process: Process,
    },
}

/// A POSIX lock owner: (principal, process, owner number), whatever opens it uses.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Process {
    /// From the client's certificate.
    pub principal: Arc<str>,
    /// The client's number for its process.
    pub process: ProcessId,
    /// The client's number for the owner within it.
    pub number: u64,
}

impl LockOwner {
    /// The open that a lock of this owner is released with.
    pub fn open(&self) -> OpenId {
        match self {
            Self::Open { open, .. } | Self::Process { open, .. } => *open,
        }
    }

    /// The client's number for the owner.
    pub fn number(&self) -> u64 {
        match self {
            Self::Open { number, .. } => *number,
            Self::Process { process, .. } => process.number,
        }
    }

    /// True if locks of the two are never in each other's way: those of one POSIX owner; and one of a POSIX owner
    /// with one of an open that has no byte. POSIX knows bytes only, and pieces join over the place between two.
    pub(super) fn goes_with(&self, range: LockRange, other: &Self, others: LockRange) -> bool {
        match (self, other) {
            (Self::Process { process: a, .. }, Self::Process { process: b, .. }) => a == b,
            (Self::Open { .. }, Self::Open { .. }) => false,
            _ => range.is_empty() || others.is_empty(),
        }
    }
}
