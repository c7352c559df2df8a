//! Two ends of one connection in one process, over the first RDMA device of this host.
//!
//! Without a device the tests say so and pass; with HOLDFAST_REQUIRE_RDMA=1 that is a failure.

use std::collections::VecDeque;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_verbs::memory::{Buffer, Pool, Region};
use holdfast_verbs::{
    Access, Completion, Connection, ConnectionConfig, Device, Listener, ListenerLimits, Local,
    MemoryRegistration, Operation, Outgoing, ProtectionDomain, QueueDepths, Remote, WorkRequest,
};
use parking_lot::{Mutex, MutexGuard};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One test at a time: the gauges are the process's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The address of an RDMA device, and the right to be the only test that runs; `None` if there is none.
pub(crate) fn rdma() -> Option<(MutexGuard<'static, ()>, SocketAddr)> {
    let guard = ONE_AT_A_TIME.lock();
    let devices = Device::list().expect("listing devices");
    let address = devices.iter().find_map(|device| device.ipv4_addresses().ok()?.first().copied());
    if let Some(address) = address {
        return Some((guard, SocketAddr::new(address.into(), 0)));
    }
    assert!(std::env::var_os("HOLDFAST_REQUIRE_RDMA").is_none_or(|value| value != "1"), "no RDMA device");
    // Not by macro: the test harness would swallow it.
    let _ = writeln!(std::io::stderr(), "skipped: no RDMA device");
    None
}

/// One end: a connection with a pool of 64 buffers of 4 KiB, and a region of 1 MiB the peer may read and write.
pub(crate) struct End {
    pub(crate) connection: Connection,
    pub(crate) pool: Pool,
    pub(crate) pool_registration: Arc<MemoryRegistration>,
    pub(crate) region: Arc<Region>,
    pub(crate) region_registration: Arc<MemoryRegistration>,
    pub(crate) done: VecDeque<Completion>,
}

pub(crate) const BUFFER: usize = 4096;
pub(crate) const BUFFERS: usize = 64;
pub(crate) const REGION: usize = 1 << 20;

struct Memory {
    pool: Pool,
    pool_registration: Arc<MemoryRegistration>,
    region: Arc<Region>,
    region_registration: Arc<MemoryRegistration>,
}

impl Memory {
    fn new(domain: &Arc<ProtectionDomain>, access: Access) -> Self {
        let pool = Pool::new(BUFFER, BUFFERS).unwrap();
        let region = Region::new(REGION).unwrap();
        Self {
            pool_registration: MemoryRegistration::of_pool(domain, &pool).unwrap(),
            region_registration: MemoryRegistration::of_region(domain, &region, access).unwrap(),
            pool,
            region,
        }
    }

    fn receives(&self, count: u64) -> impl Iterator<Item = (u64, Local)> + '_ {
        (0..count).map(|token| {
            (token, Local::buffer(&self.pool_registration, self.pool.take().unwrap(), 0..BUFFER).unwrap())
        })
    }

    fn end(self, connection: Connection) -> End {
        End {
            connection,
            pool: self.pool,
            pool_registration: self.pool_registration,
            region: self.region,
            region_registration: self.region_registration,
            done: VecDeque::new(),
        }
    }
}

pub(crate) fn config() -> ConnectionConfig {
    ConnectionConfig {
        depths: QueueDepths { send: 32, receive: 32, inline: 64 },
        ..ConnectionConfig::default()
    }
}

/// Client and server, connected, each with `receives` receives posted (tokens from 0 up).
pub(crate) fn pair(address: SocketAddr, receives: u64) -> (End, End) {
    pair_with(address, receives, &config(), Access::RemoteReadWrite)
}

