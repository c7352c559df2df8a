//! The channel against a scripted server, joined in memory.

use super::*;
use crate::bind::{self, BindRequest};
use crate::stream::Streamer;
use crate::{Binding, Region, Status};
use holdfast_shared::auth::{
    BindAnswer, BindSecret, BindTranscript, ChannelKeys, FrameKey, MacPolicy, PayloadKey, Secret,
};
use holdfast_shared::types::{Access, HandleId, RegionDescriptor, VolumeId};
use holdfast_shared::wire::data::{self, Body, Frame, Opcode, Writer};
use holdfast_transport::{Armed, Kind, Operation};
use holdfast_verbs::memory::Buffer;
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::{HashMap, VecDeque};
use zerocopy::IntoBytes;

const KEY: &[u8] = b"a resume key";
const PIECE: u32 = 16 << 10;

/// What the server does otherwise than it should, and what it saw.
#[derive(Default)]
struct Script {
    policy: MacPolicy,
    credits: u16,
    wrong_proof: bool,
    bad_mac: bool,
    gap: bool,
    wrong_digest: bool,
    fence_after_bind: bool,
    /// Requests are not answered while this is on.
    hold: bool,
    held: usize,
    held_max: usize,
    unbinds: usize,
    stop: bool,
}

struct Server {
    channel: Box<dyn Channel>,
    pool: Pool,
    script: Arc<Mutex<Script>>,
    kick: Arc<std::os::fd::OwnedFd>,
    secret: BindSecret,
    nonce: [u8; 32],
    sent: u64,
    received: u64,
    keys: HashMap<u32, ChannelKeys>,
    waiting: VecDeque<(u32, u32, Todo)>,
    fetches: HashMap<u64, Fetching>,
    next_token: u64,
    file: Vec<u8>,
}

/// Binding, request, offset, digest, and the sequence it was made with under a policy that has one.
type Fetching = (u32, u32, u64, [u8; 16], Option<u64>);

enum Todo {
    Read(data::Io),
    Fetch(data::Io, [u8; 16], u64),
    Done(u32),
    Unbind,
}

impl Server {
    fn run(mut self) {
        let hello = data::Hello {
            nonce: self.nonce,
            instance: [9; 16],
            credits: 1.into(),
            bindings_max: 8.into(),
            inline_max: 4096.into(),
            transfer_max: PIECE.into(),
            sealed_transfer_max: (PIECE / 2).into(),
            reserved: [0; 16],
        };
        self.send(Opcode::Hello, 0, 0, hello.as_bytes(), None);
        loop {
            let mut done = Vec::new();
            while self.channel.poll(&mut done) > 0 {
                for completion in done.drain(..) {
                    match (completion.kind, completion.outcome) {
                        (Kind::Recv, Ok(length)) => {
                            let mut bytes = completion.buffer[..length].to_vec();
                            let again = Operation::Recv { buffer: completion.buffer };
                            let _ = self.channel.submit(0, again);
                            self.request(&mut bytes);
                        }
                        (Kind::Fetch, Ok(length)) => {
                            self.fetched(completion.token, completion.buffer, length)
                        }
                        _ => {}
                    }
                }
            }
            if self.script.lock().stop || self.channel.ended().is_some() {
                return;
            }
            if !self.script.lock().hold && !self.waiting.is_empty() {
                self.answer();
                continue;
            }
            if self.channel.arm() == Armed::Idle {
                let mut fds = [
                    PollFd::from_borrowed_fd(self.channel.wake_fd(), PollFlags::IN),
                    PollFd::new(&*self.kick, PollFlags::IN),
                ];
                poll(&mut fds, None).unwrap();
                let _ = rustix::io::read(&*self.kick, &mut [0; 8]);
            }
        }
    }

    fn policy(&self) -> MacPolicy {
        self.script.lock().policy
    }

