//! The engine: channels, bindings, requests; no policy.
//!
//! ```text
//!  acceptors ──adopt──► worker 0..N (epoll loop; a channel stays on one) ──jobs──► storage threads
//!                        │  ▲                                                        │
//!     ControlPort ◄──────┘  └── redeemed, fence, restrict, snapshot ── link          └─► done ─► worker
//! ```
//!
//! | module | owns |
//! |---|---|
//! | `worker` | the loop: wake-ups, fairness, sleeping, deadlines |
//! | `channel` | one channel: its operations, buffers and turns |
//! | `door` | peers without a binding: how many, and who gives way |
//! | `receive` | frames that come in |
//! | `ending` | why and how a channel ends |
//! | `bind` | hello and bind |
//! | `binding` | keys and state of the bindings of a channel |
//! | `request` | one request, from its checks to its reply |
//! | `transfer` | the bytes of reads and writes |
//! | `written` | when the writes of a turn returned, and their answers |
//! | `filled` | pieces of a read on their way from the disk |
//! | `place`, `pinned`, `pinner` | long reads straight from pages that are pinned for the device |
//! | `views` | long reads straight from a mapping, over tcp |
//! | `reply` | frames that go out |
//! | `fence` | draining a binding |
//! | `restrict` | rules for what I/O may touch, and waiting for I/O begun before them |
//! | `map` | one-sided reads: what is exposed, for whom, until when |
//! | `mapper` | the threads that do it, and the limits of all channels |
//! | `registry` | which worker has which binding |
//! | `backend` | file access |
//! | `direct` | the way past the page cache, for volumes that ask for it |
//! | `storage` | storage threads: what would hold a worker up |
//! | `ring` | direct reads through io_uring, without a thread |
//! | `latch` | flushes that failed, for each open |
//! | `ready` | which requests of a channel have something to do |
//! | `inbox` | what other threads leave for a worker |

mod backend;
mod bind;
mod binding;
mod channel;
mod descriptor;
mod direct;
mod door;
mod ending;
mod fence;
mod filled;
mod inbox;
mod latch;
mod map;
mod mapper;
mod pinned;
mod pinner;
mod place;
mod ready;
mod receive;
mod registry;
mod reply;
mod request;
mod restrict;
mod ring;
mod storage;
mod straight;
mod transfer;
mod views;
mod worker;
mod written;

pub use backend::{FileIo, KernelFile, Opener, status_of};
pub use bind::Redemption;
pub use direct::DirectIo;
pub use pinned::{FileId, Stamp};
pub use registry::{HeldBinding, Snapshot};

use crate::config::{EngineConfig, Limits, MapConfig};
use crate::gauges::Gauges;
use crate::last_write::LastWrite;
use crossbeam::atomic::AtomicCell;
use door::{Answer, Door};
use holdfast_shared::types::{FRAME_BYTES_MAX, Status};
use holdfast_shared::wire::link::{
    Fence, LinkBinding, MAPPABLE_AS_SAID, Redeem, Restrict, Restricted, Withdraw, Wrote,
};
use holdfast_transport::verbs::Lanes;
use holdfast_transport::{Channel, Setup};
use holdfast_verbs::memory::Pool;
use inbox::{Inbox, Letter};
use mapper::{MapThreads, Maps, Withdrawal};
use parking_lot::Mutex;
use pinned::PinnedFiles;
use registry::Registry;
use ring::StorageRing;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;
use storage::Storage;
use views::Views;

/// Requests a channel may have in flight before its first binding.
pub const CREDITS_UNBOUND: u16 = 2;
/// Message buffers of a channel beyond its credits, in each direction: for what is sent unasked, and so that a peer over
/// its credits is noticed instead of being held up.
pub(crate) const SPARE: usize = 2;
/// Operations kept free for frames that end a channel or a binding.
pub(crate) const RESERVE: usize = 2;

/// A channel of a worker; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ConnKey {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// Where the answer to a bind goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) worker: usize,
    pub(crate) conn: ConnKey,
}

