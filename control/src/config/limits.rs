//! How much there may be of everything.

use holdfast_shared::state::Limits as AuthorityLimits;
use holdfast_shared::state::lock::LockLimits;
use serde::Deserialize;
use std::time::Duration;

/// Limits. A request beyond one is refused with `TooMany`; a connection beyond one is closed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sessions in all. Default: 4096.
    pub sessions: usize,
    /// Sessions of one principal. Default: 1024.
    pub sessions_per_principal: usize,
    /// Opens in all. Default: 262144.
    pub opens: usize,
    /// Opens of one principal. Default: 131072.
    pub opens_per_principal: usize,
    /// Opens of one session. Default: 65536.
    pub opens_per_session: usize,
    /// Bindings of one open, at most 1024: those that outlive a resume stand in one record of the journal. Default: 64.
    pub bindings_per_open: usize,
    /// Operations under way in the file system. Default: 1024.
    pub operations: usize,
    /// The same, of one principal. Default: 256.
    pub operations_per_principal: usize,
    /// How long the bindings of a detached open go on, milliseconds: a client that is back sooner has lost no read or write.
    /// Default: 5000.
    pub linger_ms: u64,
    /// Opens that ended without their client's wish and of which it can still be told; the oldest is forgotten first.
    /// Default: 65536.
    pub tombstones: usize,
    /// How long that is, seconds; it counts anew at each start of the server, as hold times do. Default: 604800, a week.
    pub tombstone_keep_s: u64,
    /// Locks of one request, at most 1024: they stand in one record of the journal. Default: 64.
    pub locks_per_request: usize,
    /// Locks of one open, at most 1024: they stand in one record of the journal. Default: 512.
    pub locks_per_open: usize,
    /// Locks of one file, and locks waited for on it. Default: 1024.
    pub locks_per_file: usize,
    /// Requests that wait for locks of one file. Default: 256.
    pub lock_waiters_per_file: usize,
    /// The longest that a request for a lock, or for a file that is held, may ask to wait, milliseconds.
    /// Default: 600000.
    pub wait_max_ms: u64,
    /// Requests that wait for a file that is held. Default: 4096.
    pub waiting_opens: usize,
    /// The same, of one principal. Default: 1024.
    pub waiting_opens_per_principal: usize,
    /// Descriptors of volumes' files that a restart takes back. Opens beyond them are found and looked at before anybody is let
    /// in, but kept by their file's handle alone until their client resumes them. What that gives up: a file that is removed
    /// beside the server in between is lost, where a descriptor would have kept it. Default: 0, which means three
    /// quarters of what the process may have (`ulimit -Hn`, systemd's `LimitNOFILE`).
    pub reopened_files: usize,
    /// Threads for them. Default: 16.
    pub file_threads: usize,
    /// Requests of one session under way; the next is read when one is answered. Default: 32.
    pub requests_per_session: usize,
    /// Bind requests from dataplane under way. Default: 256.
    pub binds: usize,
    /// Connections whose handshake is not finished. The oldest is closed for a newer one. Default: 128.
    pub half_open_handshakes: usize,
    /// The same, from one IPv4 address or IPv6 /64 network; more are closed. Default: 32.
    pub half_open_per_address: usize,
    /// Time for a handshake, hello included, milliseconds. Default: 10000.
    pub handshake_ms: u64,
    /// Time for a peer to send the rest of a message it has begun, or to take an answer, milliseconds.
    /// Default: 30000.
    pub message_ms: u64,
    /// How long a connection may be silent before the kernel asks whether the peer is there, seconds. Default: 30.
    pub keepalive_s: u64,
    /// Time for dataplane to confirm a fence before the operator is told, milliseconds. Default: 10000.
    pub fence_wait_ms: u64,
    /// Time for what is under way to be journalled at a clean stop, milliseconds. Default: 3000.
    pub stop_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let authority = AuthorityLimits::default();
        Self {
            sessions: authority.sessions,
            sessions_per_principal: authority.sessions_per_principal,
            opens: authority.opens,
            opens_per_principal: authority.opens_per_principal,
            opens_per_session: authority.opens_per_session,
            bindings_per_open: authority.bindings_per_open,
            operations: authority.operations,
            operations_per_principal: authority.operations_per_principal,
            linger_ms: 5_000,
            tombstones: authority.tombstones,
            tombstone_keep_s: 7 * 24 * 3600,
            locks_per_request: authority.locks.batch,
            locks_per_open: authority.locks.per_open,
            locks_per_file: authority.locks.per_file,
            lock_waiters_per_file: authority.locks.waiters_per_file,
            wait_max_ms: 600_000,
            waiting_opens: authority.contenders,
            waiting_opens_per_principal: authority.contenders_per_principal,
            reopened_files: 0,
            file_threads: 16,
            requests_per_session: 32,
            binds: 256,
            half_open_handshakes: 128,
            half_open_per_address: 32,
            handshake_ms: 10_000,
            message_ms: 30_000,
            keepalive_s: 30,
            fence_wait_ms: 10_000,
            stop_ms: 3_000,
        }
    }
}

