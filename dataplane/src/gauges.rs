//! Counts for the operator. Each is an atomic of its own; together they are not one instant.
//!
//! | name | meaning |
//! |---|---|
//! | `channels`, `half_open_channels` | channels; those of them that never had a binding |
//! | `bindings` | live bindings, those being fenced included |
//! | `requests_bind_total` … `requests_map_total` | frames taken, by opcode |
//! | `descriptors_given_total` | descriptors of opens handed to clients on this host |
//! | `mappings`, `mapping_bytes` | ranges exposed for one-sided reads, those being made and withdrawn included; bytes they pin |
//! | `pinned_file_bytes` | of files that are read again and again, for long reads without a copy; those being pinned and unpinned included |
//! | `reads_pinned_total` | reads that were placed from them |
//! | `viewed_file_bytes` | of files that are mapped, for long reads over tcp with one copy less; those being unmapped included |
//! | `pieces_viewed_total` | pieces of reads that were sent from them |
//! | `file_rings`, `file_rings_registered` | workers with io_uring; those whose buffers are registered with it, from their first direct operation on |
//! | `reads_direct_total`, `writes_direct_total` | pieces of reads that went past the page cache through io_uring, and of writes that did so by storage threads |
//! | `pieces_straight_total` | pieces of reads and writes that went between a file and the memory of a client on this host, without a buffer |
//! | `requests_in_flight` | reads, writes and flushes taken and not answered |
//! | `bytes_read_total`, `bytes_written_total` | bytes of answered reads and writes |
//! | `held_back_total` | bindings told to a control that came after the one that granted them, each time |
//! | `lock_conflicts_total` | reads and writes refused for the locks of others |
//! | `restricts_pending` | channels on which new rules wait for requests begun before, summed over all rules |
//! | `refused_total` | channels turned away or ended for misbehaviour, and binds refused |
//! | `buffers_free`, `buffers_total` | bulk buffers |
//! | `message_buffers_free`, `message_buffers_total` | message buffers |
//! | `storage_queue`, `storage_handovers_total` | jobs at storage threads and with io_uring now; jobs handed to threads ever |
//! | `polls_total`, `wakeups_total` | rounds of all workers; times one woke from sleep |
//! | `mrs`, `pinned_bytes`, `registrations_total`, `qps`, `cqs` | of the RDMA devices |
//! | `open_fds` | descriptors of the process |
//! | `heap_allocations_total`, `heap_bytes` | of the process; only in the shipped binary |

use holdfast_shared::wire::link::Gauge;
use holdfast_verbs::memory::Pool;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One count.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Less.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Relaxed);
    }

    /// The value now.
    pub fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What the process's allocator counts: allocations ever, bytes now.
pub type HeapSource = fn() -> (u64, u64);

/// All counts of one engine.
#[derive(Debug, Default)]
#[allow(missing_docs)] // the module's table says what each is
pub struct Gauges {
    pub channels: Count,
    pub half_open_channels: Count,
    pub bindings: Count,
    pub requests_bind_total: Count,
    pub requests_unbind_total: Count,
    pub requests_read_total: Count,
    pub requests_write_total: Count,
    pub requests_flush_total: Count,
    pub requests_map_total: Count,
    pub descriptors_given_total: Count,
    pub mappings: Count,
    pub mapping_bytes: Count,
    pub pinned_file_bytes: Count,
    pub reads_pinned_total: Count,
    pub viewed_file_bytes: Count,
    pub pieces_viewed_total: Count,
    pub file_rings: Count,
    pub file_rings_registered: Count,
    pub reads_direct_total: Count,
    pub writes_direct_total: Count,
    pub pieces_straight_total: Count,
    pub requests_in_flight: Count,
    pub bytes_read_total: Count,
    pub bytes_written_total: Count,
    pub held_back_total: Count,
    pub lock_conflicts_total: Count,
    pub restricts_pending: Count,
    pub refused_total: Count,
    pub storage_queue: Count,
    pub storage_handovers_total: Count,
    pub polls_total: Count,
    pub wakeups_total: Count,
    pools: OnceLock<(Vec<Pool>, Pool)>,
    heap: OnceLock<HeapSource>,
}

