//! One-sided reads over real verbs: what is granted, and that nothing is read once it was taken back. Without an RDMA device
//! only what is refused can be tested: the rest says so, and fails if `HOLDFAST_REQUIRE_RDMA` is set.

use crate::common::{Client, Rig, Server, Told, eventually, pattern};
use holdfast_dataplane::config::MapConfig;
use holdfast_dataplane::engine::{FileId, FileIo, KernelFile, Opener};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, IoRule, Status};
use holdfast_shared::wire::data::Mapped;
use holdfast_shared::wire::link::{Fence, MAPPABLE_AS_SAID, Restrict, Restricted, Withdraw};
use holdfast_transport::verbs::{Lane, LaneRead};
use holdfast_transport::{OperationError, Registration};
use holdfast_verbs::memory::Nowait;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(10);

/// `None` without an RDMA device, or on a kernel that can't do it.
fn start(map: MapConfig) -> Option<Server> {
    Server::start(|settings| settings.map = map, KernelFile::opener())
}

fn lane(server: &Server, client: &Client) -> Lane {
    client.channel.registrar().lane(server.address, WAIT, 16).unwrap()
}

pub(crate) fn map(
    server: &Server,
    client: &mut Client,
    binding: u32,
    at: u64,
    length: u64,
) -> Result<View, Status> {
    let lane = lane(server, client);
    client.map(binding, at, length, lane.end()).map(|mapped| View { lane, mapped, done: Vec::new() })
}

fn fence_last(server: &Server) -> Fence {
    let fence = Fence { binding: server.rig.control.last(), epoch: 5, reason: Status::Fenced };
    server.rig.engine.fence(fence);
    fence
}

fn on() -> MapConfig {
    MapConfig { enabled: true, ..MapConfig::default() }
}

/// A mapping, as its client reads it.
pub(crate) struct View {
    lane: Lane,
    mapped: Mapped,
    done: Vec<LaneRead>,
}

impl View {
    fn submit(&mut self, memory: &Registration, token: u64, at: u64, into: std::ops::Range<usize>) -> bool {
        let address = self.mapped.address.get().wrapping_add(at);
        self.lane.read(token, memory, into, address, self.mapped.rkey.get()).is_ok()
    }

    /// The next read that ends; `None` once the lane has ended and nothing is in flight.
    fn next(&mut self) -> Option<LaneRead> {
        let end = std::time::Instant::now() + WAIT;
        while self.done.is_empty() {
            if self.lane.poll(&mut self.done) == 0 && self.lane.has_ended() && self.lane.in_flight() == 0 {
                return None;
            }
            assert!(std::time::Instant::now() < end, "a read does not end");
            std::thread::yield_now();
        }
        Some(self.done.remove(0))
    }

    fn read(&mut self, client: &Client, at: u64, length: usize) -> Result<Vec<u8>, OperationError> {
        client.region().zero(0..length).unwrap();
        if !self.submit(&client.memory, 7, at, 0..length) {
            return Err(OperationError::Flushed);
        }
        let read = self.next().unwrap();
        assert_eq!(read.token, 7);
        read.outcome?;
        let mut bytes = vec![0; length];
        client.region().copy_out(0, &mut bytes).unwrap();
        Ok(bytes)
    }
}

#[test]
fn a_client_reads_what_it_mapped_as_it_changes_until_it_unmaps() {
    let Some(server) = start(on()) else { return };
    let before = holdfast_verbs::gauges();
    let content = pattern(1 << 20, 1);
    let (mut client, binding, open) = server.bound(&content);
    assert_eq!(client.hello.unwrap().mappings_max.get(), 16);
    let mut view = map(&server, &mut client, binding, 5000, 100_000).unwrap();
    assert_eq!(view.mapped.length.get(), 100_000);
    assert_eq!(view.read(&client, 0, 100_000).unwrap(), content[5000..105_000]);
    assert_eq!((server.rig.gauge("mappings"), server.rig.gauge("mapping_bytes")), (1, 25 * 4096));
    // Writes of any client, and of anybody on the server's host, are seen at once.
    assert_eq!(client.write_inline(binding, 5000, b"through"), (Status::Ok, 7));
    open.file.write_all_at(b"beside", 5007).unwrap();
    assert_eq!(view.read(&client, 0, 13).unwrap(), b"throughbeside");
    // What lies beyond the end of the file is left out.
    let tail = map(&server, &mut client, binding, (1 << 20) - 10, 100).unwrap();
    assert_eq!(tail.mapped.length.get(), 10);
    let number = view.mapped.mapping.get();
    assert_eq!(client.unmap(binding, number), Status::Ok);
    assert!(view.read(&client, 0, 10).is_err());
    assert_eq!(client.unmap(binding, number), Status::Ok, "once more");
    assert_eq!(client.unmap(binding, 99), Status::Invalid);
    // The channel and the other mapping go on, and end together.
    let mut tail = tail;
    assert_eq!(tail.read(&client, 0, 10).unwrap(), content[(1 << 20) - 10..]);
    assert_eq!(client.read(binding, 0, 4).0, Status::Ok);
    drop((client, view, tail));
    eventually("released", || server.rig.control.all_released());
    assert_eq!((server.rig.gauge("mappings"), server.rig.gauge("mapping_bytes")), (0, 0));
    eventually("nothing is left", || holdfast_verbs::gauges().queue_pairs == before.queue_pairs);
    assert_eq!(holdfast_verbs::gauges().mapped_bytes, before.mapped_bytes);
}

