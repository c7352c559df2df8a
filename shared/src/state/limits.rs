//! How much there may be. Every limit answers [`Status::TooMany`](crate::types::Status::TooMany) when it is reached.

use super::lock::LockLimits;
use std::time::Duration;

/// Limits of the authority. The operator chooses them in control's config.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Sessions in all.
    pub sessions: usize,
    /// Sessions of one principal.
    pub sessions_per_principal: usize,
    /// Opens in all.
    pub opens: usize,
    /// Opens of one principal.
    pub opens_per_principal: usize,
    /// Opens of one session.
    pub opens_per_session: usize,
    /// Bindings of one open.
    pub bindings_per_open: usize,
    /// Operations under way in the file system, in all.
    pub operations: usize,
    /// The same, of one principal.
    pub operations_per_principal: usize,
    /// How long dataplane may take to confirm a fence before the operator is told.
    pub fence_wait: Duration,
    /// How long the bindings of a detached open live on.
    pub linger: Duration,
    /// Tombstones in all; beyond it the oldest is forgotten.
    pub tombstones: usize,
    /// How long a tombstone is kept.
    pub tombstone_keep: Duration,
    /// Locks of one request, one open, one file.
    pub locks: LockLimits,
    /// The longest that a lock request may wait, whatever it asks for.
    pub lock_wait_max: Duration,
    /// The longest that an open request may wait, whatever it asks for.
    pub open_wait_max: Duration,
    /// Requests that wait for a detached open to go, in all.
    pub contenders: usize,
    /// The same, of one principal.
    pub contenders_per_principal: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 4096,
            sessions_per_principal: 1024,
            opens: 262_144,
            opens_per_principal: 131_072,
            opens_per_session: 65_536,
            bindings_per_open: 64,
            operations: 1024,
            operations_per_principal: 256,
            fence_wait: Duration::from_secs(10),
            linger: Duration::from_secs(5),
            tombstones: 65_536,
            tombstone_keep: Duration::from_secs(7 * 24 * 3600),
            locks: LockLimits::default(),
            lock_wait_max: Duration::from_secs(600),
            open_wait_max: Duration::from_secs(600),
            contenders: 4096,
            contenders_per_principal: 1024,
        }
    }
}
