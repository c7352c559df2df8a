//! What the tests are written with: two ends of a channel that sleep on their wake descriptors, edge triggered, as the
//! users of channels do. A wake-up that is lost shows as a timeout.

use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::{
    Armed, Channel, Completion, Kind, Listener, Operation, OperationError, Registration, RemoteAccess, Setup,
    SubmitError,
};
use holdfast_verbs::memory::{Buffer, Pool, Region};
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Long enough for a guest that is emulated.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A transport under test.
pub(crate) trait Fabric: 'static {
    const NAME: &'static str;
    /// True if a Place that is refused may have completed before.
    const PLACE_IS_BUFFERED: bool;
    /// True if the owner of memory learns that the peer misbehaved, and not only that the channel ended.
    const OWNER_KNOWS: bool;
    /// True if a Send waits for as long as it takes until a Recv is posted.
    const SEND_WAITS: bool;

    /// False if this machine has no device for it; then that has been said.
    fn is_available() -> bool {
        true
    }

    fn pair(client: Setup, server: Setup) -> (Box<dyn Channel>, Box<dyn Channel>);
}

/// A transport that connects to where one listens.
pub(crate) trait Listening: Fabric {
    fn listen() -> Box<dyn Listener>;
    fn connect(address: SocketAddr, setup: Setup) -> io::Result<Box<dyn Channel>>;
}

/// Sizes of both ends.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) depth: usize,
    pub(crate) receives: usize,
    pub(crate) buffer_len: usize,
    pub(crate) buffers: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { depth: 16, receives: 16, buffer_len: 64 << 10, buffers: 64 }
    }
}

/// One end.
pub(crate) struct End {
    pub(crate) channel: Box<dyn Channel>,
    pub(crate) pool: Pool,
    pub(crate) done: VecDeque<Completion>,
    batch: Vec<Completion>,
    epoll: OwnedFd,
}

/// Tokens of the receives that are posted from the beginning.
pub(crate) const FIRST_RECEIVE: u64 = 1 << 32;

pub(crate) fn setup(pool: &Pool, sizes: Sizes, posted: usize) -> Setup {
    let receives = (0..posted as u64).map(|n| (FIRST_RECEIVE + n, pool.take().unwrap())).collect();
    Setup { depth: sizes.depth, receives_max: sizes.receives, pools: vec![pool.clone()], receives }
}

/// Two ends, each with `posted` receives.
pub(crate) fn ends<F: Fabric>(sizes: Sizes, posted: usize) -> (End, End) {
    let pool = || Pool::new(sizes.buffer_len, sizes.buffers).unwrap();
    let (client_pool, server_pool) = (pool(), pool());
    let (client, server) = F::pair(setup(&client_pool, sizes, posted), setup(&server_pool, sizes, posted));
    assert_eq!(client.identity(), server.identity(), "both ends see the same channel");
    assert_ne!(client.identity().client, client.identity().server);
    (End::new(client, client_pool), End::new(server, server_pool))
}

