//! Two ends of a channel for the transport benchmarks.
//!
//! ```text
//!   Peer (criterion) ── order{ping | place | fetch, count, region} ──► Driver (other process, or the same over memory)
//!                    ◄── echo, or `count` transfers and then a message ──
//! ```

use holdfast_transport::{
    Armed, Channel, Completion, Kind, Listener, Operation, RegionDescriptor, Registration, RemoteAccess,
    Setup, memory, tcp, verbs,
};
use holdfast_verbs::memory::{Buffer, Pool, Region};
use rustix::event::epoll;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of one bulk transfer.
pub const BULK_BYTES: usize = 1 << 20;
const DEPTH: u32 = 8;
const MESSAGE_BYTES: usize = 64;
/// Rounds without work before a side goes to sleep, as the engine does it.
const SPINS: u32 = 50;

fn setup() -> (Setup, Pool, Pool) {
    let messages = Pool::new(MESSAGE_BYTES, 64).expect("memory");
    let bulk = Pool::new(BULK_BYTES, DEPTH as usize).expect("memory");
    let receives = (0..16).filter_map(|t| messages.take().map(|b| (t, b))).collect();
    let pools = vec![messages.clone(), bulk.clone()];
    (Setup { depth: 32, receives_max: 32, pools, receives }, messages, bulk)
}

/// A channel and the means to wait for it.
struct End {
    channel: Box<dyn Channel>,
    messages: Pool,
    epoll: OwnedFd,
    done: Vec<Completion>,
    /// Over memory the other end lives in this thread and is run whenever this one waits.
    other: Option<Box<Driver>>,
    /// False for that other end: the thread that runs it must not sleep.
    sleeps: bool,
}

impl End {
    fn new(channel: Box<dyn Channel>, messages: Pool) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, channel.wake_fd(), epoll::EventData::new_u64(0), flags).expect("epoll");
        Self { channel, messages, epoll, done: Vec::new(), other: None, sleeps: true }
    }

    fn submit(&mut self, operation: Operation) {
        self.channel.submit(0, operation).unwrap_or_else(|r| panic!("submit: {:?}", r.error));
    }

    fn send(&mut self, message: &[u8; MESSAGE_BYTES]) {
        let mut buffer = self.messages.take().expect("few messages are in flight");
        buffer.copy_from_slice(message);
        self.submit(Operation::Send { buffer, length: MESSAGE_BYTES });
    }

    /// Polls once; sleeps if nothing came for a while. False when the channel has ended.
    fn advance(&mut self, idle: &mut u32) -> bool {
        if self.channel.poll(&mut self.done) > 0 {
            *idle = 0;
            return true;
        }
        if self.channel.ended().is_some() {
            return false;
        }
        if let Some(other) = &mut self.other {
            other.run();
            return true;
        }
        *idle += 1;
        if self.sleeps && *idle > SPINS && self.channel.arm() == Armed::Idle {
            let mut events = Vec::with_capacity(1);
            let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None);
            *idle = 0;
        }
        true
    }
}

/// The side that criterion measures.
pub struct Peer {
    end: End,
    registration: Registration,
    process: Option<Child>,
}

impl Peer {
    fn new(end: End, process: Option<Child>) -> Self {
        let region = Region::new(BULK_BYTES).expect("memory");
        let registration =
            end.channel.registrar().register(region, RemoteAccess::FetchAndPlace).expect("registered");
        Self { end, registration, process }
    }

    /// `n` messages there and back, one after the other.
    pub fn ping(&mut self, n: u64) -> Duration {
        let start = Instant::now();
        for _ in 0..n {
            self.order(Driver::PING, 1);
        }
        start.elapsed()
    }

    /// `n` transfers by the other side.
    pub fn bulk(&mut self, what: u8, n: u64) -> Duration {
        let start = Instant::now();
        self.order(what, n);
        start.elapsed()
    }

    fn order(&mut self, what: u8, count: u64) {
        let region = self.registration.descriptor();
        let mut message = [0; MESSAGE_BYTES];
        message[0] = what;
        message[8..16].copy_from_slice(&count.to_le_bytes());
        message[16..24].copy_from_slice(&region.address().to_le_bytes());
        message[24..28].copy_from_slice(&region.rkey().to_le_bytes());
        message[28..32].copy_from_slice(&region.length().to_le_bytes());
        self.end.send(&message);
        let (mut idle, mut answered) = (0, false);
        while !answered {
            assert!(self.end.advance(&mut idle), "the peer is gone");
            let mut done = std::mem::take(&mut self.end.done);
            for completion in done.drain(..) {
                completion.outcome.expect("no failure");
                if completion.kind == Kind::Recv {
                    answered = true;
                    self.end.submit(Operation::Recv { buffer: completion.buffer });
                }
            }
            self.end.done = done;
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end.channel.close();
        if let Some(process) = &mut self.process {
            // It ends by itself when the channel does.
            let _ = process.wait();
        }
    }
}

/// The other side: does as ordered.
pub struct Driver {
    end: End,
    bulk: Pool,
    what: u8,
    left: u64,
    in_flight: u64,
    region: RegionDescriptor,
    idle: u32,
}

impl Driver {
    /// Send the message back.
    pub const PING: u8 = 0;
    /// Write into the region.
    pub const PLACE: u8 = 1;
    /// Read from the region.
    pub const FETCH: u8 = 2;