    fn send(&mut self, opcode: Opcode, binding: u32, request: u32, body: &[u8], digest: Option<[u8; 16]>) {
        let mut buffer = self.pool.take().unwrap();
        let mut w = Writer::new(&mut buffer, opcode, 0, binding, request, self.sent).unwrap();
        // The one way to write a body of any type.
        match opcode {
            Opcode::Hello => drop(w.body(&<[u8; 80]>::try_from(body).unwrap()).unwrap()),
            Opcode::BindReply => drop(w.body(&<[u8; 112]>::try_from(body).unwrap()).unwrap()),
            Opcode::Reply => drop(w.body(&<[u8; 16]>::try_from(body).unwrap()).unwrap()),
            _ => drop(w.body(&<[u8; 8]>::try_from(body).unwrap()).unwrap()),
        }
        if let Some(digest) = digest {
            w.digest(&digest).unwrap();
        }
        let keyed = opcode != Opcode::BindReply;
        let key = match self.keys.get(&binding) {
            Some(keys) if keyed => FrameKey::new(&keys.to_client, self.policy()),
            _ => FrameKey::unkeyed(),
        };
        let bad = self.script.lock().bad_mac && opcode == Opcode::Reply;
        let length = w.finish(|covered, mac| {
            key.sign(covered, mac);
            mac[0] ^= u8::from(bad);
        });
        self.sent += 1;
        self.channel.submit(1, Operation::Send { buffer, length }).unwrap();
    }

    fn reply(&mut self, binding: u32, request: u32, count: u32, digest: Option<[u8; 16]>) {
        if std::mem::take(&mut self.script.lock().gap) {
            self.sent += 1;
        }
        let reply =
            data::Reply { status: 0.into(), credits: 1.into(), count: count.into(), verifier: 5.into() };
        self.send(Opcode::Reply, binding, request, reply.as_bytes(), digest);
    }

    fn request(&mut self, bytes: &mut [u8]) {
        let copy = bytes.to_vec();
        let frame = Frame::parse(&copy).unwrap();
        assert_eq!(frame.header.sequence.get(), self.received);
        self.received += 1;
        let (binding, request) = (frame.header.binding.get(), frame.header.request.get());
        if let Body::Bind(body) = frame.body {
            return self.bind(request, body, frame.payload);
        }
        let keys = self.keys[&binding].clone();
        assert!(FrameKey::new(&keys.to_server, self.policy()).verify(&frame), "the client's MAC");
        let todo = match frame.body {
            Body::Read(io) => Todo::Read(*io),
            Body::Write(io) if io.region == RegionDescriptor::NONE => {
                let mut payload = frame.payload.to_vec();
                let key = PayloadKey::new(&keys.to_server, self.policy());
                key.check(frame.header.sequence.get(), &mut payload, frame.digest).unwrap();
                self.store(io.offset.get(), &payload);
                Todo::Done(io.length.get())
            }
            Body::Write(io) => {
                Todo::Fetch(*io, frame.digest.copied().unwrap_or_default(), frame.header.sequence.get())
            }
            Body::Unbind => Todo::Unbind,
            _ => Todo::Done(0),
        };
        self.waiting.push_back((binding, request, todo));
        let mut script = self.script.lock();
        script.held = self.waiting.len();
        script.held_max = script.held_max.max(script.held);
    }

    fn answer(&mut self) {
        let Some((binding, request, todo)) = self.waiting.pop_front() else { return };
        match todo {
            Todo::Read(io) => {
                let start = usize::try_from(io.offset.get()).unwrap().min(self.file.len());
                let end = (start + io.length.get() as usize).min(self.file.len());
                let mut bytes = self.file[start..end].to_vec();
                let key = PayloadKey::new(&self.keys[&binding].to_client, self.policy());
                // The reply's sequence: the Place carries no frame.
                let mut digest = key.protect(self.sent, &mut bytes).unwrap();
                if let (Some(digest), true) = (&mut digest, self.script.lock().wrong_digest) {
                    digest[3] ^= 1;
                }
                let count = u32::try_from(bytes.len()).unwrap();
                if count > 0 {
                    let mut buffer = self.pool.take().unwrap();
                    buffer[..bytes.len()].copy_from_slice(&bytes);
                    let remote = io.region.part(0, count).unwrap();
                    self.channel.submit(2, Operation::Place { buffer, remote }).unwrap();
                }
                self.reply(binding, request, count, digest);
            }
            Todo::Fetch(io, digest, sequence) => {
                let buffer = self.pool.take().unwrap();
                self.next_token += 1;
                let covered = self.policy().covers_payload().then_some(sequence);
                self.fetches.insert(self.next_token, (binding, request, io.offset.get(), digest, covered));
                self.channel.submit(self.next_token, Operation::Fetch { buffer, remote: io.region }).unwrap();
            }
            Todo::Done(count) => self.reply(binding, request, count, None),
            Todo::Unbind => {
                self.script.lock().unbinds += 1;
                self.reply(binding, request, 0, None);
            }
        }
    }

