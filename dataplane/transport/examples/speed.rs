//! How fast the tcp transport is, against plain sockets on the same machine, in the same run:
//!
//! ```text
//! cargo run --release -p holdfast-transport --example speed
//! ```
//!
//! The client asks with a small message; the server Places (or Fetches) and answers with a small message, as the data
//! plane does. Both sleep on epoll. Runs of ours and of plain sockets alternate; medians are printed.
#![allow(clippy::unwrap_used)]

use holdfast_transport::tcp::{TcpListener, connect};
use holdfast_transport::{
    Armed, Channel, Completion, Kind, Listener, Operation, RegionDescriptor, RemoteAccess, Setup,
};
use holdfast_verbs::memory::{Pool, Region};
use rustix::event::epoll;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Bytes of a request and of an answer.
const NOTE: usize = 100;
const TRANSFER: usize = 1 << 20;
const DEPTH: usize = 8;
const ROUNDS: usize = 5;

struct End {
    channel: Box<dyn Channel>,
    pool: Pool,
    epoll: OwnedFd,
    done: Vec<Completion>,
}

impl End {
    fn new(channel: Box<dyn Channel>, pool: Pool) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, channel.wake_fd(), epoll::EventData::new_u64(0), flags).unwrap();
        Self { channel, pool, epoll, done: Vec::with_capacity(256) }
    }

    fn setup(pool: &Pool) -> Setup {
        let receives = (0..32).map(|token| (token, pool.take().unwrap())).collect();
        Setup { depth: 64, receives_max: 32, pools: vec![pool.clone()], receives }
    }

    fn send(&mut self, token: u64) {
        let buffer = self.pool.take().unwrap();
        self.channel.submit(token, Operation::Send { buffer, length: NOTE }).unwrap();
    }

    /// Polls until something is done or the channel is over; sleeps in between. False when it is over.
    fn wait(&mut self) -> bool {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 1];
        loop {
            if self.channel.poll(&mut self.done) > 0 {
                return true;
            }
            if self.channel.ended().is_some() {
                return false;
            }
            if self.channel.arm() == Armed::Idle {
                let _ = epoll::wait(&self.epoll, &mut events[..], None);
            }
        }
    }
}

/// Answers each request with a transfer of `length` bytes and a message, until the client is gone.
fn serve(mut end: End, fetches: bool, remote: RegionDescriptor) {
    let mut done = Vec::with_capacity(256);
    while end.wait() {
        std::mem::swap(&mut done, &mut end.done);
        for completion in done.drain(..) {
            match completion.kind {
                Kind::Recv if completion.outcome.is_ok() => {
                    let buffer = end.pool.take().unwrap();
                    let operation = if fetches {
                        Operation::Fetch { buffer, remote }
                    } else {
                        Operation::Place { buffer, remote }
                    };
                    end.channel.submit(completion.token, operation).unwrap();
                    end.channel
                        .submit(completion.token, Operation::Recv { buffer: completion.buffer })
                        .unwrap();
                    if !fetches {
                        end.send(completion.token);
                    }
                }
                Kind::Fetch if completion.outcome.is_ok() => end.send(completion.token),
                _ => {}
            }
        }
    }
}

/// Requests per second.
fn ours(length: usize, depth: usize, fetches: bool, count: usize) -> f64 {
    let mut listener = TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let pools = [Pool::new(TRANSFER, 72).unwrap(), Pool::new(TRANSFER, 72).unwrap()];
    let client = connect(listener.address(), Duration::from_secs(5), End::setup(&pools[0])).unwrap();
    let registrar = client.registrar();
    let registration = registrar.register(Region::new(length).unwrap(), RemoteAccess::FetchAndPlace).unwrap();
    let remote = registration.descriptor();
    let [client_pool, server_pool] = pools;
    let channel = listener.accept(&mut |_| Some(End::setup(&server_pool))).unwrap();
    let server = std::thread::spawn(move || serve(End::new(channel, server_pool), fetches, remote));
    let mut end = End::new(Box::new(client), client_pool);
    let run = |end: &mut End, count: usize| {
        let (mut asked, mut answered) = (0, 0);
        let mut done = Vec::with_capacity(256);
        while answered < count {
            while asked < count && asked < answered + depth {
                end.send(0);
                asked += 1;
            }
            assert!(end.wait());
            std::mem::swap(&mut done, &mut end.done);
            for completion in done.drain(..) {
                if completion.kind == Kind::Recv {
                    answered += 1;
                    end.channel.submit(0, Operation::Recv { buffer: completion.buffer }).unwrap();
                }
            }
        }
    };
    run(&mut end, count / 10);
    let begun = Instant::now();
    run(&mut end, count);
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    drop(end);
    server.join().unwrap();
    rate
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    one.set_nodelay(true).unwrap();
    other.set_nodelay(true).unwrap();
    (one, other)
}

/// Transfers per second of one plain stream, with buffers of 128 KiB as iperf3 has them.
fn plain_stream(count: usize) -> f64 {
    let (mut from, mut to) = pair();
    let sender = std::thread::spawn(move || {
        let block = vec![1; 128 << 10];
        for _ in 0..count * TRANSFER / block.len() {
            from.write_all(&block).unwrap();
        }
    });
    let mut block = vec![0; 128 << 10];
    let begun = Instant::now();
    while to.read(&mut block).unwrap() > 0 {}
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    sender.join().unwrap();
    rate
}

/// Round trips per second of plain sockets: a request there, `length` bytes and an answer back.
fn plain_ping_pong(length: usize, count: usize) -> f64 {
    let (mut client, mut server) = pair();
    let answer = vec![2; length + NOTE];
    let echo = std::thread::spawn(move || {
        let mut request = [0; NOTE];
        while server.read_exact(&mut request).is_ok() {
            server.write_all(&answer).unwrap();
        }
    });
    let mut answer = vec![0; length + NOTE];
    let mut run = |count: usize| {
        for _ in 0..count {
            client.write_all(&[3; NOTE]).unwrap();
            client.read_exact(&mut answer).unwrap();
        }
    };
    run(count / 10);
    let begun = Instant::now();
    run(count);
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    drop(client);
    echo.join().unwrap();
    rate
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    const COUNT: usize = 4000;
    let [mut plain, mut place, mut fetch, mut ping, mut small, mut deep] = [const { Vec::new() }; 6];
    for _ in 0..ROUNDS {
        plain.push(plain_stream(COUNT));
        place.push(ours(TRANSFER, DEPTH, false, COUNT));
        fetch.push(ours(TRANSFER, DEPTH, true, COUNT));
        ping.push(plain_ping_pong(4096, 20_000));
        small.push(ours(4096, 1, false, 20_000));
        deep.push(ours(4096, 16, false, 100_000));
    }
    let [plain, place, fetch, ping, small, deep] = [plain, place, fetch, ping, small, deep].map(median);
    println!("1 MiB, depth {DEPTH}, GiB/s");
    println!("  plain stream  {:.2}", plain / 1024.0);
    println!("  Place         {:.2}  ({:.2} of it)", place / 1024.0, place / plain);
    println!("  Fetch         {:.2}  ({:.2} of it)", fetch / 1024.0, fetch / plain);
    println!("4 KiB, depth 1, microseconds");
    println!("  plain         {:.1}", 1e6 / ping);
    println!("  Place         {:.1}  ({:.2} of it)", 1e6 / small, ping / small);
    println!("4 KiB, depth 16: {deep:.0} per second");
}
