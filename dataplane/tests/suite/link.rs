//! Control goes and comes back: I/O does not stop, and the next control is told what there is.

use crate::common::link::{
    CONFIG, Control, Process, an_open, answer_registration, bind, connect, gauge, lock_is_free, receive,
    receive_with_fd, send, take_registration,
};
use crate::common::{Client, Msg, Open, eventually, pattern};
use holdfast_shared::types::{Access, ByteRange, IoRule, OpenId, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::{
    Fence, Held, LinkBinding, Registered, Restrict, Restricted, ToControl, ToDataplane,
};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

struct Running {
    directory: tempfile::TempDir,
    control: Control,
    process: Process,
    ready: String,
}

/// A process that is registered with a scripted control.
fn running(limits: &str) -> (Running, OwnedFd) {
    running_as(&format!("{CONFIG}{limits}"))
}

fn running_as(config: &str) -> (Running, OwnedFd) {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::listen(&directory.path().join("link.sock"));
    let mut process = Process::start(directory.path(), config);
    let (link, _) = control.register();
    let ready = process.line();
    (Running { directory, control, process, ready }, link)
}

fn names(held: &[(Held, File)]) -> Vec<u64> {
    let mut names: Vec<u64> = held.iter().map(|(held, _)| held.binding.0).collect();
    names.sort_unstable();
    names
}

/// True if both are the same open file description: they share a position.
fn same_description(mut ours: &File, mut theirs: &File) -> bool {
    let place = 1_234_567;
    ours.seek(SeekFrom::Start(place)).unwrap();
    let same = theirs.stream_position().unwrap() == place;
    ours.seek(SeekFrom::Start(0)).unwrap();
    same
}

fn fence(binding: u64, reason: Status) -> Fence {
    Fence { binding: LinkBinding(binding), epoch: 1, reason }
}

/// A test that fails ends its threads.
struct StopAfter<'a>(&'a AtomicBool);

impl Drop for StopAfter<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn io_goes_on_while_control_is_away_and_the_next_one_is_told_of_the_bindings() {
    let (running, link) = running("");
    let content = pattern(1 << 20, 1);
    let open = an_open(&content);
    let mut clients: Vec<(Client, u32)> = (0..3u64)
        .map(|n| {
            let mut client = connect(&running.ready);
            let binding = bind(&mut client, &link, &open, (7 << 32) + n);
            (client, binding)
        })
        .collect();
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let stop_after = StopAfter(&stop);
    let (first, rest) = clients.split_first_mut().unwrap();
    std::thread::scope(|scope| {
        let _stop = stop_after;
        for (client, binding) in rest {
            let (stop, requests, content) = (&stop, &requests, &content);
            scope.spawn(move || {
                let mut n = 0;
                while !stop.load(Ordering::SeqCst) {
                    n = (n + 1) % 100;
                    let at = n * 10_000;
                    let (status, data) = client.read(*binding, at, 10_000);
                    assert_eq!(status, Status::Ok);
                    assert!(data == content[at as usize..at as usize + 10_000], "read something else");
                    let same = &content[at as usize..at as usize + 5000];
                    assert_eq!(client.write(*binding, at, same), (Status::Ok, 5000));
                    assert_eq!(client.write_inline(*binding, at, &same[..100]), (Status::Ok, 100));
                    requests.fetch_add(3, Ordering::SeqCst);
                }
            });
        }
        let busy = |what: &str| {
            let before = requests.load(Ordering::SeqCst);
            eventually(what, || requests.load(Ordering::SeqCst) > before + 50);
        };
        busy("I/O before");
        // The socket's other end is gone, and control takes its time.
        let mut link = Some(link);
        for round in 0..4 {
            drop(link.take());
            let next = running.control.accept();
            let (_, held) = take_registration(&next);
            busy("I/O while control is silent");
            assert_eq!(names(&held), [7 << 32, (7 << 32) + 1, (7 << 32) + 2]);
            for (held, file) in &held {
                assert!(same_description(&open.file, file), "not the descriptor that was granted");
                assert_eq!(
                    (held.open, held.epoch, held.access, held.ending),
                    (open.id, 1, Access::ALL, false)
                );
                assert_ne!(held.transcript, [0; 32]);
            }
            let written: Vec<bool> = held.iter().map(|(held, _)| held.last_write_ns > 0).collect();
            assert_eq!(written.iter().filter(|written| **written).count(), 2, "the first only bound");
            if round % 2 == 0 {
                // This one dies in the middle, or refuses; the next is told the same.
                let status = Status::TooMany;
                send(&next, &ToDataplane::Registered(Registered { status }), None);
                drop(next);
                let (again, _, held) = running.control.register_held();
                assert_eq!(held.len(), 3);
                link = Some(again);
            } else {
                answer_registration(&next);
                link = Some(next);
            }
            busy("I/O after");
        }
        let link = link.unwrap();
        // It can fence what it did not grant.
        let one = fence(7 << 32, Status::Closed);
        send(&link, &ToDataplane::Fence(one), None);
        assert_eq!(receive(&link), ToControl::Fenced(one));
        assert_eq!(first.0.next(), Some(Msg::Notice { binding: first.1, status: Status::Closed }));
        assert_eq!(first.0.read(first.1, 0, 10).0, Status::Fenced);
        busy("I/O of the others");
        assert_eq!(gauge(&link, "bindings"), 2);
        assert_eq!(gauge(&link, "held_back_total"), 12);
    });
}