/// The canary: once a fence is confirmed, whatever is written to the file is never read by who was fenced.
#[test]
fn a_fenced_client_that_reads_at_full_speed_gets_not_one_byte_more() {
    const SIZE: usize = 64 << 10;
    const DEPTH: usize = 4;
    let Some(server) = start(on()) else { return };
    for round in 0..20 {
        let (mut client, binding, open) = server.bound(&vec![b'a'; SIZE]);
        let mut view = map(&server, &mut client, binding, 0, SIZE as u64).unwrap();
        let memory = &client.memory;
        for slot in 0..DEPTH {
            assert!(view.submit(memory, slot as u64, 0, slot * SIZE..(slot + 1) * SIZE));
        }
        let (confirmed, reads) = std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let (mut reads, mut bytes) = (0, vec![0; SIZE]);
                while let Some(LaneRead { token, outcome: Ok(count) }) = view.next() {
                    let start = token as usize * SIZE;
                    memory.region().copy_out(start, &mut bytes).unwrap();
                    assert_eq!(count, SIZE);
                    assert!(bytes.iter().all(|byte| *byte == b'a'), "round {round}: the canary was read");
                    reads += 1;
                    let _ = view.submit(memory, token, 0, start..start + SIZE);
                }
                reads
            });
            std::thread::sleep(Duration::from_micros(300 * round));
            let fence = fence_last(&server);
            let told = || server.rig.control.told().contains(&Told::Fenced(fence));
            eventually("fenced", told);
            // Confirmed: only now may anybody else write.
            open.file.write_all_at(&[b'X'; SIZE], 0).unwrap();
            (told(), reading.join().unwrap())
        });
        assert!(confirmed);
        println!("round {round}: {reads} reads before the fence");
        let _ = binding;
    }
}

#[test]
fn lck_01_rules_take_back_the_mappings_that_they_forbid_and_no_other() {
    let Some(server) = start(on()) else { return };
    let (mut client, binding, open) = server.bound(&[b'a'; 20_000]);
    let mut first = map(&server, &mut client, binding, 0, 8192).unwrap();
    let mut second = map(&server, &mut client, binding, 8192, 8192).unwrap();
    let rules = |deny| vec![IoRule { range: ByteRange::new(8191, 1).unwrap(), deny }];
    let restrict = |version, rules| {
        server.rig.engine.restrict(Restrict { open: open.id, version, rules });
        let told = Told::Restricted(Restricted { open: open.id, version });
        eventually("restricted", || server.rig.control.told().contains(&told));
    };
    restrict(1, rules(Access::WRITE));
    assert_eq!(first.read(&client, 0, 8192).unwrap(), [b'a'; 8192], "who locks for reading lets read");
    restrict(2, rules(Access::READ | Access::WRITE));
    open.file.write_all_at(&[b'X'; 8192], 0).unwrap();
    assert!(first.read(&client, 0, 8192).is_err());
    assert_eq!(second.read(&client, 0, 8192).unwrap(), [b'a'; 8192]);
    assert_eq!(map(&server, &mut client, binding, 8000, 1000).map(|_| ()), Err(Status::LockConflict));
    restrict(3, Vec::new());
    let mut again = map(&server, &mut client, binding, 8000, 100).unwrap();
    assert_eq!(again.read(&client, 0, 100).unwrap(), [b'X'; 100]);
}

