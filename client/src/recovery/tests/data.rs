//! Reads, writes and flushes across the loss of either plane, over tcp.

use super::*;
use crate::channel::tests::server::{Script, Server};
use crate::{Binding, DataChannel, HandleId, Region, Transport};
use holdfast_shared::auth::{BindSecret, Secret};
use holdfast_transport::{Listener, Setup, tcp};
use holdfast_verbs::memory::Pool;
use parking_lot::Mutex;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const HANDLE: HandleId = HandleId([7; 16]);
const PIECE: usize = 16 << 10;

/// A scripted data plane that listens.
pub(super) struct Plane {
    pub(super) script: Arc<Mutex<Script>>,
    port: u16,
    instance: u8,
    stop: Box<dyn Fn() + Send + Sync>,
    kicks: Arc<Mutex<Vec<Arc<OwnedFd>>>>,
}

impl Plane {
    pub(super) fn start(port: u16, instance: u8, secret: BindSecret, file: Vec<u8>) -> Self {
        let script = Script { instance, credits: 8, secret: Some(secret), file, ..Script::default() };
        let script = Arc::new(Mutex::new(script));
        let mut listener = tcp::TcpListener::bind(([127, 0, 0, 1], port).into()).unwrap();
        let (port, stop) = (listener.address().port(), listener.stopper());
        let kicks: Arc<Mutex<Vec<Arc<OwnedFd>>>> = Arc::default();
        let (all, shared) = (Arc::clone(&kicks), Arc::clone(&script));
        std::thread::spawn(move || {
            loop {
                let pool = Pool::new(PIECE, 128).unwrap();
                let receives = (0..64).map(|n| (n, pool.take().unwrap())).collect();
                let setup = Setup { depth: 128, receives_max: 64, pools: vec![pool.clone()], receives };
                let mut setup = Some(setup);
                let Ok(channel) = listener.accept(&mut |_| setup.take()) else { return };
                let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
                let kick = Arc::new(kick);
                all.lock().push(Arc::clone(&kick));
                let any = BindSecret::new(Secret::new([1; 32]));
                let server = Server::new(channel, pool, Arc::clone(&shared), kick, any);
                std::thread::spawn(move || server.run());
            }
        });
        Self { script, port, instance, stop, kicks }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock());
        for kick in self.kicks.lock().iter() {
            rustix::io::write(&**kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// As kill -9: no connection is left, and nobody listens. What it wrote is in the page cache.
    pub(super) fn kill(&self) -> Vec<u8> {
        (self.stop)();
        self.change(|script| script.stop = true);
        std::mem::take(&mut self.script.lock().file)
    }

    /// Ends the connections alone.
    pub(super) fn cut(&self) {
        self.change(|script| script.stop = true);
        // Those that come later live.
        std::thread::sleep(Duration::from_millis(30));
        self.script.lock().stop = false;
    }

    async fn until(&self, shown: impl Fn(&Script) -> bool) {
        let seen = async {
            while !shown(&self.script.lock()) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, seen).await.expect("the data plane did not get there");
    }

    pub(super) fn at(&self) -> Option<(u16, u8)> {
        Some((self.port, self.instance))
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        (self.stop)();
        self.change(|script| script.stop = true);
    }
}

struct World {
    control: Control,
    peer: Peer,
    open: Open,
    plane: Plane,
    channel: DataChannel,
    binding: Binding,
}

impl World {
    async fn new(config: impl FnOnce(&mut Config)) -> Self {
        let (control, mut peer, _, open) = opened(config).await;
        let plane = Plane::start(0, 10, peer.key.bind_secret(OPEN), Vec::new());
        let at = plane.at();
        let (channel, binding) = tokio::select! {
            asked = peer.keys(at) => panic!("{asked:?}"),
            bound = async {
                open.query_key().await.unwrap();
                let channel = open.connect(Transport::Tcp).await.unwrap();
                let binding = open.bind(&channel).await.unwrap();
                (channel, binding)
            } => bound,
        };
        Self { control, peer, open, plane, channel, binding }
    }

    /// The data plane is killed, and another one starts.
    fn replace_plane(&mut self) -> Plane {
        let file = self.plane.kill();
        let new = Plane::start(0, self.plane.instance + 1, self.peer.key.bind_secret(OPEN), file);
        std::mem::replace(&mut self.plane, new)
    }

    /// Runs something that needs control for keys alone.
    async fn with_keys<T>(&mut self, work: impl Future<Output = T>) -> T {
        let at = self.plane.at();
        tokio::select! { asked = self.peer.keys(at) => panic!("{asked:?}"), done = work => done }
    }

    /// Loses the connection to control; the answer to the resume is this.
    async fn lose_control(&mut self, verdict: Verdict, kept: &[HandleId]) -> Vec<HandleId> {
        // Dropped: the connection ends.
        let next = self.control.accept();
        let old = std::mem::replace(&mut self.peer.session, crate::SessionId([0; 16]));
        assert_ne!(old, self.peer.session);
        self.peer.hang_up().await;
        let mut peer = next.await;
        let (id, resume) = peer.resume().await;
        self.plane.script.lock().secret = Some(peer.key.bind_secret(OPEN));
        peer.resumed(id, OPEN, verdict, kept).await;
        self.peer = peer;
        resume.keep
    }
}

fn region(bytes: &[u8]) -> Region {
    let region = Region::allocate(bytes.len()).unwrap();
    region.copy_in(0, bytes).unwrap();
    region
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_18_a_killed_data_plane_costs_neither_reads_nor_writes() {
    let mut world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    let bytes: Vec<u8> = (0..=255).cycle().take(5 * PIECE + 77).collect();
    let all = region(&bytes);
    world.plane.change(|script| (script.hold, script.let_go) = (true, 2));
    let write = tokio::spawn({
        let (binding, all) = (binding.clone(), all.clone());
        async move { binding.write_all(&all, 0..5 * PIECE + 77, 5).await }
    });
    // Two fetched, and the short one at the end, which came in its request; two answered.
    world.plane.until(|script| script.log.len() == 3).await;
    // For the answers to get there.
    sleep(Duration::from_millis(300)).await;
    let old = world.replace_plane();
    world.with_keys(write).await.unwrap().unwrap();
    assert!(world.plane.script.lock().file[5..] == bytes);
    let order: Vec<u64> = world.plane.script.lock().log.iter().map(|(_, offset)| *offset).collect();
    assert!(order.is_sorted() && order.len() == 4, "those not answered, in order: {order:?}");
    assert_eq!(binding.read_vec(5, 10).await.unwrap(), bytes[..10], "on the new channel");
    assert_eq!(world.channel.ended(), None);
    // One that waits for its answer when the plane goes.
    world.plane.change(|script| script.hold = true);
    let read = tokio::spawn({
        let binding = binding.clone();
        async move { binding.read_vec(7, 20).await }
    });
    world.plane.until(|script| script.held == 1).await;
    drop((old, world.replace_plane()));
    assert_eq!(world.with_keys(read).await.unwrap().unwrap(), bytes[2..22]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_18_without_control_the_data_path_goes_on() {
    let mut world = World::new(|_| ()).await;
    let handle = world.binding.handle();
    world.control.away();
    world.peer.hang_up().await;
    world.binding.write_all(&region(b"undisturbed"), 0..11, 0).await.unwrap();
    world.plane.change(|script| script.hold = true);
    let read = tokio::spawn({
        let binding = world.binding.clone();
        async move { binding.read_vec(0, 100).await }
    });
    world.plane.until(|script| script.held == 1).await;
    world.control.back().await;
    let mut events = world.open.events();
    let keep = world.lose_control(Verdict::Unchanged, &[HANDLE]).await;
    assert_eq!(keep, [handle], "a binding that lives is kept");
    events.next().await.unwrap();
    world.plane.change(|script| script.hold = false);
    assert_eq!(read.await.unwrap().unwrap(), b"undisturbed", "also what was under way");
    assert_eq!((world.binding.fenced(), world.open.epoch()), (None, 2));
    world.binding.read_vec(0, 1).await.unwrap();
    assert_eq!(world.plane.script.lock().unbinds, 0, "nothing was bound again");
    assert!(timeout(Duration::from_millis(10), events.next()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_that_was_not_kept_is_bound_again() {
    let mut world = World::new(|_| ()).await;
    let mut events = world.open.events();
    world.lose_control(Verdict::Unchanged, &[]).await;
    events.next().await.unwrap();
    assert_eq!(world.binding.fenced(), Some(Status::Fenced));
    let binding = world.binding.clone();
    world.with_keys(binding.write_all(&region(b"new"), 0..3, 0)).await.unwrap();
    assert_eq!(binding.fenced(), None);
    world.plane.until(|script| script.unbinds == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_17_a_write_is_not_made_again_over_what_others_wrote() {
    let mut world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    world.plane.change(|script| script.hold = true);
    let all = region(b"mine");
    let write = binding.submit_write(&all, 0..4, 0).await.unwrap();
    let read = binding.submit_read(&all, 0..4, 0).await.unwrap();
    world.plane.until(|script| script.held == 2).await;
    let old = world.replace_plane();
    let mut events = world.open.events();
    world.lose_control(Verdict::Changed, &[]).await;
    events.next().await.unwrap();
    let error = world.with_keys(write).await.unwrap_err();
    assert!(matches!(error, Error::WriteFateUnknown), "{error}");
    let error = world.with_keys(read).await.unwrap_err();
    assert!(matches!(error, Error::Changed), "{error}");
    assert!(matches!(binding.submit_read(&all, 0..4, 0).await, Err(Error::Changed)), "and all later ones");
    assert!(matches!(binding.flush().await, Err(Error::Changed)));
    assert_eq!(world.plane.script.lock().log, []);
    drop(old);
    world.open.accept_change();
    let written = binding.write_all(&all, 0..4, 0);
    world.with_keys(written).await.unwrap();
    assert_eq!(world.plane.script.lock().log, [('w', 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_changed_and_accepted_meanwhile_still_has_an_unknown_fate() {
    let mut world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    world.plane.change(|script| script.hold = true);
    let all = region(b"mine");
    let write = binding.submit_write(&all, 0..4, 0).await.unwrap();
    let read = binding.submit_read(&all, 0..4, 0).await.unwrap();
    world.plane.until(|script| script.held == 2).await;
    let _old = world.replace_plane();
    let mut events = world.open.events();
    world.lose_control(Verdict::Changed, &[]).await;
    events.next().await.unwrap();
    world.open.accept_change();
    assert!(matches!(world.with_keys(write).await, Err(Error::WriteFateUnknown)));
    assert_eq!(world.with_keys(read).await.unwrap(), 4, "a read has no fate");
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_17_a_channel_that_broke_alone_is_fenced_before_writes_go_again() {
    let mut world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    world.plane.change(|script| script.hold = true);
    // So many that the server fetches them: it has not yet.
    let all = region(&[7; 5000]);
    let write = tokio::spawn({
        let (binding, all) = (binding.clone(), all.clone());
        async move { binding.write_at(&all, 0..5000, 0).await }
    });
    world.plane.until(|script| script.held == 1).await;
    world.plane.cut();
    world.plane.script.lock().hold = false;
    // The session is replaced while it lives, and the resume keeps nothing of the broken channel.
    let (at, before) = (world.plane.at(), world.peer.session);
    let mut next = tokio::select! {
        asked = world.peer.keys(at) => panic!("the session was ended first: {asked:?}"),
        next = world.control.accept() => next,
    };
    let (id, resume) = next.resume().await;
    assert_eq!((resume.supersede, resume.keep), (Some(before), Vec::new()));
    assert_eq!(world.plane.script.lock().log, [], "nothing was written before that");
    world.plane.script.lock().secret = Some(next.key.bind_secret(OPEN));
    next.resumed(id, OPEN, Verdict::Unchanged, &[]).await;
    world.peer = next;
    assert_eq!(world.with_keys(write).await.unwrap().unwrap(), 5000);
    assert_eq!(world.plane.script.lock().log, [('w', 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_broke_without_writes_under_way_costs_no_session() {
    let mut world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    binding.write_all(&region(b"answered"), 0..8, 0).await.unwrap();
    world.plane.change(|script| script.hold = true);
    let read = tokio::spawn({
        let binding = binding.clone();
        async move { binding.read_vec(0, 8).await }
    });
    world.plane.until(|script| script.held == 1).await;
    world.plane.cut();
    world.plane.script.lock().hold = false;
    assert_eq!(world.with_keys(read).await.unwrap().unwrap(), b"answered");
    assert_eq!(world.open.epoch(), 1, "the session goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn crs_09_a_flush_covers_what_a_killed_process_wrote_but_not_what_a_host_lost() {
    let mut world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    let bytes = region(b"bytes");
    binding.write_all(&bytes, 0..5, 0).await.unwrap();
    let old = world.replace_plane();
    world.with_keys(binding.flush()).await.unwrap();
    binding.write_all(&bytes, 0..5, 0).await.unwrap();
    let older = world.replace_plane();
    // The host was started again: what was in its memory is gone.
    world.plane.script.lock().verifier = 6;
    for _ in 0..2 {
        let error = world.with_keys(binding.flush()).await.unwrap_err();
        assert!(matches!(error, Error::WritesLost), "{error}");
    }
    binding.write_all(&bytes, 0..5, 0).await.unwrap();
    assert!(matches!(binding.flush().await, Err(Error::WritesLost)), "until it is accepted");
    world.open.accept_lost_writes();
    binding.flush().await.unwrap();
    drop((old, older));
}

#[tokio::test(flavor = "multi_thread")]
async fn binds_wait_while_control_is_away_from_its_data_plane() {
    let mut world = World::new(|_| ()).await;
    world.plane.script.lock().refuse_bind = Some(Status::Unavailable);
    let (open, channel) = (world.open.clone(), world.channel.clone());
    let bound = world.with_keys(open.bind(&channel)).await;
    bound.unwrap();
    // A key that is not good is not waited for.
    world.plane.script.lock().refuse_bind = Some(Status::BadKey);
    let error = open.bind(&channel).await.unwrap_err();
    assert_eq!(error.status(), Some(Status::BadKey));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_channel_is_not_connected_again() {
    let world = World::new(|_| ()).await;
    world.channel.close();
    assert!(matches!(world.binding.read_vec(0, 1).await, Err(Error::Ended { .. })));
    assert!(matches!(world.open.bind(&world.channel).await, Err(Error::Ended { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn soft_io_gives_up_and_goes_on_later() {
    let mut world = World::new(|config| (config.recovery, config.soft_ms) = (Recovery::Soft, 150)).await;
    let binding = world.binding.clone();
    let file = world.plane.kill();
    let read = binding.read_vec(0, 1);
    let at = world.plane.at();
    let error = tokio::select! { _ = world.peer.keys(at) => panic!(), read = read => read.unwrap_err() };
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    world.plane = Plane::start(0, 11, world.peer.key.bind_secret(OPEN), file);
    assert_eq!(world.with_keys(binding.read_vec(0, 1)).await.unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_dropped_while_nothing_is_there_leave_nothing_behind() {
    let mut world = World::new(|_| ()).await;
    let all = Region::allocate(8).unwrap();
    world.plane.change(|script| script.hold = true);
    let read = world.binding.submit_read(&all, 0..8, 0).await.unwrap();
    world.plane.kill();
    let at = world.plane.at();
    let waits = async { timeout(Duration::from_millis(150), read).await.is_err() };
    assert!(tokio::select! { _ = world.peer.keys(at) => panic!(), waits = waits => waits });
    let World { binding, open, channel, .. } = world;
    let weak = Arc::downgrade(&open.inner);
    drop((binding, open, channel));
    assert!(weak.upgrade().is_none(), "the open lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soft_write_of_unknown_fate_is_told_so_when_its_time_is_over_and_not_before() {
    let mut world = World::new(|config| (config.recovery, config.soft_ms) = (Recovery::Soft, 400)).await;
    let binding = world.binding.clone();
    let all = region(b"mine");
    world.plane.change(|script| script.hold = true);
    let sent = binding.submit_write(&all, 0..4, 0).await.unwrap();
    world.plane.until(|script| script.held == 1).await;
    let (start, file) = (Instant::now(), world.plane.kill());
    let error = world.with_keys(sent).await.unwrap_err();
    assert!(matches!(error, Error::WriteFateUnknown), "it may have been carried out: {error}");
    assert!(start.elapsed() >= Duration::from_millis(400), "{:?}", start.elapsed());
    let start = Instant::now();
    let error = world.with_keys(binding.write_at(&all, 0..4, 0)).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "it never left: {error}");
    assert!(start.elapsed() >= Duration::from_millis(400), "{:?}", start.elapsed());
    world.plane = Plane::start(0, 11, world.peer.key.bind_secret(OPEN), file);
    world.with_keys(binding.write_all(&all, 0..4, 0)).await.unwrap();
    assert_eq!(world.plane.script.lock().file, b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_flush_is_not_made_good_by_the_next() {
    let world = World::new(|_| ()).await;
    let binding = world.binding.clone();
    for status in [Status::Io, Status::NoSpace] {
        binding.write_all(&region(b"bytes"), 0..5, 0).await.unwrap();
        world.plane.script.lock().refuse = Some((status, true));
        assert_eq!(binding.flush().await.unwrap_err().status(), Some(status));
        // The storage has forgotten the bytes, and would take the next flush for granted.
        for _ in 0..2 {
            assert!(matches!(binding.flush().await, Err(Error::WritesLost)), "{status:?}");
        }
        world.open.accept_lost_writes();
        binding.flush().await.unwrap();
    }
}

/// Where a session must be replaced, the server spares of the opens without hold time the one that supersedes it: that is the
/// one with writes to be fenced. The others end, and say why.
#[tokio::test(flavor = "multi_thread")]
async fn without_hold_time_the_open_with_writes_under_way_outlives_its_session() {
    const OTHER: OpenId = OpenId([9; 16]);
    let mut control = Control::start().await;
    let config = control.config();
    let (session, mut peer) = tokio::join!(Session::connect(&config), control.accept());
    let (session, place, options) = (session.unwrap(), file(), OpenOptions::read_write());
    let mut opens = Vec::new();
    for (id, key) in [(OTHER, 77), (OPEN, 1)] {
        let (open, ()) = tokio::join!(session.open(&place, &options), async {
            let asked = peer.next().await.unwrap();
            let mut opened = crate::scripted::opened_as(id, 1);
            (opened.hold_ms, opened.key.resume_key) = (0, vec![key]);
            peer.give(asked.id, Reply::Opened(opened)).await;
        });
        opens.push(open.unwrap());
    }
    let (open, other) = (opens.pop().unwrap(), opens.pop().unwrap());
    let plane = Plane::start(0, 10, peer.key.bind_secret(OPEN), Vec::new());
    let at = plane.at();
    let (channel, binding) = tokio::select! {
        asked = peer.keys(at) => panic!("{asked:?}"),
        bound = async {
            open.query_key().await.unwrap();
            let channel = open.connect(Transport::Tcp).await.unwrap();
            let binding = open.bind(&channel).await.unwrap();
            (channel, binding)
        } => bound,
    };
    let mut world = World { control, peer, open, plane, channel, binding };
    let (binding, all) = (world.binding.clone(), region(&[7; 5000]));
    world.plane.change(|script| script.hold = true);
    let write = tokio::spawn(async move { binding.write_at(&all, 0..5000, 0).await });
    world.plane.until(|script| script.held == 1).await;
    world.plane.cut();
    world.plane.script.lock().hold = false;
    let mut next = tokio::select! {
        asked = world.peer.keys(at) => panic!("{asked:?}"),
        next = world.control.accept() => next,
    };
    let (id, resume) = next.resume().await;
    assert_eq!((resume.resume_key, resume.supersede), (vec![1], Some(world.peer.session)), "this one first");
    world.plane.script.lock().secret = Some(next.key.bind_secret(OPEN));
    next.resumed(id, OPEN, Verdict::Unchanged, &[]).await;
    let asked = timeout(SOON, next.keys(at)).await.unwrap().unwrap();
    assert!(matches!(&asked.request, Request::Resume(resume) if resume.resume_key == [77]), "{asked:?}");
    next.refuse(asked.id, Status::BadKey).await;
    world.peer = next;
    assert_eq!(world.with_keys(write).await.unwrap().unwrap(), 5000);
    let error = other.query_key().await.unwrap_err();
    assert_eq!(error.status(), Some(Status::BadKey));
    assert!(error.to_string().contains("no hold time"), "{error}");
}