#[test]
fn what_is_ending_is_told_so_and_confirmed_and_what_ended_is_not_told() {
    // Through buffers: a read that waits for its client without one is no Place under way.
    let config = CONFIG.replace("[engine]", "[engine]\nviewed_bytes_max = 0");
    let (running, link) = running_as(&format!("{config}stuck_ms = 60000\nfence_ms = 60000\n"));
    let (open, other) = (an_open(&pattern(4 << 20, 1)), an_open(b"abc"));
    let mut slow = connect(&running.ready);
    let binding = bind(&mut slow, &link, &open, 1);
    let mut leaving = connect(&running.ready);
    bind(&mut leaving, &link, &other, 2);
    let mut staying = connect(&running.ready);
    let kept = bind(&mut staying, &link, &other, 3);
    // Reads whose bytes the client does not take: their Places are under way until the server gives up.
    for _ in 0..32 {
        slow.send_io(Opcode::Read, binding, 0, 4 << 20, slow.descriptor());
    }
    eventually("the reads are taken", || gauge(&link, "requests_read_total") == 32);
    // What the sockets between hold is soon full.
    eventually("nothing moves", || {
        let before = gauge(&link, "bytes_read_total");
        std::thread::sleep(Duration::from_millis(500));
        gauge(&link, "bytes_read_total") == before
    });
    assert!(gauge(&link, "requests_in_flight") > 0);
    let slow_fence = fence(1, Status::SessionGone);
    send(&link, &ToDataplane::Fence(slow_fence), None);
    // One after the other: the answer says that the fence was read too.
    assert_eq!(gauge(&link, "bindings"), 3);
    // Nobody listens: what ends now is told to nobody.
    let Running { directory, control, ready: _, process: _process } = running;
    let path = directory.path().join("link.sock");
    drop((link, control));
    drop(leaving);
    std::thread::sleep(Duration::from_millis(1000));
    let control = Control::listen(&path);
    let (link, _, held) = control.register_held();
    assert_eq!(names(&held), [1, 3]);
    let ending: Vec<u64> =
        held.iter().filter(|(held, _)| held.ending).map(|(held, _)| held.binding.0).collect();
    assert_eq!(ending, [1]);
    drop(slow);
    assert_eq!(receive(&link), ToControl::Fenced(slow_fence), "its end is told to who is there now");
    assert_eq!(staying.read(kept, 0, 3).0, Status::Ok);
    assert!(!lock_is_free(directory.path()), "it holds its lock all the time");
}

#[test]
fn sixty_four_bindings_are_told_and_what_ends_meanwhile_is_told_after() {
    let (running, link) = running("");
    let open = an_open(b"abc");
    let mut client = connect(&running.ready);
    let bindings: Vec<u32> = (0..64).map(|n| bind(&mut client, &link, &open, 100 + n)).collect();
    drop(link);
    let link = running.control.accept();
    let (_, held) = take_registration(&link);
    assert_eq!(names(&held), (100..164).collect::<Vec<_>>());
    assert!(held.iter().all(|(_, file)| same_description(&open.file, file)));
    // Between the snapshot and the answer.
    let unbind = client.send_unbind(bindings[10]);
    assert_eq!(client.answer(unbind).0, Status::Ok);
    assert_eq!(client.bind(&open), Err(Status::Unavailable), "nothing is bound before it is answered");
    answer_registration(&link);
    assert_eq!(receive(&link), ToControl::Released(LinkBinding(110)));
    for (n, binding) in bindings.iter().enumerate() {
        let wanted = if n == 10 { Status::Closed } else { Status::Ok };
        assert_eq!(client.read(*binding, 0, 3).0, wanted);
    }
    drop(client);
    let mut released: Vec<ToControl> = (0..63).map(|_| receive(&link)).collect();
    released.dedup();
    assert_eq!(released.len(), 63, "each once");
    // The descriptors are the new control's alone.
    drop(held);
    assert_eq!(gauge(&link, "bindings"), 0);
}