#[test]
fn an_unbind_takes_back_its_mappings_alone_and_frees_their_places() {
    let limits = MapConfig { channel_mappings_max: 2, channel_bytes_max: 64 << 10, ..on() };
    let Some(server) = start(MapConfig { mappings_max: 3, bytes_max: 80 << 10, ..limits }) else {
        return;
    };
    let (mut client, binding, open) = server.bound(&[b'a'; 1 << 20]);
    let other = client.bind(&open).unwrap();
    let mut of_other = map(&server, &mut client, other, 0, 4096).unwrap();
    assert_eq!(map(&server, &mut client, binding, 0, 61_441).map(|_| ()), Err(Status::TooMany), "bytes");
    let mut mine = map(&server, &mut client, binding, 0, 61_440).unwrap();
    assert_eq!(map(&server, &mut client, binding, 0, 1).map(|_| ()), Err(Status::TooMany), "mappings");
    let (mut second, its, _) = server.bound(&[b'a'; 1 << 20]);
    assert_eq!(map(&server, &mut second, its, 0, 20_000).map(|_| ()), Err(Status::TooMany), "bytes in all");
    let request = client.send_unbind(binding);
    assert_eq!(client.answer(request).0, Status::Ok);
    open.file.write_all_at(b"X", 0).unwrap();
    assert!(mine.read(&client, 0, 1).is_err());
    assert_eq!(of_other.read(&client, 0, 1).unwrap(), b"X");
    // Its place is free.
    map(&server, &mut second, its, 0, 20_000).unwrap();
    let unmapping = of_other.mapped.mapping.get();
    assert_eq!(client.unmap(other, unmapping), Status::Ok);
    assert_eq!(client.map(binding, 0, 1, of_other.lane.end()), Err(Status::Closed));
}

#[test]
fn a_file_that_shrinks_beside_the_server_harms_nobody() {
    let Some(server) = start(on()) else { return };
    let content = pattern(1 << 20, 3);
    let (mut client, binding, open) = server.bound(&content);
    let mut view = map(&server, &mut client, binding, 0, 1 << 20).unwrap();
    for round in 0..50u64 {
        open.file.set_len(if round % 2 == 0 { 100 } else { 1 << 20 }).unwrap();
        // What was pinned is what is served; the device faults on nothing.
        assert_eq!(view.read(&client, 1 << 19, 4096).unwrap(), content[1 << 19..(1 << 19) + 4096]);
    }
    open.file.set_len(100).unwrap();
    assert_eq!(map(&server, &mut client, binding, 100, 1).map(|_| ()), Err(Status::BadRange));
    let mut rest = map(&server, &mut client, binding, 0, 4096).unwrap();
    assert_eq!(
        (rest.mapped.length.get(), rest.read(&client, 0, 100).unwrap()),
        (100, content[..100].to_vec())
    );
    assert_eq!(client.read(binding, 0, 4096), (Status::Ok, content[..100].to_vec()));
}

#[test]
fn bytes_beside_the_mapping_are_not_served() {
    let Some(server) = start(on()) else { return };
    let (mut client, binding, _open) = server.bound(&[b'a'; 20_000]);
    for at in [u64::MAX, 1000] {
        let mut view = map(&server, &mut client, binding, 4096, 1000).unwrap();
        assert_eq!(view.read(&client, at, 1), Err(OperationError::RemoteAccess));
        assert!(view.read(&client, 0, 1).is_err(), "its lane is at its end");
    }
    assert_eq!(client.read(binding, 0, 1).0, Status::Ok, "the channel goes on");
}

#[test]
fn what_may_not_be_mapped_is_refused() {
    let Some(server) = start(on()) else { return };
    let (mut client, binding, open) = server.bound(&[b'a'; 4096]);
    let lane = lane(&server, &client);
    assert_eq!(client.map(binding, 0, 0, lane.end()), Err(Status::BadRange));
    assert_eq!(client.map(binding, u64::MAX, 2, lane.end()), Err(Status::BadRange));
    assert_eq!(client.map(binding, 4096, 1, lane.end()), Err(Status::BadRange));
    let mut unknown = lane.end();
    unknown[0] ^= 1;
    assert_eq!(client.map(binding, 0, 1, unknown), Err(Status::Invalid));
    let mut elsewhere = lane.end();
    elsewhere[19] ^= 1;
    assert_eq!(client.map(binding, 0, 1, elsewhere), Err(Status::Invalid));
    client.map(binding, 0, 1, lane.end()).unwrap();
    assert_eq!(client.map(binding, 0, 1, lane.end()), Err(Status::Invalid), "a lane has one mapping");
    let write_only = client.bind_as(&open, Access::WRITE, MacPolicy::Header, |_| {}).unwrap();
    assert_eq!(map(&server, &mut client, write_only, 0, 1).map(|_| ()), Err(Status::AccessDenied));
    for policy in [MacPolicy::Payload, MacPolicy::Sealed] {
        let covered = server.rig.control.open(&[b'a'; 4096], Access::ALL, policy);
        let binding = client.bind(&covered).unwrap();
        assert_eq!(
            map(&server, &mut client, binding, 0, 1).map(|_| ()),
            Err(Status::Unsupported),
            "{policy:?}"
        );
    }
    assert_eq!(server.rig.gauge("mappings"), 1);
}

