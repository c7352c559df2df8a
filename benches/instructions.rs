//! What ci/instructions counts under valgrind: the processor's work of one 4 KiB read, part by part.
//!
//! ```text
//!   client                                   data plane
//!   request built, signed ──────────────►  parsed, verified          frames
//!                                           admitted, read, placed    engine, over the memory transport
//!   parsed, verified      ◄──────────────  reply built, signed        frames
//! ```
//!
//! `instructions PART COUNT` does a part so often, after a few times unseen: what counts lies between the calls of
//! [`counting_begins`] and [`counting_ends`], by which valgrind is told when.
//!
//! * `frames`: all four steps above, policy `header`; nothing else. One thread.
//! * `transport`: a message there, 4 KiB placed and a message back over the memory transport, both ends in one thread.
//! * `engine`: the same request served by a real worker of the engine, from a real file. The client beside it is a script of
//!   the tests; the worker sleeps between requests, and its thread alone is to be counted.

// The scripted client and control of the data plane's own tests; a part of each is used.
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation)]
#[path = "../dataplane/tests/common/client.rs"]
mod client;
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation)]
#[path = "../dataplane/tests/common/control.rs"]
mod control;

use client::Client;
use control::{FakeControl, Open};
use holdfast_dataplane::config::{EngineConfig, Limits, MapConfig};
use holdfast_dataplane::engine::{Engine, FileIo, KernelFile, Opener, Settings};
use holdfast_shared::auth::{DirectionKeys, FrameKey, MacPolicy, Secret};
use holdfast_shared::types::{Access, RegionDescriptor, Status};
use holdfast_shared::wire::data::{Frame, Io, Opcode, Reply, Writer};
use holdfast_transport::{Channel, Kind, Operation, RemoteAccess, Setup, memory};
use holdfast_verbs::memory::{Nowait, Pool, Region};
use std::hint::black_box;
use std::io::Result;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

const BLOCK: u32 = 4096;
const MESSAGE_BYTES: usize = 512;
/// So many blocks of the file are read in turn.
const BLOCKS: u32 = 64;
/// What is done once, or seldom, is over after so many.
const WARM_UP: u32 = 64;

// Two that differ, or the compiler makes one of them.
#[inline(never)]
fn counting_begins() {
    black_box('b');
}

#[inline(never)]
fn counting_ends() {
    black_box("e");
}

/// Does something so often, between the marks, and before them until all is warm.
fn counted(count: u32, mut once: impl FnMut(u32)) {
    (0..WARM_UP).for_each(&mut once);
    counting_begins();
    (WARM_UP..WARM_UP + count).for_each(&mut once);
    counting_ends();
}

fn keys() -> DirectionKeys {
    DirectionKeys { frame: Secret::new([1; 32]), payload: Secret::new([2; 32]) }
}

fn frames(count: u32) {
    let key = FrameKey::new(&keys(), MacPolicy::Header);
    let region = RegionDescriptor::new(0x7f00_0000_0000, 0x1234, BLOCK);
    let (mut request, mut reply) = ([0; MESSAGE_BYTES], [0; MESSAGE_BYTES]);
    counted(count, |number| {
        let offset = u64::from(number) * u64::from(BLOCK);
        let io = Io { offset: offset.into(), length: BLOCK.into(), reserved: 0.into(), region };
        let mut w = Writer::new(&mut request, Opcode::Read, 0, 1, number, offset).expect("room");
        w.body(&io).expect("body");
        let length = w.finish(|covered, mac| key.sign(covered, mac));
        let frame = Frame::parse(black_box(&request[..length])).expect("form");
        assert!(key.verify(&frame));
        let body = Reply { status: 0.into(), credits: 1.into(), count: BLOCK.into(), verifier: 5.into() };
        let mut w = Writer::new(&mut reply, Opcode::Reply, 0, 1, number, offset).expect("room");
        w.body(&body).expect("body");
        let length = w.finish(|covered, mac| key.sign(covered, mac));
        let frame = Frame::parse(black_box(&reply[..length])).expect("form");
        assert!(key.verify(&frame));
    });
}

/// A pool of messages and one of blocks, and what a channel gets of them.
fn setup() -> (Setup, Pool, Pool) {
    let messages = Pool::new(MESSAGE_BYTES, 32).expect("memory");
    let blocks = Pool::new(BLOCK as usize, 4).expect("memory");
    let receives = (0..8).filter_map(|tag| messages.take().map(|buffer| (tag, buffer))).collect();
    let pools = vec![messages.clone(), blocks.clone()];
    (Setup { depth: 32, receives_max: 16, pools, receives }, messages, blocks)
}

fn submit(channel: &mut impl Channel, operation: Operation) {
    channel.submit(0, operation).unwrap_or_else(|rejected| panic!("submit: {:?}", rejected.error));
}