/// How the engine reaches control: the link in the process, anything in tests. No call may wait.
pub trait ControlPort: Send + Sync {
    /// Carries a bind request, its `id` for the port to set. The answer comes through [`Engine::redeemed`].
    ///
    /// # Errors
    /// `Unavailable` while control is away.
    fn redeem(&self, ticket: Ticket, redeem: Redeem) -> Result<(), Status>;
    /// The binding is fenced.
    fn fenced(&self, fence: Fence);
    /// The binding ended by itself.
    fn released(&self, binding: LinkBinding);
    /// The rules are in force, and the I/O begun before has ended.
    fn restricted(&self, restricted: Restricted);
    /// Nothing of the file is mapped any more which the withdrawal of that number is about.
    fn withdrawn(&self, id: u64);
}

/// What does not change while the engine runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Threads and memory.
    pub engine: EngineConfig,
    /// Limits.
    pub limits: Limits,
    /// One-sided reads.
    pub map: MapConfig,
    /// This run of the process; also in the service blob.
    pub instance: [u8; 16],
    /// The write verifier of this run.
    pub verifier: u64,
}

/// The running engine.
pub struct Engine {
    settings: Arc<Settings>,
    gauges: Arc<Gauges>,
    port: Arc<dyn ControlPort>,
    registry: Arc<Registry>,
    last_write: Arc<LastWrite>,
    door: Arc<Door>,
    inboxes: Vec<Arc<Inbox>>,
    pools: Vec<Pool>,
    messages: Pool,
    turn: AtomicUsize,
    stopped: AtomicCell<bool>,
    threads: Mutex<(Vec<JoinHandle<()>>, Option<Storage>)>,
    lanes: Option<Arc<Lanes>>,
    mapping: Mutex<Option<MapThreads>>,
    pinner: Mutex<Option<JoinHandle<()>>>,
}

/// A worker's bulk buffers.
fn bulk_pool(config: &EngineConfig, buffers: usize) -> io::Result<Pool> {
    if config.huge_pages {
        match Pool::new_reserved(config.buffer_bytes, buffers) {
            Ok(pool) => return Ok(pool),
            Err(error) => {
                tracing::warn!(
                    %error,
                    bytes = config.buffer_bytes * buffers,
                    "not enough huge pages are set aside (vm.nr_hugepages): ordinary memory is used"
                );
            }
        }
    }
    Pool::new(config.buffer_bytes, buffers)
}

/// A worker's ring for direct reads. `None`: storage threads do them.
fn storage_ring(config: &EngineConfig, pool: &Pool, gauges: &Gauges) -> Option<StorageRing> {
    if !config.io_uring {
        return None;
    }
    match StorageRing::new(pool.clone()) {
        Ok(ring) => {
            gauges.file_rings.add(1);
            Some(ring)
        }
        Err(error) => {
            tracing::info!(%error, "no io_uring here: storage threads do direct reads");
            None
        }
    }
}