#[test]
fn lanes_that_nobody_claims_go() {
    let Some(server) = start(on()) else { return };
    let client = server.client();
    let lanes = Arc::clone(server.rig.engine.lanes().unwrap());
    let first = lane(&server, &client);
    assert!(lanes.waiting() <= 1);
    drop(first);
    eventually("its client has gone", || lanes.waiting() == 0);
    // For one more than may wait, the oldest goes; more of them, if it takes long to make so many.
    let mut all: Vec<_> = (0..65).map(|_| lane(&server, &client)).collect();
    // On a slow machine more of them may have waited too long already.
    assert!(lanes.waiting() <= 64);
    assert!(lanes.claim(&all[0].end()).is_none());
    assert!(lanes.claim(&all[64].end()).is_some());
    all.truncate(2);
    eventually("the others have waited too long", || lanes.waiting() == 0);
}

/// A file that the mapper can't pin while a test holds its lock.
struct Slow {
    file: KernelFile,
    held: Arc<Mutex<()>>,
}

impl FileIo for Slow {
    fn read_now(&self, data: &mut [u8], at: u64) -> io::Result<Nowait> {
        self.file.read_now(data, at)
    }
    fn write_now(&self, data: &[u8], at: u64) -> io::Result<Nowait> {
        self.file.write_now(data, at)
    }
    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read(data, at)
    }
    fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
        self.file.write(data, at)
    }
    fn sync(&self, data_only: bool) -> io::Result<()> {
        self.file.sync(data_only)
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        if std::thread::current().name() == Some("mapper") {
            drop(self.held.lock());
        }
        self.file.descriptor()
    }
}

/// A server of such files.
fn slow() -> Option<(Server, Arc<Mutex<()>>)> {
    let held = Arc::new(Mutex::new(()));
    let ours = Arc::clone(&held);
    let opener: Opener = Arc::new(move |fd: OwnedFd, _| -> Arc<dyn FileIo> {
        Arc::new(Slow { file: KernelFile::new(fd), held: Arc::clone(&ours) })
    });
    Some((Server::start(|settings| settings.map = on(), opener)?, held))
}

#[test]
fn a_lane_whose_map_waits_for_its_turn_does_not_grow_too_old() {
    let Some((server, held)) = slow() else { return };
    let (mut client, binding, _open) = server.bound(&[b'a'; 8192]);
    let holding = held.lock().unwrap();
    let (first, second) = (lane(&server, &client), lane(&server, &client));
    let asked = [first.end(), second.end()].map(|end| client.send_map(binding, 0, 4096, end));
    // Claimed; or dropped, as nobody claimed it in time.
    eventually("no lane waits", || server.rig.engine.lanes().unwrap().waiting() == 0);
    drop(holding);
    for request in asked {
        client.mapped(request).unwrap();
    }
}

/// Pinned before or after the bytes were taken away, who knows: it is granted to nobody, also if the change has ended by then.
#[test]
fn a_map_under_way_while_bytes_are_taken_away_is_not_granted() {
    let Some((server, held)) = slow() else { return };
    let (mut client, binding, open) = server.bound(&[b'a'; 20_000]);
    let file = FileId::of(open.file.as_fd()).unwrap();
    for id in 1..=3 {
        let holding = held.lock().unwrap();
        let lane = lane(&server, &client);
        let request = client.send_map(binding, 0, 8192, lane.end());
        eventually("it is with the mapper", || server.rig.gauge("mappings") == 1);
        server.rig.engine.withdraw(Withdraw { id, device: file.0, inode: file.1 });
        // What is not granted need not be waited for.
        let told = Told::Withdrawn(id);
        eventually("withdrawn", || server.rig.control.told().contains(&told));
        if id > 1 {
            open.file.set_len(20_000 - id).unwrap();
            server.rig.engine.mappable(id);
        }
        drop(holding);
        assert_eq!(client.mapped(request).map(drop), Err(Status::Unavailable), "change {id}");
        eventually("nothing of it is left", || server.rig.gauge("mappings") == 0);
        server.rig.engine.mappable(id);
    }
    let mut view = map(&server, &mut client, binding, 16_384, 8192).unwrap();
    assert_eq!(view.mapped.length.get(), 20_000 - 3 - 16_384);
    assert_eq!(view.read(&client, 0, 10).unwrap(), [b'a'; 10]);
}