impl Gauges {
    /// Tells it where the heap's counts come from; the first call counts.
    pub fn set_heap_source(&self, source: HeapSource) {
        let _ = self.heap.set(source);
    }

    pub(crate) fn set_pools(&self, bulk: Vec<Pool>, messages: Pool) {
        let _ = self.pools.set((bulk, messages));
    }

    /// Everything, by name.
    pub fn collect(&self) -> Vec<Gauge> {
        let mut all = Vec::with_capacity(52);
        let mut put = |name: &str, value: u64| all.push(Gauge { name: name.to_owned(), value });
        put("channels", self.channels.read());
        put("half_open_channels", self.half_open_channels.read());
        put("bindings", self.bindings.read());
        put("requests_bind_total", self.requests_bind_total.read());
        put("requests_unbind_total", self.requests_unbind_total.read());
        put("requests_read_total", self.requests_read_total.read());
        put("requests_write_total", self.requests_write_total.read());
        put("requests_flush_total", self.requests_flush_total.read());
        put("requests_map_total", self.requests_map_total.read());
        put("descriptors_given_total", self.descriptors_given_total.read());
        put("mappings", self.mappings.read());
        put("mapping_bytes", self.mapping_bytes.read());
        put("pinned_file_bytes", self.pinned_file_bytes.read());
        put("reads_pinned_total", self.reads_pinned_total.read());
        put("viewed_file_bytes", self.viewed_file_bytes.read());
        put("pieces_viewed_total", self.pieces_viewed_total.read());
        put("file_rings", self.file_rings.read());
        put("file_rings_registered", self.file_rings_registered.read());
        put("reads_direct_total", self.reads_direct_total.read());
        put("writes_direct_total", self.writes_direct_total.read());
        put("pieces_straight_total", self.pieces_straight_total.read());
        put("requests_in_flight", self.requests_in_flight.read());
        put("bytes_read_total", self.bytes_read_total.read());
        put("bytes_written_total", self.bytes_written_total.read());
        put("held_back_total", self.held_back_total.read());
        put("lock_conflicts_total", self.lock_conflicts_total.read());
        put("restricts_pending", self.restricts_pending.read());
        put("refused_total", self.refused_total.read());
        put("storage_queue", self.storage_queue.read());
        put("storage_handovers_total", self.storage_handovers_total.read());
        put("polls_total", self.polls_total.read());
        put("wakeups_total", self.wakeups_total.read());
        if let Some((bulk, messages)) = self.pools.get() {
            let sum = |count: fn(&Pool) -> usize| bulk.iter().map(count).sum::<usize>() as u64;
            put("buffers_free", sum(Pool::available));
            put("buffers_total", sum(Pool::capacity));
            put("message_buffers_free", messages.available() as u64);
            put("message_buffers_total", messages.capacity() as u64);
        }
        let verbs = holdfast_verbs::gauges();
        put("mrs", verbs.memory_registrations);
        put("pinned_bytes", verbs.pinned_bytes);
        put("registrations_total", verbs.registrations_total);
        put("qps", verbs.queue_pairs);
        put("cqs", verbs.completion_queues);
        put("open_fds", open_fds());
        if let Some(heap) = self.heap.get() {
            let (allocations, bytes) = heap();
            put("heap_allocations_total", allocations);
            put("heap_bytes", bytes);
        }
        all
    }

    /// One value by name, for tests.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.collect().into_iter().find(|gauge| gauge.name == name).map(|gauge| gauge.value)
    }
}

/// Descriptors of this process, without the one that lists them.
fn open_fds() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1) as u64)
}
