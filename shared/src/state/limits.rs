//! How much there may be. Every limit answers [`Status::TooMany`](crate::types::Status::TooMany) when it is reached.

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
        }
    }
}
