//! The channel against a scripted server, joined in memory.

pub(crate) mod server;

use super::*;
use crate::bind::{self, BindRequest};
use crate::stream::Streamer;
use crate::{Binding, Region, Status};
use holdfast_shared::auth::{BindSecret, MacPolicy, Secret};
use holdfast_shared::types::{Access, VolumeId};
use server::{Script, Server};

const KEY: &[u8] = b"a resume key";
const PIECE: u32 = 16 << 10;

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
        let server =
            Server::new(Box::new(server), pool, Arc::clone(&script), Arc::clone(&kick), secret.clone());
        let server = Some(std::thread::spawn(move || server.run()));
        let shared =
            Shared::start(Box::new(client), prepared.frames, 32, Duration::from_secs(10)).await.unwrap();
        let channel = DataChannel::new(shared, crate::Transport::Auto, 0, None);
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
        let core = bind::bind(&self.channel.shared(), &request).await?;
        let seat = crate::binding::Seat::new(core, self.channel.shared(), 0, None);
        Ok(Binding::new(seat, &self.channel, request.access, None))
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
    assert_eq!(world.channel.shared().state.lock().slots.len(), 0, "and no slot is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_bindings_and_binds_are_given_back() {
    let world = World::new(Script::default()).await;
    drop(world.bind().await.unwrap());
    world.until(|script| script.unbinds == 1).await;
    // A bind nobody waits for any more: polled once, so that it is sent. Should the server be so quick that the one poll
    // sees its answer, then what is dropped is the new binding.
    {
        let mut bind = Box::pin(world.bind());
        std::future::poll_fn(|cx| Poll::Ready(bind.as_mut().poll(cx).is_ready())).await;
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

async fn until_fenced(binding: &Binding) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while binding.fenced().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
}

/// The memory transport is one that is looked at instead of slept for.
#[tokio::test]
async fn after_requests_that_were_looked_for_a_notice_is_heard_without_another_one() {
    let world = World::new(Script { file: pattern(1000), ..Script::default() }).await;
    let binding = world.bind().await.unwrap();
    let region = Region::allocate(8).unwrap();
    for _ in 0..3 {
        while !world.channel.shared().state.lock().prompt.is_watched() {
            assert_eq!(binding.read_at(&region, 0..8, 0).await.unwrap(), 8);
        }
        // Left alone, it is armed again; and looked at again when there is more to do.
        tokio::time::timeout(Duration::from_secs(10), async {
            while world.channel.shared().state.lock().prompt.is_watched() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
    }
    while !world.channel.shared().state.lock().prompt.is_watched() {
        assert_eq!(binding.read_at(&region, 0..8, 0).await.unwrap(), 8);
    }
    world.change(|script| script.fence = true);
    until_fenced(&binding).await;
    // One that is dropped before it was looked for is answered all the same, and gives its place back.
    let binding = world.bind().await.unwrap();
    for _ in 0..100 {
        let mut read = std::pin::pin!(binding.read_at(&region, 0..8, 0));
        let _ = std::future::poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_ready())).await;
    }
    tokio::time::timeout(Duration::from_secs(10), async {
        while !world.channel.shared().state.lock().slots.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_binding_says_so() {
    let world = World::new(Script { fence_after_bind: true, ..Script::default() }).await;
    let binding = world.bind().await.unwrap();
    until_fenced(&binding).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_piece_waits_for_the_others() {
    let world = World::new(Script::default()).await;
    let binding = world.bind().await.unwrap();
    world.change(|script| script.hold = true);
    let length = 7 * PIECE as usize;
    let region = Region::allocate(length).unwrap();
    let read = tokio::spawn({
        let (binding, region) = (binding.clone(), region.clone());
        async move { binding.read_at(&region, 0..length, 0).await }
    });
    world.until(|script| script.held == 7).await;
    world.change(|script| (script.refuse, script.let_go) = (Some((Status::Io, true)), 1));
    world.until(|script| script.let_go == 0).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!read.is_finished(), "the server may still place into the region");
    world.change(|script| script.hold = false);
    assert_eq!(read.await.unwrap().unwrap_err().status(), Some(Status::Io));
    assert_eq!(world.channel.shared().state.lock().slots.len(), 0, "all are answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_unbind_still_gives_the_binding_back() {
    let world = World::new(Script { credits: 1, ..Script::default() }).await;
    let binding = world.bind().await.unwrap();
    world.change(|script| script.hold = true);
    let region = Region::allocate(8).unwrap();
    let read = binding.submit_read(&region, 0..8, 0).await.unwrap();
    // It waits for the only credit.
    assert!(tokio::time::timeout(Duration::from_millis(20), binding.unbind()).await.is_err());
    drop(binding);
    world.change(|script| script.hold = false);
    read.await.unwrap();
    world.until(|script| script.unbinds == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_missing_binding_is_believed_without_a_mac() {
    for (status, ends) in [(Status::Io, true), (Status::Fenced, true), (Status::NotBound, false)] {
        let world = World::new(Script::default()).await;
        let binding = world.bind().await.unwrap();
        world.change(|script| script.refuse = Some((status, false)));
        let error = binding.flush().await.unwrap_err();
        if ends {
            assert_eq!(why(&error), Some(Ended::BadMac), "{status}");
        } else {
            assert_eq!((error.status(), world.channel.ended()), (Some(status), None));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boundless_server_does_not_make_us_boundless() {
    let script = Script { boundless: true, policy: MacPolicy::Sealed, ..Script::default() };
    let world = World::new(script).await;
    assert_eq!(world.channel.transfer_max(), TRANSFER_MAX);
    let binding = world.bind().await.unwrap();
    assert_eq!(binding.piece_max(), COVERED_TRANSFER_MAX as usize);
    // More than is sent inline: the bounce region is as large as it has to be.
    let region = Region::allocate(5000).unwrap();
    for _ in 0..2 {
        binding.write_all(&region, 0..5000, 0).await.unwrap();
        let idle: Vec<usize> = world.channel.shared().idle_bounces.lock().iter().map(Region::len).collect();
        assert_eq!(idle, [64 << 10]);
    }
    world.channel.shared().idle_bounces.lock()[0] = Region::allocate(4096).unwrap();
    binding.write_all(&region, 0..5000, 0).await.unwrap();
    assert_eq!(world.channel.shared().idle_bounces.lock()[0].len(), 64 << 10, "one too small is replaced");
}