impl Limits {
    /// Those that the authority keeps.
    pub fn authority(&self) -> AuthorityLimits {
        AuthorityLimits {
            sessions: self.sessions,
            sessions_per_principal: self.sessions_per_principal,
            opens: self.opens,
            opens_per_principal: self.opens_per_principal,
            opens_per_session: self.opens_per_session,
            bindings_per_open: self.bindings_per_open,
            operations: self.operations,
            operations_per_principal: self.operations_per_principal,
            fence_wait: Duration::from_millis(self.fence_wait_ms),
            linger: Duration::from_millis(self.linger_ms),
            tombstones: self.tombstones,
            tombstone_keep: Duration::from_secs(self.tombstone_keep_s),
            locks: LockLimits {
                batch: self.locks_per_request,
                per_open: self.locks_per_open,
                per_file: self.locks_per_file,
                waiters_per_file: self.lock_waiters_per_file,
            },
            lock_wait_max: Duration::from_millis(self.wait_max_ms),
            open_wait_max: Duration::from_millis(self.wait_max_ms),
            contenders: self.waiting_opens,
            contenders_per_principal: self.waiting_opens_per_principal,
        }
    }

    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(&self) -> Result<(), String> {
        let counts = [
            ("sessions", self.sessions),
            ("sessions_per_principal", self.sessions_per_principal),
            ("opens", self.opens),
            ("opens_per_principal", self.opens_per_principal),
            ("opens_per_session", self.opens_per_session),
            ("bindings_per_open", self.bindings_per_open),
            ("operations", self.operations),
            ("operations_per_principal", self.operations_per_principal),
            ("file_threads", self.file_threads),
            ("requests_per_session", self.requests_per_session),
            ("binds", self.binds),
            ("half_open_handshakes", self.half_open_handshakes),
            ("half_open_per_address", self.half_open_per_address),
            ("tombstones", self.tombstones),
            ("locks_per_request", self.locks_per_request),
            ("locks_per_open", self.locks_per_open),
            ("locks_per_file", self.locks_per_file),
            ("lock_waiters_per_file", self.lock_waiters_per_file),
            ("waiting_opens", self.waiting_opens),
            ("waiting_opens_per_principal", self.waiting_opens_per_principal),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0 || *count > 1 << 24) {
            return Err(format!("limits.{name}: must be between 1 and 16777216"));
        }
        for (name, count) in [
            ("bindings_per_open", self.bindings_per_open),
            ("locks_per_request", self.locks_per_request),
            ("locks_per_open", self.locks_per_open),
        ] {
            if count > 1024 {
                return Err(format!("limits.{name}: must be at most 1024, as they stand in one record"));
            }
        }
        if self.keepalive_s == 0 || self.keepalive_s > 32_767 {
            return Err("limits.keepalive_s: must be between 1 and 32767".into());
        }
        for (name, ms) in [
            ("handshake_ms", self.handshake_ms),
            ("message_ms", self.message_ms),
            ("fence_wait_ms", self.fence_wait_ms),
            ("wait_max_ms", self.wait_max_ms),
        ] {
            if ms == 0 || ms > 3_600_000 {
                return Err(format!("limits.{name}: must be between 1 and 3600000"));
            }
        }
        if self.linger_ms > 3_600_000 {
            return Err("limits.linger_ms: must be at most 3600000".into());
        }
        Ok(())
    }
}