    fn fetched(&mut self, token: u64, mut buffer: Buffer, length: usize) {
        let (binding, request, offset, digest, covered) = self.fetches.remove(&token).unwrap();
        let mut bytes = buffer[..length].to_vec();
        buffer.fill(0);
        drop(buffer);
        if let Some(sequence) = covered {
            let key = PayloadKey::new(&self.keys[&binding].to_server, self.policy());
            key.check(sequence, &mut bytes, Some(&digest)).unwrap();
        }
        self.store(offset, &bytes);
        self.reply(binding, request, u32::try_from(length).unwrap(), None);
    }

    fn store(&mut self, offset: u64, bytes: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        self.file.resize(self.file.len().max(start + bytes.len()), 0);
        self.file[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn bind(&mut self, request: u32, body: &data::Bind, key: &[u8]) {
        let (policy, access) = (self.policy(), Access::from_bits(body.access).unwrap());
        let identity = self.channel.identity().clone();
        let transcript = BindTranscript {
            channel: &identity,
            server_nonce: &self.nonce,
            open_challenge: &[4; 32],
            client_challenge: &body.challenge,
            resume_key: key,
            volume: VolumeId([6; 16]),
            access,
            policy,
        }
        .digest();
        self.nonce[0] += 1;
        let mut reply = data::BindReply {
            status: Status::BadKey.number().into(),
            credits: 0.into(),
            access: 0,
            policy: 0,
            reserved: [0; 2],
            handle: [0; 16],
            epoch: 0.into(),
            proof: [0; 32],
            nonce: self.nonce,
            verifier: 0.into(),
            reserved2: [0; 8],
        };
        if !self.secret.client_proof_is_right(&transcript, &body.proof) {
            return self.send(Opcode::BindReply, 0, request, reply.as_bytes(), None);
        }
        let number = 256 * u32::from(self.nonce[0]) + 1;
        let answer = BindAnswer { handle: HandleId([7; 16]), epoch: 3, access, policy };
        let answered = answer.digest(&transcript);
        reply.status = 0.into();
        reply.credits = self.script.lock().credits.into();
        (reply.access, reply.policy) = (access.bits(), policy.number());
        (reply.handle, reply.epoch, reply.verifier) = ([7; 16], 3.into(), 5.into());
        reply.proof = self.secret.server_proof(&answered);
        reply.proof[31] ^= u8::from(self.script.lock().wrong_proof);
        self.keys.insert(number, self.secret.channel_keys(&answered));
        self.send(Opcode::BindReply, number, request, reply.as_bytes(), None);
        if self.script.lock().fence_after_bind {
            let notice = data::Notice { status: Status::Fenced.number().into(), reserved: [0; 6] };
            self.send(Opcode::Notice, number, 0, notice.as_bytes(), None);
        }
    }
}

struct World {
    channel: DataChannel,
    script: Arc<Mutex<Script>>,
    kick: Arc<std::os::fd::OwnedFd>,
    server: Option<std::thread::JoinHandle<()>>,
    secret: BindSecret,
}

impl Drop for World {
    fn drop(&mut self) {
        self.change(|script| script.stop = true);
        // A panic of the server is one of the test.
        if let (Some(server), false) = (self.server.take(), std::thread::panicking()) {
            server.join().unwrap();
        }
    }
}

impl World {
    async fn new(script: Script) -> Self {
        let credits = if script.credits == 0 { 8 } else { script.credits };
        let script = Arc::new(Mutex::new(Script { credits, ..script }));
        let kick = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
        let secret = BindSecret::new(Secret::new([1; 32]));
        let prepared = prepare(32).unwrap();
        let pool = Pool::new(PIECE as usize, 128).unwrap();
        let receives = (0..64).map(|n| (n, pool.take().unwrap())).collect();
        let setup = Setup { depth: 128, receives_max: 64, pools: vec![pool.clone()], receives };
        let (client, server) = holdfast_transport::memory::pair(prepared.setup, setup).unwrap();
        let server = Server {
            channel: Box::new(server),
            pool,
            script: Arc::clone(&script),
            kick: Arc::clone(&kick),
            secret: secret.clone(),
            nonce: [0; 32],
            sent: 0,
            received: 0,
            keys: HashMap::new(),
            waiting: VecDeque::new(),
            fetches: HashMap::new(),
            next_token: 100,
            file: Vec::new(),
        };
        let server = Some(std::thread::spawn(move || server.run()));
        let channel =
            DataChannel::start(Box::new(client), prepared.frames, 32, Duration::from_secs(10)).await.unwrap();
        Self { channel, script, kick, server, secret }
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock());
        rustix::io::write(&*self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    async fn bind_with(&self, secret: &BindSecret) -> Result<Binding> {
        let policy = self.script.lock().policy;
        let request = BindRequest {
            resume_key: KEY,
            open_challenge: &[4; 32],
            volume: VolumeId([6; 16]),
            policy,
            access: Access::READ | Access::WRITE,
            secret,
        };
        let core = bind::bind(&self.channel.shared, &request).await?;
        Ok(Binding::new(core, &self.channel, None))
    }

    async fn bind(&self) -> Result<Binding> {
        self.bind_with(&self.secret).await
    }

    /// Waits until the script shows something. Every change of it comes from work under way, so this ends.
    async fn until(&self, shown: impl Fn(&Script) -> bool) {
        tokio::time::timeout(Duration::from_secs(10), async {
            while !shown(&self.script.lock()) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the server did not get there");
    }
}

fn why(error: &Error) -> Option<Ended> {
    match error {
        Error::Ended { why, .. } => Some(why.clone()),
        _ => None,
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_back_under_every_policy() {
    for policy in [MacPolicy::None, MacPolicy::Header, MacPolicy::Payload, MacPolicy::Sealed] {
        let world = World::new(Script { policy, ..Script::default() }).await;
        let binding = world.bind().await.unwrap();
        assert_eq!((binding.policy(), binding.epoch(), binding.verifier()), (policy, 3, 5));
        // Inline, fetched in one piece, and split into many.
        for length in [1, 4096, 4097, 100_000] {
            let bytes = pattern(length);
            let region = Region::allocate(2 * length).unwrap();
            region.copy_in(length, &bytes).unwrap();
            assert_eq!(
                binding.write_at(&region, length..2 * length, 10).await.unwrap(),
                length,
                "{policy:?}"
            );
            assert_eq!(binding.read_at(&region, 0..length, 10).await.unwrap(), length);
            let mut back = vec![0; length];
            region.copy_out(0, &mut back).unwrap();
            assert!(back == bytes, "{policy:?}, {length} bytes");
        }
        assert_eq!(binding.read_vec(100_000, 1000).await.unwrap().len(), 10, "a short read at the end");
        assert_eq!(binding.read_vec(1 << 40, 10).await.unwrap().len(), 0, "beyond the end");
        binding.flush().await.unwrap();
        binding.unbind().await.unwrap();
        assert_eq!(world.script.lock().unbinds, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_stream_both_ways() {
    let world = World::new(Script::default()).await;
    let binding = world.bind().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let bytes = pattern(1_000_003);
    std::fs::write(dir.path().join("a"), &bytes).unwrap();
    let from = Arc::new(std::fs::File::open(dir.path().join("a")).unwrap());
    let to = Arc::new(std::fs::File::create(dir.path().join("b")).unwrap());
    let told = Arc::new(Mutex::new(0));
    let counter = Arc::clone(&told);
    let progress: crate::stream::Progress = Arc::new(move |count| *counter.lock() += count);
    let mut streamer = Streamer::new(5, 40_000).unwrap();
    assert_eq!(streamer.upload(&from, &binding, 1_000_003, progress.clone()).await.unwrap(), 1_000_003);
    assert_eq!(streamer.download(&to, &binding, 1_000_003, progress).await.unwrap(), 1_000_003);
    assert!(std::fs::read(dir.path().join("b")).unwrap() == bytes);
    assert_eq!(*told.lock(), 2_000_006);
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_are_never_exceeded() {
    let world = World::new(Script { credits: 4, ..Script::default() }).await;
    let binding = world.bind().await.unwrap();
    assert_eq!(world.channel.credits(), 4);
    world.change(|script| script.hold = true);
    let region = Region::allocate(64).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..32 {
        let (binding, region) = (binding.clone(), region.clone());
        tasks.spawn(async move { binding.read_at(&region, n..n + 1, 0).await });
    }
    world.until(|script| script.held == 4).await;
    world.change(|script| script.hold = false);
    while let Some(read) = tasks.join_next().await {
        assert_eq!(read.unwrap().unwrap(), 0);
    }
    assert_eq!(world.script.lock().held_max, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_request_keeps_its_memory_until_the_reply() {
    let world = World::new(Script { credits: 1, ..Script::default() }).await;
    let binding = world.bind().await.unwrap();
    let small = Region::allocate(8).unwrap();
    small.copy_in(0, b"contents").unwrap();
    binding.write_all(&small, 0..8, 0).await.unwrap();
    world.change(|script| script.hold = true);
    let region = Region::allocate(4096).unwrap();
    drop(binding.submit_read(&region, 0..4096, 0).await.unwrap());
    drop(region);
    world.until(|script| script.held == 1).await;
    // Were the registration withdrawn, the server's Place would now end the channel.
    world.change(|script| script.hold = false);
    assert_eq!(binding.read_vec(0, 8).await.unwrap(), b"contents", "the only credit came back");
    assert_eq!(world.channel.ended(), None);
    assert_eq!(world.channel.shared.state.lock().slots.len(), 0, "and no slot is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_bindings_and_binds_are_given_back() {
    let world = World::new(Script::default()).await;
    drop(world.bind().await.unwrap());
    world.until(|script| script.unbinds == 1).await;
    // A bind nobody waits for any more: polled once, so that it is sent.
    {
        let mut bind = Box::pin(world.bind());
        assert!(std::future::poll_fn(|cx| Poll::Ready(bind.as_mut().poll(cx).is_pending())).await);
    }
    world.until(|script| script.unbinds == 2).await;
    world.bind().await.unwrap().unbind().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_is_refused_and_the_channel_lives() {
    let world = World::new(Script::default()).await;
    let wrong = BindSecret::new(Secret::new([2; 32]));
    let error = world.bind_with(&wrong).await.unwrap_err();
    assert_eq!(error.status(), Some(Status::BadKey));
    world.bind().await.expect("with the next nonce");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impostor_is_found_out() {
    let world = World::new(Script { wrong_proof: true, ..Script::default() }).await;
    let error = world.bind().await.unwrap_err();
    assert_eq!((why(&error), error.status()), (Some(Ended::BadProof), Some(Status::BadProof)));
    assert_eq!(world.channel.ended(), Some(Ended::BadProof));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_mac_or_a_gap_ends_the_channel() {
    for gap in [false, true] {
        let world = World::new(Script::default()).await;
        let binding = world.bind().await.unwrap();
        world.change(|script| (script.bad_mac, script.gap) = (!gap, gap));
        let error = binding.read_vec(0, 10).await.unwrap_err();
        assert_eq!((why(&error), error.status()), (Some(Ended::BadMac), Some(Status::BadMac)), "gap: {gap}");
        assert_eq!(
            why(&binding.flush().await.unwrap_err()),
            Some(Ended::BadMac),
            "whoever comes later is told too"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_payloads_are_refused() {
    for policy in [MacPolicy::Payload, MacPolicy::Sealed] {
        let world = World::new(Script { policy, ..Script::default() }).await;
        let binding = world.bind().await.unwrap();
        let region = Region::allocate(8).unwrap();
        binding.write_all(&region, 0..8, 0).await.unwrap();
        world.change(|script| script.wrong_digest = true);
        let error = binding.read_at(&region, 0..8, 0).await.unwrap_err();
        assert_eq!(error.status(), Some(Status::Integrity));
        world.change(|script| script.wrong_digest = false);
        assert_eq!(binding.read_at(&region, 0..8, 0).await.unwrap(), 8, "the channel lives");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_binding_says_so() {
    let world = World::new(Script { fence_after_bind: true, ..Script::default() }).await;
    let binding = world.bind().await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), async {
        while binding.fenced().is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(binding.read_vec(0, 1).await.unwrap_err().status(), Some(Status::Fenced));
    assert_eq!(world.channel.ended(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_answers_everybody() {
    let world = World::new(Script::default()).await;
    let binding = world.bind().await.unwrap();
    world.change(|script| script.hold = true);
    let region = Region::allocate(8).unwrap();
    let request = binding.submit_read(&region, 0..8, 0).await.unwrap();
    world.channel.close();
    assert_eq!(why(&request.await.unwrap_err()), Some(Ended::Closed));
    assert_eq!(why(&world.bind().await.unwrap_err()), Some(Ended::Closed));
}