fn transport(count: u32) {
    let (client_setup, client_messages, _) = setup();
    let (server_setup, server_messages, blocks) = setup();
    let (mut client, mut server) = memory::pair(client_setup, server_setup).expect("memory");
    let region = Region::new(BLOCK as usize).expect("memory");
    let registration = client.registrar().register(region, RemoteAccess::FetchAndPlace).expect("registered");
    let mut done = Vec::with_capacity(16);
    counted(count, |_| {
        let buffer = client_messages.take().expect("a message");
        submit(&mut client, Operation::Send { buffer, length: 100 });
        let mut answered = false;
        while !answered {
            server.poll(&mut done);
            for completion in done.drain(..) {
                if completion.kind == Kind::Recv {
                    submit(&mut server, Operation::Recv { buffer: completion.buffer });
                    let buffer = blocks.take().expect("a block");
                    submit(&mut server, Operation::Place { buffer, remote: registration.descriptor() });
                    let buffer = server_messages.take().expect("a message");
                    submit(&mut server, Operation::Send { buffer, length: 100 });
                }
            }
            client.poll(&mut done);
            for completion in done.drain(..) {
                if completion.kind == Kind::Recv {
                    answered = true;
                    submit(&mut client, Operation::Recv { buffer: completion.buffer });
                }
            }
        }
    });
}

/// A file of the engine that marks, in the worker's own thread, from which read to which is counted.
struct Marked {
    file: KernelFile,
    reads: AtomicU32,
    count: u32,
}

impl FileIo for Marked {
    fn read_now(&self, data: &mut [u8], at: u64) -> Result<Nowait> {
        match self.reads.fetch_add(1, Relaxed) {
            WARM_UP => counting_begins(),
            number if number == WARM_UP + self.count => counting_ends(),
            _ => {}
        }
        // Not by way of a storage thread, wherever the file is: it is in the page cache.
        self.file.read(data, at).map(Nowait::Done)
    }
    fn write_now(&self, data: &[u8], at: u64) -> Result<Nowait> {
        self.file.write_now(data, at)
    }
    fn read(&self, data: &mut [u8], at: u64) -> Result<usize> {
        self.file.read(data, at)
    }
    fn write(&self, data: &[u8], at: u64) -> Result<usize> {
        self.file.write(data, at)
    }
    fn sync(&self, data_only: bool) -> Result<()> {
        self.file.sync(data_only)
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.descriptor()
    }
}

fn engine(count: u32) {
    let settings = Settings {
        engine: EngineConfig {
            workers: 1,
            storage_threads: 1,
            pool_bytes: 4 << 20,
            message_pool_bytes: 4 << 20,
            // Not one round in vain: how many there are is chance.
            spin_rounds: 0,
            spin_us_max: 0,
            ..EngineConfig::default()
        },
        limits: Limits::default(),
        map: MapConfig::default(),
        instance: [7; 16],
        verifier: 5,
    };
    let control = FakeControl::new();
    let opener: Opener = Arc::new(move |fd: OwnedFd, _| -> Arc<dyn FileIo> {
        Arc::new(Marked { file: KernelFile::new(fd), reads: AtomicU32::new(0), count })
    });
    let engine = Engine::start(settings, Arc::clone(&control) as _, opener).expect("an engine");
    control.attach(&engine);
    let content = vec![0x5a; (BLOCKS * BLOCK) as usize];
    let open: Open = control.open(&content, Access::ALL, MacPolicy::Header);
    let parts = Client::parts();
    let theirs = engine.setup(([127, 0, 0, 1], 0).into()).expect("room for a channel");
    let (ours, theirs) = memory::pair(parts.setup(), theirs).expect("memory");
    engine.adopt(Box::new(theirs));
    let mut client = Client::new(Box::new(ours), parts);
    client.hello();
    let binding = client.bind(&open).expect("bound");
    let region = client.descriptor().part(0, BLOCK).expect("in the region");
    for number in 0..=WARM_UP + count {
        let at = u64::from(number % BLOCKS) * u64::from(BLOCK);
        let request = client.send_io(Opcode::Read, binding, at, BLOCK, region);
        assert_eq!(client.answer(request), (Status::Ok, BLOCK));
        // The worker goes to sleep: the next request finds it as this one did.
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(client);
    engine.stop();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let count = arguments.get(1).and_then(|text| text.parse().ok());
    match (arguments.first().map(String::as_str), count) {
        (Some("frames"), Some(count)) => frames(count),
        (Some("transport"), Some(count)) => transport(count),
        (Some("engine"), Some(count)) => engine(count),
        _ => {
            eprintln!("usage: instructions frames|transport|engine COUNT");
            std::process::exit(2);
        }
    }
}