#[test]
fn it_is_off_by_default() {
    let Some(server) = start(MapConfig::default()) else { return };
    let (mut client, binding, _open) = server.bound(b"content");
    assert_eq!(client.hello.unwrap().mappings_max.get(), 0);
    assert!(client.channel.registrar().lane(server.address, WAIT, 16).is_err());
    assert_eq!(client.map(binding, 0, 1, [0; 20]), Err(Status::Unsupported));
    assert_eq!(client.read(binding, 0, 7), (Status::Ok, b"content".to_vec()));
}

#[test]
fn other_transports_have_none() {
    let rig = Rig::with(|settings| settings.map = on());
    let (mut client, binding, _open) = rig.bound(b"content");
    assert_eq!(client.hello.unwrap().mappings_max.get(), 0);
    assert_eq!(client.map(binding, 0, 1, [0; 20]), Err(Status::Unsupported));
    assert_eq!(client.unmap(binding, 1), Status::Unsupported);
    assert_eq!(client.read(binding, 0, 7), (Status::Ok, b"content".to_vec()));
}

#[test]
fn a_file_that_is_to_be_cut_short_is_served_to_nobody_first_and_mapped_by_nobody_meanwhile() {
    let Some(server) = start(on()) else { return };
    let (mut client, binding, open) = server.bound(&[b'a'; 20_000]);
    let mut view = map(&server, &mut client, binding, 0, 8192).unwrap();
    let (mut beside, of_other, _other) = server.bound(&[b'b'; 20_000]);
    let mut other = map(&server, &mut beside, of_other, 0, 8192).unwrap();
    let file = FileId::of(open.file.as_fd()).unwrap();
    let withdraw = |id| Withdraw { id, device: file.0, inode: file.1 };
    let told = |id| server.rig.control.told().contains(&Told::Withdrawn(id));
    server.rig.engine.withdraw(withdraw(7));
    eventually("withdrawn", || told(7));
    assert!(view.read(&client, 0, 10).is_err(), "confirmed, and yet it is served");
    assert_eq!(other.read(&beside, 0, 10).unwrap(), [b'b'; 10], "another file is none of it");
    // The channel, the binding and the server-driven way go on.
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"aaa".to_vec()));
    assert_eq!(map(&server, &mut client, binding, 0, 8192).map(drop), Err(Status::Unavailable));
    // Two changes at once: the file is barred until both have ended.
    server.rig.engine.withdraw(withdraw(8));
    eventually("withdrawn, of nothing", || told(8));
    open.file.set_len(100).unwrap();
    server.rig.engine.mappable(7);
    assert_eq!(map(&server, &mut client, binding, 0, 8192).map(drop), Err(Status::Unavailable));
    server.rig.engine.mappable(8);
    let mut view = map(&server, &mut client, binding, 0, 8192).unwrap();
    assert_eq!((view.mapped.length.get(), view.read(&client, 0, 100).unwrap()), (100, vec![b'a'; 100]));
    // What an earlier control had asked for is forgotten when another has said what it wants.
    server.rig.engine.withdraw(withdraw(9));
    eventually("withdrawn", || told(9));
    server.rig.engine.withdraw(withdraw(10));
    let mut snapshot = server.rig.engine.snapshot();
    eventually("gathered", || snapshot.gather(Duration::from_millis(10)));
    assert!(map(&server, &mut client, binding, 0, 8192).is_err(), "it has not said yet what it wants");
    server.rig.engine.withdraw(withdraw(11));
    server.rig.engine.mappable(MAPPABLE_AS_SAID);
    assert!(map(&server, &mut client, binding, 0, 8192).is_err(), "that was asked again");
    server.rig.engine.mappable(11);
    assert!(map(&server, &mut client, binding, 0, 8192).is_ok());
}
