//! Fences: nothing lands afterwards, and control is told only then.

use crate::common::{Gate, Msg, Rig, Told, eventually, gated, pattern};
use holdfast_shared::types::Status;
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::Fence;
use holdfast_transport::Kind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn fence(rig: &Rig, epoch: u64) -> Fence {
    let fence = Fence { binding: rig.control.last(), epoch, reason: Status::Fenced };
    rig.engine.fence(fence);
    fence
}

#[test]
fn a_fence_drains_and_then_nothing_lands() {
    let rig = Rig::new();
    let (mut client, faults) = rig.client_and_faults();
    let content = pattern(1 << 20, 1);
    let open = rig.open(&content);
    let binding = client.bind(&open).unwrap();
    faults.hold(Kind::Fetch);
    let writes: Vec<u32> =
        (0..8).map(|n| client.send_io(Opcode::Write, binding, n * 1000, 1000, client.descriptor())).collect();
    eventually("fetches are under way", || {
        client.pump();
        faults.held() >= 8
    });
    let fence = fence(&rig, 5);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.control.told(), [], "control is not told while operations are under way");
    // What comes after the fence is answered at once.
    let late = client.send_inline(binding, 0, 3, b"XYZ");
    assert_eq!(client.answer(late), (Status::Fenced, 0));
    faults.release(Kind::Fetch);
    for write in writes {
        assert_eq!(client.answer(write), (Status::Fenced, 0));
    }
    eventually("fenced", || rig.control.told() == [Told::Fenced(fence)]);
    assert_eq!(open.content(), content, "a fetch that came after the fence was applied");
    let Some(Msg::Notice { binding: about, status }) = client.next() else { panic!("no notice") };
    assert_eq!((about, status), (binding, Status::Fenced));
    let late = client.send_inline(binding, 0, 3, b"XYZ");
    assert_eq!(client.answer(late), (Status::Fenced, 0));
    assert_eq!(open.content(), content);
    // The channel is as good as new.
    let again = client.bind(&open).unwrap();
    assert_eq!(client.write_inline(again, 0, b"XYZ"), (Status::Ok, 3));
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
}

#[test]
fn a_fence_of_another_epoch_is_ignored() {
    let rig = Rig::new();
    let (mut client, binding, _open) = rig.bound(b"abc");
    fence(&rig, 4);
    fence(&rig, 6);
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()));
    assert_eq!(rig.control.told(), []);
    let right = fence(&rig, 5);
    eventually("fenced", || rig.control.told() == [Told::Fenced(right)]);
    // Once more: nothing of it is under way, so it is confirmed at once.
    fence(&rig, 5);
    eventually("fenced again", || rig.control.told().len() == 2);
}

#[test]
fn a_peer_that_holds_up_a_fence_is_cut_off() {
    let rig = Rig::with(|s| s.limits.fence_ms = 200);
    let (mut client, faults) = rig.client_and_faults();
    let open = rig.open(b"content");
    let binding = client.bind(&open).unwrap();
    faults.hold(Kind::Place);
    client.send_io(Opcode::Read, binding, 0, 7, client.descriptor());
    eventually("the place is under way", || {
        client.pump();
        faults.held() >= 1
    });
    let begun = Instant::now();
    let fence = fence(&rig, 5);
    eventually("fenced", || rig.control.told() == [Told::Fenced(fence)]);
    assert!(begun.elapsed() >= Duration::from_millis(200));
    faults.release(Kind::Place);
    while client.next().is_some() {}
    assert!(client.channel.ended().is_some(), "the device is cut off");
    let mut data = [0; 7];
    client.region().copy_out(0, &mut data).unwrap();
    assert_eq!(data, [0; 7], "bytes landed after the fence");
}

#[test]
fn a_fence_of_one_binding_leaves_the_others() {
    let rig = Rig::new();
    let (mut client, first, open) = rig.bound(b"abc");
    let fence_of = rig.control.last();
    let second = client.bind(&open).unwrap();
    rig.engine.fence(Fence { binding: fence_of, epoch: 5, reason: Status::Closed });
    let Some(Msg::Notice { binding, status }) = client.next() else { panic!("no notice") };
    assert_eq!((binding, status), (first, Status::Closed), "the reason is control's");
    assert_eq!(client.read(second, 0, 3).0, Status::Ok);
    assert_eq!(client.read(first, 0, 3).0, Status::Fenced);
}