impl Engine {
    /// Starts workers and storage threads.
    ///
    /// # Errors
    /// The kernel's, when memory, descriptors or threads can't be had.
    pub fn start(settings: Settings, port: Arc<dyn ControlPort>, opener: Opener) -> io::Result<Arc<Self>> {
        let gauges = Arc::new(Gauges::default());
        let settings = Arc::new(settings);
        let config = &settings.engine;
        let workers = config.worker_count();
        let messages = Pool::new(FRAME_BYTES_MAX, (config.message_pool_bytes / FRAME_BYTES_MAX).max(8))?;
        let each = (config.pool_bytes / workers / config.buffer_bytes).max(1);
        let bulk: Vec<Pool> = (0..workers).map(|_| bulk_pool(config, each)).collect::<io::Result<_>>()?;
        gauges.set_pools(bulk.clone(), messages.clone());
        let inboxes: Vec<Arc<Inbox>> =
            (0..workers).map(|_| Inbox::new().map(Arc::new)).collect::<io::Result<_>>()?;
        let last_write = Arc::new(LastWrite::default());
        let storage = Storage::start(
            config.storage_threads,
            config.storage_queue,
            inboxes.clone(),
            Arc::clone(&gauges),
            Arc::clone(&last_write),
        )?;
        let registry = Arc::new(Registry::default());
        let latches = Arc::new(latch::Latches::default());
        let limits = &settings.limits;
        let door = Arc::new(Door::new(limits.half_open_max, limits.half_open_per_address));
        let mapping = if settings.map.enabled {
            Some(Maps::start(settings.map.clone(), Arc::clone(&gauges), inboxes.clone())?)
        } else {
            None
        };
        let maps = mapping.as_ref().map(|mapping| Arc::clone(&mapping.maps));
        let (pins, pinner) = pinner::start(inboxes.clone())?;
        let mut threads = Vec::new();
        for (n, pool) in bulk.iter().enumerate() {
            let cx = channel::Cx {
                worker: n,
                settings: Arc::clone(&settings),
                bulk: pool.clone(),
                messages: messages.clone(),
                storage: storage.sender(storage_ring(config, pool, &gauges)),
                port: Arc::clone(&port),
                registry: Arc::clone(&registry),
                latches: Arc::clone(&latches),
                last_write: Arc::clone(&last_write),
                door: Arc::clone(&door),
                opener: Arc::clone(&opener),
                gauges: Arc::clone(&gauges),
                maps: maps.clone(),
                pinned: PinnedFiles::new(n, config, pins.clone(), Arc::clone(&gauges)),
                views: Views::new(n, config, pins.clone(), Arc::clone(&gauges)),
                now: std::time::Instant::now(),
            };
            let worker = worker::Worker::new(cx, Arc::clone(&inboxes[n]))?;
            threads
                .push(std::thread::Builder::new().name(format!("worker-{n}")).spawn(move || worker.run())?);
        }
        let mut pools = bulk;
        pools.push(messages.clone());
        Ok(Arc::new(Self {
            settings,
            gauges,
            port,
            registry,
            last_write,
            door,
            inboxes,
            pools,
            messages,
            turn: AtomicUsize::new(0),
            stopped: AtomicCell::new(false),
            threads: Mutex::new((threads, Some(storage))),
            lanes: maps.as_ref().map(|maps| Arc::clone(maps.lanes())),
            mapping: Mutex::new(mapping),
            pinner: Mutex::new(Some(pinner)),
        }))
    }

    /// The counts.
    pub fn gauges(&self) -> &Arc<Gauges> {
        &self.gauges
    }

    /// What it was started with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All pools whose buffers are used on channels.
    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// Where verbs listeners leave the lanes for one-sided reads; `None`: there are none.
    pub fn lanes(&self) -> Option<&Arc<Lanes>> {
        self.lanes.as_ref()
    }

    /// Admits a peer: what its channel is to be made with, or `None` if there is no room for one more. An older channel
    /// that has not been bound yet may have to end for it.
    pub fn setup(&self, peer: SocketAddr) -> Option<Setup> {
        let limits = &self.settings.limits;
        if self.gauges.channels.read() >= limits.channels_max as u64 || self.stopped.load() {
            self.gauges.refused_total.add(1);
            return None;
        }
        match self.door.arrive(peer, Instant::now()) {
            Answer::Welcome => {}
            Answer::InsteadOf { worker, id } => self.inboxes[worker].send(Letter::Evict { id }),
            Answer::Full => {
                self.gauges.refused_total.add(1);
                return None;
            }
        }
        let credits = usize::from(self.settings.engine.credits);
        let receives: Option<Vec<_>> = (0..usize::from(CREDITS_UNBOUND) + SPARE)
            .map(|_| self.messages.take().map(|buffer| (0, buffer)))
            .collect();
        let Some(receives) = receives else {
            self.gauges.refused_total.add(1);
            return None;
        };
        Some(Setup {
            depth: 2 * credits + RESERVE,
            receives_max: credits + SPARE,
            pools: self.pools.clone(),
            receives,
        })
    }

    /// Takes a channel made with [`Engine::setup`] over.
    pub fn adopt(&self, channel: Box<dyn Channel>) {
        let worker = self.turn.fetch_add(1, Ordering::Relaxed) % self.inboxes.len();
        // Counted here, not by the worker: a burst of peers must not slip past the limit.
        self.gauges.channels.add(1);
        self.gauges.half_open_channels.add(1);
        let id = self.door.adopted(channel.peer(), worker);
        self.inboxes[worker].send(Letter::Channel { channel, id });
    }

