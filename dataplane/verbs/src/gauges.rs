//! Process-wide counts of what this crate holds: one atomic each, raised on creation and lowered on drop.
//!
//! A gauge that doesn't come back to where it was after a connection has gone is a leak: the tests check that.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One count that goes up and down (or, for totals, only up).
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    pub(crate) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Relaxed);
    }

    fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

pub(crate) static MAPPED_BYTES: Gauge = Gauge::new();
pub(crate) static PROTECTION_DOMAINS: Gauge = Gauge::new();
pub(crate) static MEMORY_REGISTRATIONS: Gauge = Gauge::new();
pub(crate) static PINNED_BYTES: Gauge = Gauge::new();
pub(crate) static REGISTRATIONS_TOTAL: Gauge = Gauge::new();
pub(crate) static COMPLETION_QUEUES: Gauge = Gauge::new();
pub(crate) static QUEUE_PAIRS: Gauge = Gauge::new();
pub(crate) static CM_IDS: Gauge = Gauge::new();
pub(crate) static OUTSTANDING_WORK_REQUESTS: Gauge = Gauge::new();

/// A reading of all counts. Each is exact; together they are not one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Bytes of anonymous memory mapped by [`crate::memory::Memory`].
    pub mapped_bytes: u64,
    /// Protection domains.
    pub protection_domains: u64,
    /// Memory registrations (MRs) that exist now.
    pub memory_registrations: u64,
    /// Bytes pinned by the registrations that exist now.
    pub pinned_bytes: u64,
    /// Registrations made since the process started; never goes down.
    pub registrations_total: u64,
    /// Completion queues.
    pub completion_queues: u64,
    /// Queue pairs.
    pub queue_pairs: u64,
    /// Connection manager ids: listeners, connections, and connect requests nobody has answered yet.
    pub cm_ids: u64,
    /// Work requests posted whose completion has not been handed out yet.
    pub outstanding_work_requests: u64,
}

/// Reads all counts.
pub fn gauges() -> Gauges {
    Gauges {
        mapped_bytes: MAPPED_BYTES.read(),
        protection_domains: PROTECTION_DOMAINS.read(),
        memory_registrations: MEMORY_REGISTRATIONS.read(),
        pinned_bytes: PINNED_BYTES.read(),
        registrations_total: REGISTRATIONS_TOTAL.read(),
        completion_queues: COMPLETION_QUEUES.read(),
        queue_pairs: QUEUE_PAIRS.read(),
        cm_ids: CM_IDS.read(),
        outstanding_work_requests: OUTSTANDING_WORK_REQUESTS.read(),
    }
}