#[test]
fn storage_threads_do_what_the_page_cache_cannot() {
    let (rig, _gate) = gated();
    let content = pattern(1 << 20, 2);
    let (mut client, binding, open) = rig.bound(&content);
    assert_eq!(client.read(binding, 0, 1 << 20), (Status::Ok, content.clone()));
    assert_eq!(client.read(binding, (1 << 20) - 10, 4096), (Status::Ok, content[(1 << 20) - 10..].to_vec()));
    let new = pattern(1 << 20, 3);
    assert_eq!(client.write(binding, 0, &new), (Status::Ok, 1 << 20));
    assert_eq!(client.write_inline(binding, 1 << 20, b"tail"), (Status::Ok, 4));
    assert_eq!(open.content(), [&new[..], b"tail"].concat());
    assert!(rig.gauge("storage_handovers_total") > 8);
}

#[test]
fn a_flush_is_answered_when_the_storage_has_it() {
    let (rig, gate) = gated();
    let (mut client, binding, _open) = rig.bound(b"");
    assert_eq!(client.write_inline(binding, 0, b"abc"), (Status::Ok, 3));
    gate.set(true);
    let request = client.send_flush(binding);
    eventually("the flush is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    client.pump();
    assert_eq!(client.stash.len(), 0);
    assert!(!gate.synced.load(Ordering::SeqCst));
    gate.set(false);
    assert_eq!(client.answer(request), (Status::Ok, 0));
    assert!(gate.synced.load(Ordering::SeqCst));
    gate.fail.store(5, Ordering::SeqCst);
    assert_eq!(client.flush(binding), Status::Io);
}

#[test]
fn after_a_failed_flush_no_flush_of_the_open_succeeds() {
    let (rig, gate) = gated();
    let (mut client, binding, open) = rig.bound(b"");
    let other = client.bind(&open).unwrap();
    let (mut elsewhere, unharmed, _) = rig.bound(b"");
    gate.fail.store(5, Ordering::SeqCst);
    assert_eq!(client.flush(binding), Status::Io);
    // The kernel tells of a failed write-back once.
    gate.fail.store(0, Ordering::SeqCst);
    assert_eq!(client.flush(binding), Status::Io);
    assert_eq!(client.flush(other), Status::Io, "another binding of the open");
    assert_eq!(elsewhere.bind(&open).map(|late| elsewhere.flush(late)), Ok(Status::Io), "a later one");
    assert_eq!(elsewhere.flush(unharmed), Status::Ok, "another open");
}

#[test]
fn a_job_that_found_the_queue_full_is_not_forgotten() {
    let gate = Arc::new(Gate::default());
    let change = |s: &mut holdfast_dataplane::engine::Settings| {
        s.engine.workers = 2;
        s.engine.storage_threads = 1;
        s.engine.storage_queue = 1;
    };
    let rig = Rig::with_files(change, gate.opener());
    // Channels go to the workers in turn.
    let ((mut first, a, _), (mut second, b, _)) = (rig.bound(b""), rig.bound(b""));
    gate.set(true);
    let flushes = [first.send_flush(a), first.send_flush(a)];
    rig.wait_gauge("storage_queue", 2);
    let late = second.send_flush(b);
    rig.wait_gauge("storage_queue", 3);
    gate.set(false);
    assert_eq!(second.answer(late).0, Status::Ok, "nothing else wakes its worker");
    for flush in flushes {
        assert_eq!(first.answer(flush).0, Status::Ok);
    }
}

#[test]
fn failures_of_storage_are_told_with_what_was_done() {
    let (rig, gate) = gated();
    let content = pattern(100_000, 4);
    let (mut client, binding, open) = rig.bound(&content);
    for (errno, status) in
        [(28, Status::NoSpace), (27, Status::FileTooBig), (5, Status::Io), (30, Status::ReadOnly)]
    {
        gate.fail.store(errno, Ordering::SeqCst);
        assert_eq!(client.write(binding, 0, &[1; 50_000]), (status, 0));
        assert_eq!(client.write_inline(binding, 0, &[1; 50]), (status, 0));
    }
    gate.fail.store(5, Ordering::SeqCst);
    assert_eq!(client.read(binding, 0, 1000), (Status::Io, vec![]));
    assert_eq!(open.content(), content);
    gate.fail.store(0, Ordering::SeqCst);
    assert_eq!(client.read(binding, 0, 1000).0, Status::Ok);
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
}

#[test]
fn a_fence_waits_for_storage() {
    let (rig, gate) = gated();
    let (mut client, binding, open) = rig.bound(b"old content");
    gate.set(true);
    let write = client.send_inline(binding, 0, 3, b"new");
    eventually("the write is with storage", || gate.waiting.load(Ordering::SeqCst) == 1);
    let fence = fence(&rig, 5);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.control.told(), []);
    gate.set(false);
    eventually("fenced", || rig.control.told() == [Told::Fenced(fence)]);
    let (status, count) = client.answer(write);
    assert!(matches!((status, count), (Status::Ok | Status::Fenced, 3)), "{status:?} {count}");
    assert_eq!(open.content(), b"new content");
}