impl End {
    pub(crate) fn new(channel: Box<dyn Channel>, pool: Pool) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, channel.wake_fd(), epoll::EventData::new_u64(0), flags).unwrap();
        Self { channel, pool, done: VecDeque::new(), batch: Vec::new(), epoll }
    }

    pub(crate) fn buffer(&self) -> Buffer {
        self.pool.take().expect("the test has enough buffers")
    }

    #[track_caller]
    pub(crate) fn submit(&mut self, token: u64, operation: Operation) {
        self.channel.submit(token, operation).map_err(|rejected| rejected.error).unwrap();
    }

    #[track_caller]
    pub(crate) fn refused(&mut self, operation: Operation) -> SubmitError {
        self.channel.submit(u64::MAX, operation).expect_err("should be refused").error
    }

    #[track_caller]
    pub(crate) fn send(&mut self, token: u64, bytes: &[u8]) {
        let mut buffer = self.buffer();
        buffer[..bytes.len()].copy_from_slice(bytes);
        self.submit(token, Operation::Send { buffer, length: bytes.len() });
    }

    #[track_caller]
    pub(crate) fn recv(&mut self, token: u64) {
        let buffer = self.buffer();
        self.submit(token, Operation::Recv { buffer });
    }

    #[track_caller]
    pub(crate) fn place(&mut self, token: u64, bytes: &[u8], remote: RegionDescriptor) {
        let mut buffer = self.buffer();
        buffer[..bytes.len()].copy_from_slice(bytes);
        self.submit(token, Operation::Place { buffer, remote });
    }

    #[track_caller]
    pub(crate) fn fetch(&mut self, token: u64, remote: RegionDescriptor) {
        let buffer = self.buffer();
        self.submit(token, Operation::Fetch { buffer, remote });
    }

    pub(crate) fn register(&self, length: usize, access: RemoteAccess) -> Registration {
        self.channel.registrar().register(Region::shareable(length).unwrap(), access).unwrap()
    }

    /// Polls until nothing comes.
    pub(crate) fn pump(&mut self) -> usize {
        let mut count = 0;
        while self.channel.poll(&mut self.batch) > 0 {
            count += self.batch.len();
            self.done.extend(self.batch.drain(..));
        }
        assert!(self.batch.is_empty());
        count
    }

    /// Sleeps until this end has a completion, and takes it.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Completion {
        drive(&mut [self], |ends| !ends[0].done.is_empty());
        self.done.pop_front().unwrap()
    }

    /// Takes completions until one is of `kind`; the others' buffers are dropped.
    #[track_caller]
    pub(crate) fn next_of(&mut self, kind: Kind) -> Completion {
        loop {
            let completion = self.next();
            if completion.kind == kind {
                return completion;
            }
        }
    }

    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.done.iter().filter(|completion| completion.kind == kind).count()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.channel.ended().is_some()
    }

    /// Sleeps until the wake descriptor has an edge, and looks at nothing.
    #[track_caller]
    pub(crate) fn sleep(&self) {
        let time = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let ready = rustix::event::poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&time)).unwrap();
        assert!(ready > 0, "timed out: no edge came");
        self.drain_epoll();
    }

    fn drain_epoll(&self) {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 4];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.epoll, &mut events[..], Some(&none));
    }
}

/// Polls, arms and sleeps on all ends until `done` says so.
#[track_caller]
pub(crate) fn drive(ends: &mut [&mut End], mut done: impl FnMut(&mut [&mut End]) -> bool) {
    assert!(drive_for(ends, PATIENCE, &mut done), "timed out: a wake-up was lost, or nothing moves");
}

/// As [`drive`]; false if the time is over.
pub(crate) fn drive_for(
    ends: &mut [&mut End],
    time: Duration,
    mut done: impl FnMut(&mut [&mut End]) -> bool,
) -> bool {
    let deadline = Instant::now() + time;
    loop {
        for end in ends.iter_mut() {
            end.pump();
        }
        if done(ends) {
            return true;
        }
        let mut pending = false;
        for end in ends.iter_mut() {
            pending |= end.channel.arm() == Armed::Pending;
        }
        if pending {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut fds: Vec<PollFd<'_>> =
            ends.iter().map(|end| PollFd::new(&end.epoll, PollFlags::IN)).collect();
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let _ = rustix::event::poll(&mut fds, Some(&left));
        for end in ends.iter() {
            end.drain_epoll();
        }
    }
}

#[track_caller]
pub(crate) fn ok(completion: &Completion, kind: Kind) -> usize {
    assert_eq!(completion.kind, kind);
    completion.outcome.unwrap_or_else(|error: OperationError| panic!("{kind:?}: {error}"))
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// xorshift64*: the same numbers for the same seed.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

pub(crate) fn bytes_of(region: &Arc<Region>, start: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    region.copy_out(start, &mut bytes).unwrap();
    bytes
}