pub(crate) fn pair_with(
    address: SocketAddr,
    receives: u64,
    config: &ConnectionConfig,
    access: Access,
) -> (End, End) {
    let (sender, requests) = crossbeam::channel::unbounded();
    let listener =
        Listener::bind(address, ListenerLimits::default(), move |request| drop(sender.send(request)))
            .unwrap();
    let target = listener.local_address().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let request = requests.recv_timeout(PATIENCE).unwrap();
            assert_eq!(request.private_data(), b"hello");
            assert_eq!(request.peer_address().ip(), address.ip());
            let domain = ProtectionDomain::new(request.device()).unwrap();
            let memory = Memory::new(&domain, access);
            let mut incoming = request.connection(&domain, config).unwrap();
            for (token, local) in memory.receives(receives) {
                incoming.post_receive(token, local).unwrap();
            }
            let connection = incoming.accept(b"welcome").unwrap();
            connection.wait_established(PATIENCE).unwrap();
            memory.end(connection)
        });
        let outgoing = Outgoing::resolve(target, PATIENCE).unwrap();
        let domain = ProtectionDomain::new(outgoing.device()).unwrap();
        let memory = Memory::new(&domain, access);
        let mut prepared = outgoing.prepare(&domain, config).unwrap();
        for (token, local) in memory.receives(receives) {
            prepared.post_receive(token, local).unwrap();
        }
        let client = memory.end(prepared.connect(b"hello").unwrap());
        assert_eq!(client.connection.private_data(), b"welcome");
        let server = server.join().unwrap();
        assert_eq!(listener.half_open(), 0);
        (client, server)
    })
}

impl End {
    pub(crate) fn buffer(&self, bytes: &[u8]) -> Buffer {
        let mut buffer = self.pool.take().expect("a free buffer");
        buffer[..bytes.len()].copy_from_slice(bytes);
        buffer
    }

    /// A request with a fresh buffer that holds `bytes`.
    pub(crate) fn request(&self, token: u64, operation: Operation, bytes: &[u8]) -> WorkRequest {
        let local = Local::buffer(&self.pool_registration, self.buffer(bytes), 0..bytes.len()).unwrap();
        WorkRequest { token, operation, local, signaled: true }
    }

    /// A request on part of the region.
    pub(crate) fn region_request(
        &self,
        token: u64,
        operation: Operation,
        range: std::ops::Range<usize>,
    ) -> WorkRequest {
        let local = Local::region(&self.region_registration, range).unwrap();
        WorkRequest { token, operation, local, signaled: true }
    }

    /// Where the peer finds byte `offset` of the region.
    pub(crate) fn remote(&self, offset: usize) -> Remote {
        Remote {
            addr: self.region_registration.addr() + offset as u64,
            rkey: self.region_registration.rkey(),
        }
    }

    pub(crate) fn post(&mut self, request: WorkRequest) {
        let mut queue = VecDeque::from([request]);
        assert_eq!(self.connection.post(&mut queue).unwrap(), 1);
    }

    /// The next completion; sleeps on the descriptor in between, as a program would.
    pub(crate) fn next(&mut self) -> Completion {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(completion) = self.done.pop_front() {
                return completion;
            }
            let mut batch = Vec::new();
            self.connection.poll(&mut batch).unwrap();
            self.done.extend(batch);
            if self.done.is_empty() && self.connection.arm().unwrap() {
                sleep(&self.connection, deadline);
            }
        }
    }

    /// Everything that completes until nothing is in flight.
    pub(crate) fn drain(&mut self) -> Vec<Completion> {
        let mut all = Vec::new();
        while self.connection.in_flight() > 0 || !self.done.is_empty() {
            all.push(self.next());
        }
        all
    }

    pub(crate) fn region_bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.region.copy_out(offset, &mut bytes).unwrap();
        bytes
    }
}

/// Sleeps until the connection's descriptor is readable.
pub(crate) fn sleep(connection: &Connection, deadline: Instant) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout =
        Timespec { tv_sec: left.as_secs().try_into().unwrap(), tv_nsec: left.subsec_nanos().into() };
    let ready = poll(&mut [PollFd::new(connection, PollFlags::IN)], Some(&timeout)).unwrap();
    assert!(ready > 0, "nothing happened in time");
}