#[test]
fn a_client_that_goes_while_storage_works_leaves_nothing() {
    let (rig, gate) = gated();
    let (mut client, binding, _open) = rig.bound(&pattern(500_000, 5));
    gate.set(true);
    client.send_io(Opcode::Read, binding, 0, 300_000, client.descriptor());
    client.send_inline(binding, 0, 3, b"new");
    client.send_flush(binding);
    eventually("all is with storage", || gate.waiting.load(Ordering::SeqCst) == 2);
    drop(client);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.control.told(), [], "its descriptor is in use");
    gate.set(false);
    rig.wait_gauge("channels", 0);
    rig.wait_gauge("storage_queue", 0);
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
    rig.wait_gauge("message_buffers_free", rig.gauge("message_buffers_total"));
    eventually("released", || rig.control.all_released());
}

#[test]
fn the_pool_is_shared_fairly_and_never_deadlocks() {
    // One buffer for everybody, then three, with storage in between.
    for buffers in [1, 3] {
        let gate = Arc::new(Gate::default());
        let change = |s: &mut holdfast_dataplane::engine::Settings| {
            s.engine.buffer_bytes = 16 << 10;
            s.engine.pool_bytes = buffers * (16 << 10);
        };
        let rig = Rig::with_files(change, gate.opener());
        assert_eq!(rig.gauge("buffers_total"), buffers as u64);
        let content = pattern(1 << 20, 6);
        let mut clients: Vec<_> = (0..4).map(|_| rig.bound(&content)).collect();
        // The first asks for much, the others for little, and get it before the first is done.
        let (hog, binding, _) = &mut clients[0];
        let mut much: Vec<u32> =
            (0..32).map(|_| hog.send_io(Opcode::Read, *binding, 0, 1 << 20, hog.descriptor())).collect();
        much.extend(
            (0..16).map(|n| hog.send_io(Opcode::Write, *binding, n << 16, 1 << 16, hog.descriptor())),
        );
        for (client, binding, _) in &mut clients[1..] {
            for n in 0..4u64 {
                let at = n * 100_000;
                assert_eq!(client.read(*binding, at, 20_000).1, content[at as usize..at as usize + 20_000]);
                assert_eq!(client.write(*binding, at, &[7; 20_000]), (Status::Ok, 20_000));
            }
        }
        let done_early = clients[0].0.stash.len();
        let (hog, ..) = &mut clients[0];
        assert!(done_early < much.len(), "the others waited for the one that asked first");
        for request in much {
            assert_eq!(hog.answer(request).0, Status::Ok);
        }
        rig.wait_gauge("buffers_free", buffers as u64);
    }
}