    fn new(end: End, bulk: Pool) -> Self {
        Self { end, bulk, what: 0, left: 0, in_flight: 0, region: RegionDescriptor::NONE, idle: 0 }
    }

    /// One round; false when the channel has ended.
    fn run(&mut self) -> bool {
        let alive = self.end.advance(&mut self.idle);
        let mut done = std::mem::take(&mut self.end.done);
        for completion in done.drain(..) {
            match (completion.kind, completion.outcome) {
                (Kind::Recv, Ok(MESSAGE_BYTES)) => self.ordered(completion.buffer),
                (Kind::Place | Kind::Fetch, Ok(_)) => {
                    self.in_flight -= 1;
                    drop(completion.buffer);
                    self.transfer();
                }
                _ => {}
            }
        }
        self.end.done = done;
        alive
    }

    fn ordered(&mut self, buffer: Buffer) {
        let number = |at: usize| u64::from_le_bytes(buffer[at..at + 8].try_into().expect("8 bytes"));
        let word = |at: usize| u32::from_le_bytes(buffer[at..at + 4].try_into().expect("4 bytes"));
        self.what = buffer[0];
        self.region = RegionDescriptor::new(number(16), word(24), word(28));
        self.left = if self.what == Self::PING { 0 } else { number(8) };
        self.end.submit(Operation::Recv { buffer });
        self.transfer();
    }

    fn transfer(&mut self) {
        while self.left > 0 && self.in_flight < u64::from(DEPTH) {
            let Some(buffer) = self.bulk.take() else { return };
            let remote = self.region;
            self.end.submit(match self.what {
                Self::PLACE => Operation::Place { buffer, remote },
                _ => Operation::Fetch { buffer, remote },
            });
            self.left -= 1;
            self.in_flight += 1;
        }
        if self.left == 0 && self.in_flight == 0 {
            self.end.send(&[0; MESSAGE_BYTES]);
        }
    }
}

/// Starts the other side and connects. `None` if this machine has no such transport.
pub fn start_peer(kind: &str) -> Option<Peer> {
    let (setup_here, messages, _) = setup();
    if kind == "mem" {
        let (setup_there, messages_there, bulk_there) = setup();
        let (here, there) = memory::pair(setup_here, setup_there).expect("memory");
        let mut end = End::new(Box::new(here), messages);
        let mut other = Driver::new(End::new(Box::new(there), messages_there), bulk_there);
        other.end.sleeps = false;
        end.other = Some(Box::new(other));
        return Some(Peer::new(end, None));
    }
    let mut process = Command::new(std::env::current_exe().expect("own path"))
        .env("HOLDFAST_BENCH_PEER", kind)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a second process");
    let mut line = String::new();
    BufReader::new(process.stdout.take().expect("piped")).read_line(&mut line).expect("its address");
    let Ok(address) = line.trim().parse::<SocketAddr>() else {
        let _ = process.wait();
        return None;
    };
    let wait = Duration::from_secs(10);
    let channel: Box<dyn Channel> = match kind {
        "tcp" => Box::new(tcp::connect(address, wait, setup_here).expect("connected")),
        _ => Box::new(verbs::connect(address, wait, setup_here).expect("connected")),
    };
    Some(Peer::new(End::new(channel, messages), Some(process)))
}

/// In the second process: listens, serves one channel, and ends with it. False in the first one.
pub fn peer_main() -> bool {
    let Ok(kind) = std::env::var("HOLDFAST_BENCH_PEER") else { return false };
    let (setup, messages, bulk) = setup();
    let mut setup = Some(setup);
    let listener: Option<Box<dyn Listener>> = match kind.as_str() {
        "tcp" => Some(Box::new(tcp::TcpListener::bind(([127, 0, 0, 1], 0).into()).expect("listening"))),
        _ => super::rdma_address().map(|ip| {
            Box::new(verbs::VerbsListener::bind(SocketAddr::new(ip, 0)).expect("listening"))
                as Box<dyn Listener>
        }),
    };
    let Some(mut listener) = listener else {
        println!("none");
        return true;
    };
    println!("{}", listener.address());
    let _ = std::io::stdout().flush();
    let channel = listener.accept(&mut |_| setup.take()).expect("one peer");
    let mut driver = Driver::new(End::new(channel, messages), bulk);
    while driver.run() {}
    true
}