fn restrict(link: &OwnedFd, open: &Open, version: u64, rules: Vec<IoRule>) -> Restricted {
    send(link, &ToDataplane::Restrict(Restrict { open: open.id, version, rules }), None);
    Restricted { open: open.id, version }
}

fn all(offset: u64, length: u64) -> IoRule {
    IoRule { range: ByteRange::new(offset, length).unwrap(), deny: Access::READ | Access::WRITE }
}

#[test]
fn rules_travel_on_the_link_and_outlive_it() {
    let (running, link) = running("");
    let open = an_open(&pattern(100, 1));
    let mut client = connect(&running.ready);
    let binding = bind(&mut client, &link, &open, 1);
    let told = restrict(&link, &open, 5, vec![all(0, 10), all(20, 10)]);
    assert_eq!(receive(&link), ToControl::Restricted(told));
    assert_eq!(client.read(binding, 25, 10).0, Status::LockConflict);
    let mut unknown = an_open(b"");
    unknown.id = OpenId([9; 16]);
    let told = restrict(&link, &unknown, 1, vec![all(0, 10)]);
    assert_eq!(receive(&link), ToControl::Restricted(told), "it has no bindings");
    drop(link);
    let (link, _, held) = running.control.register_held();
    assert_eq!(held[0].0.rules_version, 5);
    assert_eq!(client.read(binding, 25, 10).0, Status::LockConflict);
    assert_eq!(client.read(binding, 10, 10).0, Status::Ok);
    // Another control's versions are its own.
    let told = restrict(&link, &open, 2, vec![]);
    assert_eq!(receive(&link), ToControl::Restricted(told));
    assert_eq!(client.read(binding, 25, 10).0, Status::Ok);
    // Rules that could be misjudged end the link.
    restrict(&link, &open, 3, vec![all(20, 10), all(0, 10)]);
    let (link, _, held) = running.control.register_held();
    assert_eq!(held[0].0.rules_version, 2);
    assert_eq!(gauge(&link, "bindings"), 1);
}

#[test]
fn the_last_write_outlives_the_process() {
    let (mut running, link) = running("");
    let open = an_open(b"abc");
    let mut client = connect(&running.ready);
    let binding = bind(&mut client, &link, &open, 1);
    let path = running.directory.path().join("last-write");
    let last = || u64::from_le_bytes(std::fs::read(&path).unwrap().try_into().unwrap());
    assert_eq!(client.read(binding, 0, 3).0, Status::Ok);
    assert_eq!(last(), 0);
    for n in 0..20 {
        let before = last();
        assert_eq!(client.write_inline(binding, n, b"x").0, Status::Ok);
        // Who was told of its write can rely on it.
        assert!(last() > before && last() >= open.changed_ns());
    }
    let before = last();
    assert_eq!(client.read(binding, 0, 3).0, Status::Ok);
    drop(link);
    let (_link, _, held) = running.control.register_held();
    assert_eq!(held[0].0.last_write_ns, before);
    running.process.child.kill().unwrap();
    running.process.child.wait().unwrap();
    assert_eq!(last(), before);
    assert!(lock_is_free(running.directory.path()));
}

#[test]
fn a_control_that_says_nothing_is_not_waited_for_when_the_process_stops() {
    let (mut running, link) = running("");
    let open = an_open(b"abc");
    let mut client = connect(&running.ready);
    bind(&mut client, &link, &open, 1);
    drop(link);
    let link = running.control.accept();
    assert!(matches!(receive(&link), ToControl::Register(register) if register.held == 1));
    let (ToControl::Held(_), Some(fd)) = receive_with_fd(&link) else { panic!("no binding") };
    let mut three = [0; 3];
    File::from(fd).read_exact_at(&mut three, 0).unwrap();
    assert_eq!(&three, b"abc");
    let begun = Instant::now();
    running.process.terminate();
    assert!(running.process.child.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(20));
}