    /// When anything was last written; [`crate::link`] says where that is kept.
    pub fn last_write(&self) -> &LastWrite {
        &self.last_write
    }

    /// What bindings that are gone wrote, by open; what lives is in [`Engine::snapshot`], to be taken before.
    pub fn wrote(&self) -> Vec<Wrote> {
        self.registry.wrote()
    }

    /// Control's answer to a bind.
    pub fn redeemed(&self, redemption: Redemption) {
        let worker = redemption.ticket.worker;
        let Some(inbox) = self.inboxes.get(worker) else {
            return tracing::error!(worker, "an answer for a worker that does not exist");
        };
        if let Some(grant) = redemption.granted() {
            self.registry.add(grant, worker);
        }
        inbox.send(Letter::Redeemed(redemption));
    }

    /// Control wants a binding fenced. One that is gone already is answered at once: nothing of it is under way.
    pub fn fence(&self, fence: Fence) {
        match self.registry.worker(fence.binding) {
            Some(worker) => self.inboxes[worker].send(Letter::Fence(fence)),
            None => self.port.fenced(fence),
        }
    }

    /// Control has new rules for an open, ordered as [`holdfast_shared::types::io_rules_ordered`] says. Answered when they
    /// are in force and the I/O that its bindings began before has ended; at once if it has none. Rules older than ones
    /// that came over the same link are answered too, and the newer ones stay.
    pub fn restrict(&self, restrict: Restrict) {
        let told = Restricted { open: restrict.open, version: restrict.version };
        match self.registry.restrict(restrict, &self.port) {
            Some((restriction, workers)) => {
                for worker in workers {
                    self.inboxes[worker].send(Letter::Restrict(Arc::clone(&restriction)));
                }
            }
            None => self.port.restricted(told),
        }
    }

    /// Control is about to take bytes away from a file. Answered when no byte of it is served one-sided any more; and none is
    /// mapped before [`Engine::mappable`].
    pub fn withdraw(&self, withdraw: Withdraw) {
        let mapping = self.mapping.lock();
        let Some(threads) = &*mapping else { return self.port.withdrawn(withdraw.id) };
        let file = FileId(withdraw.device, withdraw.inode);
        // Before the workers look: what is mapped from now on is refused.
        threads.maps.bar(withdraw.id, file);
        let withdrawal = Arc::new(Withdrawal::new(withdraw.id, file, Arc::clone(&self.port)));
        for inbox in &self.inboxes {
            inbox.send(Letter::Withdraw(Arc::clone(&withdrawal)));
        }
    }

    /// The change of that number has ended; [`MAPPABLE_AS_SAID`]: all that was asked for before the last [`Engine::snapshot`],
    /// and not since.
    pub fn mappable(&self, id: u64) {
        match &*self.mapping.lock() {
            Some(threads) if id == MAPPABLE_AS_SAID => threads.maps.forget_old_bars(),
            Some(threads) => threads.maps.unbar(id),
            None => {}
        }
    }

    /// Begins to gather all bindings there are, those included whose grants have just been left for a worker. For a control
    /// that comes after another: rules may come in any version then, and restrictions not yet confirmed never are.
    pub fn snapshot(&self) -> Snapshot {
        self.registry.forget_versions();
        if let Some(threads) = &*self.mapping.lock() {
            threads.maps.bars_are_old();
        }
        let (to, from) = std::sync::mpsc::channel();
        for inbox in &self.inboxes {
            inbox.send(Letter::Snapshot(to.clone()));
        }
        Snapshot::new(from, self.inboxes.len())
    }

    /// Ends all channels, finishes storage operations, and ends all threads. Idempotent.
    pub fn stop(&self) {
        if self.stopped.swap(true) {
            return;
        }
        for inbox in &self.inboxes {
            inbox.send(Letter::Stop);
        }
        let (threads, storage) = &mut *self.threads.lock();
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker had panicked");
            }
        }
        if let Some(mut storage) = storage.take() {
            storage.stop();
        }
        if let Some(mapping) = self.mapping.lock().take() {
            mapping.stop();
        }
        // It ends with the last worker's end of its queue.
        if self.pinner.lock().take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the pinning thread had panicked");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("workers", &self.inboxes.len()).finish_non_exhaustive()
    }
}
