//! When writes returned: known before anybody is told of them, however many were made in one turn.

use crate::common::{Client, Rig, anyone, eventually};
use crate::within::as_within;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_transport::memory::{Faults, pair};
use holdfast_transport::{Capabilities, Channel, Completion, Kind, Operation, Rejected};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// An engine that keeps the time of its last write, and where.
fn kept() -> (Rig, tempfile::TempDir, PathBuf) {
    let rig = Rig::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("last-write");
    rig.engine.last_write().keep_in(&path).unwrap();
    (rig, directory, path)
}

fn last(path: &Path) -> u64 {
    u64::from_le_bytes(std::fs::read(path).unwrap().try_into().unwrap())
}

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

/// An open of a file in memory: written at once, by the worker.
fn in_memory(rig: &Rig) -> crate::common::Open {
    let memory = rustix::fs::memfd_create("written", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rig.control.open_file(memory.into(), Access::ALL, MacPolicy::Header)
}

/// A channel that lets come what has come in batches of so many, takes few operations, and sees to it that nothing is said while
/// the time of a write is not known.
struct Batches {
    within: Box<dyn Channel>,
    of: Arc<AtomicUsize>,
    depth: usize,
    last_write: PathBuf,
    kept: Vec<Completion>,
}

impl Channel for Batches {
    as_within!(@most within);
    fn capabilities(&self) -> Capabilities {
        let within = self.within.capabilities();
        Capabilities { depth: within.depth.min(self.depth), ..within }
    }
    fn submit(&mut self, token: u64, operation: Operation) -> Result<(), Rejected> {
        if operation.kind() == Kind::Send {
            assert!(last(&self.last_write) <= now(), "said before the time of a write is known");
        }
        self.within.submit(token, operation)
    }
    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        self.within.poll(&mut self.kept);
        if self.kept.len() >= self.of.load(SeqCst) {
            done.append(&mut self.kept);
        }
        // The worker is to look again.
        done.len() + usize::from(!self.kept.is_empty())
    }
}

/// A client whose channel does so.
fn batched(rig: &Rig, path: &Path, depth: usize) -> (Client, Arc<AtomicUsize>, Faults) {
    let (parts, of) = (Client::parts(), Arc::new(AtomicUsize::new(0)));
    let (ours, theirs) = pair(parts.setup(), rig.engine.setup(anyone()).unwrap()).unwrap();
    let faults = ours.faults();
    rig.engine.adopt(Box::new(Batches {
        within: Box::new(theirs),
        of: Arc::clone(&of),
        depth,
        last_write: path.into(),
        kept: Vec::new(),
    }));
    let mut client = Client::new(Box::new(ours), parts);
    client.hello();
    (client, of, faults)
}

#[test]
fn who_was_told_of_a_write_can_rely_on_its_time() {
    let (rig, _directory, path) = kept();
    let (mut client, of, _faults) = batched(&rig, &path, usize::MAX);
    let opens = [in_memory(&rig), in_memory(&rig)];
    let bindings = opens.each_ref().map(|open| client.bind(open).unwrap());
    client.region().copy_in(0, b"fetched").unwrap();
    for round in 0..50u64 {
        let send = |client: &mut Client, n: u64| {
            let binding = bindings[n as usize % 2];
            match n % 5 {
                4 => client.send_io(Opcode::Write, binding, n * 7, 7, client.descriptor()),
                _ => client.send_inline(binding, n * 7, 7, b"inlined"),
            }
        };
        // All of them come at once.
        of.store(48, SeqCst);
        let asked: Vec<u32> = (0..48).map(|n| send(&mut client, n)).collect();
        of.store(0, SeqCst);
        for request in asked {
            assert_eq!(client.answer(request), (Status::Ok, 7), "round {round}");
        }
        // Nothing is under way: nothing is ahead.
        let kept = last(&path);
        assert!(kept <= now(), "{} ns ahead", kept - now());
        let mut snapshot = rig.engine.snapshot();
        assert!(snapshot.gather(Duration::from_secs(5)));
        let held = snapshot.into_bindings();
        for (open, held) in opens.iter().flat_map(|open| {
            held.iter().filter(|other| other.held.open == open.id).map(move |held| (open, held))
        }) {
            let changed = open.changed_ns();
            assert!(held.held.last_write_ns >= changed && kept >= changed, "round {round}");
            assert!(held.held.last_write_ns <= kept);
        }
        assert_eq!(held.len(), 2);
    }
    for (which, open) in opens.iter().enumerate() {
        let content = open.content();
        for n in (0..48).filter(|n| n % 2 == which) {
            let expected: &[u8] = if n % 5 == 4 { b"fetched" } else { b"inlined" };
            assert_eq!(&content[n * 7..n * 7 + 7], expected, "write {n}");
        }
    }
}

#[test]
fn a_binding_that_goes_with_its_last_write_has_the_time_of_it() {
    let (rig, _directory, path) = kept();
    let (mut client, of, faults) = batched(&rig, &path, usize::MAX);
    for round in 0..20 {
        let open = in_memory(&rig);
        let binding = client.bind(&open).unwrap();
        faults.hold(Kind::Fetch);
        let write = client.send_io(Opcode::Write, binding, 0, 100, client.descriptor());
        eventually("the fetch has begun", || faults.held() == 1);
        // The bytes and the request to unbind come together.
        of.store(2, SeqCst);
        faults.release(Kind::Fetch);
        let unbind = client.send_unbind(binding);
        of.store(0, SeqCst);
        let written = client.answer(write);
        assert_eq!(client.answer(unbind).0, Status::Ok);
        assert!(written == (Status::Ok, 100) || written == (Status::Closed, 100), "{written:?}");
        let wrote = rig.engine.wrote();
        let told = wrote.iter().find(|wrote| wrote.open == open.id).expect("told of it");
        assert!(told.last_write_ns >= open.changed_ns(), "round {round}");
        assert!(told.last_write_ns <= now() && last(&path) <= now(), "round {round}");
    }
}

#[test]
fn writes_for_whose_answers_there_is_no_room_are_answered_when_there_is() {
    let (rig, _directory, path) = kept();
    let (mut client, _of, faults) = batched(&rig, &path, 16);
    let open = in_memory(&rig);
    let binding = client.bind(&open).unwrap();
    assert_eq!(client.write_inline(binding, 0, &[1; 4096]), (Status::Ok, 4096));
    // What is placed holds up all answers behind it.
    faults.hold(Kind::Place);
    let read = client.send_io(Opcode::Read, binding, 0, 4096, client.descriptor());
    let writes: Vec<u32> = (1..64).map(|n| client.send_inline(binding, n * 8, 3, b"abc")).collect();
    // Some are written whose answers find no room; the others wait.
    eventually("one is written", || &open.content()[8..11] == b"abc");
    std::thread::sleep(Duration::from_millis(20));
    faults.release(Kind::Place);
    assert_eq!(client.answer(read), (Status::Ok, 4096));
    let mut before = 0;
    for write in writes {
        let (status, count, _, sequence) = client.full_answer(write);
        assert_eq!((status, count), (Status::Ok, 3));
        assert!(sequence > before, "not in their order");
        before = sequence;
    }
    assert!(last(&path) >= open.changed_ns() && last(&path) <= now());
}
